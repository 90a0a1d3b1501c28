"""Sampling against transformers' logits processors, and against the distribution it must draw from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers.generation import logits_process as oracle

from jora.errors import InputError
from jora.inference import sampling as ours
from jora.inference.sampling import sampling_rows

filtered, sample, largest_cut = jax.jit(ours.filtered), jax.jit(ours.sample), jax.jit(ours.largest_cut)
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


@pytest.mark.parametrize("spread", [0.3, 8.0])  # more tokens than the candidates are kept, and far fewer
@pytest.mark.parametrize("options", [dict(top_p=0.9), dict(top_k=1500, top_p=0.95), dict(top_k=700), dict(top_k=2999)])
def test_filters_of_a_vocabulary_that_is_larger_than_the_candidates(options, spread):
    logits = np.random.default_rng(3).normal(0, spread, (2, 3000)).astype(np.float32)
    scores = torch.tensor(logits)
    if "top_k" in options:
        scores = oracle.TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = oracle.TopPLogitsWarper(options["top_p"])(None, scores)
    # The second row asks for nothing and draws from all.
    sampling = sampling_rows(2, 1.0, **options)
    sampling = sampling._replace(top_k=sampling.top_k.at[1].set(0), top_p=sampling.top_p.at[1].set(1))
    found, wanted = kept(filtered(jnp.asarray(logits), sampling)), np.isfinite(scores.numpy())
    # Sums of fp32 in another order may move the border of the nucleus by a token.
    assert abs(int(found[0].sum()) - int(wanted[0].sum())) <= 1 and (found[0] != wanted[0]).sum() <= 1
    assert found[1].all()


def test_ties_at_the_border_stay_also_beyond_the_candidates():
    logits = np.zeros((1, 3000), np.float32)
    logits[0, 100:110] = 5.0
    assert kept(filtered(jnp.asarray(logits), sampling_rows(1, 1.0, top_k=5))).sum() == 10
    assert kept(filtered(jnp.asarray(logits), sampling_rows(1, 1.0, top_k=11))).all()
    assert kept(filtered(jnp.asarray(logits), sampling_rows(1, 1.0, top_k=11, top_p=0.2))).sum() == 10


@settings(deadline=None, max_examples=60)
@given(
    values=arrays(
        np.float32,
        (2, 7),
        elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False) | st.just(-np.inf) | st.just(0.0),
    ),
    weights=arrays(np.float32, (2, 7), elements=st.sampled_from([0.0, 0.25, 1.0, 3.0])),
    least=arrays(np.float32, 2, elements=st.sampled_from([0.25, 1.0, 5.5, 30.0])),
)
def test_the_largest_cut_that_holds_enough(values, weights, least):
    found = np.asarray(largest_cut(jnp.asarray(values), jnp.asarray(weights), jnp.asarray(least)))[:, 0]
    for row in range(2):
        enough = [t for t in values[row] if weights[row][values[row] >= t].sum() >= least[row]]
        assert found[row] == max(enough, default=-np.inf)


@pytest.mark.parametrize("words", [1, 4, 99, 512, 1000, 1536, 2001])
def test_argmax_is_the_first_of_equals(words):
    rng = np.random.default_rng(words)
    ties = rng.integers(-3, 3, (20, words)).astype(np.float32)
    ties[rng.random(ties.shape) < 0.1] = -np.inf
    ties[0], ties[1, :-1] = -np.inf, -np.inf
    spread = rng.normal(0, 1, (20, words)).astype(np.float32)
    for logits in (ties, spread):
        assert ours.argmax(jnp.asarray(logits)).tolist() == logits.argmax(-1).tolist()
    assert 0 <= ours.argmax(jnp.full((1, words), jnp.nan))[0] < words  # a token, whatever the logits


def test_noise_is_gumbel_and_independent():
    seeds, steps = jnp.repeat(jnp.arange(8, dtype=jnp.uint32), 8), jnp.tile(jnp.arange(8), 8)
    noise = np.asarray(ours.gumbel(seeds, steps, 4096))
    # The largest distance of 262,144 draws' distribution from the true one: 0.0038 in one case of a thousand.
    cumulative = np.exp(-np.exp(-np.sort(noise.ravel())))
    assert np.abs(cumulative - np.linspace(0, 1, cumulative.size)).max() < 0.004
    between = np.corrcoef(noise) - np.eye(64)
    # 2,016 correlations of 4,096 draws each: standard deviation 1/64.
    assert np.abs(between).max() < 5 / 64 and abs(between[np.triu_indices(64, 1)].std() * 64 - 1) < 0.1
    np.testing.assert_array_equal(ours.gumbel(seeds[3:4], steps[3:4], 50), noise[3:4, :50])


def test_hardly_any_temperature_is_greedy():
    sampling = sampling_rows(5, 1e-40)
    assert (sample(jnp.asarray(LOGITS), sampling, jnp.int32(0)) == LOGITS.argmax(-1)).all()


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
