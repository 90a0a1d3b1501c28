"""XLA:GPU reads each layer's weights in the stacks where they lie: no copies of slices, no product made twice."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.gpu_programs import ADAPTERS, RANK, ROWS, adapter_step, decode_step
from benchmarks.hlo_traffic import Body, loop_bodies

from jora.models.config import ModelConfig
from jora.models.families import config_from_hf
from jora.sharding import single_device
from jora.train.memory import ProgramMemory

pytestmark = pytest.mark.gpu

TOKENS = 64
WIDTH, MLP = 4096, 16384  # only compiled: nothing of it is ever allocated
WEIGHTS = 4 * WIDTH**2 + 3 * WIDTH * MLP  # of a layer
SMALL = 0.2  # of the weights' bytes: what activations, adapters, norms and residuals may add to a training step
DECODED = 0.08  # and to a decode step, where the adapters count as weights; a copy of every A would be as much again


def config() -> ModelConfig:
    sizes = dict(hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=4, num_attention_heads=32)
    fixed = dict(model_type="llama", vocab_size=512, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10_000.0)
    return config_from_hf({**fixed, **sizes, "num_key_value_heads": 32, "max_position_embeddings": 128})


def layers(lowered: Any) -> list[Body]:
    """The loops over layers: those that multiply by all weights."""
    bodies = loop_bodies(lowered.compile().as_text())
    return [body for body in bodies if body.flops > WEIGHTS * TOKENS]


def assert_reads_weights(body: Body, tokens: int, times: float) -> None:
    """times: how often the body multiplies by each weight."""
    assert 0.9 * times < body.flops / (2 * tokens * WEIGHTS) < (1 + SMALL) * times, body
    assert body.read < (times + SMALL) * 2 * WEIGHTS, body
    assert body.written < SMALL * times * 2 * WEIGHTS, body


@pytest.mark.parametrize("remat", ["none", "selective", "full"])
def test_a_step_reads_each_weight_once_a_product(remat: str) -> None:
    """Forward, backward, and forward once more where that is made again (not down_proj, whose result nobody needs)."""
    forward, backward = sorted(
        layers(adapter_step(config(), single_device(), TOKENS, remat)), key=lambda body: body.flops
    )
    again = (WEIGHTS - WIDTH * MLP) / WEIGHTS if remat == "full" else 0
    assert_reads_weights(forward, TOKENS, 1)
    assert_reads_weights(backward, TOKENS, 1 + again)


def test_dora_makes_no_stacks_of_its_own() -> None:
    """Its norms are of matrices: XLA would turn the stacks of q, k and v to sum over the rows of their heads."""
    lora, dora = (
        ProgramMemory.of(adapter_step(config(), single_device(), TOKENS, "selective", method).compile()).added
        for method in ("lora", "dora")
    )
    assert dora - lora < 2 * WIDTH**2, (lora, dora)  # one layer's q_proj


def test_serving_reads_weights_and_adapters_once() -> None:
    """The factors of all adapters, a fifth of the weights here, are read in place too."""
    (body,) = layers(decode_step(config(), single_device()))
    factors = ADAPTERS * RANK * (4 * 2 * WIDTH + 3 * (WIDTH + MLP))
    entries = WEIGHTS + factors
    assert body.read < (1 + DECODED) * 2 * entries, body
    assert body.written < DECODED * 2 * entries, body
    assert body.flops < (1 + DECODED) * 2 * ROWS * entries, body
