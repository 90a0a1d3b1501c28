"""Many jobs in one batch: each is what it would be alone, whatever becomes of the others.

One run serves most tests. Places for two of the four jobs of the first kind: two wait, and one of all fails.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import yaml
from tests.tiny import tiny
from tests.train.conftest import METHOD, Reporter, examples, factors, options

import jora
from jora.cli.train_many_command import read_jobs
from jora.errors import InputError
from jora.methods.lora import LoRA
from jora.methods.storage import load_adapter
from jora.models.model import Model, load_model
from jora.train import TrainOptions
from jora.train.many.jobs import Job, ManyOptions
from jora.train.many.programs import BankPrograms
from jora.train.many.record import JobProgress, JobResult
from jora.train.many.running import Running
from jora.train.metrics import MetricsFile

RATE = 3e-3
STEADY = options(learning_rate=RATE, remat="auto", max_steps=5)


def change(**changes: Any) -> TrainOptions:
    return dataclasses.replace(STEADY, **changes)


JOBS = [
    Job(name="first", data=examples(12), method=METHOD, options=STEADY),
    Job(  # the same shapes: another scale, rate, schedule, length and seed
        name="shorter",
        data=examples(9, seed=1),
        method=dataclasses.replace(METHOD, alpha=5.0),
        options=change(
            max_steps=3, learning_rate=1e-2, schedule="linear", warmup=0.4, seed=7, max_grad_norm=0.3, epsilon=1e-6
        ),
    ),
    Job(name="diverging", data=examples(12, seed=2), method=METHOD, options=change(learning_rate=3e38)),
    Job(name="last", data=examples(12, seed=3), method=dataclasses.replace(METHOD, alpha=7.0), options=change(seed=9)),
    Job(  # another rank and other targets; it stops early
        name="evaluated",
        data=examples(6, seed=4),
        eval_data=examples(3, seed=5),
        method=LoRA(rank=2, targets=["v_proj", "lm_head"]),
        options=change(
            max_steps=9, batch_size=2, accumulation=2, eval_every=1, patience=2, learning_rate=0.02, weight_decay=0.1
        ),
    ),
]
SHARED = ManyOptions(at_once=2, remat="none", save_every=4)


class Ran(NamedTuple):
    results: dict[str, JobResult]
    early: set[str]  # what XLA had compiled when the first step was read
    late: set[str]  # and what afterwards, while two jobs enter and all end
    notes: list[str]
    directory: Path


@pytest.fixture(scope="module")
def many(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    compiled: list[str] = []
    counts: list[int] = []

    def listen(name: str, seconds: float, fun_name: str = "", **_: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    reporter = Reporter(lambda done: counts.append(len(compiled)))
    directory = tmp_path_factory.mktemp("many") / "run"
    results = jora.train_many(model, JOBS, out=directory, options=SHARED, reporter=reporter)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not reporter.stack
    early, late = set(compiled[: counts[0]]), set(compiled[counts[0] :])
    return Ran({result.name: result for result in results}, early, late, reporter.notes, directory)


def losses(history: list[dict[str, Any]], name: str = "loss") -> list[float]:
    return [line[name] for line in history if name in line]


def assert_close(found: Any, expected: Any) -> None:
    """Each array to 3e-6 of its norm: what is asked for is 1e-5, what fp32 needs is 1e-6."""
    ours, theirs = factors(found), factors(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert np.linalg.norm(ours[name] - value) <= 3e-6 * np.linalg.norm(value), name


@pytest.mark.parametrize("name", ["first", "shorter", "last", "evaluated"])
def test_a_job_equals_the_job_alone(name: str, many: Ran, model: Model, tmp_path: Path) -> None:
    job, found = next(job for job in JOBS if job.name == name), many.results[name]
    own = dataclasses.replace(job.options, remat="none")
    alone = jora.train(model, job.method, job.data, out=tmp_path / "alone", options=own, eval_data=job.eval_data)
    assert found.status == ("stopped" if name == "evaluated" else "finished")
    assert (found.steps, found.best_step) == (alone.steps, alone.best_step)
    for measure in ("loss", "grad_norm", "eval_loss"):
        np.testing.assert_allclose(losses(found.history, measure), losses(alone.history, measure), rtol=1e-5)
    same = ("step", "epoch", "learning_rate", "tokens", "answer_tokens", "eval_answer_tokens", "best")
    assert [{k: line[k] for k in same if k in line} for line in found.history] == [
        {k: line[k] for k in same if k in line} for line in alone.history
    ]
    adapter = load_adapter(found.directory / "adapter", model)
    assert_close(adapter, alone.adapter)
    assert adapter.method.alpha == job.method.alpha
    if name == "evaluated":
        assert found.steps < 9 and found.best_loss == pytest.approx(alone.best_loss, rel=1e-5)


def test_a_failing_job_is_reported_and_alone_in_it(many: Ran) -> None:
    found = many.results["diverging"]
    assert found.status == "failed" and found.steps < 5
    assert found.reason and "lower learning_rate (now 3e+38)" in found.reason
    assert any(note.startswith("diverging: step") for note in many.notes)
    assert not (found.directory / "adapter").exists()
    written = json.loads((many.directory / "results.json").read_text())
    assert written["diverging"]["status"] == "failed" and written["first"]["status"] == "finished"


def test_the_adapter_of_an_evaluation_before_a_failure_goes(tmp_path: Path) -> None:
    prepared: Any = SimpleNamespace(job=JOBS[4])
    running = Running(prepared, 0, tmp_path, JobProgress("running", 0, 3, 1.5, 2), MetricsFile(tmp_path / "m.jsonl"))
    (tmp_path / "adapter").mkdir()
    assert running.fail(3, "the loss is nan").startswith("evaluated: step 3: the loss is nan: lower learning_rate")
    assert not (tmp_path / "adapter").exists()
    assert (running.progress.status, running.progress.place) == ("failed", None)
    running.metrics.close()


def test_jobs_come_and_go_without_compiling_a_step(many: Ran) -> None:
    assert many.results["last"].steps == 5  # it waited for a place, which one job finished in and another failed in
    ours = {"jit(bank_step)", "jit(enter)", "jit(leave)", "jit(eval_step)"}
    assert ours <= many.early
    assert not ours & many.late
    # The first values of "last", whose alpha no other job has, are made when it enters: such a program would be seen.
    assert "jit(_draw)" in many.late


def test_the_directory_is_a_jobs_file(many: Ran, tmp_path: Path) -> None:
    values = yaml.safe_load((many.directory / "config.yaml").read_text())
    assert [job["name"] for job in values["jobs"]] == [job.name for job in JOBS]
    for job in values["jobs"]:
        job["data"] = "x.jsonl"
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump(values))
    whole, jobs = read_jobs(tmp_path / "jobs.yaml", {})
    assert whole.many == SHARED and whole.out == str(many.directory)
    assert whole.mesh == "data=1,fsdp=1,tensor=1"
    assert [(job.name, job.method, job.options) for job in jobs] == [(j.name, j.method, j.options) for j in JOBS]
    own = yaml.safe_load((many.directory / "first" / "config.yaml").read_text())
    assert own["rank"] == METHOD.rank and own["learning_rate"] == RATE


def test_resuming_gives_the_same(many: Ran, model: Model, tmp_path: Path) -> None:
    """Interrupted after a few steps, while jobs wait and one has ended."""

    def stop(done: int) -> None:
        if done >= 9:
            signal.raise_signal(signal.SIGINT)

    where = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        jora.train_many(model, JOBS, out=where, options=SHARED, reporter=Reporter(stop))
    assert not (where / "results.json").exists()
    others = [*JOBS[:-1], dataclasses.replace(JOBS[-1], options=change(max_steps=2))]
    again = dataclasses.replace(SHARED, resume=True)
    with pytest.raises(InputError, match=r"cannot resume, job evaluated, .* differs"):
        jora.train_many(model, others, out=where, options=again)
    reporter = Reporter()
    results = jora.train_many(model, JOBS, out=where, options=again, reporter=reporter)
    assert reporter.behind is not None and reporter.behind >= 9
    for result in results:
        expected = many.results[result.name]
        assert (result.status, result.steps, result.reason) == (expected.status, expected.steps, expected.reason)
        assert losses(result.history) == losses(expected.history)
        assert losses(result.history, "eval_loss") == losses(expected.history, "eval_loss")
        if result.status != "failed":
            ours, theirs = (factors(load_adapter(r.directory / "adapter", model)) for r in (result, expected))
            for key, value in theirs.items():
                np.testing.assert_array_equal(ours[key], value, err_msg=key)


@pytest.mark.slow
def test_jobs_whose_rows_are_packed(model: Model, tmp_path: Path) -> None:
    """Beside one whose rows are not, at the same step."""
    packed = change(packing=True, max_steps=2)
    jobs = [
        dataclasses.replace(JOBS[0], name="packed", options=packed),
        dataclasses.replace(JOBS[0], name="plain", options=change(max_steps=2)),
    ]
    results = jora.train_many(model, jobs, out=tmp_path / "run", options=ManyOptions(remat="none"))
    for job, found in zip(jobs, results, strict=True):
        own = dataclasses.replace(job.options, remat="none")
        alone = jora.train(model, job.method, job.data, out=tmp_path / job.name, options=own)
        np.testing.assert_allclose(losses(found.history), losses(alone.history), rtol=1e-5)
        assert_close(load_adapter(found.directory / "adapter", model), alone.adapter)
    first = [next(line["tokens"] for line in result.history if "tokens" in line) for result in results]
    assert first[0] > first[1]  # of the same examples


@pytest.mark.parametrize("mesh", ["data=2,tensor=2", "fsdp=2,tensor=2"])
def test_a_mesh_changes_nothing(mesh: str, many: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pairs of devices share the rows of each job, 4 and (filled up) 3 of them; a pair cuts the model."""

    def compile_fast(self: BankPrograms, planned: Any, remat: Any) -> Any:
        return self.trace(planned, remat).lower().compile({"xla_backend_optimization_level": "0"})

    monkeypatch.setattr(BankPrograms, "compile_step", compile_fast)
    cut = load_model(tiny("llama2")[1], dtype="float32", mesh=mesh)
    jobs = [JOBS[0], dataclasses.replace(JOBS[0], name="odd", options=change(batch_size=3, max_steps=2))]
    results = jora.train_many(cut, jobs, out=tmp_path / "run", options=ManyOptions(remat="none"))
    assert [result.steps for result in results] == [5, 2]
    np.testing.assert_allclose(losses(results[0].history), losses(many.results["first"].history), rtol=1e-5)
    assert np.isfinite(losses(results[1].history)).all()


def test_mistakes_are_named(model: Model, tmp_path: Path) -> None:
    data = examples(4)
    with pytest.raises(InputError, match="two jobs are called 'a'"):
        jora.train_many(model, [Job(name="a", data=data), Job(name="a", data=data)], out=tmp_path / "x")
    with pytest.raises(InputError, match="no job to train"):
        jora.train_many(model, [], out=tmp_path / "x")
    with pytest.raises(InputError, match=r"job name '\.\./a'"):
        Job(name="../a", data=data)
    with pytest.raises(InputError, match="job a: save_every is one for all jobs"):
        Job(name="a", data=data, options=TrainOptions(save_every=3))
    with pytest.raises(InputError, match="optimizer adamw alone"):
        Job(name="a", data=data, options=TrainOptions(optimizer="adamw8bit"))
    with pytest.raises(InputError, match="at_once is 0"):
        ManyOptions(at_once=0)


FILE = """
model: somewhere
out: runs
at_once: 4
rank: 8
learning_rate: 1e-4
jobs:
  - {name: a, data: a.jsonl}
  - {name: b, data: b.jsonl, rank: 64, targets: [q_proj], epochs: 3}
  - {name: c, data: c.jsonl, method: ia3, eval_data: d.jsonl}
"""


def written(text: str, tmp_path: Path) -> Path:
    (tmp_path / "jobs.yaml").write_text(text)
    return tmp_path / "jobs.yaml"


def test_jobs_file(tmp_path: Path) -> None:
    whole, (a, b, c) = read_jobs(written(FILE, tmp_path), {"out": "elsewhere", "resume": True})
    assert (whole.model, whole.out, whole.many) == ("somewhere", "elsewhere", ManyOptions(at_once=4, resume=True))
    assert (a.method, a.options) == (LoRA(rank=8), TrainOptions(learning_rate=1e-4))
    assert (b.method, b.options.epochs) == (LoRA(rank=64, targets=["q_proj"]), 3)
    assert (c.method, c.eval_data) == (jora.IA3(), "d.jsonl")  # a default rank says nothing about IA3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("at_once: 4", "at_ones: 4", "unknown key 'at_ones'; the nearest is 'at_once'"),
        ("epochs: 3", "epoch: 3", "job b: unknown option 'epoch'; the nearest is 'epochs'"),
        ("rank: 64", "rank: many", "job b"),
        (", data: a.jsonl", "", "job a: --data is missing"),
        ("method: ia3", "method: ia4", "the nearest is 'ia3'"),
        ("epochs: 3", "remat: full", "job b: remat is one for all jobs"),
        ("jobs:", "job:", "jobs is a list"),
    ],
)
def test_mistakes_in_a_jobs_file(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_jobs(written(FILE.replace(old, new, 1), tmp_path), {})
