"""Sampling against transformers' logits processors, and against the distribution it must draw from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as oracle

from jora.errors import InputError
from jora.inference import sampling as ours
from jora.inference.sampling import sampling_rows

filtered, sample = jax.jit(ours.filtered), jax.jit(ours.sample)
LOGITS = np.random.default_rng(0).normal(0, 3, (5, 97)).astype(np.float32)


def kept(logits: jax.Array) -> np.ndarray:
    return np.asarray(logits) > -1e29


def oracle_kept(processor) -> np.ndarray:
    scores = processor(torch.zeros(5, 1, dtype=torch.long), torch.tensor(LOGITS))
    return np.isfinite(scores.numpy())


@pytest.mark.parametrize(
    ("options", "processor"),
    [
        *((dict(top_k=k), oracle.TopKLogitsWarper(k)) for k in (1, 2, 10, 97, 1000)),
        *((dict(top_p=p), oracle.TopPLogitsWarper(p)) for p in (1e-6, 0.3, 0.9, 0.999)),
        *((dict(min_p=p), oracle.MinPLogitsWarper(p)) for p in (0.01, 0.2, 1.0)),
    ],
)
def test_each_filter_keeps_what_transformers_keeps(options, processor):
    found = filtered(jnp.asarray(LOGITS), sampling_rows(5, 1.0, **options))
    assert (kept(found) == oracle_kept(processor)).all()


def test_without_filters_all_tokens_stay():
    assert kept(filtered(jnp.asarray(LOGITS), sampling_rows(5, 1.0))).all()


def test_filters_apply_in_transformers_order():
    chain = [
        oracle.TemperatureLogitsWarper(0.7),
        oracle.TopKLogitsWarper(20),
        oracle.TopPLogitsWarper(0.8),
        oracle.MinPLogitsWarper(0.05),
    ]
    scores = torch.tensor(LOGITS)
    for processor in chain:
        scores = processor(torch.zeros(5, 1, dtype=torch.long), scores)
    found = filtered(jnp.asarray(LOGITS), sampling_rows(5, 0.7, 20, 0.8, 0.05))
    np.testing.assert_allclose(jax.nn.softmax(found), torch.softmax(scores, -1).numpy(), atol=1e-6)


def test_each_row_has_its_own_options():
    sampling = sampling_rows(5, 1.0)._replace(top_k=jnp.array([0, 1, 2, 3, 97]))
    assert kept(filtered(jnp.asarray(LOGITS), sampling)).sum(-1).tolist() == [97, 1, 2, 3, 97]


def test_temperature_zero_is_greedy_beside_a_drawing_row():
    sampling = sampling_rows(5)._replace(temperature=jnp.array([0.0, 50.0, 0.0, 0.0, 50.0]))
    draws = np.stack([sample(jnp.asarray(LOGITS), sampling, jnp.int32(i)) for i in range(20)])
    greedy = LOGITS.argmax(-1)
    assert (draws[:, [0, 2, 3]] == greedy[[0, 2, 3]]).all()
    assert len(set(draws[:, 1])) > 5


def test_draws_follow_the_distribution():
    rows, words = 4000, 6
    logits = np.tile(np.log([0.4, 0.3, 0.15, 0.1, 0.04, 0.01]).astype(np.float32), (rows, 1))
    sampling = sampling_rows(rows, 1.0, top_k=4)._replace(seed=jnp.arange(rows, dtype=jnp.uint32))
    draws = np.asarray(sample(jnp.asarray(logits), sampling, jnp.int32(3)))
    shares = np.bincount(draws, minlength=words) / rows
    expected = np.array([0.4, 0.3, 0.15, 0.1, 0, 0]) / 0.95
    # Three standard deviations of a share of 4,000 draws are at most 0.024.
    np.testing.assert_allclose(shares, expected, atol=0.024)
    assert (shares[4:] == 0).all()


def test_a_draw_depends_on_its_own_seed_and_step_only():
    logits = jnp.zeros((3, 500))
    sampling = sampling_rows(3, 1.0)._replace(seed=jnp.array([7, 8, 7], jnp.uint32))
    first = sample(logits, sampling, jnp.int32(0))
    assert first[0] == first[2] != first[1]
    alone = sample(logits[:1], sampling_rows(1, 1.0)._replace(seed=jnp.array([8], jnp.uint32)), jnp.int32(0))
    assert alone[0] == first[1]
    assert (sample(logits, sampling, jnp.int32(1)) != first).all()


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=-1),
        dict(temperature=float("nan")),
        dict(top_k=-1),
        dict(top_p=0),
        dict(top_p=1.1),
        dict(min_p=2),
    ],
)
def test_values_out_of_range_are_refused_by_name(options):
    with pytest.raises(InputError, match=next(iter(options))):
        sampling_rows(1, **options)
