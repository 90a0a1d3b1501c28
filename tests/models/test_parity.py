"""Our logits against transformers', in fp32, on tiny random models of every family."""

from __future__ import annotations

import copy
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tests.real import real_gemma
from tests.tiny import FAMILIES, assert_close, logits, tiny, tokens
from transformers import AutoModelForCausalLM

import jora
from jora.models import decoder, head
from jora.models.adapted import BASE, Rows
from jora.models.cache import new_cache

TIGHT = 2e-5  # of the logits' spread


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family):
    # 33 tokens: beyond the windows (7) and beyond Llama 3.1's original 16 positions.
    hf, path = tiny(family)
    ids = tokens(2, 33)
    assert_close(jora.load_model(path)(ids), logits(hf, ids), TIGHT)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama31", dict(num_key_value_heads=1, head_dim=24)),
        ("llama2", dict(num_attention_heads=8, num_key_value_heads=4, head_dim=6, attention_bias=True)),
        ("qwen3", dict(num_key_value_heads=1, tie_word_embeddings=True)),
        ("qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1, num_hidden_layers=3)),
        ("mistral", dict(sliding_window=None)),
        ("gemma2", dict(num_key_value_heads=1, tie_word_embeddings=False)),
        ("gemma3", dict(num_key_value_heads=1, num_hidden_layers=7)),
        ("gemma3", dict(final_logit_softcapping=3.0, num_hidden_layers=6)),
        (
            "gemma3",
            dict(
                num_hidden_layers=6,
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            ),
        ),
    ],
)
def test_odd_shapes_and_options(family, overrides):
    hf, path = tiny(family, **overrides)
    ids = tokens(2, 21, seed=1)
    assert_close(jora.load_model(path)(ids), logits(hf, ids), TIGHT)


@pytest.mark.parametrize("length", [1, 7, 129])
@pytest.mark.parametrize("family", ["llama31", "gemma3"])
def test_sequence_lengths(family, length):
    hf, path = tiny(family)
    ids = tokens(1, length, seed=2)
    # Angles grow with the position, and with them what an ulp of a frequency is worth.
    assert_close(jora.load_model(path)(ids), logits(hf, ids), TIGHT if length < 100 else 1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_sequences_of_several_attention_blocks(family):
    hf, path = tiny(family)
    ids = tokens(1, 600, seed=3)
    assert_close(jora.load_model(path)(ids), logits(hf, ids), TIGHT)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama31", "gemma3"])
def test_padded_rows(family, side):
    hf, path = tiny(family)
    ids, lengths = tokens(3, 25, seed=4), (25, 11, 1)
    mask = np.stack([np.arange(25) < n for n in lengths])
    mask = mask[:, ::-1].copy() if side == "left" else mask
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        expected = hf(
            torch.tensor(ids.astype(np.int64)),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            position_ids=torch.tensor(positions),
        ).logits.numpy()
    found = np.asarray(jora.load_model(path)(ids, positions=positions, segments=mask.astype(np.int32)))
    assert_close(found[mask], expected[mask], TIGHT)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_packed_sequences_do_not_see_each_other(family):
    hf, path = tiny(family)
    parts = [tokens(1, n, seed=n)[0] for n in (9, 14, 1)]
    packed = np.concatenate([*parts, np.zeros(3, np.int32)])[None]
    segments = np.concatenate([np.full(len(p), i + 1) for i, p in enumerate(parts)] + [np.zeros(3)]).astype(np.int32)
    positions = np.concatenate([np.arange(len(p)) for p in parts] + [np.zeros(3)]).astype(np.int32)
    found = np.asarray(jora.load_model(path)(packed, positions=positions[None], segments=segments[None]))[0]
    expected = np.concatenate([logits(hf, part[None])[0] for part in parts])
    assert_close(found[: len(expected)], expected, TIGHT)


@pytest.mark.parametrize("family", ["llama31", "mistral", "gemma2", "gemma3"])
def test_logits_with_a_cache_equal_those_of_the_whole(family):
    hf, path = tiny(family)
    model = jora.load_model(path)
    ids = tokens(2, 30, seed=6)
    lengths = np.array([20, 13], np.int32)  # rows stand at different places; the second is padded

    @jax.jit
    def run(params: Any, ids: Any, cache: Any) -> Any:
        rows = Rows()
        hidden, cache = decoder.forward(params, model.config, model.layout, ids, bound=BASE, rows=rows, cache=cache)
        return head.logits(params, model.config, model.layout, hidden, BASE, rows), cache

    expected = logits(hf, ids)
    cache = new_cache(model.config, model.layout, 2, 32, jnp.float32)
    found, cache = run(model.params, ids[:, :20], cache)
    assert_close(found, expected[:, :20], TIGHT)
    cache = cache.advance(lengths)
    for count in (5, 1, 1):  # several tokens at once, then one by one
        step = np.stack([ids[row, at : at + count] for row, at in enumerate(lengths)])
        found, cache = run(model.params, step, cache)
        wanted = np.stack([expected[row, at : at + count] for row, at in enumerate(lengths)])
        assert_close(found, wanted, TIGHT)
        cache = cache.advance(jnp.full(2, count))
        lengths = lengths + count


def test_a_checkpoint_of_many_files(tmp_path):
    hf, _ = tiny("gemma2")
    hf.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ids = tokens(1, 9)
    assert_close(jora.load_model(tmp_path)(ids), logits(hf, ids), TIGHT)


def test_half_precision_stays_near_full():
    hf, path = tiny("llama31")
    model = jora.load_model(path, dtype="bfloat16")
    assert model.dtype == jnp.bfloat16
    ids = tokens(2, 33)
    found = model(ids)
    assert found.dtype == jnp.float32
    assert_close(found, logits(hf, ids), 0.15)


def test_a_half_precision_checkpoint_is_widened_exactly(tmp_path):
    hf, _ = tiny("qwen2")
    half = copy.deepcopy(hf).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    ids = tokens(1, 9)
    assert_close(jora.load_model(tmp_path, dtype="float32")(ids), logits(wide, ids), TIGHT)


@pytest.fixture(scope="module")
def gemma() -> tuple[Any, Any]:
    return real_gemma()


TEXT = "\n\n".join(topics[name] for name in ("assignment", "class", "compound"))


@pytest.mark.slow
def test_real_gemma_logits(gemma):
    hf, model = gemma
    ids = np.array([[2, *model.tokenizer.encode(TEXT, add_special_tokens=False)]], np.int32)[:, :600]
    assert ids.shape == (1, 600)  # beyond the window of 512
    assert_close(model(ids), logits(hf, ids), 1e-4)


@pytest.mark.slow
def test_real_gemma_greedy_tokens(gemma):
    from jora.inference.tokens import generate_tokens

    hf, model = gemma
    prompt = model.tokenizer("The three longest rivers of the world are")["input_ids"]
    ids = torch.tensor([prompt])
    out = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
    assert generate_tokens(model, [prompt], max_new_tokens=32) == [out[0, len(prompt) :].tolist()]
