"""The loop of a run: set up, step after step, evaluations and checkpoints between, and the result.

The host works one step ahead: it builds and sends the next batch while the devices compute, and reads a
step's metrics after it has started the next one.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jora.data.batches import Batch, Batches
from jora.errors import InputError
from jora.methods.method import Adapter, State
from jora.models.decoder import Remat
from jora.models.model import Model
from jora.reporting import Reporter
from jora.sharding import hosts
from jora.sharding.memory import free_bytes
from jora.train.checkpoints import Checkpoints, Progress
from jora.train.evaluation import evaluation_loss, is_best
from jora.train.examples import digest
from jora.train.feed import Schedule, to_devices
from jora.train.interrupt import Interrupt, delayed_interrupt
from jora.train.memory import peak_bytes
from jora.train.metrics import RATE_STEPS, Line, MetricsFile
from jora.train.optimizer import diverged, learning_rate, optimizer_for
from jora.train.options import TrainOptions
from jora.train.programs import Programs, abstract_params_of
from jora.train.record import TRAINED_FROM, identity, write_config
from jora.train.remat import choose_remat
from jora.train.state import abstract_adapter, abstract_train_state, first_train_state, placement
from jora.train.step import Program

AGREE_EVERY = 4  # steps between two looks of several hosts at whether one of them is to stop


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        adapter: the trained adapter: of the best evaluation where there was one, else of the last step.
        history: the lines of metrics.jsonl.
        directory: the run's directory.
        steps: finished optimiser steps.
        best_step, best_loss: of the best evaluation; None without one.
    """

    adapter: Adapter
    history: list[Line]
    directory: Path
    steps: int
    best_step: int | None = None
    best_loss: float | None = None


class _Pending(NamedTuple):
    """A step that was started and whose metrics were not read yet."""

    step: int
    epoch: int
    metrics: dict[str, jax.Array]
    tokens: int
    answer_tokens: int


class Run:
    """One call of `jora.train`; `execute` is the order of events."""

    def __init__(
        self,
        model: Model,
        adapter: Adapter,
        batches: Batches,
        evaluation: Batches | None,
        directory: Path,
        options: TrainOptions,
        reporter: Reporter,
        start: str | None = None,
    ) -> None:
        """start: `record.digest_of` the adapter that was given to be trained further."""
        self.model, self.layout, self.options, self.reporter = model, model.layout, options, reporter
        self.batches, self.evaluation = batches, evaluation
        self.directory = directory
        self.schedule = Schedule(batches, options.epochs, options.max_steps)
        self.total = self.schedule.total
        self.checkpoints = Checkpoints(directory / "checkpoints", options.keep_checkpoints)
        state = abstract_adapter(adapter.method, adapter.state, model.config, self.layout)
        self.optimizer = optimizer_for(adapter.method, options, self.total, model.config, self.layout, state.trained)
        self.abstract = abstract_train_state(state.trained, self.optimizer, self.layout)
        self.params = adapter.method.rest(model.params)
        self.constant = jax.tree.map(lambda x, a: hosts.put(x, a.sharding), adapter.state.constant, state.constant)
        self.abstract_constant = state.constant
        self.adapter = adapter
        self.seed = hosts.put(np.uint32(options.seed), self.layout.sharding(()))
        eval_digest = None if evaluation is None else digest(evaluation.examples)
        self.identity = identity(model, adapter, options, self.total, digest(batches.examples), eval_digest, start)

    def execute(self, given: dict[str, Any]) -> TrainResult:
        """Set up, train, and write the result."""
        saved = self.checkpoints.latest(self.identity, self.reporter) if self.options.resume else None
        if saved is None:
            self.state = first_train_state(self.adapter, self.abstract, self.optimizer)
        self.programs, remat = self._compile(saved)
        self.progress = saved or Progress(self.identity, remat)
        if saved is None:
            about = {"rematerialisation": remat, "steps": self.total, **_short_identity(self.identity)}
            if hosts.first():
                write_config(self.directory, self.model, self.adapter, self.options, about, given)
        else:
            self._restore(saved.step)
        self.metrics = MetricsFile(self.directory / "metrics.jsonl", self.progress.step, written=hosts.first())
        self.started = time.monotonic() - self.metrics.seconds
        self.last_read = time.monotonic()
        self.recent: deque[tuple[int, float]] = deque(maxlen=RATE_STEPS)
        self.pending: _Pending | None = None
        try:
            self._train()
            return self._result()
        except BaseException:
            self._hand_back()
            raise
        finally:
            self.metrics.close()

    def _restore(self, step: int) -> None:
        """The state of a checkpoint; what it replaces is freed first, for it may fill the devices."""
        if self.adapter.method.in_place:
            old = self.state if hasattr(self, "state") else self.adapter.state.trained
            jax.tree.map(lambda leaf: leaf.delete(), old)
        self.state = self.checkpoints.restore(step, self.abstract)

    def _hand_back(self) -> None:
        """A method that trains in place took over the model's weights: the model gets them as they are now.

        They are no longer those of its fingerprint; `save_result` gives it a new one.
        """
        if self.adapter.method.in_place:
            before = self.model.identity
            began = before.get("fingerprint", before.get(TRAINED_FROM, ""))
            self.model.identity = {"name": before["name"], TRAINED_FROM: began}
            state = State(self.state.trained, self.constant)
            self.model.params = self.adapter.method.base(state, self.params)

    def _compile(self, saved: Progress | None) -> tuple[Programs, Remat]:
        """All programs of the run, and the rematerialisation that was chosen (a resumed run keeps its own)."""
        shapes = self.schedule.shapes
        held = placement(self.abstract, self.layout)
        program = Program(self.model.config, self.layout, self.adapter.method, self.optimizer, "none", held)
        params = self.adapter.method.rest(abstract_params_of(self.model))
        programs = Programs(program, self.abstract, self.abstract_constant, params, self.options)
        remat: Remat
        evaluations = self.evaluation.shapes() if self.evaluation else ()
        self.reporter.start(len(shapes) + len(evaluations), "compiling, programs")
        if self.options.remat != "auto":
            remat = self.options.remat
        elif saved is not None:
            remat = saved.remat
        else:
            remat = choose_remat(
                lambda policy: programs.compile_train(shapes[0], program._replace(remat=policy)),
                hosts.least(free_bytes(self.layout)),
            )
            self.reporter.note(f"rematerialisation: {remat}")
        programs.program = program._replace(remat=remat)
        programs.compile_all(shapes, evaluations, self.reporter)
        self.reporter.finish()
        return programs, remat

    def _train(self) -> None:
        self.reporter.start(self.total, "training, steps", self.progress.step)
        with delayed_interrupt() as interrupt:
            while self.progress.step < self.total and not self._exhausted_patience():
                self._step()
                if self._evaluation_is_due():
                    self._evaluate()
                elif self.progress.step % self.options.save_every == 0:
                    self._save()
                if self._is_asked_to_stop(interrupt):
                    path = self._save()
                    self.reporter.note(
                        f"interrupted after step {self.progress.step}, saved {path}: use resume to go on"
                    )
                    raise KeyboardInterrupt
            self._save()
        self.reporter.finish(**self._last_losses())

    def _is_asked_to_stop(self, interrupt: Interrupt) -> bool:
        """Whether any host is. Several agree every few steps only: they wait for their devices to do so."""
        if hosts.several() and self.progress.step % AGREE_EVERY:
            return False
        return hosts.any_of(interrupt.asked)

    def _step(self) -> None:
        """Start one step, then read the metrics of the one before it."""
        number = self.progress.step
        epoch, planned = self.schedule.step(number)
        host = self.batches.build(planned)
        instances = self.batches.instances_of(planned)
        on_devices = to_devices(host, self.layout, packed=self.options.packing, instances=instances)
        run = self.programs.train[planned.shape]
        self.state, metrics = run(self.state, self.constant, self.params, on_devices, self.seed)
        before = self.pending
        self.pending = _Pending(number + 1, epoch, metrics, *_count(host))
        self.progress.step = number + 1
        self._read(before)

    def _read(self, pending: _Pending | None) -> None:
        """Wait for a step and write its line. Raises InputError where its loss is not finite."""
        if pending is None:
            return
        loss, norm = (float(pending.metrics[name]) for name in ("loss", "grad_norm"))
        now = time.monotonic()
        self.recent.append((pending.tokens, now - self.last_read))
        self.last_read = now
        rate = sum(tokens for tokens, _ in self.recent) / max(sum(s for _, s in self.recent), 1e-9)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._stop(pending.step, f"the loss is {loss} and the gradient's norm {norm}")
        line = {
            "step": pending.step,
            "epoch": pending.epoch,
            "loss": loss,
            "learning_rate": float(learning_rate(pending.step - 1, self.options, self.total)),
            "grad_norm": norm,
            "tokens": pending.tokens,
            "answer_tokens": pending.answer_tokens,
            "tokens_per_s": round(rate, 1),
            "memory_bytes": peak_bytes(self.layout),
            "seconds": round(now - self.started, 3),
        }
        if pending.step % self.options.log_every == 0 or pending.step == self.total:
            self.metrics.write(line)
        self.reporter.update(pending.step, loss=loss, tokens_per_s=rate, learning_rate=line["learning_rate"])

    def _drain(self) -> None:
        """Read the step that is under way, so that what follows knows that it went well."""
        self._read(self.pending)
        self.pending = None

    def _stop(self, step: int, seen: str) -> None:
        """Raise InputError about numbers that are not finite."""
        steps = self.checkpoints.steps()
        kept = f"the last checkpoint is {self.checkpoints.path(steps[-1])}" if steps else "there is no checkpoint yet"
        raise InputError(f"{diverged(step, seen, self.options)}; {kept}")

    def _evaluation_is_due(self) -> bool:
        due = self.schedule.evaluation_is_due(self.progress.step, self.options.eval_every)
        return self.evaluation is not None and due

    def _evaluate(self) -> None:
        """Loss of the evaluation data; a new best, and what `save_every` asks for, is saved."""
        self._drain()
        progress = self.progress
        assert self.evaluation is not None
        loss, answers = evaluation_loss(
            self.evaluation, self.programs, self.state.trained, self.constant, self.params, self.reporter
        )
        if not math.isfinite(loss):
            self._stop(progress.step, f"the evaluation loss is {loss}")
        best = is_best(progress, loss, progress.step)
        seconds = round(time.monotonic() - self.started, 3)
        self.metrics.write(
            {"step": progress.step, "eval_loss": loss, "eval_answer_tokens": answers, "best": best, "seconds": seconds}
        )
        self.reporter.note(f"step {progress.step}: evaluation loss {loss:.4f}{', the best so far' if best else ''}")
        if best or progress.step % self.options.save_every == 0:
            self._save()
        self.last_read = time.monotonic()

    def _exhausted_patience(self) -> bool:
        patience = self.options.patience
        if patience is None or self.progress.evaluations_since_best < patience:
            return False
        self.reporter.note(f"stopped at step {self.progress.step}: no better evaluation in {patience}")
        return True

    def _save(self) -> Path:
        """A checkpoint of the current step, unless there is one."""
        self._drain()
        path = self.checkpoints.path(self.progress.step)
        if not path.exists():
            self.checkpoints.save(self.state, self.progress)
        self.last_read = time.monotonic()
        return path

    def _last_losses(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for line in self.metrics.history:
            found |= {name: line[name] for name in ("loss", "eval_loss") if name in line}
        return found

    def _result(self) -> TrainResult:
        progress = self.progress
        if progress.best_step not in (None, progress.step):
            self._restore(progress.best_step)
        adapter = dataclasses.replace(self.adapter, state=State(self.state.trained, self.constant))
        self._hand_back()
        self._save_result(adapter)
        return TrainResult(
            adapter, self.metrics.history, self.directory, progress.step, progress.best_step, progress.best_loss
        )

    def _save_result(self, adapter: Adapter) -> None:
        """An adapter, by the first host; a model, of which each host has a part, by all."""
        if not adapter.method.in_place:
            adapter = dataclasses.replace(adapter, state=hosts.whole(adapter.state))
        if adapter.method.in_place or hosts.first():
            written = adapter.method.save_result(adapter, self.model, self.directory)
            self.reporter.note(f"{written.name} of step {int(self.state.step)} in {written}")
        hosts.barrier("the result is written")


def _count(batches: list[Batch]) -> tuple[int, int]:
    """(tokens without padding, answer tokens) of a step."""
    tokens = sum(int(np.count_nonzero(batch.segments)) for batch in batches)
    return tokens, int(sum(batch.answer_weights.sum() for batch in batches))


def _short_identity(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("base fingerprint", "training data", "evaluation data") if found[name]}
