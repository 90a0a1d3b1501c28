"""The serving engine: it plans, executes and emits (docs/serving.md, "A step"). Usable as a library, without HTTP."""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from jora.data.chat import Template
from jora.errors import InputError
from jora.inference.ends import end_tokens
from jora.models.model import Model
from jora.reporting import SILENT, Reporter
from jora.serve import memory
from jora.serve.adapters.active_set import ActiveSet
from jora.serve.adapters.catalogue import Catalogue
from jora.serve.adapters.describe import AdapterInfo
from jora.serve.adapters.host_store import HostStore
from jora.serve.adapters.loading import Limits, Loader
from jora.serve.adapters.needs import fitted
from jora.serve.adapters.resident import Resident
from jora.serve.adapters.soft_prompts import SoftPrompts
from jora.serve.answers import Answer
from jora.serve.device.executor import Executor
from jora.serve.device.results import Pending, Sampled, Scored
from jora.serve.device.sample_rows import answer_seed, sample_row
from jora.serve.device.sampling import SampleRows
from jora.serve.device.warm_up import warm_up
from jora.serve.options import EngineOptions
from jora.serve.pages.allocator import Pages
from jora.serve.pages.layout import PoolLayout
from jora.serve.pages.prefix_cache import PrefixCache
from jora.serve.requests import Event, Logprobs, Request
from jora.serve.scheduling.plan import Plan
from jora.serve.scheduling.scheduler import Scheduler
from jora.serve.scheduling.sequence import AdapterVersion, Sequence
from jora.serve.stats import EngineStats
from jora.serve.text.detokenise import Detokeniser

IDLE = 0.001  # s between two looks where there is nothing to compute
SMALL = 32  # tokens of a sequence that any pool must hold


@dataclass
class _Live:
    """A sequence that has not ended, with its answer."""

    sequence: Sequence
    answer: Answer
    row: SampleRows
    slot: int | None = None  # as the executor knows it
    scores: list[Logprobs] = field(default_factory=list)
    soft: np.ndarray | None = None  # its soft prompt [m, d]


class Engine:
    """One base model and its adapters, many requests at a time. Not thread-safe: `AsyncEngine` is for servers.

    Args:
        model: the base; its mesh may cut tensors only.
        options: sizes and policies.
        adapters: a directory of adapters, or a `Catalogue` (which may allow loading from others); None: the base alone.
        clock: seconds, rising; deadlines are on it.

    Raises:
        InputError: a pool that does not fit the devices, or holds no sequence of `SMALL` tokens.
    """

    def __init__(
        self,
        model: Model,
        options: EngineOptions | None = None,
        adapters: str | os.PathLike[str] | Catalogue | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.catalogue = Catalogue.of(adapters, model)
        options = memory.with_pool(model, fitted(options or EngineOptions(), self.catalogue.infos()))
        assert options.pool_bytes is not None and options.targets is not None
        assert options.product_buckets is not None and options.soft_tokens is not None
        self.model, self.options = model, options
        self.targets = options.targets
        self.pool_layout = PoolLayout.of(model.config, model.layout, model.dtype, options.page_tokens)
        self.pages = Pages(self.pool_layout.pages_in(options.pool_bytes))
        self._detokeniser = Detokeniser(model.tokenizer)
        self._ends = end_tokens(model, Template(model.tokenizer))
        self._active_set = active = ActiveSet(options.rank_buckets, options.product_buckets)
        ranks, products = (max(buckets, default=0) for buckets in (options.rank_buckets, options.product_buckets))
        limits = Limits(self.targets, ranks, products, options.soft_tokens, self.pages.total - 1)
        self.loader = Loader(self.catalogue, model, self.pool_layout, limits)
        self.host = HostStore(self.loader, options.host_adapters_bytes)
        self.resident = Resident(
            self.catalogue,
            self.loader,
            self.host,
            self.pages,
            active,
            on_retired=self._retired,
            on_freed=lambda version: self.executor.deactivate(version),
        )
        cache = PrefixCache(self.pool_layout, self.pages) if options.prefix_cache else None
        self.scheduler = Scheduler(options, self.pool_layout, self.pages, cache, self.resident, clock)
        self.max_length = self._longest()
        self.executor = Executor(
            model,
            options,
            self.pool_layout,
            self.pages.total,
            self.targets,
            active,
            self.max_length,
            options.soft_tokens,
        )
        self._clock = clock
        self._live: dict[Sequence, _Live] = {}
        self._by_request: dict[str, list[Sequence]] = {}
        self._pending: Pending | None = None
        self._soft_prompts = SoftPrompts(model)
        self._unprompted: dict[str, None] = {}  # requests whose soft prompt is not known yet
        self._counts: Counter[str] = Counter()

    def _longest(self) -> int:
        """Most positions of a sequence: what is asked for, as far as the model has them and the pool holds them."""
        asked = self.options.longest(self.model.config.max_positions)
        held = self.scheduler.longest(None, asked)
        if held < min(SMALL, asked):
            raise InputError(
                f"a pool of {self.options.pool_bytes:,} bytes holds a sequence of {held} tokens at most, which is too"
                " few to serve; make it larger"
            )
        return held

    def warm_up(self, reporter: Reporter = SILENT) -> None:
        """Load the encoders, and compile every program that serving may need; after this nothing compiles.

        Raises InputError for an encoder that cannot be read.
        """
        warm_up(self.executor, self._active_set.sizes(), reporter)
        if self.options.soft_tokens:
            self._soft_prompts.warm_up(self.max_length, self.options.encoders)

    def close(self) -> None:
        """End its threads, after what they are doing."""
        self.host.close()
        self._soft_prompts.close()

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._live) or self._pending is not None

    def knows(self, request: str) -> bool:
        """Whether a request of this id has an answer that has not ended."""
        return request in self._by_request

    # --- requests ---

    def submit(self, request: Request) -> None:
        """Take a request; its events come from `step`.

        Raises InputError for one that cannot be served, UnknownAdapter, and Rejected while the queue is full.
        """
        if self.knows(request.id):
            raise InputError(f"request {request.id}: there is one of this id already")
        version, slots = None, 0
        if request.adapter is not None:
            version = self.catalogue.resolve(request.adapter)
            slots = self.loader.described(version).prefix_slots
            here = self.resident.status(version) in ("host", "resident")
            self._counts["adapter_hits" if here else "adapter_misses"] += 1
        most = request.most_tokens(slots, self.max_length, self.model.config.vocab_size)
        if request.sampling.max_tokens is None:  # what the pool cannot hold is refused only where it was asked for
            most = max(1, min(most, self.scheduler.longest(version, self.max_length) - slots - len(request.prompt)))
        seed = request.sampling.seed
        seed = secrets.randbits(32) if seed is None else seed
        submitted: list[Sequence] = []
        try:
            for index in range(request.sampling.n):
                submitted.append(self._submit(request, index, version, slots, most, answer_seed(seed, index)))
        except InputError:
            for sequence in submitted:
                self.scheduler.cancel(sequence)
                self._forget(sequence)
            raise

    def _submit(
        self, request: Request, index: int, version: AdapterVersion | None, slots: int, most: int, seed: int
    ) -> Sequence:
        sampling = request.sampling
        # A soft prompt may depend on the whole prompt, so no other prompt shares what follows it.
        salt = np.asarray(request.prompt, "<i8").tobytes() if slots else b""
        sequence = Sequence(request, index, version, most, slots, salt, ready=not slots)
        ends = (*(() if sampling.ignore_eos else self._ends), *sampling.stop_token_ids)
        row = sample_row(sampling, seed, ends, self.model.config.vocab_size)
        answer = Answer(request, index, self._detokeniser, self._ends, most)
        self.scheduler.submit(sequence)
        if version is not None:
            self.resident.hold(version)
        self._live[sequence] = _Live(sequence, answer, row)
        self._by_request.setdefault(request.id, []).append(sequence)
        if slots:
            self._unprompted[request.id] = None
        return sequence

    def cancel(self, request: str) -> None:
        """End a request's answers, without events; nothing happens where it has ended."""
        for sequence in self._by_request.get(request, [])[:]:
            self.scheduler.cancel(sequence)
            self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        """It has left the scheduler."""
        live = self._live.pop(sequence)
        if live.slot is not None:
            self.executor.stop(sequence, live.slot)
        siblings = self._by_request[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self._by_request[sequence.request.id]
            self._unprompted.pop(sequence.request.id, None)
            self._soft_prompts.forget(sequence.request.id)
        if sequence.adapter is not None:
            self.resident.release(sequence.adapter)

    # --- adapters ---

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> AdapterInfo:
        """Serve an adapter under a name, in place of one that has it; requests that run keep the old one.

        Everything is checked before. May be called from another thread; what it replaces is freed by `retire`, or in
        the next step. Raises InputError.
        """
        entry = self.catalogue.candidate(name, path)
        try:
            self.loader.described(entry.version)
            self.host.fetch(entry.version)
        except InputError:
            self.host.drop(entry.version)
            self.catalogue.forget(entry.version)
            raise
        return self.catalogue.info(self.catalogue.commit(entry))

    def unload_adapter(self, name: str) -> None:
        """Serve it no longer; requests that have it finish. Raises UnknownAdapter."""
        self.catalogue.unload(name)
        self.retire()

    def retire(self) -> None:
        """Free what was replaced or unloaded and is not in use."""
        self.resident.retire()

    def adapters(self) -> list[AdapterInfo]:
        """Every adapter that is served; those whose files cannot be are left out."""
        return self.catalogue.infos()

    def _retired(self, version: AdapterVersion) -> None:
        self.scheduler.drop_adapter(version)

    # --- steps ---

    def step(self) -> list[Event]:
        """One step; what is new of the step before it."""
        self.retire()
        events = self._failed_adapters() + self._make_soft_prompts()
        plan = self.scheduler.plan()
        self._counts["preemptions"] += len(plan.preempted)
        events += self._left(plan)
        self._prepare(plan)
        forward = self.executor.forward(plan)
        self.scheduler.after_dispatch(plan)
        before, self._pending = self._pending, None
        if before is not None:
            events += self._emit(*before.read())
        masks, failed = self._masks(plan)
        events += failed
        alive = [s for s in plan.decode if s in self._live]
        if alive or forward.chunk is not None:
            rows = {s: self._live[s].row for s in self._stepping(plan)}
            self._pending = self.executor.sample(forward, alive, rows, masks)
        elif before is None and not plan.admitted:
            time.sleep(IDLE)  # all that is left waits for an adapter from disk, or for a place
        return events

    def _stepping(self, plan: Plan) -> list[Sequence]:
        """Those that get a token of this step, unless they have ended meanwhile."""
        last = plan.prefill.sequence if plan.prefill is not None and plan.prefill.last else None
        return [s for s in (*plan.decode, last) if s is not None and s in self._live]

    def _masks(self, plan: Plan) -> tuple[dict[Sequence, np.ndarray], list[Event]]:
        """What grammars allow, and the ends of answers whose grammar has become too complex to go on."""
        masks, failed = {}, []
        for sequence in self._stepping(plan):
            grammar = self._live[sequence].answer.grammar
            if grammar is not None:
                try:
                    masks[sequence] = grammar.mask()
                except InputError as error:
                    failed.append(self._fail(sequence, str(error)))
        return masks, failed

    def _fail(self, sequence: Sequence, error: str) -> Event:
        """End an answer that cannot go on; the others do."""
        event = self._live[sequence].answer.end("error", error)
        sequence.cacheable = False
        self.scheduler.cancel(sequence)
        self._forget(sequence)
        return event

    def _left(self, plan: Plan) -> list[Event]:
        """Those that the scheduler has ended, or put back."""
        for sequence in plan.preempted:
            live = self._live[sequence]
            if live.slot is not None:
                self.executor.stop(sequence, live.slot)
                live.slot = None
        events = []
        for sequence, reason in plan.expired:
            events.append(self._live[sequence].answer.end(reason))
            self._forget(sequence)
        return events

    def _prepare(self, plan: Plan) -> None:
        """What the newly admitted need on the devices before the step's forward."""
        if not plan.admitted:
            return
        self.executor.write(self.resident.take_copies())
        rows = Counter(s.adapter for s in self._live if s.slot is not None and s.adapter is not None)
        self.executor.activate({v: (self.resident.spec(v), self.resident.pages_of(v)) for v in sorted(rows)}, rows)
        for sequence in plan.admitted:
            live = self._live[sequence]
            live.slot = sequence.slot
            if not sequence.generated:
                live.scores.clear()
                live.answer.cached = sequence.cached
                self._counts["cached_tokens"] += sequence.cached
            self.executor.start(sequence, live.row, live.soft)

    def _make_soft_prompts(self) -> list[Event]:
        """Those of requests whose adapters are here; the ends of answers for which there is none."""
        events: list[Event] = []
        for request in list(self._unprompted):
            sequences = self._by_request[request]
            version = sequences[0].adapter
            loaded = None if version is None else self.resident.find(version)
            if loaded is None:
                continue
            try:
                found = self._soft_prompts.of(sequences[0].request, loaded)
            except InputError as error:  # its encoder is missing, or another than it was trained with
                events += [self._fail(sequence, str(error)) for sequence in sequences[:]]
                continue
            if found is not None:
                del self._unprompted[request]
                for sequence in sequences:
                    self._live[sequence].soft, sequence.ready = found, True
        return events

    def _failed_adapters(self) -> list[Event]:
        """Requests whose adapter could not be loaded."""
        events = []
        waiting = {s.adapter for s, live in self._live.items() if s.state == "loading" and s.adapter is not None}
        for version in waiting:
            error = self.host.failure(version)
            if error is None:
                continue
            for sequence in [s for s in self._live if s.adapter == version and s.state == "loading"]:
                events.append(self._fail(sequence, str(error)))
        return events

    def _emit(self, scored: list[Scored], sampled: list[Sampled]) -> list[Event]:
        for scores in scored:
            live = self._live.get(scores.sequence)
            if live is not None and scores.epoch == scores.sequence.epoch:
                live.scores += scores.found
        events = []
        for token in sampled:
            live = self._live.get(token.sequence)
            if live is None or token.epoch != token.sequence.epoch:
                continue  # it ended, or was put back, while the token was on its way
            events.append(self._emit_token(live, token))
        return events

    def _emit_token(self, live: _Live, token: Sampled) -> Event:
        sequence, answer = live.sequence, live.answer
        if not sequence.generated and sequence.request.sampling.prompt_logprobs is not None:
            answer.keep_prompt_logprobs((None, *live.scores))
        self.scheduler.append(sequence, token.token)
        try:
            event = answer.take(token.token, token.logprobs)
        except InputError as error:  # its grammar has become too complex
            return self._fail(sequence, str(error))
        if answer.finished:
            self.scheduler.finish(sequence)
            self._forget(sequence)
        return event

    # --- what is going on ---

    def stats(self, known: int | None = None) -> EngineStats:
        """A snapshot. known: how many adapters there are; None counts them, which looks through the directory."""
        pages = self.pages.by_kind()
        counts = self.host.counts
        return EngineStats(
            waiting=self.scheduler.waiting_count,
            running=self.scheduler.running_count,
            pool_pages={"free": self.pages.free_count, **pages},
            adapters={
                "known": len(self.catalogue.names()) if known is None else known,
                "host": len(self.host),
                "resident": len(self.resident),
            },
            adapter_hits=self._counts["adapter_hits"],
            adapter_misses=self._counts["adapter_misses"],
            adapter_loads=counts.loads,
            adapter_failures=counts.failures,
            adapter_load_seconds=counts.seconds,
            preemptions=self._counts["preemptions"],
            cached_tokens=self._counts["cached_tokens"],
            service=dict(self.scheduler.service),
        )
