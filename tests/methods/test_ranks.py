"""A rank above a matrix is refused where training begins, and not where a file that has one is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest
from tests.methods.peft_oracle import base
from tests.train.conftest import examples

import jora
from jora.methods.targets import check_options_match
from jora.train import TrainOptions
from jora.train.estimation import estimate
from jora.train.many.jobs import Job

# The tiny Llama 3: width 32, MLP 48, q 32, k and v 16 in heads of 8.
TOO_MUCH: list[tuple[Any, str]] = [
    (jora.LoRA(rank=17, targets=["q_proj", "k_proj"]), "lora: rank 17 is above k_proj, which is 32 x 16; lower it"),
    (jora.LoRA(rank=4, targets=["q_proj"], rank_pattern={r"layers\.1\..*": 33}), "lora: rank 33 is above q_proj"),
    (jora.LoRA(rank=33, targets=["lm_head"]), "lora: rank 33 is above lm_head, which is 32 x 99"),
    (jora.DoRA(rank=33, targets=["down_proj"]), "dora: rank 33 is above down_proj, which is 48 x 32"),
    (jora.PerHeadLoRA(rank=9), "per-head: rank 9 is above q_proj's heads, each 32 x 8; lower it"),
]


@pytest.mark.parametrize(("method", "message"), TOO_MUCH)
def test_it_is_refused_before_training(method: Any, message: str, tmp_path: Path) -> None:
    model = base("llama3")
    with pytest.raises(jora.InputError, match=message):
        jora.train(model, method, examples(2), out=tmp_path / "run")
    with pytest.raises(jora.InputError, match=message):
        jora.train_many(model, [Job(name="one", data=examples(2), method=method)], out=tmp_path / "many")
    with pytest.raises(jora.InputError, match=message):
        estimate(model.path, method, options=TrainOptions())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", [jora.LoRA(rank=16), jora.DoRA(rank=16), jora.PerHeadLoRA(rank=8), jora.VeRA()])
def test_what_a_matrix_can_have_is_not(method: Any) -> None:
    """VeRA's rank may be any: its matrices are frozen, and only vectors train."""
    check_options_match(method, base("llama3").config)


def test_files_may_have_it(tmp_path: Path) -> None:
    model = base("llama3")
    jora.save_adapter(jora.LoRA(rank=40, targets=["v_proj"]).init(model, jax.random.key(0)), tmp_path / "adapter")
    assert jora.load_adapter(tmp_path / "adapter", model).method.rank == 40
