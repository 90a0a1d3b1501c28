"""What this machine's memory and its products can do, measured in this process, for the floor of a decode step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

MIB = 1 << 20
REPEATS = 9


def bandwidth(mib: int = 512) -> float:
    """Bytes a second that are read from memory: a sum over an array far larger than the caches."""
    import jax
    import jax.numpy as jnp

    array = jnp.ones(mib * MIB // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    return array.nbytes / _best(lambda: total(array).block_until_ready())


def product_rate(inner: int, columns: int, rows: int = 512) -> float:
    """FLOPs a second of a [rows, inner] x [inner, columns] product: many rows, for a floor takes the best rate."""
    import jax
    import jax.numpy as jnp

    a = jax.random.normal(jax.random.key(0), (rows, inner))
    b = jax.random.normal(jax.random.key(1), (inner, columns))
    dot = jax.jit(jnp.dot)
    return 2 * rows * inner * columns / _best(lambda: dot(a, b).block_until_ready())


def _best(call: Callable[[], Any]) -> float:
    call()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
