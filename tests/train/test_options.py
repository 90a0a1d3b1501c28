"""Options that make no sense are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from jora.errors import InputError
from jora.train.options import TrainOptions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("max_steps", 0),
        ("batch_size", -1),
        ("batch_size", 2.5),
        ("max_steps", "many"),
        ("learning_rate", "1e-4"),
        ("accumulation", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup", 1.0),
        ("beta2", 1.0),
        ("max_grad_norm", -1.0),
        ("weight_decay", float("inf")),
        ("schedule", "cosin"),
        ("too_long", "cut"),
        ("remat", "some"),
        ("patience", 0),
        ("max_length", 1),
        ("seed", -1),
    ],
)
def test_nonsense_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name} is .*: it must be"):
        TrainOptions(**{name: value})
