"""The loop of many jobs: each runs its own course, all of them share every step.

A job takes a place of its kind, trains, is evaluated and ends on its own; the next waiting job of the kind then
takes the place. The host works one step ahead of the devices, so a failure is seen a step late; the devices
themselves have frozen the job by then.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jora.errors import InputError
from jora.models.decoder import Remat
from jora.models.model import Model
from jora.reporting import Reporter
from jora.train.evaluation import evaluation_loss
from jora.train.feed import to_devices
from jora.train.interrupt import delayed_interrupt
from jora.train.many.feed import JobRows, assemble, job_rows
from jora.train.many.jobs import ManyOptions
from jora.train.many.plan import Planned, Prepared, bank_of, choose_programs, group_jobs
from jora.train.many.programs import SETTING_TYPES, BankPrograms
from jora.train.many.record import BankCheckpoints, BankProgress, JobProgress, JobResult, write_results
from jora.train.many.running import Running
from jora.train.many.state import empty_arrays
from jora.train.many.step import Measured, Settings
from jora.train.memory import peak_bytes
from jora.train.metrics import RATE_STEPS


class _Pending(NamedTuple):
    """A step that was started and whose measurements were not read yet."""

    jobs: list[tuple[Running, int, JobRows]]  # with the number of the job's step, from 1
    kinds: tuple[int, ...]
    measured: tuple[Measured, ...]


class ManyRun:
    """One call of `train_many`; `execute` is the order of events."""

    def __init__(
        self, model: Model, prepared: Sequence[Prepared], directory: Path, options: ManyOptions, reporter: Reporter
    ) -> None:
        self.model, self.layout, self.reporter = model, model.layout, reporter
        self.prepared, self.directory, self.options = prepared, directory, options
        self.groups = group_jobs(prepared, model, options.at_once)
        self.programs = BankPrograms(model, self.groups, prepared, options.deterministic)
        self.checkpoints = BankCheckpoints(directory / "checkpoints", options.keep_checkpoints)
        self.total = sum(each.schedule.total for each in prepared)
        self.whole = self.layout.sharding(())
        self.pending: _Pending | None = None
        self.recent: deque[float] = deque(maxlen=RATE_STEPS)

    def identity(self) -> dict[str, Any]:
        """Everything that decides the numbers."""
        own = {f"job {p.job.name}, {k}": v for p in self.prepared for k, v in p.identity.items()}
        shared = {"at_once": self.options.at_once, "deterministic": self.options.deterministic}
        return {"jobs": [p.job.name for p in self.prepared], **shared, **own}

    def execute(self, write_head: Callable[[dict[str, Any]], None]) -> list[JobResult]:
        """Set up, train, and write the results. `write_head` writes the directory's config.yaml."""
        identity = self.identity()
        saved: BankProgress | None = self.checkpoints.latest(identity, self.reporter) if self.options.resume else None
        remat = self._compile(saved)
        if saved is None:
            jobs = {each.job.name: JobProgress() for each in self.prepared}
            self.progress = BankProgress(identity, remat, jobs=jobs)
            write_head({"rematerialisation": remat, "kinds": len(self.groups)})
            self.arrays = [empty_arrays(each) for each in self.programs.arrays]
        else:
            self.progress = saved
            self.arrays = self.checkpoints.restore(saved.step, self.programs.arrays)
        self.jobs = self._open_jobs()
        self.started = time.monotonic() - max(job.metrics.seconds for job in self.jobs)
        self.last_read = time.monotonic()
        try:
            self._train()
            return self._results()
        finally:
            for job in self.jobs:
                job.metrics.close()

    def _compile(self, saved: BankProgress | None) -> Remat:
        """All programs of the run, and the rematerialisation that was chosen (a resumed run keeps its own)."""
        planned = choose_programs(self.groups, self.prepared)
        remat: Remat
        if self.options.remat != "auto":
            remat = self.options.remat
        elif saved is not None:
            remat = saved.remat
        else:
            remat = self.programs.choose_remat(planned[0])
        sizes = ", ".join(f"{group.kind.jobs} x {group.kind.method.name}" for group in self.groups)
        self.reporter.note(f"{len(self.prepared)} jobs, kinds at once: {sizes}; rematerialisation: {remat}")
        self.programs.compile_all(planned, remat, self.reporter)
        return remat

    def _open_jobs(self) -> list[Running]:
        kinds = {job: k for k, group in enumerate(self.groups) for job in group.jobs}
        return [
            Running.open(each, kinds[number], self.directory, self.progress.jobs[each.job.name], self.model)
            for number, each in enumerate(self.prepared)
        ]

    # --- a step ---

    def _train(self) -> None:
        self.reporter.start(self.total, "training, steps of jobs", self._steps_done())
        with delayed_interrupt() as interrupt:
            while running := self._running():
                self._step(running)
                if any(job.due for job in running):
                    self._drain()
                    self._settle([job for job in running if job.due])
                if self.progress.step % self.options.save_every == 0:
                    self._save()
                if interrupt.asked:
                    path = self._save()
                    self.reporter.note(f"interrupted, saved {path}: use resume to go on")
                    raise KeyboardInterrupt
            self._save()
        self.reporter.finish()

    def _steps_done(self) -> int:
        return sum(job.progress.step for job in self.jobs)

    def _running(self) -> list[Running]:
        """The jobs of the next step: waiting jobs take free places, in their order."""
        for k, group in enumerate(self.groups):
            here = [job for job in self.jobs if job.kind == k]
            taken = {job.place for job in here if job.progress.status == "running"}
            free = [place for place in range(group.kind.jobs) if place not in taken]
            waiting = [job for job in here if job.progress.status == "waiting"]
            for place, job in zip(free, waiting, strict=False):
                seed = jax.random.key(job.prepared.job.options.seed)
                first = job.prepared.job.method.init(self.model, seed).state
                self.arrays[k] = self.programs.moves[k].enter(self.arrays[k], place, first)
                job.progress.status, job.progress.place = "running", place
        return [job for job in self.jobs if job.progress.status == "running"]

    def _step(self, running: list[Running]) -> None:
        """Start one step, then read the measurements of the one before it."""
        planned = [job.prepared.schedule.step(job.progress.step)[1].shape for job in running]
        kinds = tuple(sorted({job.kind for job in running}))
        need = Planned(kinds, max(s.length for s in planned), max(s.answers for s in planned))
        chosen = self.programs.smallest(need)
        rows = [job_rows(job.prepared, job.progress.step, chosen) for job in running]
        bank = bank_of(self.groups, chosen.kinds, self.layout.batch_shards)
        starts = dict(zip(chosen.kinds, np.cumsum([0, *(kind.jobs for kind in bank.kinds)]).tolist(), strict=False))
        places = {starts[job.kind] + job.place: each.rows for job, each in zip(running, rows, strict=True)}
        host = assemble(places, bank, self.programs.parts, chosen)
        batches = to_devices(host, self.layout, packed=self.programs.packed)
        measured = self.programs.step(self.arrays, batches, self._settings(running, chosen.kinds), chosen)
        before = self.pending
        for job in running:
            job.advance()
        numbered = [(job, job.progress.step, each) for job, each in zip(running, rows, strict=True)]
        self.pending = _Pending(numbered, chosen.kinds, measured)
        self.progress.step += 1
        self._read(before)

    def _settings(self, running: list[Running], kinds: Sequence[int]) -> tuple[Settings, ...]:
        """What the devices are told about the jobs of each kind."""
        found = []
        for k in kinds:
            # A place without a job: nothing in it moves.
            values = [(False, 0, 0.0, 0.9, 0.999, 0.1, 0.001, 1e-8, 0.0, math.inf)] * self.groups[k].kind.jobs
            for job in running:
                if job.kind == k:
                    values[job.place] = job.settings()
            columns: Any = zip(zip(*values, strict=True), SETTING_TYPES, strict=True)
            found.append(Settings(*(np.array(column, dtype) for column, dtype in columns)))
        placed: tuple[Settings, ...] = jax.device_put(tuple(found), self.whole)
        return placed

    # --- what comes back ---

    def _read(self, pending: _Pending | None) -> None:
        """Wait for a step and write its lines; a job whose loss is not finite has failed."""
        if pending is None:
            return
        measured = dict(zip(pending.kinds, jax.device_get(pending.measured), strict=True))
        now = time.monotonic()
        self.recent.append(now - self.last_read)
        self.last_read = now
        seconds, memory = sum(self.recent) / len(self.recent), peak_bytes(self.layout)
        for job, step, rows in pending.jobs:
            if job.progress.status != "running":  # it failed in the step before, which was read after this one began
                continue
            values = Measured(*(x[job.place] for x in measured[job.kind]))
            if not values.ok:
                job.progress.step = step - 1
                seen = f"the loss is {float(values.loss)} and the gradient's norm {float(values.grad_norm)}"
                self.reporter.note(job.fail(step, seen))
                continue
            job.write(step, rows, values, seconds, memory, now - self.started)
        tokens = sum(rows.tokens for _, _, rows in pending.jobs)
        self.reporter.update(self._steps_done(), jobs=len(pending.jobs), tokens_per_s=tokens / max(seconds, 1e-9))

    def _drain(self) -> None:
        """Read the step that is under way."""
        self._read(self.pending)
        self.pending = None

    # --- a job's own events ---

    def _settle(self, due: list[Running]) -> None:
        """Evaluate and end the jobs whose turn it is."""
        for job in due:
            job.due = False
            if job.progress.status == "running":
                self._evaluate(job)
            if job.progress.status != "running":
                continue
            if job.progress.step == job.total:
                self.reporter.note(job.end("finished"))
            elif job.exhausted_patience():
                self.reporter.note(job.end("stopped"))
        self.last_read = time.monotonic()

    def _evaluate(self, job: Running) -> None:
        """Loss of the job's own evaluation data: the adapter of its best is kept, without such data that of its end."""
        state = self.programs.moves[job.kind].leave(self.arrays[job.kind], job.place)
        if job.prepared.evaluation is None:
            job.save_adapter(state, self.model)
            return
        programs = self.programs.evaluations[job.kind, job.options.packing]
        loss, answers = evaluation_loss(
            job.prepared.evaluation, programs, state.trained, state.constant, self.model.params, self.reporter
        )
        if not math.isfinite(loss):
            self.reporter.note(job.fail(job.progress.step, f"the evaluation loss is {loss}"))
        elif job.evaluated(loss, answers, time.monotonic() - self.started):
            job.save_adapter(state, self.model)

    def _save(self) -> Path:
        """A checkpoint of the current step, unless there is one."""
        self._drain()
        path = self.checkpoints.path(self.progress.step)
        if not path.exists():
            self.checkpoints.save(self.arrays, self.progress)
        self.last_read = time.monotonic()
        return path

    def _results(self) -> list[JobResult]:
        results = [job.result() for job in self.jobs]
        write_results(self.directory, results)
        failed = [result.name for result in results if result.status == "failed"]
        if len(failed) == len(results):
            raise InputError(f"every job failed; {failed[0]}: {results[0].reason}")
        return results
