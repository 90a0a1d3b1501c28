"""The compiled step does not grow with depth: layers are a loop. `benchmarks/` has the seconds."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

from jora.data.batches import Shape
from jora.methods.lora import LoRA
from jora.models.families import config_from_hf
from jora.sharding import single_device
from jora.train.estimation import abstract_programs
from jora.train.options import TrainOptions

SMALL: dict[str, Any] = dict(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
GEMMA3: dict[str, Any] = dict(model_type="gemma3_text", sliding_window=7)


def sizes(hf: dict[str, Any], layers: int) -> dict[str, int]:
    """Sizes of the program before and after the compiler."""
    config = config_from_hf({**SMALL, **hf, "num_hidden_layers": layers})
    programs = abstract_programs(config, single_device(), LoRA(rank=4), TrainOptions(), jnp.float32)
    lowered = programs.trace_train(Shape(2, 24, 8), programs.program._replace(remat="full")).lower()
    instructions = lowered.compile({"xla_backend_optimization_level": "0"}).as_text()
    return {
        "characters lowered": len(lowered.as_text()),
        "instructions compiled": sum(" = " in line for line in instructions.splitlines()),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hf", "deep", "shallow"),
    [
        pytest.param({"model_type": "llama"}, 32, 2, id="llama-32-2"),
        pytest.param(GEMMA3, 36, 6, id="gemma3-36-6"),
    ],
)
def test_depth_adds_nothing_to_the_program(hf: dict[str, Any], deep: int, shallow: int) -> None:
    small, large = sizes(hf, shallow), sizes(hf, deep)
    for what, size in small.items():
        assert large[what] <= 1.05 * size, f"{what}: {large[what]} for {deep} layers, {size} for {shallow}"
