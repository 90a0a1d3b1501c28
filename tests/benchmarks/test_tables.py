"""Tables say where a figure means less than it seems to."""

from benchmarks.serving import tables
from benchmarks.serving.metrics import Served, Slo, summary


def _runs(seconds, last_arrival):
    return [{**summary([Served(0, 0.0, 1, (0.1, seconds))], Slo(1, 1)), "last_arrival": last_arrival}]


def test_a_contestant_that_waited_for_requests_is_named():
    rounds = {"engine:0": _runs(10.0, 9.0), "peft:4": _runs(40.0, 9.0)}
    text = tables.trace({"rounds": rounds, "agreement": {}})
    assert "**engine:0 were not saturated" in text
    assert "not saturated" not in tables.trace({"rounds": {"peft:4": rounds["peft:4"]}, "agreement": {}})


def test_the_floors_verdict_stands_beside_the_range_of_the_ratios():
    step = {"distinct": 5, "floor_ratio": 1.03, "bytes_ratio": 1.03, "flops_ratio": 1.01, "floor_seconds": 0.5}
    report = {"formula": "f", "context": 9, "speed": {"bandwidth": 1e9, "rate": 1e9}}
    met = tables.floor({**report, "steps": [{**step, "seconds": [1.0, 1.1], "ratios": [1.05, 1.07]}]})
    missed = tables.floor({**report, "steps": [{**step, "seconds": [1.0, 1.1], "ratios": [1.08, 1.10]}]})
    assert "1.060 (1.050 - 1.070)" in met and "+3.0 points (met)" in met
    assert "+6.0 points (missed)" in missed
