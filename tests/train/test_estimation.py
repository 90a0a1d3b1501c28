"""Estimates against what can be counted by hand, and against what a run really takes."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jora.errors import InputError
from jora.methods.full import Full
from jora.methods.lora import LoRA
from jora.train import TrainOptions, estimate
from jora.train.flops import matmul_flops

LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "intermediate_size": 128,
    "tie_word_embeddings": False,
}
OPTIONS = TrainOptions(batch_size=4, max_length=64, remat="full")
METHOD = LoRA(rank=8)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model of which there is only the config.json."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def test_flops_multiply_loops_out() -> None:
    def scanned(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (jax.checkpoint(lambda a: jnp.sin(a @ a))(c), None), x, None, length=7)[0]

    assert matmul_flops(jax.make_jaxpr(scanned)(jnp.ones((5, 5)))) == 7 * 2 * 5**3
    gradient = jax.make_jaxpr(jax.grad(lambda x: scanned(x).sum()))(jnp.ones((5, 5)))
    assert matmul_flops(gradient) == 7 * 4 * 2 * 5**3  # forward, forward again, and two products backward


def test_parts_add_up(directory: Path) -> None:
    found = estimate(directory, METHOD, options=OPTIONS)
    linears = 6 * (4 * 64 * 64 + 3 * 64 * 128)
    assert found.parameters == linears + 2 * 512 * 64 + 13 * 64
    assert found.trained == 6 * 8 * (4 * 128 + 3 * 192)
    # Weights once, and the adapter three times (AdamW), all fp32; the batch is small.
    assert found.memory.arguments == pytest.approx(4 * (found.parameters + 3 * found.trained), rel=0.02)
    # Tokens x (forward, recomputed forward, backward to the activations), attention and adapters on top.
    least = 3 * 2 * linears * 4 * 64
    assert least < found.flops < 1.7 * least
    assert found.fits
    assert "fits" in found.table()


def test_a_mesh_shares_weights_and_temporaries(directory: Path) -> None:
    alone = estimate(directory, METHOD, options=OPTIONS)
    shared = estimate(directory, METHOD, options=OPTIONS, mesh="tensor=4")
    assert shared.memory.arguments < 0.4 * alone.memory.arguments
    assert shared.flops == alone.flops


def test_what_does_not_fit_is_said(directory: Path) -> None:
    found = estimate(directory, METHOD, options=OPTIONS, dtype="bfloat16", device_gib=0.001)
    assert not found.fits
    assert found.advice().startswith("does not fit by 0.0 GiB a device: try a smaller batch_size")


def test_bfloat16_halves_the_weights(directory: Path) -> None:
    wide = estimate(directory, METHOD, options=OPTIONS, dtype="float32")
    narrow = estimate(directory, METHOD, options=OPTIONS, dtype="bfloat16")
    assert wide.memory.arguments - narrow.memory.arguments == 2 * wide.parameters


def test_bfloat16_halves_weights_that_train(directory: Path) -> None:
    wide, narrow = (estimate(directory, Full(), options=OPTIONS, dtype=kind) for kind in ("float32", "bfloat16"))
    assert wide.memory.arguments - narrow.memory.arguments == 2 * wide.parameters


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        estimate(tmp_path, METHOD)
    with pytest.raises(InputError, match="no such model"):
        estimate(tmp_path / "nothing", METHOD)
    with pytest.raises(InputError, match="device_gib is -1"):
        estimate(tmp_path, METHOD, device_gib=-1)
