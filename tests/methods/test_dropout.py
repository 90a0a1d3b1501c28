"""LoRA's dropout: really applied to the adapter's input, and the same wherever and however a row is computed."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.tiny import VOCAB, tiny

import jora
from jora.kernels.counter_hash import fold_all, keep_mask
from jora.methods.lora import LoRA, LoRAProjection
from jora.methods.method import Adapter
from jora.models import decoder, head
from jora.models.adapted import Bound, Dense, Rows, Site
from jora.models.config import LINEARS
from jora.models.families import config_from_hf
from jora.models.head import Answers, answer_loss
from jora.models.model import Model
from jora.models.params import Params
from jora.sharding import parse_mesh, single_device
from jora.sharding.mesh import build_layout

RATE = 0.25
WIDTH = 64


def mask_of(target: str = "q_proj", layer: int = 0, step: int = 0, rows: Any = (0, 1), length: int = 32) -> np.ndarray:
    """1 where the adapter of a site lets its input through: with weight 0, A = B = 1/s = I it gives x's share."""
    layout = single_device()
    dense = Dense(jnp.zeros((WIDTH, WIDTH)), None, (None,), (None,), layout)
    projection = LoRAProjection(jnp.eye(WIDTH), jnp.eye(WIDTH), jnp.float32(1), RATE)
    seeds = fold_all(7, step, np.asarray(rows, np.int32))
    out = projection.apply(jnp.ones((len(rows), length, WIDTH)), dense, Site(target, jnp.int32(layer)), Rows(seeds))
    return np.asarray(out)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """In standard deviations of what independent draws give."""
    x, y = ((m > 0) - (1 - RATE) for m in (a, b))
    return float(np.mean(x * y) / (RATE * (1 - RATE)) * np.sqrt(x.size))


def test_the_rate_is_honoured_and_the_rest_scaled_up() -> None:
    out = mask_of(rows=range(16))
    # jnp.where(keep, x, 0) / (1 - rate): inverted dropout, as torch's.
    assert set(np.unique(out)) == {0.0, np.float32(1) / np.float32(1 - RATE)}
    dropped = float(np.mean(out == 0))
    assert abs(dropped - RATE) < 4 * np.sqrt(RATE * (1 - RATE) / out.size)


def test_every_target_layer_step_and_row_draws_its_own() -> None:
    masks = [mask_of(target, layer) for target in (*LINEARS, "lm_head") for layer in (0, 1, 31)]
    masks += [mask_of(step=1), mask_of(step=100_000), mask_of(rows=(2, 3)), mask_of(rows=(1, 0))]
    for a, b in combinations(masks, 2):
        assert not np.array_equal(a, b)
        assert abs(correlation(a, b)) < 5
    first, second = mask_of()
    assert abs(correlation(first, second)) < 5


def test_a_row_draws_the_same_wherever_it_stands() -> None:
    whole = mask_of(rows=(4, 5, 6), length=40)
    np.testing.assert_array_equal(mask_of(rows=(6,), length=40), whole[2:])  # another micro-batch
    np.testing.assert_array_equal(mask_of(rows=(5, 9), length=17)[:1], whole[1:2, :17])  # padded to another length


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_bits_look_random(rate: float) -> None:
    """Share kept, and pairwise correlation, over rows, tokens, features and sites."""
    seeds = fold_all(0, np.arange(8))
    sites = [Site(t, jnp.int32(n)) for t in ("q_proj", "k_proj") for n in (0, 1)]
    kept = np.stack([np.asarray(keep_mask(site.salt(seeds), (8, 64, WIDTH), rate)) for site in sites])
    deviation = np.sqrt(rate * (1 - rate))
    normal = (kept - (1 - rate)) / deviation
    for axes in [(0, 2, 3), (0, 1, 3), (0, 1, 2), (1, 2, 3)]:
        means = normal.mean(axes) * np.sqrt(kept.size / np.prod([kept.shape[i] for i in range(4) if i not in axes]))
        assert np.abs(means).max() < 5  # in standard deviations
    streams = normal.reshape(4 * 8, -1)
    pairs = (streams @ streams.T / np.sqrt(streams.shape[1]))[np.triu_indices(32, 1)]
    assert np.abs(pairs).max() < 5
    assert abs(pairs.std() - 1) < 0.15


@pytest.fixture(scope="module")
def model() -> Model:
    return jora.load_model(tiny("llama2")[1], dtype="float32")


@pytest.fixture(scope="module")
def adapter(model: Model) -> Adapter:
    """With random B: a fresh adapter gives nothing that dropout could drop."""
    made = LoRA(rank=3, dropout=0.5).init(model, jax.random.key(0))
    draw = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: jnp.asarray(0.3 * draw.standard_normal(x.shape), x.dtype), made.state.trained)
    return dataclasses.replace(made, state=made.state._replace(trained=trained))


def test_evaluation_drops_nothing(model: Model, adapter: Adapter) -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, 9)).astype(np.int32)
    without = dataclasses.replace(adapter, method=dataclasses.replace(adapter.method, dropout=0.0))
    np.testing.assert_array_equal(model(ids, adapter), model(ids, without))

    @jax.jit
    def trained_on(seeds: Any) -> Any:
        rows = Rows(seeds)
        bound = adapter.method.bind(adapter.state, rows)
        hidden, _ = decoder.forward(model.params, model.config, model.layout, ids, bound=bound, rows=rows)
        return head.logits(model.params, model.config, model.layout, hidden, bound, rows)

    seeds = fold_all(7, 0, np.arange(2))
    found = np.asarray(trained_on(seeds))
    assert np.abs(found - np.asarray(model(ids, adapter))).max() > 0.01
    np.testing.assert_array_equal(found[0], np.asarray(trained_on(seeds[:1].repeat(2)))[0])


@pytest.mark.parametrize("mesh", ["tensor=8", "data=2,fsdp=2,tensor=2"])
def test_a_mesh_draws_what_one_device_draws(mesh: str) -> None:
    """Bits depend on an element's place in the whole array, not in a device's part."""
    layout = build_layout(parse_mesh(mesh), 2)
    seeds = fold_all(7, 0, np.arange(4))
    sharded = jax.jit(
        lambda s: keep_mask(s, (4, 6, 2, 4, 8), RATE),
        out_shardings=layout.sharding(("batch", None, "kv_heads", "q_group", None), (4, 6, 2, 4, 8)),
    )(jax.device_put(seeds, layout.sharding(("batch",), (4,))))
    np.testing.assert_array_equal(sharded, keep_mask(seeds, (4, 6, 2, 4, 8), RATE))


def head_nll(rows: int, count: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The answers' -log p under an lm_head adapter with dropout; the first rows and answers are always the same."""
    monkeypatch.setattr(head, "CHUNK", chunk)
    config = config_from_hf(
        {
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "intermediate_size": 8,
        }
    )
    draw = np.random.default_rng(0)
    table = draw.standard_normal((config.padded_vocab, WIDTH)).astype(np.float32)
    a, b = draw.standard_normal((WIDTH, 3)), draw.standard_normal((3, config.padded_vocab))
    hidden = draw.standard_normal((8, 24, WIDTH)).astype(np.float32)[:rows]
    targets = draw.integers(0, VOCAB, (8, 24)).astype(np.int32)[:rows, :count]
    positions = np.broadcast_to(np.arange(count, dtype=np.int32), (rows, count))
    projection = LoRAProjection(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), jnp.float32(1), RATE)
    params = Params(jnp.asarray(table), (), jnp.zeros(WIDTH), None)
    answers = Answers(positions, targets, np.ones((rows, count), np.float32))
    seeds = fold_all(7, 0, np.arange(rows))
    bound = Bound(head=projection)
    return np.asarray(answer_loss(params, config, single_device(), hidden, answers, bound, Rows(seeds))[1])


def test_the_heads_dropout_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk holds fewer answers of each row where there are more rows: mesh padding and accumulation change it."""
    expected = head_nll(4, 24, 4 * 24, monkeypatch)
    for rows, count, chunk in [(4, 24, 4 * 8), (4, 24, 4 * 7), (2, 24, 4 * 8), (8, 24, 4 * 8), (4, 17, 4 * 8)]:
        found = head_nll(rows, count, chunk, monkeypatch)[:4, :17]
        np.testing.assert_allclose(found, expected[: min(rows, 4), :17], rtol=1e-4, atol=1e-4)
