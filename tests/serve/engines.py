"""Small engines that share one set of compiled programs, what runs them, and what each answer should be."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import current_thread
from typing import Any

import jax
import numpy as np
import torch
from tests.serve.bases import base, greedy, hf_base, merged
from transformers import PreTrainedModel

import jora
from jora.methods.method import Method
from jora.serve.engine import Engine
from jora.serve.options import EngineOptions
from jora.serve.requests import Event, Request, SamplingOptions

QV = ("q_proj", "v_proj")
# "again" stands in for "two" when that is replaced. Of all ranks no more than eight run together.
ADAPTERS: dict[str, Method] = {
    "one": jora.LoRA(rank=1, targets=("q_proj",)),
    "two": jora.LoRA(rank=2, targets=QV),
    "again": jora.LoRA(rank=2, targets=QV),
    "three": jora.LoRA(rank=3, targets=("v_proj",)),
    "eight": jora.LoRA(rank=8, targets=QV),
    "soft": jora.PromptTuning(prompt_tokens=5),
    "lopa": jora.LoPA(prompt_tokens=6, rank=2, hidden=7),
}
OPTIONS = EngineOptions(
    pool_bytes=1 << 20,
    page_tokens=4,
    max_batch=4,
    chunk=16,
    rank_buckets=(8,),
    targets=QV,
    max_length=160,
)
GREEDY = SamplingOptions(temperature=0.0, ignore_eos=True, max_tokens=8)


@contextmanager
def serving(
    directory: Path | None,
    *,
    pages: int | None = None,
    clock: Callable[[], float] = time.monotonic,
    **changes: Any,
) -> Iterator[Engine]:
    """An engine for the tiny Llama. pages: all that the pool has left, so that its programs stay those of `OPTIONS`."""
    engine = Engine(base(), replace(OPTIONS, **changes), directory, clock)
    if pages is not None:
        engine.pages.allocate(BALLAST, engine.pages.free_count - pages)
    try:
        yield engine
    finally:
        engine.close()


BALLAST = ("adapter", "ballast")


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 256, length).tolist())


def ask(name: str, tokens: Sequence[int], adapter: str | None = None, **options: Any) -> Request:
    """A greedy request of eight tokens, unless options say otherwise."""
    return Request(name, tuple(tokens), replace(GREEDY, **options), adapter)


def step(engine: Engine) -> list[Event]:
    """One step, after which the books are checked. Waits a moment where adapters are still on their way."""
    events = engine.step()
    check(engine)
    if engine.has_work and not events and not engine.scheduler.running_count:
        time.sleep(0.001)
    return events


def check(engine: Engine) -> None:
    """AssertionError unless every page, row, pin and hold is accounted for."""
    engine.scheduler.check()
    resident = engine.resident
    for version, (pages, _) in resident._resident.items():
        assert engine.pages.owned(("adapter", version)) == len(pages)
    owned = sum(len(pages) for pages, _ in resident._resident.values())
    assert owned + engine.pages.owned(BALLAST) == engine.pages.by_kind()["adapter"], "an adapter's pages are lost"
    idle = sum(len(pages) for version, (pages, _) in resident._resident.items() if version not in resident._pinned)
    assert idle == resident.evictable_pages()
    assert resident._pinned == set(engine.scheduler._batch.versions)
    assert resident._holds == Counter(s.adapter for s in engine._live if s.adapter is not None)


def run(engine: Engine, *requests: Request) -> dict[str, list[Event]]:
    """Submit all, and step until nothing is left."""
    for request in requests:
        engine.submit(request)
    events: dict[str, list[Event]] = {request.id: [] for request in requests}
    while engine.has_work:
        for event in step(engine):
            events.setdefault(event.request, []).append(event)  # an earlier caller may have submitted too
    return events


def no_adapter_is_left(engine: Engine) -> None:
    """Where all were unloaded and nothing runs: no page, no host memory, no soft prompt on the device."""
    assert not engine.executor._prefixes and not engine._active_set.members
    check(engine)
    pages = engine.stats().pool_pages
    assert (pages["kv"], pages["adapter"] - engine.pages.owned(BALLAST)) == (0, 0)
    assert (len(engine.host), engine.host.nbytes, len(engine.resident)) == (0, 0, 0)


def tokens(events: Sequence[Event], index: int = 0) -> list[int]:
    return [token for event in events if event.index == index for token in event.tokens]


def text(events: Sequence[Event], index: int = 0) -> str:
    return "".join(event.text for event in events if event.index == index)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Grows by one with every program that XLA compiles for the engine (loading an adapter has threads of its own)."""
    found: list[str] = []

    def count(name: str, seconds: float, **kwargs: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration" and not current_thread().name.startswith("adapters"):
            found.append(name)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


class Reference:
    """What transformers generates for each request alone, with the adapter that PEFT merged; kept for the session."""

    def __init__(self, directory: Path, family: str = "llama2"):
        self._directory, self._family = directory, family
        self._known: dict[tuple[str | None, tuple[int, ...]], list[int]] = {}
        self.model = functools.cache(self._model)

    def _model(self, adapter: str | None) -> PreTrainedModel:
        if adapter is None:
            return hf_base(self._family)[0]
        return merged(self._family, self._directory / adapter)

    def __call__(self, adapter: str | None, prompt: tuple[int, ...], count: int = 8) -> list[int]:
        """The likeliest tokens after a prompt."""
        known = self._known.get((adapter, prompt), [])
        if len(known) < count:
            self._known[adapter, prompt] = known = greedy(self.model(adapter), prompt, max(count, 16))
        return known[:count]

    def logits(self, adapter: str | None, tokens: Sequence[int]) -> np.ndarray:
        """fp32 [tokens, vocabulary]."""
        with torch.no_grad():
            return self.model(adapter)(torch.tensor([list(tokens)])).logits[0].float().numpy()

    def controlled(
        self,
        prompt: Sequence[int],
        count: int,
        adjust: Callable[[np.ndarray, list[int]], np.ndarray],
        adapter: str | None = None,
    ) -> list[int]:
        """Greedy with logits that `adjust` changes, given the answer so far."""
        answer: list[int] = []
        for _ in range(count):
            answer.append(int(adjust(self.logits(adapter, [*prompt, *answer])[-1].copy(), answer).argmax()))
        return answer
