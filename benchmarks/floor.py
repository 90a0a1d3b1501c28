"""The least time that a LoRA step can take: FLOPs that cannot be avoided over the measured rate of matrix products.

The formulas are written out in docs/benchmarks.md. Nothing is recomputed in them: a step that rematerialises
does more than this, and its gap shows it.

`python floor.py jax|torch TOKENS EMBED MLP HEADS KV_HEADS HEAD_DIM` measures the rate in this process and prints it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

REPEATS = 7
SECONDS = 0.1  # a timing lasts at least this long


def _linears(c: Any) -> list[tuple[int, int]]:
    """(in, out) of the seven linears of a layer."""
    query, key = c.heads * c.head_dim, c.kv_heads * c.head_dim
    attention = [(c.embed, query), (c.embed, key), (c.embed, key), (query, c.embed)]
    return [*attention, (c.embed, c.mlp), (c.embed, c.mlp), (c.mlp, c.embed)]


def _pairs(tokens: int, window: int | None) -> int:
    """Query-key pairs that a causal layer sees."""
    if window is None or window >= tokens:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


def step_flops(config: Any, tokens: int, answers: int, rank: int) -> dict[str, int]:
    """FLOPs of one step over one row of `tokens`, of which `answers` carry loss; `config` is a ModelConfig."""
    weights = config.layers * sum(i * o for i, o in _linears(config))
    factors = config.layers * sum(rank * (i + o) for i, o in _linears(config))
    windows = [config.window if kind == "sliding" else None for kind in config.layer_kinds]
    pairs = sum(_pairs(tokens, window) for window in windows)
    parts = {
        "linears": 4 * weights * tokens,
        "attention": 12 * pairs * config.heads * config.head_dim,
        "logits": 4 * answers * config.vocab_size * config.embed,
        "lora": 6 * factors * tokens,
    }
    return {**parts, "total": sum(parts.values())}


def rate_of(library: str, config: Any, tokens: int) -> float:
    """FLOPs per second of this machine in `library` ("jax" or "torch"), measured in a fresh process."""
    sizes = (tokens, config.embed, config.mlp, config.heads, config.kv_heads, config.head_dim)
    command = [sys.executable, __file__, library, *map(str, sizes)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(found.splitlines()[-1]))


def _best_seconds(call: Callable[[], Any]) -> float:
    """Seconds of one call: the best of a few timings, each long enough for the clock."""
    call()
    start = time.perf_counter()
    call()
    count = max(1, round(SECONDS / max(time.perf_counter() - start, 1e-6)))
    timings = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(count):
            call()
        timings.append((time.perf_counter() - start) / count)
    return min(timings)


def _multiply(library: str, rows: int, inner: int, columns: int) -> Callable[[], Any]:
    if library == "jax":
        import jax
        import jax.numpy as jnp

        a, b = (jax.random.normal(jax.random.key(0), shape) for shape in ((rows, inner), (inner, columns)))
        dot = jax.jit(jnp.dot)
        return lambda: dot(a, b).block_until_ready()
    import torch

    x, y = torch.randn(rows, inner), torch.randn(inner, columns)
    return lambda: torch.mm(x, y)


def _measure(library: str, tokens: int, shapes: list[tuple[int, int]]) -> float:
    """The rate over the products of one layer: each linear forward, and backward to its input."""
    flops = seconds = 0.0
    for inner, columns in [pair for i, o in shapes for pair in ((i, o), (o, i))]:
        flops += 2 * tokens * inner * columns
        seconds += _best_seconds(_multiply(library, tokens, inner, columns))
    return flops / seconds


def _main() -> None:
    from types import SimpleNamespace

    library, *sizes = sys.argv[1:]
    tokens, embed, mlp, heads, kv_heads, head_dim = map(int, sizes)
    config = SimpleNamespace(embed=embed, mlp=mlp, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    print(json.dumps(_measure(library, tokens, _linears(config))))


if __name__ == "__main__":
    _main()
