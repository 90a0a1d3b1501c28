"""The engine's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from jora.errors import InputError
from jora.models.config import LINEARS

_LEAST = dict.fromkeys(("page_tokens", "max_batch", "chunk", "max_queue", "max_length", "pool_bytes"), 1)
_LEAST |= dict.fromkeys(("soft_tokens", "cluster", "host_adapters_bytes"), 0)


@dataclass(frozen=True)
class EngineOptions:
    """Sizes that memory and compiled programs follow from, and how requests are chosen.

    pool_bytes: of the page pool, over all devices; None takes what `jora.serve.memory` finds free. page_tokens: tokens
    that a KV page holds. max_length: most tokens of a sequence, prompt and answer; None is the model's positions. No
    sequence gets more than the pool holds. max_batch: sequences that decode together. chunk: most prompt tokens of one
    prefill step.

    rank_buckets: total adapter ranks of a decode batch, one program each (0, the base alone, is always there); the
    largest is the most that can run together. product_buckets: the same for the extra base products that fLoRA, DoRA
    and IA3 rows need; () serves none of those. targets: the linears that adapters may change. soft_tokens: most of an
    adapter's soft prompt. These three follow from the directory's adapters at start where they are None: all linears
    that one changes (every linear where there is none), one bucket with room for four of the adapters with the most
    products, the longest soft prompt.

    scheduler: "vtc" (arXiv 2401.00588) or "fcfs". weights: share of each client, 1 where not named. optimistic: admit
    by what requests need now and preempt when the pool is full, instead of by what they may need at most.
    prefix_cache: keep finished prompts' pages for requests that begin alike. cluster: prefer waiting requests of
    running adapters once this many adapters run (S-LoRA); 0 is off. slo: seconds to the first token after which a
    request that cannot make it is ended early; None is off. max_queue: waiting requests before new ones are rejected:
    those of a client that has its even share of them, and of everybody at twice as many. host_adapters_bytes: bound of
    the adapters kept in host memory. encoders: directories or hub ids of encoders that adapters may use for their soft
    prompts (their `Catalogue` says which), to be loaded at start; without soft_tokens none is.
    """

    pool_bytes: int | None = None
    page_tokens: int = 16
    max_length: int | None = None
    max_batch: int = 16
    chunk: int = 256
    rank_buckets: tuple[int, ...] = (8, 32, 64, 128, 256, 512)
    product_buckets: tuple[int, ...] | None = None
    targets: tuple[str, ...] | None = None
    soft_tokens: int | None = None
    scheduler: Literal["vtc", "fcfs"] = "vtc"
    weights: Mapping[str, float] = field(default_factory=dict)
    optimistic: bool = False
    prefix_cache: bool = True
    cluster: int = 0
    slo: float | None = None
    max_queue: int = 1024
    host_adapters_bytes: int = 4 * 10**9
    encoders: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"{name} must be at least {least}, found {value}")
        if self.slo is not None and not self.slo > 0:
            raise InputError(f"slo must be above 0 seconds, found {self.slo}")
        for name in ("rank_buckets", "product_buckets"):
            buckets = getattr(self, name) or ()
            if any(b < 1 for b in buckets) or list(buckets) != sorted(set(buckets)):
                raise InputError(f"{name} must be rising numbers above 0, found {buckets}")
        if unknown := [t for t in self.targets or () if t not in LINEARS]:
            raise InputError(f"targets: {unknown[0]!r} is not one of {', '.join(LINEARS)}")
        if self.chunk % self.page_tokens:
            raise InputError(f"chunk {self.chunk} must be a multiple of page_tokens {self.page_tokens}")
        if any(not w > 0 for w in self.weights.values()):
            raise InputError(f"weights must be above 0, found {dict(self.weights)}")
        if self.scheduler not in ("vtc", "fcfs"):
            raise InputError(f"scheduler {self.scheduler!r} is not known; use vtc or fcfs")

    def longest(self, positions: int) -> int:
        """`max_length` for a model of so many positions."""
        return min(self.max_length or positions, positions)
