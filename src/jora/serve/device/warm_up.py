"""Compiling everything that serving may need, before the first request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array

from jora.reporting import Reporter
from jora.serve.adapters import joining
from jora.serve.adapters.active import Active, PartShape, part
from jora.serve.adapters.active_set import Size
from jora.serve.adapters.pool_writes import write_pages
from jora.serve.adapters.projection import Expanded
from jora.serve.device import sampling
from jora.serve.device.executor import Executor, chunk_widths, part_shapes
from jora.serve.device.programs import decode, prefill
from jora.serve.device.sample_rows import prompt_bits, sample_row, token_counts
from jora.serve.requests import SamplingOptions


def warm_up(executor: Executor, sizes: Sequence[Size], reporter: Reporter) -> None:
    """Run every program once, for nobody: rows are empty, and what is written goes to page 0, which has no owner."""
    largest = sizes[-1]
    widths, shapes = chunk_widths(executor.options), part_shapes(executor.options)
    work: list[Callable[[], None]] = [partial(_adapters, executor, size) for size in sizes]
    work += [partial(_decode, executor, size) for size in sizes]
    work += [partial(_prefill, executor, largest, width, shape) for width in widths for shape in shapes]
    work.append(partial(_sampling, executor))
    reporter.start(len(work), "compiling")
    for number, compile_one in enumerate(work):
        compile_one()
        reporter.update(number + 1)
    reporter.finish()


def _adapters(executor: Executor, size: Size) -> None:
    """What puts adapters into the pool and into an active set of this size, and takes parts of it out."""
    layout, pool_layout = executor.model.layout, executor.pool_layout
    blocks = np.zeros((1, pool_layout.shards, pool_layout.elements), pool_layout.dtype)
    executor.pool = write_pages(executor.pool, [0], blocks, layout)
    active = executor.new_active(size)
    if size.ranks or size.products:
        active = joining.warm_up(active, executor.pool, executor.model.config, layout, pool_layout)
    for shape in part_shapes(executor.options):
        if not shape.vectors or active.vectors:
            part(active, np.int32(0), np.int32(0), shape=shape)


def _decode(executor: Executor, size: Size) -> None:
    rows = executor.options.max_batch
    expanded = None
    if size.products:
        expanded = Expanded(np.zeros(rows + size.products, np.int32), np.full(size.products, rows, np.int32))
    executor.pool, _ = decode(
        executor.model.params,
        executor.new_active(size),
        executor.pool,
        executor.samples.last,
        np.full(rows, -1, np.int32),
        np.full(rows, -1, np.int32),
        np.zeros_like(executor.tables),
        expanded,
        program=executor.program,
    )


def _prefill(executor: Executor, size: Size, width: int, shape: PartShape) -> None:
    """Chunks of this width with this much of an adapter; the widest also with what few requests ask for."""
    active = part(executor.new_active(size), np.int32(0), np.int32(0), shape=shape)
    widest = width == chunk_widths(executor.options)[-1]
    _prefill_once(executor, active, width)
    if widest:
        _prefill_once(executor, active, width, scored=True)
    if widest and shape == PartShape(0, 0) and executor.prefix_slots:
        _prefill_once(executor, active, width, soft=True)
        _prefill_once(executor, active, width, soft=True, scored=True)


def _prefill_once(executor: Executor, active: Active, width: int, *, soft: bool = False, scored: bool = False) -> None:
    nothing = np.zeros(width, np.int32)
    vectors = active.vectors
    expanded = Expanded(np.zeros(vectors, np.int32), np.ones(vectors - 1, np.int32)) if vectors else None
    executor.pool, _, _ = prefill(
        executor.model.params,
        active,
        executor.pool,
        nothing,
        np.int32(0),
        np.int32(0),
        np.int32(-1),
        np.zeros_like(executor.tables[:, 0]),
        expanded,
        executor.soft_prompt(np.zeros((0, executor.model.config.embed), np.float32)) if soft else None,
        nothing if scored else None,
        program=executor.program,
    )


def _sampling(executor: Executor) -> None:
    """The samplers of a batch and of a prompt's first token, with and without a grammar's mask."""
    model, rows = executor.model, executor.options.max_batch
    vocabulary, layout = model.config.vocab_size, model.layout
    row = sample_row(SamplingOptions(temperature=0.0), 0, (), vocabulary)
    executor.samples = sampling.start_row(
        executor.samples, np.int32(0), prompt_bits((), vocabulary), token_counts((), vocabulary), layout=layout
    )

    def logits(count: int) -> Array:
        return jnp.zeros((count, vocabulary), device=layout.sharding((None, "vocab"), (count, vocabulary)))

    for masked in (False, True):
        words = -(-vocabulary // 32)
        masks = [np.zeros((count, words), np.uint32) if masked else None for count in (rows, 1)]
        executor.samples, _ = sampling.sample(
            logits(rows),
            executor.samples,
            executor.rows.at(np.zeros(rows, np.int32)),
            np.zeros(rows, bool),
            masks[0],
            layout=layout,
        )
        executor.samples, _ = sampling.first(logits(1), executor.samples, row, np.int32(0), masks[1], layout=layout)
