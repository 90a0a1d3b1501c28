"""S-LoRA's trace: moments of what is drawn, and what stays the same between traces."""

import numpy as np
import pytest
from benchmarks.serving.trace import FIRST_TOKEN, Workload, clients, popularity, synthetic

MANY = Workload(requests=20_000, rate=4.0, inputs=(1, 9), outputs=(2, 16))


def _gaps(load):
    return np.diff([0.0, *(a.time for a in synthetic(load, 4, 100))])


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_intervals_have_the_rate_and_the_coefficient_of_variation(cv):
    gaps = _gaps(MANY._replace(cv=cv))
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / MANY.rate, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_lengths_are_uniform_with_both_ends():
    trace = synthetic(MANY, 4, 100)
    for lengths, (low, high) in (([len(a.prompt) for a in trace], (1, 9)), ([a.output for a in trace], (2, 16))):
        counts = np.bincount(lengths, minlength=high + 1)[low:]
        assert len(counts) == high - low + 1
        np.testing.assert_allclose(counts / len(trace), 1 / len(counts), atol=0.015)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 3.0])
def test_popularity_follows_the_power_law(alpha):
    chosen = np.bincount([a.adapter for a in synthetic(MANY._replace(alpha=alpha), 8, 100)], minlength=8)
    np.testing.assert_allclose(chosen / MANY.requests, popularity(8, alpha), atol=0.015)


def test_popularity_is_that_of_the_reference():
    # The reference draws floor(n * numpy.random.power(alpha)).
    drawn = (np.random.default_rng(0).power(0.3, 50_000) * 5).astype(int)
    np.testing.assert_allclose(np.bincount(drawn) / 50_000, popularity(5, 0.3), atol=0.01)


def test_exponent_one_is_uniform_and_a_small_one_favours_the_first():
    np.testing.assert_allclose(popularity(16, 1.0), 1 / 16)
    assert popularity(100, 0.1)[0] == pytest.approx(0.631, abs=1e-3)


def test_a_trace_is_deterministic_and_differs_between_numbers_of_adapters_in_those_alone():
    load = Workload(requests=50, rate=2.0, seed=3)
    few, again, many, base = (synthetic(load, n, 500) for n in (16, 16, 2000, 0))
    assert few == again
    assert few != synthetic(load._replace(seed=4), 16, 500)
    assert [a._replace(adapter=None) for a in few] == [a._replace(adapter=None) for a in many] == base
    assert [a.adapter for a in few] == [a.adapter // 125 for a in many]  # the same quantile


def test_tokens_are_words_of_the_vocabulary():
    tokens = [t for a in synthetic(MANY._replace(requests=500), 1, 20) for t in a.prompt]
    assert (min(tokens), max(tokens)) == (FIRST_TOKEN, 19)


def test_clients_send_at_their_own_even_rates():
    trace = clients([1.5, 3.0], seconds=60, inputs=5, outputs=7, vocabulary=50)
    assert [a.time for a in trace] == sorted(a.time for a in trace)
    for client, rate in (("0", 1.5), ("1", 3.0)):
        own = [a for a in trace if a.client == client]
        assert len(own) == 60 * rate
        np.testing.assert_allclose(np.diff([a.time for a in own]), 1 / rate)
    assert {(len(a.prompt), a.output) for a in trace} == {(5, 7)}
    assert [a.number for a in trace] == list(range(len(trace)))
