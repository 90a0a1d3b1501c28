"""GaLore's memory in numbers: parameters, the paper's formula, and the bytes of the arrays that `jora.optim` makes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from benchmarks.galore_memory import SIZES, formula, paper_config, state_bytes

from jora.models.config import LINEARS
from jora.models.tensors import linear_shape, parameter_count

MILLIONS = {"60M": 58.07, "130M": 134.11, "350M": 367.97, "1B": 1339.08, "7B": 6738.42}
# Optimiser state in GB: bf16 moments and P, full Adam on what is not projected.
STATE_GB = {"60M": 0.164, "130M": 0.343, "350M": 0.653, "1B": 2.085}
# At 7B and rank 1024, against AdamW with bf16 moments: % less by the formula, by the bytes of our arrays, and how far
# these may be above: 8-bit moments have the fp32 scale of each block of 256, int8 P that of each column.
LESS = {
    ("bfloat16", "bfloat16"): (65.1, 65.1, 0.0005),
    ("bfloat16", "int8"): (68.6, 68.6, 0.0005),
    ("int8", "bfloat16"): (79.1, 78.9, 4 / 256),
    ("int8", "int8"): (82.6, 82.3, 4 / 256),
}
BYTES = {"bfloat16": 2, "int8": 1}


@pytest.mark.parametrize("size", SIZES)
def test_parameters(size: str) -> None:
    assert parameter_count(paper_config(size)) / 1e6 == pytest.approx(MILLIONS[size], abs=0.005)


def test_projected_parameters() -> None:
    """Of the 350M model; a user of galore-torch measured 302.38 M."""
    config = paper_config("350M")
    shapes = [linear_shape(config, target) for target in LINEARS]
    assert config.layers * sum(s.in_size * s.out_size for s in shapes) / 1e6 == pytest.approx(302.4, abs=0.05)


@pytest.mark.parametrize("size", STATE_GB)
def test_state_of_the_papers_models(size: str) -> None:
    config, rank = paper_config(size), SIZES[size][-1]
    said = 2 * sum(formula(config, rank)) / 1e9
    assert said == pytest.approx(STATE_GB[size], abs=0.0005)
    assert state_bytes(config, rank, "bfloat16") / 1e9 == pytest.approx(said, rel=1e-6)


@cache
def of_adamw() -> tuple[float, int]:
    """(by the formula, measured)"""
    config = paper_config("7B")
    return 2.0 * formula(config, None)[1], state_bytes(config, None, "bfloat16")


@pytest.mark.parametrize(("moments", "precision"), LESS)
def test_what_is_saved_at_7b(moments: Any, precision: Any) -> None:
    config = paper_config("7B")
    by_formula, by_bytes, scales = LESS[moments, precision]
    projectors, means = formula(config, 1024)
    said = projectors * BYTES[precision] + means * BYTES[moments]
    found = state_bytes(config, 1024, moments, precision)
    plain, made = of_adamw()
    assert made == pytest.approx(plain, rel=1e-6)
    assert 100 * (1 - said / plain) == pytest.approx(by_formula, abs=0.05)
    assert 100 * (1 - found / made) == pytest.approx(by_bytes, abs=0.05)
    assert said <= found <= said * (1 + scales)
