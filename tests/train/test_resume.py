"""A run that was interrupted and resumed gives the same bits as one that was not."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import jax
import pytest
from tests.train.conftest import METHOD, Reporter, assert_same, examples, losses, options

from jora.data.batches import Tokenised
from jora.errors import InputError
from jora.methods.lora import LoRA
from jora.methods.method import Adapter, State
from jora.models.model import Model
from jora.train import TrainOptions, train
from jora.train.checkpoints import Checkpoints

# Dropout, accumulation and a moving rate: all that a forgotten bit of state would change.
RUN = options(batch_size=2, accumulation=2, max_steps=8, warmup=0.3, save_every=100)
SHOWN = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens", "answer_tokens", "best")


def interrupted(model: Model, adapter: Adapter, out: Path, at: int, chosen: TrainOptions, **more: Any) -> None:
    """Run until Ctrl-C arrives while step `at` is read."""
    reporter = Reporter(lambda step: signal.raise_signal(signal.SIGINT) if step == at else None)
    with pytest.raises(KeyboardInterrupt):
        train(model, adapter, examples(10), out=out, options=chosen, reporter=reporter, **more)


def test_resumed_run_equals_the_straight_one(model: Model, adapter: Adapter, tmp_path: Path) -> None:
    held_out = examples(4, seed=7)
    chosen = dataclasses.replace(RUN, eval_every=3)
    straight = train(model, adapter, examples(10), out=tmp_path / "a", options=chosen, eval_data=held_out)
    interrupted(model, adapter, tmp_path / "b", 4, chosen, eval_data=held_out)
    resumed = train(
        model,
        adapter,
        examples(10),
        out=tmp_path / "b",
        options=dataclasses.replace(chosen, resume=True),
        eval_data=held_out,
    )
    assert_same(straight, resumed)
    assert (straight.best_step, straight.best_loss) == (resumed.best_step, resumed.best_loss)

    def shown(run: str) -> list[dict[str, Any]]:
        lines = map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
        return [{key: line[key] for key in SHOWN if key in line} for line in lines]

    assert shown("a") == shown("b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / "adapter" / name).read_bytes() == (tmp_path / "b" / "adapter" / name).read_bytes()


def test_lines_after_the_checkpoint_are_made_again(model: Model, adapter: Adapter, tmp_path: Path) -> None:
    # A crash after step 6, of which only step 4 has a checkpoint.
    chosen = dataclasses.replace(RUN, save_every=4)

    class Crash(RuntimeError):
        pass

    def crash(step: int) -> None:
        if step == 6:
            raise Crash

    with pytest.raises(Crash):
        train(model, adapter, examples(10), out=tmp_path, options=chosen, reporter=Reporter(crash))
    assert Checkpoints(tmp_path / "checkpoints", 2).steps() == [4]
    reporter = Reporter()
    resumed = train(
        model,
        adapter,
        examples(10),
        out=tmp_path,
        options=dataclasses.replace(chosen, resume=True),
        reporter=reporter,
    )
    assert reporter.notes[0] == "resuming after step 4"
    assert reporter.behind == 4
    assert [line["step"] for line in resumed.history] == list(range(1, 9))
    seconds = [line["seconds"] for line in resumed.history]
    assert seconds == sorted(seconds)


def test_resuming_a_finished_run_gives_its_adapter(model: Model, adapter: Adapter, tmp_path: Path) -> None:
    first = train(model, adapter, examples(10), out=tmp_path, options=RUN)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    again = train(model, adapter, examples(10), out=tmp_path, options=dataclasses.replace(RUN, resume=True))
    assert_same(first, again)
    assert losses(again) == losses(first)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_another_run_is_not_resumed(model: Model, adapter: Adapter, tmp_path: Path) -> None:
    interrupted(model, adapter, tmp_path, 1, RUN)
    resuming = dataclasses.replace(RUN, resume=True)
    other = [*examples(9), *examples(1, seed=50)]

    def refused(what: str, method: Any = adapter, data: list[Tokenised] | None = None, **changes: Any) -> None:
        with pytest.raises(InputError, match=f"cannot resume, {what} differs"):
            chosen = dataclasses.replace(resuming, **changes)
            train(model, method, data or examples(10), out=tmp_path, options=chosen)

    refused("training data", data=other)
    refused("option learning_rate", learning_rate=0.02)
    refused("option seed", seed=5)
    refused("method option rank", method=LoRA(rank=2, dropout=0.1, targets=METHOD.targets))
    further = jax.tree.map(lambda x: x * 2, adapter.state.trained)
    refused("adapter to begin with", method=dataclasses.replace(adapter, state=State(further, adapter.state.constant)))
    with pytest.raises(InputError, match="evaluation data differs"):
        train(model, adapter, examples(10), out=tmp_path, options=resuming, eval_data=other)
    # How often it is saved may change.
    train(model, adapter, examples(10), out=tmp_path, options=dataclasses.replace(resuming, save_every=3))


def test_only_the_latest_and_the_best_are_kept(model: Model, adapter: Adapter, tmp_path: Path) -> None:
    chosen = dataclasses.replace(RUN, save_every=1, keep_checkpoints=2, eval_every=1)
    result = train(model, adapter, examples(10), out=tmp_path, options=chosen, eval_data=examples(4, seed=7))
    kept = Checkpoints(tmp_path / "checkpoints", 2).steps()
    assert kept == sorted({result.best_step, 7, 8})
    assert not list((tmp_path / "checkpoints").glob(".*"))  # nothing half-written


# orbax's threads may still report to an event loop that it has closed after its first error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_named(model: Model, adapter: Adapter, tmp_path: Path) -> None:
    interrupted(model, adapter, tmp_path, 1, RUN)
    [checkpoint] = (tmp_path / "checkpoints").iterdir()
    resuming = dataclasses.replace(RUN, resume=True)
    run = (checkpoint / "run.json").read_bytes()
    (checkpoint / "run.json").write_bytes(run[:-20])
    with pytest.raises(InputError, match=f"run.json: not valid JSON.*: delete {checkpoint} to go on"):
        train(model, adapter, examples(10), out=tmp_path, options=resuming)
    (checkpoint / "run.json").write_bytes(run)
    for path in (checkpoint / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 100 and path.name not in ("_METADATA", "_sharding"):
            path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(InputError, match=f"{checkpoint}: a damaged checkpoint"):
        train(model, adapter, examples(10), out=tmp_path, options=resuming)
