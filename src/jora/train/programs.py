"""The compiled programs of a run: one train step and one evaluation a batch shape, all made before step 0.

A step later runs an executable that exists; a shape that was not planned would raise, never recompile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jora.data.batches import Shape
from jora.models.model import Model
from jora.reporting import Reporter
from jora.sharding import Layout, hosts
from jora.sharding.memory import free_bytes
from jora.train.feed import abstract_batches
from jora.train.memory import check_fits, return_freed_memory
from jora.train.options import TrainOptions
from jora.train.step import Program, TrainState, eval_step, train_step

# XLA on GPUs: the same bits every time, at the price of slower scatters and no autotuning.
DETERMINISTIC = {"xla_gpu_deterministic_ops": True}


@dataclass
class Programs:
    """Executables by batch shape. `state` and `constant` are abstract (shapes, dtypes, shardings)."""

    program: Program
    state: TrainState
    constant: Any
    params: Any
    options: TrainOptions
    train: dict[Shape, Any] = field(default_factory=dict)
    evaluate: dict[Shape, Any] = field(default_factory=dict)

    def trace_train(self, shape: Shape, program: Program) -> Any:
        """The traced train step of `shape` (a `jax.stages.Traced`)."""
        batches = self._batches(shape, self.options.accumulation, program)
        seed = jax.ShapeDtypeStruct((), jnp.uint32, sharding=program.layout.sharding(()))
        return train_step.trace(self.state, self.constant, self.params, batches, seed, program=program)

    def compile_train(self, shape: Shape, program: Program) -> Any:
        """The executable train step of `shape`; compiled once a process for equal arguments."""
        return compile_lowered(self.trace_train(shape, program).lower(), program.layout, self.options.deterministic)

    def compile_evaluate(self, shape: Shape) -> Any:
        """The executable evaluation of one batch of `shape`."""
        program = self.program
        batch = self._batches(shape, 1, program, stacked=False)
        lowered = eval_step.lower(self.state.trained, self.constant, self.params, batch, program=program)
        return compile_lowered(lowered, program.layout, self.options.deterministic)

    def _batches(self, shape: Shape, accumulation: int, program: Program, stacked: bool = True) -> Any:
        return abstract_batches(
            shape,
            accumulation,
            program.layout,
            packed=self.options.packing,
            stacked=stacked,
            instance_width=program.method.instance_width(program.config),
        )

    def compile_all(self, train: Sequence[Shape], evaluate: Sequence[Shape], reporter: Reporter) -> None:
        """Compile every shape, the largest first: what does not fit is refused (InputError) before any work is done.

        reporter: told how many are done, of what the caller has started.
        """
        for shape in train:
            self.train[shape] = self.compile_train(shape, self.program)
            if len(self.train) == 1:
                check_fits(self.train[shape], hosts.least(free_bytes(self.program.layout)))
            reporter.update(len(self.train))
        for shape in evaluate:
            self.evaluate[shape] = self.compile_evaluate(shape)
            reporter.update(len(self.train) + len(self.evaluate))


def compile_lowered(lowered: Any, layout: Layout, deterministic: bool) -> Any:
    """The executable of a `jax.stages.Lowered`."""
    on_gpu = layout.mesh.devices.flat[0].platform == "gpu"
    compiled = lowered.compile(compiler_options=DETERMINISTIC if deterministic and on_gpu else None)
    return_freed_memory()
    return compiled


def abstract_params_of(model: Model) -> Any:
    """Shapes, dtypes and shardings of weights that are on the devices."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), model.params)
