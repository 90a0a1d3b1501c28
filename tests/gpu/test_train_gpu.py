"""Training on a GPU: what a CPU gives in fp32, the same bits after a resume where asked for, and a 16-bit base."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from tests.gpu.devices import gpu, on_cpu
from tests.tiny import tiny
from tests.train.conftest import METHOD, assert_same, examples, factors, losses, options
from tests.train.test_resume import interrupted

import jora
from jora.methods.method import Adapter
from jora.models.model import Model
from jora.train import TrainResult, train

pytestmark = pytest.mark.gpu

# One batch shape, so one program: every step takes all examples of `interrupted`.
RUN = options(batch_size=10, max_steps=3)


@pytest.fixture(scope="module")
def model() -> Model:
    """The tiny Llama on the GPU, fp32; matmul precision is the tests' own, highest."""
    return jora.load_model(tiny("llama2")[1], dtype="float32")


@pytest.fixture(scope="module")
def adapter(model: Model) -> Adapter:
    """METHOD's first values, with dropout; drawn once, for devices may round a uniform draw differently."""
    return METHOD.init(model, jax.random.key(0))


@pytest.fixture(scope="module")
def trained(model: Model, adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """Three steps in fp32 on the GPU."""
    return train(model, adapter, examples(10), out=tmp_path_factory.mktemp("gpu") / "run", options=RUN)


def test_three_steps_equal_those_on_the_cpu(
    model: Model, adapter: Adapter, trained: TrainResult, tmp_path: Path
) -> None:
    expected = train(on_cpu(model), adapter, examples(10), out=tmp_path / "run", options=RUN)
    for result, device in ((trained, gpu()), (expected, jax.devices("cpu")[0])):
        assert {d for leaf in jax.tree.leaves(result.adapter.state) for d in leaf.devices()} == {device}
    assert len(losses(trained)) == 3 and losses(trained)[2] < losses(trained)[0]
    np.testing.assert_allclose(losses(trained), losses(expected), rtol=1e-5)
    assert_same(expected, trained, 1e-4)


def test_a_resumed_run_has_the_same_bits(model: Model, adapter: Adapter, tmp_path: Path) -> None:
    """Each of the three runs compiles its step anew: no choice by timing may decide a bit."""
    chosen = dataclasses.replace(RUN, max_steps=4, deterministic=True)
    straight = train(model, adapter, examples(10), out=tmp_path / "a", options=chosen)
    interrupted(model, adapter, tmp_path / "b", 1, chosen)
    assert [path.name for path in (tmp_path / "b" / "checkpoints").iterdir()] == ["step-00000002"]
    again = dataclasses.replace(chosen, resume=True)
    resumed = train(model, adapter, examples(10), out=tmp_path / "b", options=again)
    assert_same(straight, resumed)
    assert losses(straight) == losses(resumed) and len(losses(resumed)) == 4


def test_a_16_bit_base_trains_an_fp32_adapter(adapter: Adapter, trained: TrainResult, tmp_path: Path) -> None:
    """Heads of eight: attention is cuDNN's, forward and backward."""
    half = jora.load_model(tiny("llama2")[1], dtype="bfloat16")
    result = train(half, adapter, examples(10), out=tmp_path / "run", options=RUN)
    assert {array.dtype for array in factors(result.adapter).values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(losses(result), losses(trained), rtol=0.02)
