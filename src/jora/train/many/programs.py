"""The compiled programs of a run, all made before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jora.data.batches import Shape
from jora.models.decoder import Remat
from jora.models.model import Model
from jora.reporting import Reporter
from jora.sharding.memory import free_bytes
from jora.train.feed import abstract_batches
from jora.train.many.plan import Group, Planned, Prepared, bank_of, micro_batches, smallest
from jora.train.many.state import KindArrays, Moves, abstract_arrays, abstract_job, moves
from jora.train.many.step import NO_UPDATE, BankProgram, Measured, Settings, bank_step
from jora.train.memory import check_fits
from jora.train.programs import Programs, abstract_params_of, compile_lowered
from jora.train.remat import choose_remat
from jora.train.step import Program, TrainState

# Dtypes of `Settings`, in its order.
SETTING_TYPES = (np.bool_, np.uint32, *(np.float32,) * 8)


class BankPrograms:
    """Executables of a run: steps by what they hold, evaluations by kind, packing and batch shape."""

    def __init__(self, model: Model, groups: Sequence[Group], prepared: Sequence[Prepared], deterministic: bool):
        self.model, self.groups, self.prepared = model, groups, prepared
        self.layout = model.layout
        self.parts = micro_batches(prepared)
        self.packed = any(each.job.options.packing for each in prepared)
        self.arrays = [abstract_arrays(group.kind, model) for group in groups]
        self.jobs = [abstract_job(group.kind, model) for group in groups]
        self.moves: list[Moves] = []
        self.deterministic = deterministic
        self.steps: dict[Planned, Any] = {}
        self.evaluations: dict[tuple[int, bool], Programs] = {}

    def trace(self, planned: Planned, remat: Remat) -> Any:
        """The traced step (a `jax.stages.Traced`) of what `planned` holds."""
        bank = bank_of(self.groups, planned.kinds, self.layout.batch_shards)
        shape = Shape(bank.spans.rows, planned.length, planned.answers)
        batches = abstract_batches(shape, self.parts, self.layout, packed=self.packed)
        whole = self.layout.sharding(())
        settings = tuple(
            Settings(*(jax.ShapeDtypeStruct((kind.jobs,), dtype, sharding=whole) for dtype in SETTING_TYPES))
            for kind in bank.kinds
        )
        own = [self.arrays[k] for k in planned.kinds]
        states = tuple(each.state for each in own)
        many = self.layout.devices > 1
        placement = tuple(leaf.sharding for leaf in jax.tree.leaves(states)) if many else None
        return bank_step.trace(
            states,
            tuple(each.constant for each in own),
            abstract_params_of(self.model),
            batches,
            settings,
            program=BankProgram(self.model.config, self.layout, bank, remat, placement),
        )

    def compile_step(self, planned: Planned, remat: Remat) -> Any:
        """The executable step of what `planned` holds."""
        return compile_lowered(self.trace(planned, remat).lower(), self.layout, self.deterministic)

    def choose_remat(self, largest: Planned) -> Remat:
        """The least rematerialisation that fits."""
        return choose_remat(lambda remat: self.compile_step(largest, remat), free_bytes(self.layout))

    def compile_all(self, planned: Sequence[Planned], remat: Remat, reporter: Reporter) -> None:
        """Compile every program, the largest first: what does not fit is refused (InputError) before any work."""
        evaluated = self._evaluation_shapes()
        reporter.start(len(planned) + len(self.groups) + len(evaluated), "compiling, programs")
        for number, each in enumerate(planned, start=1):
            self.steps[each] = self.compile_step(each, remat)
            if number == 1:
                check_fits(self.steps[each], free_bytes(self.layout))
            reporter.update(number)
        for number, (arrays, job) in enumerate(zip(self.arrays, self.jobs, strict=True), start=len(planned) + 1):
            self.moves.append(moves(arrays, job))
            reporter.update(number)
        for number, (kind, packed, shape) in enumerate(evaluated, start=len(planned) + len(self.groups) + 1):
            if (kind, packed) not in self.evaluations:
                self.evaluations[kind, packed] = self._evaluation(kind, packed, remat)
            programs = self.evaluations[kind, packed]
            programs.evaluate[shape] = programs.compile_evaluate(shape)
            reporter.update(number)
        reporter.finish()

    def _evaluation_shapes(self) -> list[tuple[int, bool, Shape]]:
        found = {
            (k, self.prepared[job].job.options.packing, shape)
            for k, group in enumerate(self.groups)
            for job in group.jobs
            if (evaluation := self.prepared[job].evaluation) is not None
            for shape in evaluation.shapes()
        }
        return sorted(found)

    def _evaluation(self, kind: int, packed: bool, remat: Remat) -> Programs:
        """The evaluation of one job at a time."""
        job, method = self.jobs[kind], self.groups[kind].kind.method
        first = next(p for p in (self.prepared[n] for n in self.groups[kind].jobs) if p.job.options.packing == packed)
        program = Program(self.model.config, self.layout, method, NO_UPDATE, remat)
        state = TrainState(job.trained, None, None)  # type: ignore[arg-type]
        options = dataclasses.replace(first.job.options, deterministic=self.deterministic)
        return Programs(program, state, job.constant, abstract_params_of(self.model), options)

    def step(self, arrays: list[KindArrays], batches: Any, settings: Any, chosen: Planned) -> tuple[Measured, ...]:
        """Run one step; `arrays` gets the new states. Returns what was measured, by kind."""
        own = [arrays[k] for k in chosen.kinds]
        states, measured = self.steps[chosen](
            tuple(each.state for each in own),
            tuple(each.constant for each in own),
            self.model.params,
            batches,
            settings,
        )
        for k, state in zip(chosen.kinds, states, strict=True):
            arrays[k] = KindArrays(state, arrays[k].constant)
        done: tuple[Measured, ...] = measured
        return done

    def smallest(self, need: Planned) -> Planned:
        """The cheapest program that holds `need`."""
        return smallest(self.steps, need, self.groups)
