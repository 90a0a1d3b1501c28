"""A training step as `jora.train` runs it, compiled and ready to be taken, for what times steps in one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any


def random_row(base: Any, length: int, answers: int, seed: int = 0) -> Any:
    """Random tokens (a `Tokenised`), the last `answers` of which carry loss."""
    import numpy as np

    from jora.data.batches import Tokenised

    tokens = np.random.default_rng(seed).integers(3, base.config.vocab_size, length).astype(np.int32)
    return Tokenised(tokens, np.arange(length) >= length - answers)


def compiled_step(base: Any, method: Any, rows: Sequence[Any], remat: Any) -> tuple[Callable[[], Any], Any, int]:
    """(a call that takes one step on `rows` and waits for it, its compiled program, trained parameters)."""
    import jax
    import numpy as np

    from jora.data.batches import Batches
    from jora.train.feed import Schedule, batch_options, to_devices
    from jora.train.optimizer import make_optimizer
    from jora.train.options import TrainOptions
    from jora.train.programs import Programs, abstract_params_of
    from jora.train.state import abstract_adapter, abstract_train_state, first_train_state
    from jora.train.step import Program

    adapter = method.init(base, jax.random.key(0))
    chosen = TrainOptions(batch_size=len(rows), max_steps=1, max_length=len(rows[0].tokens))
    batches = Batches(list(rows), batch_options(chosen, base.layout))
    schedule, optimizer = Schedule(batches, 1, 1), make_optimizer(chosen, 1)
    shapes = abstract_adapter(method, adapter.state, base.config, base.layout)
    abstract = abstract_train_state(shapes.trained, optimizer, base.layout)
    program = Program(base.config, base.layout, method, optimizer, remat)
    programs = Programs(program, abstract, shapes.constant, abstract_params_of(base), chosen)
    compiled = programs.compile_train(schedule.shapes[0], program)
    batch = to_devices(batches.build(schedule.step(0)[1]), base.layout, packed=False)
    seed = jax.device_put(np.uint32(0), base.layout.sharding(()))
    constant = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), adapter.state.constant, shapes.constant)
    state = [first_train_state(adapter, abstract, optimizer)]

    def step() -> None:
        state[0], metrics = compiled(state[0], constant, base.params, batch, seed)
        jax.block_until_ready((state[0], metrics))

    return step, compiled, sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.trained))
