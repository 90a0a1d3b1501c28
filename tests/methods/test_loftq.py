"""LoftQ: the first factors are the best of their rank for what bitsandbytes' nf4 took from a weight."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from tests.methods.gradients import by_name
from tests.methods.peft_oracle import base
from tests.tiny import tiny, tokens

import jora
from jora import LoRA
from jora.methods.bank import check_bankable
from jora.train.many.plan import abstract_state

RANK, ALPHA = 8, 4.0  # scale 0.5: PEFT's own initialisation leaves it out
METHOD = LoRA(rank=RANK, alpha=ALPHA, targets=["q_proj", "down_proj"], init_lora_weights="loftq")


def test_what_is_left_is_the_smallest_possible() -> None:
    """Eckart and Young: the error of the best rank r is the singular values after the first r."""
    model = jora.load_model(tiny("llama3")[1], quant="nf4")
    adapter = METHOD.init(model, jax.random.key(0))
    factors = by_name(adapter, adapter.state.trained)
    for layer in tiny("llama3")[0].model.layers:
        for module in (layer.self_attn.q_proj, layer.mlp.down_proj):
            name = next(n for n, m in tiny("llama3")[0].named_modules() if m is module)
            weight = module.weight.detach()
            # In one row: on a CPU bitsandbytes is wrong where a row is shorter than a block.
            stored = quantize_4bit(weight.reshape(1, -1), blocksize=64, quant_type="nf4", compress_statistics=True)
            lost = (weight - dequantize_4bit(*stored).reshape(weight.shape)).numpy()
            a, b = (factors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            left = np.linalg.norm(lost - ALPHA / RANK * b @ a)
            values = np.linalg.svd(lost, compute_uv=False)
            assert left == pytest.approx(np.linalg.norm(values[RANK:]), rel=1e-2)
            assert left < 0.8 * np.linalg.norm(lost)


def test_the_first_step_is_closer_to_the_unquantised_model() -> None:
    model = jora.load_model(tiny("llama3")[1], quant="nf4")
    adapter = LoRA(rank=16, init_lora_weights="loftq").init(model, jax.random.key(0))
    dense = np.asarray(base("llama3")(tokens()))
    errors = [np.linalg.norm(np.asarray(model(tokens(), a)) - dense) for a in (None, adapter)]
    assert errors[1] < 0.6 * errors[0]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(jora.InputError, match="load the model with quant=nf4"):
        METHOD.init(base("llama3"), jax.random.key(0))
    with pytest.raises(jora.InputError, match="loftq needs an alpha above 0"):
        LoRA(init_lora_weights="loftq", alpha=0)
    model = jora.load_model(tiny("llama3")[1], quant="nf4")
    with pytest.raises(jora.InputError, match="lm_head is not quantised"):
        LoRA(init_lora_weights="loftq", targets=["lm_head"]).init(model, jax.random.key(0))
    with pytest.raises(jora.InputError, match="rank 33 is above down_proj, which is 48 x 32"):
        LoRA(rank=33, init_lora_weights="loftq").init(model, jax.random.key(0))


def test_its_shapes_need_no_weights() -> None:
    """As for jobs that train in one batch, whose shapes are asked for before the first of them begins."""
    model = jora.load_model(tiny("llama3")[1], quant="nf4")
    check_bankable(METHOD, model, "job a")
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_state(METHOD, model))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), METHOD.init(model, jax.random.key(0)).state)
