"""Floating-point operations of a traced program: those of its matrix products, loops multiplied out.

XLA's own cost analysis counts the body of a loop once, and the layers are a loop.
"""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Side of the matrices that measure a device: long enough a product that its launch does not count.
CPU_MATMUL, MATMUL = 2048, 8192
REPEATS = 3


def matmul_flops(jaxpr: Any) -> int:
    """2 x multiply-adds of all dot products of a (closed) jaxpr, over all devices; what jit removes counts."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[d] for d in contracted)
    if name == "cond":
        return max(matmul_flops(branch) for branch in params["branches"])
    times = params["length"] if name == "scan" else 1
    if name == "shard_map":  # shapes inside are those of one device
        axes = params.get("newly_manual_axes") or params["manual_axes"]  # the name differs between jax versions
        times = math.prod(params["mesh"].shape[axis] for axis in axes)
    return times * sum(matmul_flops(inner) for inner in _inner(params))


def _inner(params: dict[str, Any]) -> list[Any]:
    return [p for p in params.values() if hasattr(getattr(p, "jaxpr", p), "eqns")]


def matmul_rate(device: jax.Device, dtype: Any) -> float:
    """FLOPs per second of a square matrix product on `device`, the best of a few."""
    side = CPU_MATMUL if device.platform == "cpu" else MATMUL
    # Not ones or zeros: a GPU multiplies those faster.
    x = jax.device_put(np.random.default_rng(0).standard_normal((side, side), np.float32), device).astype(dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(x, x).block_until_ready()
    best = math.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
