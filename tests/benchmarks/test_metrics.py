"""Latencies, goodput, service and the floor, on cases that can be counted by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from benchmarks.serving import decode_floor
from benchmarks.serving.metrics import Served, Slo, fairness, percentiles, service, summary
from benchmarks.serving.trace import Arrival

FAST = Served(0, arrival=1.0, inputs=10, times=(2.0, 2.5, 3.5))
SLOW = Served(1, arrival=2.0, inputs=20, times=(9.0,))


def test_summary_by_hand():
    found = summary([FAST, SLOW], Slo(ttft=1.0, tpot=0.75))
    assert found["seconds"] == 8.0
    assert found["requests_per_s"] == pytest.approx(2 / 8)
    assert found["output_tokens_per_s"] == pytest.approx(4 / 8)
    assert found["tokens_per_s"] == pytest.approx(34 / 8)
    assert found["goodput"] == 0.5
    assert found["good_requests_per_s"] == pytest.approx(1 / 8)
    assert found["ttft"] == percentiles([1.0, 7.0])
    assert found["tpot"] == percentiles([0.75])  # one token alone has none
    assert found["itl"] == percentiles([0.5, 1.0])
    assert found["e2e"] == percentiles([2.5, 7.0])


@pytest.mark.parametrize("slo", [Slo(0.9, 1.0), Slo(1.0, 0.7)])
def test_goodput_needs_both_limits(slo):
    assert summary([FAST], slo)["goodput"] == 0.0


def test_percentiles():
    assert percentiles(range(101)) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([]) == {}


def test_service_charges_the_prompt_with_the_first_token():
    ticks = np.array([1.9, 2.0, 2.4, 2.5, 4.0])
    np.testing.assert_array_equal(service([FAST], "default", ticks), [0, 12, 12, 14, 16])
    np.testing.assert_array_equal(service([FAST], "another", ticks), 0)


def _alternating(order):
    """Requests of 1 input and 1 output token, one served each second in the given order of clients."""
    asked = [Arrival(n, 0.0, (5,), 1, client=c) for n, c in enumerate(order)]
    served = [Served(n, 0.0, 1, (n + 0.5,), c) for n, c in enumerate(order)]
    return asked, served


def test_fairness_of_turns_and_of_one_after_the_other():
    even = fairness(*_alternating("abababab"), until=8, window=4)
    assert even["gap_max"] == 3.0  # one request
    assert even["difference_max"] == 0.0
    uneven = fairness(*_alternating("aaaabbbb"), until=8, window=4)
    assert uneven["gap_max"] == 12.0
    assert uneven["gap_end"] == 0.0
    # In windows of the first half a has one request a second and b none, though it asks for 12.
    assert uneven["difference_max"] == pytest.approx(3.0)


def test_a_client_misses_no_more_than_it_asked_for():
    asked, served = _alternating("aaaaaaab")
    asked[-1] = asked[-1]._replace(time=7.0)
    found = fairness(asked, served, until=8, window=2)
    # b asks for 3 at the end and gets it at once: nothing is missing, though a had far more.
    assert found["gap_max"] == 21.0
    assert found["difference_max"] < 3.0


def _config(**changes):
    sizes = dict(embed=8, mlp=16, heads=4, kv_heads=2, head_dim=4, layers=3, vocab_size=100, window=5)
    return SimpleNamespace(**{**sizes, "layer_kinds": ("sliding", "full", "sliding"), **changes})


def test_floor_of_a_decode_step_counted_weight_by_weight():
    config, rows, context, rank = _config(), 2, 9, 3
    shapes = [(8, 16), (8, 8), (8, 8), (16, 8), (8, 16), (8, 16), (16, 8)]  # q k v o gate up down
    weights = 3 * sum(i * o for i, o in shapes) + 100 * 8
    adapter = 3 * rank * sum(i + o for i, o in shapes)
    keys = 5 + 9 + 5  # of the three layers
    assert decode_floor.adapter_entries(config, rank) == adapter
    base = decode_floor.step(config, rows, context, rank, 0)
    assert base.bytes == 4 * (weights + rows * keys * 2 * 2 * 4)
    assert base.flops == rows * (2 * weights + 4 * keys * 4 * 4)
    two = decode_floor.step(config, rows, context, rank, 2)
    assert two.bytes - base.bytes == 4 * 2 * adapter
    assert two.flops - base.flops == rows * 2 * adapter  # each row multiplies by its own alone
    assert base.seconds(bandwidth=1e30, rate=2.0) == base.flops / 2
    assert base.seconds(bandwidth=2.0, rate=1e30) == base.bytes / 2


def test_floor_of_llama_7b_is_that_of_the_published_sizes():
    shape = dict(embed=4096, mlp=11008, heads=32, kv_heads=32, head_dim=128, layers=32, vocab_size=32_000, window=None)
    config = _config(**shape, layer_kinds=("full",) * 32)
    assert 2 * decode_floor.adapter_entries(config, 8) == pytest.approx(5.0e6 * 8, rel=0.01)  # bf16
    batch = decode_floor.step(config, 64, 1024, 8, 64, entry_bytes=2)
    assert batch.bytes == pytest.approx(50.1e9, rel=0.01)  # W, 64 contexts and 64 adapters
