"""Execute: the arrays that live on the devices, and the dispatch of the programs that change them.

Everything here returns before the devices are done, except `Pending.read`. Programs run in the order of their dispatch,
so a page that was given up may be written again by the next program without waiting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt32

from jora.models.model import Model
from jora.serve.adapters import joining
from jora.serve.adapters.active import Active, PartShape, new_active, part, windows
from jora.serve.adapters.active_set import ActiveSet, Size
from jora.serve.adapters.packing import Spec
from jora.serve.adapters.pool_writes import write_pages
from jora.serve.adapters.projection import Expanded
from jora.serve.adapters.resident import PendingCopy
from jora.serve.device import sampling
from jora.serve.device.programs import Program, PromptScores, SoftPrompt, decode, prefill
from jora.serve.device.results import Pending
from jora.serve.device.sample_rows import RowTable, at_step, prompt_bits, token_counts
from jora.serve.device.sampling import SampleRows
from jora.serve.options import EngineOptions
from jora.serve.pages.layout import PoolLayout
from jora.serve.scheduling.plan import Chunk, Plan
from jora.serve.scheduling.sequence import AdapterVersion
from jora.serve.scheduling.sequence import Sequence as Answering


class Forward(NamedTuple):
    """What the forward programs of one step gave; `sample` goes on with it."""

    decode: list[Answering]
    logits: Float[Array, "b vocab"] | None
    chunk: Chunk | None
    chunk_logits: Float[Array, "1 vocab"] | None
    scores: PromptScores | None


class Executor:
    """The devices' side of an engine. The scheduler decides, this does."""

    def __init__(
        self,
        model: Model,
        options: EngineOptions,
        pool_layout: PoolLayout,
        pages: int,
        targets: tuple[str, ...],
        active_set: ActiveSet,
        max_length: int,
        prefix_slots: int,
    ):
        self.model, self.options, self.pool_layout, self._targets = model, options, pool_layout, targets
        self._set = active_set
        self.program = Program(model.config, model.layout, pool_layout)
        self.pool = pool_layout.new_pool(pages, model.layout)
        self.active = self.new_active(active_set.size)
        self._no_adapters = self.new_active(Size(0, 0))
        self.samples = sampling.new_state(options.max_batch, model.config.vocab_size, model.layout)
        self.rows = RowTable(options.max_batch)
        shape = (len(pool_layout.groups), options.max_batch, pool_layout.blocks(max_length + 1))
        self.tables = np.zeros(shape, np.int32)
        self.prefix_slots = prefix_slots  # of the longest soft prompt
        self._prefixes: dict[Answering, SoftPrompt] = {}

    # --- adapters ---

    def write(self, copies: Sequence[PendingCopy]) -> None:
        """Put adapters into their pages."""
        for copy in copies:
            self.pool = write_pages(self.pool, copy.pages, copy.blocks, self.model.layout)

    def activate(
        self, wanted: Mapping[AdapterVersion, tuple[Spec, list[int]]], rows: Mapping[AdapterVersion, int]
    ) -> None:
        """Have the adapters that run in the active set; each with its shape and its pages, and how many rows it has."""
        update = self._set.update({version: spec for version, (spec, _) in wanted.items()}, rows)
        if update.rebuild is not None:
            self.active = self.new_active(update.rebuild)
        for number in update.leave:
            self.active = joining.leave(self.active, number)
        for member in update.join:
            spec, pages = wanted[member.version]
            self.active = joining.join(
                self.active,
                self.pool,
                pages,
                spec,
                member.place,
                self.model.config,
                self.model.layout,
                self.pool_layout,
            )

    def deactivate(self, version: AdapterVersion) -> None:
        """An adapter that was unloaded, and that no row has any more, leaves the active set."""
        number = self._set.remove(version)
        if number is not None and self.active.ranks:
            self.active = joining.leave(self.active, number)

    def new_active(self, size: Size) -> Active:
        config, layout = self.model.config, self.model.layout
        return new_active(config, layout, self._targets, size.ranks, size.products, self.pool_layout.dtype)

    # --- steps ---

    def start(self, sequence: Answering, row: SampleRows, prefix: Float32[np.ndarray, "m d"] | None) -> None:
        """A sequence has got its row: what it wants of sampling, and its soft prompt."""
        assert sequence.slot is not None
        vocabulary = self.model.config.vocab_size
        self.rows.put(sequence.slot, row)
        self.samples = sampling.start_row(
            self.samples,
            np.int32(sequence.slot),
            prompt_bits(sequence.request.prompt, vocabulary),
            token_counts(sequence.tokens[sequence.prompt_length :], vocabulary),
            layout=self.model.layout,
        )
        if prefix is not None:
            self._prefixes[sequence] = self.soft_prompt(prefix)

    def soft_prompt(self, prefix: Float32[np.ndarray, "m d"]) -> SoftPrompt:
        """A soft prompt in the shape that all have."""
        padded = np.zeros((self.prefix_slots, self.model.config.embed), np.float32)
        padded[: len(prefix)] = prefix
        return SoftPrompt(jnp.asarray(padded), jnp.int32(len(prefix)))

    def forward(self, plan: Plan) -> Forward:
        """Dispatch the step's forward programs: the decode batch, then a chunk of a prompt."""
        logits = self._decode(plan.decode) if plan.decode else None
        chunk_logits, scores = self._prefill(plan.prefill) if plan.prefill is not None else (None, None)
        return Forward(plan.decode, logits, plan.prefill, chunk_logits, scores)

    def _decode(self, sequences: list[Answering]) -> Float[Array, "b vocab"]:
        rows = self.options.max_batch
        lengths = np.full(rows, -1, np.int32)
        versions: list[AdapterVersion | None] = [None] * rows
        tables = np.zeros_like(self.tables)
        for sequence in sequences:
            assert sequence.slot is not None
            lengths[sequence.slot] = sequence.computed
            versions[sequence.slot] = sequence.adapter
            self._fill(tables[:, sequence.slot], sequence)
        # The set keeps the adapters of those who ran last; rows of the base alone need not multiply by them.
        adapted = any(version is not None for version in versions)
        products = self._set.size.products if adapted else 0
        self.pool, logits = decode(
            self.model.params,
            self.active if adapted else self._no_adapters,
            self.pool,
            self.samples.last,
            lengths,
            self._set.numbers(versions),
            tables,
            Expanded(*self._set.expanded(versions, products)) if products else None,
            program=self.program,
        )
        return logits

    def _own(self, version: AdapterVersion | None) -> tuple[Active, int, Expanded | None]:
        """One adapter out of the active set, its number there, and its base products."""
        if version is None:
            return self._no_adapters, -1, None
        spec, place = self._set.members[version].spec, self._set.members[version].place
        shape = part_shape(spec, self.options)
        own = part(self.active, np.int32(place.rank), np.int32(place.vector), shape=shape)
        if not shape.vectors:
            return own, place.number, None
        # The window of vectors may begin before the adapter's own, at the end of the set.
        first = place.vector - min(place.vector, max(0, self.active.vectors - shape.vectors))
        extra, padding = spec.products - 1, shape.vectors - spec.products
        vector = np.array([*range(first, first + spec.products), *[0] * padding], np.int32)
        return own, place.number, Expanded(vector, np.array([0] * extra + [1] * padding, np.int32))

    def _prefill(self, chunk: Chunk) -> tuple[Float[Array, "1 vocab"], PromptScores | None]:
        sequence = chunk.sequence
        scored = sequence.request.sampling.prompt_logprobs is not None
        soft = self._prefixes.get(sequence) if chunk.start < sequence.prefix_slots else None
        widths = chunk_widths(self.options)
        # What few requests ask for is compiled for the widest chunk alone.
        width = widths[-1] if scored or soft is not None else next(w for w in widths if w >= chunk.count)
        at = np.arange(chunk.start, chunk.start + width) - sequence.prefix_slots
        known = np.asarray(sequence.tokens, np.int32)
        tables = np.zeros_like(self.tables[:, 0])
        self._fill(tables, sequence)
        own, number, expanded = self._own(sequence.adapter)
        self.pool, logits, scores = prefill(
            self.model.params,
            own,
            self.pool,
            known[np.clip(at, 0, len(known) - 1)],  # what is before or behind the tokens is not read
            np.int32(chunk.start),
            np.int32(chunk.count),
            np.int32(number),
            tables,
            expanded,
            soft,
            known[np.clip(at + 1, 0, len(known) - 1)] if scored else None,
            program=self.program,
        )
        return logits, scores

    def _fill(self, tables: np.ndarray, sequence: Answering) -> None:
        for group, table in enumerate(sequence.tables):
            tables[group, : len(table)] = table

    def sample(
        self,
        forward: Forward,
        alive: Sequence[Answering],
        wanted: Mapping[Answering, SampleRows],
        masks: Mapping[Answering, UInt32[np.ndarray, " w"]],
    ) -> Pending:
        """Dispatch the step's sampling, of sequences that have not ended meanwhile.

        alive: of the decoded. wanted: the options of every sequence that gets a token. masks: tokens that a grammar
        allows.
        """
        rows = [(s, s.epoch, s.slot) for s in alive if s.slot is not None]
        tokens = self._sample_rows(rows, forward, masks) if rows else None
        first = first_token = scored = None
        chunk = forward.chunk
        if chunk is not None and chunk.sequence.slot is not None:
            if chunk.last:
                first = (chunk.sequence, chunk.sequence.epoch)
                first_token = self._sample_first(chunk.sequence, forward, wanted[chunk.sequence], masks)
            if positions := _scored(chunk) if forward.scores is not None else None:
                scored = (chunk.sequence, chunk.sequence.epoch, positions)
        return Pending(rows, tokens, first, first_token, scored, forward.scores)

    def _sample_rows(
        self, rows: list[tuple[Answering, int, int]], forward: Forward, masks: Mapping[Answering, np.ndarray]
    ) -> sampling.Sampled:
        assert forward.logits is not None
        active = np.zeros(self.options.max_batch, bool)
        steps = np.zeros(self.options.max_batch, np.int32)
        for sequence, _, row in rows:
            active[row] = True
            steps[row] = _step(sequence)
        mask = self._mask({row: masks[s] for s, _, row in rows if s in masks}, self.options.max_batch)
        self.samples, tokens = sampling.sample(
            forward.logits, self.samples, self.rows.at(steps), active, mask, layout=self.model.layout
        )
        return tokens

    def _sample_first(
        self, sequence: Answering, forward: Forward, row: SampleRows, masks: Mapping[Answering, np.ndarray]
    ) -> sampling.Sampled:
        assert forward.chunk_logits is not None and sequence.slot is not None
        self.samples, token = sampling.first(
            forward.chunk_logits,
            self.samples,
            at_step(row, np.array([_step(sequence)], np.int32)),
            np.int32(sequence.slot),
            self._mask({0: masks[sequence]} if sequence in masks else {}, 1),
            layout=self.model.layout,
        )
        return token

    def _mask(self, masks: Mapping[int, UInt32[np.ndarray, " w"]], rows: int) -> UInt32[np.ndarray, "b w"] | None:
        if not masks:
            return None
        words = -(-self.model.config.vocab_size // 32)
        mask = np.full((rows, words), 0xFFFFFFFF, np.uint32)
        for row, allowed in masks.items():
            mask[row] = allowed[:words]
        return mask

    def stop(self, sequence: Answering, slot: int) -> None:
        """A sequence has left its row."""
        self.rows.clear(slot)
        self._prefixes.pop(sequence, None)


def chunk_widths(options: EngineOptions) -> tuple[int, ...]:
    """Sizes of prefill programs: a chunk is padded to the next one. A program for each, so they shrink by four."""
    widths = [options.chunk]
    while widths[-1] // 4 >= 16:
        widths.append(widths[-1] // 4)
    return tuple(reversed(widths))


def _step(sequence: Answering) -> int:
    """Tokens that were generated before the one that is sampled now; called when the forward counts as computed."""
    return sequence.computed - sequence.prefix_slots - sequence.prompt_length


def _scored(chunk: Chunk) -> range:
    """Positions of a chunk whose next token is one of the prompt's."""
    begin = chunk.sequence.prefix_slots
    end = begin + chunk.sequence.prompt_length - 1
    return range(max(chunk.start, begin) - chunk.start, min(chunk.start + chunk.count, end) - chunk.start)


def part_shapes(options: EngineOptions) -> tuple[PartShape, ...]:
    """Sizes in which prefill takes one adapter out of the active set; a program each.

    Low-rank factors come with one base product at most (DoRA), several (fLoRA) without them: see `Spec.check`.
    """
    ranks = (0, *windows(max(options.rank_buckets, default=0)))
    vectors = windows(max(options.product_buckets or (), default=0))
    alone = [PartShape(each, 0) for each in ranks]
    scaled = [PartShape(each, 1) for each in ranks] + [PartShape(0, each) for each in vectors if each > 1]
    return (*alone, *(scaled if vectors else ()))


def part_shape(spec: Spec, options: EngineOptions) -> PartShape:
    """The smallest of them that holds an adapter."""
    holding = (s for s in part_shapes(options) if s.ranks >= spec.rank and s.vectors >= spec.products)
    return min((s for s in holding if (s.vectors > 0) == (spec.products > 0)), key=lambda s: s.ranks + s.vectors)
