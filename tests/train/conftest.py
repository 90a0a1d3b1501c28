"""A tiny model, random examples and a reporter: what tests of training need again and again.

Most tests share one program (METHOD, OPTIONS and 24 tokens a row), because compiling is what takes time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from tests.tiny import VOCAB, tiny

from jora.data.batches import Tokenised
from jora.methods.lora import LoRA
from jora.methods.method import Adapter
from jora.models.model import Model, load_model
from jora.train import TrainOptions, TrainResult

METHOD = LoRA(rank=4, dropout=0.1, targets=["q_proj", "down_proj"])
OPTIONS = TrainOptions(max_steps=6, batch_size=4, max_length=24, remat="none", learning_rate=0.03, warmup=0.0)


def options(**changes: Any) -> TrainOptions:
    return dataclasses.replace(OPTIONS, **changes)


class Reporter:
    """Keeps what it is told; `on_step` is called with the number of every training step that is read.

    `behind` is what an earlier run had done of the training, as the last `start` said.
    """

    def __init__(self, on_step: Any = None) -> None:
        self.notes: list[str] = []
        self.stack: list[str] = []
        self.behind: int | None = None
        self.on_step = on_step

    def start(self, total: int | None, what: str, done: int = 0) -> None:
        self.stack.append(what)
        if what.startswith("training"):
            self.behind = done

    def update(self, done: int, **fields: Any) -> None:
        if self.on_step and self.stack[-1].startswith("training"):
            self.on_step(done)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self, **fields: Any) -> None:
        self.stack.pop()


def examples(count: int = 12, *, seed: int = 0, shortest: int = 18, longest: int = 24) -> list[Tokenised]:
    """Random examples of unequal lengths, with 1 to 6 answer tokens each."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(draw.integers(shortest, longest + 1))
        loss = np.zeros(length, bool)
        loss[-int(draw.integers(1, 7)) :] = True
        made.append(Tokenised(draw.integers(3, VOCAB, length).astype(np.int32), loss))
    return made


def losses(result: TrainResult) -> list[float]:
    """Of every training step."""
    return [line["loss"] for line in result.history if "loss" in line]


def assert_same(a: TrainResult, b: TrainResult, tolerance: float = 0.0) -> None:
    """Equal adapters, bit for bit or relative to each array's largest element."""
    ours, theirs = factors(a.adapter), factors(b.adapter)
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=tolerance * np.abs(value).max(), err_msg=name)


def factors(adapter: Any) -> dict[str, np.ndarray]:
    """The trained arrays of an adapter by target and name."""
    return {f"{t}.{n}": np.asarray(x) for t, pair in adapter.state.trained.items() for n, x in pair.items()}


@pytest.fixture(scope="session")
def model() -> Model:
    """The tiny Llama on one device, fp32."""
    return load_model(tiny("llama2")[1], dtype="float32")


@pytest.fixture(scope="session")
def adapter(model: Model) -> Adapter:
    """METHOD's first values: making them anew would compile."""
    return METHOD.init(model, jax.random.key(0))
