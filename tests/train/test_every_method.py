"""Every built-in method through the whole of it: trained, interrupted, resumed, loaded, evaluated, merged; and five in
one batch."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tests.inference.characters import talking
from tests.train.conftest import OPTIONS, Reporter, losses

import jora
from jora.data.formats import parse_example
from jora.errors import InputError
from jora.inference import evaluate as evaluation
from jora.inference import tokens as generation
from jora.inference.evaluate import EvalResult, evaluate
from jora.methods import registry
from jora.methods.method import Method
from jora.models.model import Model, load_model
from jora.train import TrainResult
from jora.train.many.jobs import Job, ManyOptions
from jora.train.many.programs import BankPrograms
from jora.train.programs import Programs

PROMPT: dict[str, Any] = dict(prompt_tokens=3)
METHODS: dict[str, Method] = {
    "lora": jora.LoRA(rank=2, targets=["down_proj", "lm_head", "q_proj"]),
    "full": jora.Full(),
    "dora": jora.DoRA(rank=2, targets=["down_proj", "q_proj"]),
    "pissa": jora.PiSSA(rank=2, alpha=2, targets=["down_proj", "q_proj"]),
    "per-head": jora.PerHeadLoRA(rank=2),
    "prompt-tuning": jora.PromptTuning(**PROMPT),
    "lopa": jora.LoPA(**PROMPT, rank=2, hidden=5),
    "idpg": jora.IDPG(**PROMPT, hidden=5),
    "vera": jora.VeRA(rank=8, targets=["down_proj", "q_proj"]),
    "ia3": jora.IA3(),
    "nola": jora.NOLA(rank=2, bases=5, targets=["down_proj", "q_proj"]),
    "flora": jora.FLoRA(rank=2),
}
DATA = [{"prompt": p, "completion": c} for p, c in (("one", "a"), ("two", "bcd"), ("three", "ef"), ("four", "g"))]
RUN = dataclasses.replace(OPTIONS, max_steps=4, batch_size=2, learning_rate=0.02, max_length=16)
FAST = {"xla_backend_optimization_level": "0"}
SOFT = ("prompt-tuning", "lopa", "idpg")  # what they do is no change of the weights


def test_these_are_all_methods() -> None:
    assert METHODS.keys() == registry.BUILT_IN.keys()


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    """Nearly all of the time goes to the compiler."""

    def quick(module: Any, name: str, **options: Any) -> None:
        patch.setattr(module, name, jax.jit(getattr(module, name).__wrapped__, compiler_options=FAST, **options))

    def alone(self: Programs, shape: Any, program: Any) -> Any:
        return self.trace_train(shape, program).lower().compile(FAST)

    def together(self: BankPrograms, planned: Any, remat: Any) -> Any:
        return self.trace(planned, remat).lower().compile(FAST)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Programs, "compile_train", alone)
        patch.setattr(BankPrograms, "compile_step", together)
        quick(generation, "prefill", static_argnames=("program", "slots"))
        quick(generation, "decode", static_argnames="program", donate_argnames="stream")
        quick(evaluation, "_answer_nll", static_argnames="program")
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """One base for all but method full, which changes it."""
    return talking("llama2", tmp_path_factory.mktemp("methods") / "model")[1]


@pytest.fixture(scope="module")
def straight(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Model, TrainResult]]:
    """A method's name -> the base and the result of its run, made once."""
    found: dict[str, tuple[Model, TrainResult]] = {}

    def run(name: str) -> tuple[Model, TrainResult]:
        if name not in found:
            base = fresh(name, model)
            found[name] = base, jora.train(base, METHODS[name], DATA, out=tmp_path_factory.mktemp(name), options=RUN)
        return found[name]

    return run


def fresh(name: str, model: Model) -> Model:
    """A base that the method may train on."""
    return load_model(model.path) if name == "full" else model


def resumed(name: str, base: Model, out: Path) -> TrainResult:
    """Interrupted after two steps, and continued."""
    reporter = Reporter(lambda step: signal.raise_signal(signal.SIGINT) if step == 1 else None)
    run = partial(jora.train, base, METHODS[name], DATA, out=out)
    with pytest.raises(KeyboardInterrupt):
        run(options=RUN, reporter=reporter)
    reporter = Reporter()
    result = run(options=dataclasses.replace(RUN, resume=True), reporter=reporter)
    assert reporter.behind == 2
    return result


def assert_same(found: EvalResult, expected: EvalResult, tolerance: float) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=tolerance)
    assert [row.prediction for row in found.rows] == [row.prediction for row in expected.rows]


# Those whose code is run by others here, or whose training other tests compare with PEFT's.
SLOW = ("lora", "pissa", "per-head", "prompt-tuning", "idpg")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in METHODS])
def test_it_goes_through_everything(name: str, straight: Any, model: Model, tmp_path: Path) -> None:
    base, whole = straight(name)
    again = resumed(name, fresh(name, model), tmp_path / "resumed")
    assert losses(again) == losses(whole) and len(losses(whole)) == 4
    jax.tree.map(np.testing.assert_array_equal, again.adapter.state.trained, whole.adapter.state.trained)

    examples = [parse_example(line, f"line {number}") for number, line in enumerate(DATA)]
    scores = partial(evaluate, data=examples, max_new_tokens=3)
    untrained = scores(model)
    if name == "full":
        trained, written = scores(base), scores(load_model(whole.directory / "model"))
    else:
        trained = scores(base, adapter=whole.adapter)
        written = scores(base, adapter=jora.load_adapter(whole.directory / "adapter", base))
    assert abs(trained.loss - untrained.loss) > 0.01
    # Files of these are a plain LoRA, whose sums are others.
    assert_same(written, trained, 1e-5 if name in ("pissa", "per-head") else 0)

    if name in (*SOFT, "full"):
        with pytest.raises(InputError, match=name):
            jora.merge(base, whole.adapter)
        return
    jora.merge(base, whole.adapter).save(tmp_path / "merged")
    assert_same(scores(load_model(tmp_path / "merged")), trained, 1e-4)


TOGETHER = ("dora", "ia3", "flora", "nola", "vera")


def test_methods_in_one_batch_are_each_itself_alone(straight: Any, model: Model, tmp_path: Path) -> None:
    options = dataclasses.replace(RUN, remat="auto")  # which is the batch's to choose
    jobs = [Job(name=name, data=DATA, method=METHODS[name], options=options) for name in TOGETHER]
    for found in jora.train_many(model, jobs, out=tmp_path / "run", options=ManyOptions(remat="none")):
        alone = straight(found.name)[1]
        for measure in ("loss", "grad_norm"):
            ours, theirs = ([line[measure] for line in result.history] for result in (found, alone))
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=f"{found.name} {measure}")
        adapter = jora.load_adapter(found.directory / "adapter", model)
        for ours, theirs in zip(
            *map(jax.tree.leaves, (adapter.state.trained, alone.adapter.state.trained)), strict=True
        ):
            assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs), found.name
