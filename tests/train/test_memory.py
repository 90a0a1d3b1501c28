"""Memory and FLOPs of the Llama-2-7B shape by the compiler's own analysis, without weights."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

from jora.data.batches import Shape
from jora.methods.lora import LoRA
from jora.models.config import ModelConfig
from jora.models.families import config_from_hf
from jora.sharding import parse_mesh
from jora.train.estimation import abstract_programs, simulated_layout
from jora.train.memory import ProgramMemory
from jora.train.options import TrainOptions

# fp32: the CPU's compiler hoists fp32 copies of bfloat16 weights out of the layer loop.
LLAMA_7B: ModelConfig = config_from_hf(
    {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "intermediate_size": 11008,
        "rms_norm_eps": 1e-5,
    }
)


def compiled(mesh: str, rows: int, length: int = 2048) -> tuple[ProgramMemory, float]:
    """(memory a device, FLOPs a device with the loop's body counted once) of the train step with LoRA r16."""
    spec = parse_mesh(mesh)
    options = TrainOptions(batch_size=rows, max_length=length)
    programs = abstract_programs(LLAMA_7B, simulated_layout(spec, LLAMA_7B), LoRA(rank=16), options, jnp.float32)
    step: Any = programs.compile_train(Shape(rows, length, 64), programs.program._replace(remat="full"))
    return ProgramMemory.of(step), step.cost_analysis()["flops"]


@pytest.mark.slow
def test_tensor_parallel_shares_memory() -> None:
    alone, _ = compiled("data=1", 1)
    shared, _ = compiled("tensor=4", 1)
    assert shared.total <= 0.27 * alone.total


@pytest.mark.slow
def test_fsdp_shares_memory_and_work() -> None:
    alone, work = compiled("data=1", 4)
    shared, part = compiled("fsdp=4", 4)
    assert part <= 0.27 * work
    assert shared.total <= 0.29 * alone.total
