"""Logits and greedy tokens of models on a GPU: in fp32 those of transformers, on quantised bases those of the CPU."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from tests.gpu.devices import gpu, on_cpu
from tests.inference.test_generate import PROMPTS, greedy
from tests.tiny import FAMILIES, assert_close, logits, tiny, tokens

import jora
from jora.inference.tokens import generate_tokens
from jora.models.model import Model

pytestmark = pytest.mark.gpu

# Without those that differ from another one in numbers alone; time on a GPU is short.
SHOWN = [family for family in FAMILIES if family not in ("llama3", "qwen25")]
IDS = tokens(2, 33)  # beyond the windows (7) and beyond Llama 3.1's original 16 positions


def assert_on_gpu(model: Model) -> None:
    assert {device for leaf in jax.tree.leaves(model.params) for device in leaf.devices()} == {gpu()}


@pytest.mark.parametrize("family", SHOWN)
def test_logits_equal_transformers(family: str) -> None:
    hf, path = tiny(family)
    model = jora.load_model(path, dtype="float32")
    assert_on_gpu(model)
    assert_close(model(IDS), logits(hf, IDS))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_logits_of_a_quantised_base_equal_those_on_the_cpu(kind: Any) -> None:
    """Rows of 32 and 48 are shorter than nf4's blocks."""
    model = jora.load_model(tiny("qwen3")[1], dtype="float32", quant=kind)
    assert_on_gpu(model)
    found = np.asarray(model(IDS))
    assert_close(found, np.asarray(on_cpu(model)(IDS)))
    assert np.abs(found - logits(tiny("qwen3")[0], IDS)).max() > 0.01  # it is quantised


@pytest.mark.parametrize("family", ["llama31", "gemma2"])
def test_a_16_bit_base_stays_near(family: str) -> None:
    """The default on a GPU. Llama's attention is cuDNN's; Gemma 2 has a soft cap, which that lacks."""
    hf, path = tiny(family)
    model = jora.load_model(path)
    assert model.dtype == np.dtype("bfloat16")
    assert_close(model(IDS), logits(hf, IDS), 0.15)


def test_greedy_tokens_equal_transformers() -> None:
    hf, path = tiny("mistral")
    found = generate_tokens(jora.load_model(path, dtype="float32"), PROMPTS, max_new_tokens=12)
    assert found == [greedy(hf, prompt, 12) for prompt in PROMPTS]
