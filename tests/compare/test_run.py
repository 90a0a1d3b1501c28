"""The whole of a comparison on a tiny model: runs, what is skipped, what fails, what is written."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from tests.bytewise import bytewise_llama

import jora
from jora.cli.main import run as jora_command
from jora.compare import run as compare_run
from jora.compare import worker
from jora.compare.plan import read_plan
from jora.compare.results import JOB, RESULT, read_result, write_json
from jora.errors import InputError

pytestmark = pytest.mark.slow

PLAN = """
model: {model}
data: {data}/train.jsonl
eval_data: {data}/eval.jsonl
seeds: [1]
batch_size: 2
max_length: 256
schedule: constant
warmup: 0.0
evaluation: {{max_new_tokens: 4, batch_size: 2}}
methods:
  - {{label: LoRA r4, method: lora, rank: 4, learning_rate: 5e-3}}
  - {{label: too fast, method: lora, rank: 4, learning_rate: 1e30}}
"""


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("plan")
    model = bytewise_llama(tmp_path_factory.mktemp("model"))
    for split, count in (("train", 8), ("eval", 2)):
        rows = [
            {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"number {i}"}]}
            for i in range(count)
        ]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = directory / "plan.yaml"
    path.write_text(PLAN.format(model=model, data=directory))
    return path


REAL_EXECUTE = compare_run._execute


@pytest.fixture(scope="module", autouse=True)
def executed() -> Iterator[list[str]]:
    """What was run, in order. Processes of their own would compile everything again; one test below has real ones."""
    done: list[str] = []

    def execute(run):
        done.append(f"{run.job['label']} {run.job['seed']}")
        write_json(run.directory / JOB, run.job)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["worker", str(run.directory)])
            worker.main()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_run, "_execute", execute)
        yield done


class Compared(NamedTuple):
    """One `jora compare`: its directory, what it ran, what it printed."""

    out: Path
    executed: list[str]
    printed: str


@pytest.fixture(scope="module")
def compared(tmp_path_factory, plan_file, executed) -> Compared:
    out, printed = tmp_path_factory.mktemp("compared") / "out", io.StringIO()
    executed.clear()
    with redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        jora_command(["compare", str(plan_file), "--out", str(out)])
    assert ended.value.code == 1  # one of its runs failed
    return Compared(out, list(executed), printed.getvalue())


@pytest.fixture(scope="module")
def out(compared) -> Path:
    return compared.out


def test_every_method_with_every_seed(compared):
    out, executed, table = compared
    assert executed == ["base None", "LoRA r4 1", "too fast 1"]
    assert table == (out / "results.md").read_text()
    assert "| LoRA r4 |" in table and "- too fast, seed 1: step 2: the loss is nan" in table
    names = {path.name for path in out.iterdir() if path.is_file()}
    assert names == {
        *("results.json", "results.csv", "results.md", "index.html"),
        *("loss-time.png", "score-parameters.png", "memory.png"),
    }
    results = json.loads((out / "results.json").read_text())["results"]
    assert [(r["label"], r["seed"], r["error"] is None) for r in results] == [
        ("base", None, True),
        ("LoRA r4", 1, True),
        ("too fast", 1, False),
    ]


def test_a_run_is_measured(plan_file, out):
    directory = out / "runs" / "lora-r4" / "seed-1"
    result = read_result(directory / RESULT)
    training = result.training
    assert training is not None
    shapes = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32), "g": (32, 48), "u": (32, 48), "d": (48, 32)}
    assert training.parameters == 2 * 4 * sum(a + b for a, b in shapes.values())
    assert training.adapter_bytes == (directory / "train" / "adapter" / "adapter_model.safetensors").stat().st_size
    lines = [json.loads(line) for line in (directory / "train" / "metrics.jsonl").read_text().splitlines()]
    assert training.curve == tuple((line["seconds"], line["loss"]) for line in lines)
    assert (training.steps, training.seconds) == (4, lines[-1]["seconds"])
    gaps = np.diff([line["seconds"] for line in lines])
    assert training.seconds_a_step == pytest.approx(np.median(gaps), abs=1e-4)
    assert training.peak_bytes > 2**27  # jax alone is more
    assert "seed: 1\n" in (directory / "train" / "config.yaml").read_text()


def test_the_scores_are_evaluates_of_the_saved_adapter(plan_file, out):
    plan = read_plan(plan_file)
    model = jora.load_model(plan.common["model"])
    directory = out / "runs" / "lora-r4" / "seed-1"
    adapter = jora.load_adapter(directory / "train" / "adapter", model)
    expected = jora.evaluate(model, plan.eval_data, adapter, max_new_tokens=4, batch_size=2)
    scores = read_result(directory / RESULT).scores
    assert scores["loss"] == pytest.approx(expected.loss, abs=1e-6)
    assert scores["loss"] != read_result(out / "base" / RESULT).scores["loss"]
    assert scores["examples"] == len((directory / "rows.jsonl").read_text().splitlines()) == 2


def test_what_is_finished_is_not_repeated(plan_file, out, executed):
    executed.clear()
    before = (out / "results.json").read_text()
    (out / "index.html").unlink()
    compare_run.compare(read_plan(plan_file), out)
    assert executed == []
    assert (out / "results.json").read_text() == before and (out / "index.html").exists()


def test_what_was_begun_goes_on(plan_file, out, executed, tmp_path):
    """An evaluation that was interrupted begins again, the training before it does not."""
    copied = tmp_path / "out"
    shutil.copytree(out, copied)
    directory = copied / "runs" / "lora-r4" / "seed-1"
    job = json.loads((directory / JOB).read_text())
    job["options"]["out"] = str(directory / "train")
    write_json(directory / JOB, job)
    (directory / RESULT).unlink()
    checkpoint = (directory / "train" / "metrics.jsonl").stat().st_mtime_ns
    result = worker.run(directory, job, compare_run.SILENT)
    assert (directory / "train" / "metrics.jsonl").stat().st_mtime_ns == checkpoint
    assert dataclasses.replace(result, machine="") == dataclasses.replace(
        read_result(out / "runs" / "lora-r4" / "seed-1" / RESULT), machine=""
    )
    # And a training that was interrupted is resumed: it is finished, so it has no step left.
    (directory / "training.json").unlink()
    again = worker.run(directory, job, compare_run.SILENT).training
    assert again is not None and again.curve == result.training.curve


def test_other_settings_are_not_mixed_in(plan_file, out, executed):
    changed = plan_file.with_name("changed.yaml")
    changed.write_text(plan_file.read_text().replace("5e-3", "6e-3"))
    with pytest.raises(InputError, match=r"lora-r4/seed-1 was run with other settings \(learning_rate differs\)"):
        compare_run.compare(read_plan(changed), out)


def test_a_failure_is_tried_again_with_other_settings(plan_file, out, tmp_path, monkeypatch):
    copied = tmp_path / "out"
    shutil.copytree(out, copied)
    for path in copied.rglob(JOB):  # the copy's runs know their place
        path.write_text(path.read_text().replace(str(out), str(copied)))
    calmer = plan_file.with_name("calmer.yaml")
    calmer.write_text(plan_file.read_text().replace("1e30", "1e-3"))
    monkeypatch.setattr(compare_run, "_execute", lambda run: f"not run: {sorted(run.directory.iterdir())}")
    with pytest.raises(FileNotFoundError, match="too-fast/seed-1"):  # the old failure's directory is gone
        compare_run.compare(read_plan(calmer), copied)


def test_seeds_come_one_after_the_other(plan_file, tmp_path):
    plan = dataclasses.replace(read_plan(plan_file), seeds=(4, 7))
    runs = compare_run._runs(plan, tmp_path)
    names = [(run.job["label"], run.job["seed"], str(run.directory.relative_to(tmp_path))) for run in runs]
    assert names == [
        ("base", None, "base"),
        ("LoRA r4", 4, "runs/lora-r4/seed-4"),
        ("too fast", 4, "runs/too-fast/seed-4"),
        ("LoRA r4", 7, "runs/lora-r4/seed-7"),
        ("too fast", 7, "runs/too-fast/seed-7"),
    ]
    assert [run.job["options"].get("seed") for run in runs] == [None, 4, 4, 7, 7]


@pytest.fixture
def process(tmp_path):
    """Run a job in a process of its own; what the process did wrong."""

    def process(**job):
        directory = tmp_path / "run"
        return directory, REAL_EXECUTE(compare_run._Run(directory, {"label": "x", "seed": 0, "options": {}, **job}))

    return process


def test_a_users_mistake_in_a_process_is_a_result(process):
    directory, error = process(options={"model": "./absent", "data": "d", "out": "o"})
    assert error is None
    assert read_result(directory / RESULT).error.startswith("./absent: no such model")


def test_a_process_that_dies_says_so(process, capfd):
    directory, error = process(options=None)
    assert error == "its process ended with code 1: see its messages"
    assert "Traceback" in capfd.readouterr().err and not (directory / RESULT).exists()


def test_data_that_is_not_there_is_named(plan_file, tmp_path):
    plan = read_plan(plan_file)
    with pytest.raises(InputError, match=r"absent\.jsonl: No such file.*eval_data"):
        compare_run.compare(dataclasses.replace(plan, eval_data="absent.jsonl"), tmp_path / "out")


def test_the_peak_is_the_process_own():
    """Not that of the process which started it, and not what it holds now."""
    code = "from jora.compare.worker import _process_peak as peak; x = b'1' * 2**28; del x; print(peak())"
    held = np.ones(2**26)  # 512 MiB
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**28 < int(done.stdout) < held.nbytes
