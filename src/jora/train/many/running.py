"""One job while it runs: what it is due, what it tells the devices, what is written of it, and how it ends."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jora.methods.method import Adapter, State
from jora.models.model import Model
from jora.train.evaluation import is_best
from jora.train.many.feed import JobRows
from jora.train.many.plan import Prepared
from jora.train.many.record import JobProgress, JobResult
from jora.train.many.step import Measured
from jora.train.metrics import MetricsFile
from jora.train.optimizer import diverged, learning_rate
from jora.train.options import TrainOptions
from jora.train.record import write_config


@dataclass
class Running:
    """A job of this run. `kind`: the number of its kind."""

    prepared: Prepared
    kind: int
    directory: Path
    progress: JobProgress
    metrics: MetricsFile
    due: bool = False  # its last step asks for an evaluation, or is its last

    @classmethod
    def open(cls, prepared: Prepared, kind: int, run: Path, progress: JobProgress, model: Model) -> Running:
        """Its directory in that of the run, with config.yaml and metrics.jsonl."""
        job, directory = prepared.job, run / prepared.job.name
        directory.mkdir(exist_ok=True)
        if progress.step == 0:
            adapter = Adapter(job.method, State(None, None), model.config)
            given = {"data": job.data, "eval_data": job.eval_data}
            write_config(directory, model, adapter, job.options, {"trained beside": "others"}, given)
        metrics = MetricsFile(directory / "metrics.jsonl", keep_until=progress.step)
        return cls(prepared, kind, directory, progress, metrics)

    @property
    def name(self) -> str:
        return self.prepared.job.name

    @property
    def options(self) -> TrainOptions:
        return self.prepared.job.options

    @property
    def total(self) -> int:
        """Its optimiser steps."""
        return self.prepared.schedule.total

    @property
    def place(self) -> int:
        """Its place in its kind."""
        assert self.progress.place is not None
        return self.progress.place

    def settings(self) -> tuple[Any, ...]:
        """What the next step is told about it, in the order of `step.Settings`."""
        o = self.options
        rate = float(learning_rate(self.progress.step, o, self.total))
        betas = (o.beta1, o.beta2, 1 - o.beta1, 1 - o.beta2)
        return (True, o.seed, rate, *betas, o.epsilon, o.weight_decay, o.max_grad_norm or math.inf)

    def advance(self) -> None:
        """One more step was started."""
        self.progress.step += 1
        step, every = self.progress.step, self.options.eval_every
        evaluates = self.prepared.evaluation is not None and self.prepared.schedule.evaluation_is_due(step, every)
        self.due = step == self.total or evaluates

    def write(self, step: int, rows: JobRows, values: Measured, step_seconds: float, memory: int, now: float) -> None:
        """The line of a step. step_seconds: of one step; now: seconds since the run began."""
        if step % self.options.log_every and step != self.total:
            return
        self.metrics.write(
            {
                "step": step,
                "epoch": rows.epoch,
                "loss": float(values.loss),
                "learning_rate": float(learning_rate(step - 1, self.options, self.total)),
                "grad_norm": float(values.grad_norm),
                "tokens": rows.tokens,
                "answer_tokens": rows.answer_tokens,
                "tokens_per_s": round(rows.tokens / max(step_seconds, 1e-9), 1),
                "memory_bytes": memory,
                "seconds": round(now, 3),
            }
        )

    def evaluated(self, loss: float, answers: int, now: float) -> bool:
        """Write the line of an evaluation; whether it is the best so far."""
        step = self.progress.step
        best = is_best(self.progress, loss, step)
        line = {"step": step, "eval_loss": loss, "eval_answer_tokens": answers, "best": best}
        self.metrics.write({**line, "seconds": round(now, 3)})
        return best

    def exhausted_patience(self) -> bool:
        patience = self.options.patience
        return patience is not None and self.progress.evaluations_since_best >= patience

    def save_adapter(self, state: State, model: Model) -> None:
        """Write its adapter/."""
        adapter = Adapter(self.prepared.job.method, state, model.config, dict(model.identity))
        adapter.method.save_result(adapter, model, self.directory)

    def fail(self, step: int, seen: str) -> str:
        """End it for numbers that are not finite, `seen` after `step`; what to tell the user.

        The adapter of an evaluation before goes: a directory with one is a job that went well.
        """
        self.progress.reason = diverged(step, seen, self.options)
        shutil.rmtree(self.directory / "adapter", ignore_errors=True)
        self.end("failed")
        return f"{self.name}: {self.progress.reason}"

    def end(self, status: Literal["finished", "stopped", "failed"]) -> str:
        """Give its place back; what to tell the user."""
        self.progress.status, self.progress.place = status, None
        return f"{self.name}: {status} after step {self.progress.step}"

    def result(self) -> JobResult:
        """What became of it."""
        p = self.progress
        where = (self.metrics.history, self.directory)
        return JobResult(self.name, p.status, p.step, *where, p.best_step, p.best_loss, p.reason)
