"""Attention of a decode step over pages, on one GPU: the Triton kernel and plain XLA beside the bytes they must read.

    PYTHONPATH=src python benchmarks/gpu_paged_decode.py --out build/paged_decode.json

One layer, bf16, pages of 16 tokens in random order, every row at its full context. Calls are dispatched one after the
other and waited for together, so the host's part is hidden where the kernel takes longer than a launch. Less than half
a minute, compilation included. `--tiny` runs the kernel in Pallas' interpreter, to try the script anywhere.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import machine
import numpy as np
from gpu_children import gpu_name
from jax import Array

from jora.kernels import paged_decode
from jora.kernels.paged_attention import Table, paged_attention
from jora.kernels.spec import AttentionSpec

PACKAGES = ("jax", "jaxlib")
CALLS, REPEATS, PAGE = 20, 5, 16
FULL = np.iinfo(np.int32).max


class Shape(NamedTuple):
    """Rows, KV heads, query heads of each, head width, tokens of context."""

    rows: int
    kv_heads: int
    group: int
    width: int
    context: int

    @property
    def bytes(self) -> int:
        """Of keys and values in bf16."""
        return 2 * 2 * self.rows * self.context * self.kv_heads * self.width


SHAPES = {
    "Llama 2 7B": Shape(64, 32, 1, 128, 1024),
    "Llama 3 8B": Shape(64, 8, 4, 128, 1024),
    "Gemma 3 270M": Shape(16, 1, 4, 256, 512),
}
TINY = {"tiny": Shape(2, 2, 1, 32, 64)}


def arrays(shape: Shape) -> tuple[Array, Array, np.ndarray, np.ndarray]:
    """Queries, pool, page table and positions."""
    blocks = -(-shape.context // PAGE)
    pages = np.random.default_rng(0).permutation(np.arange(1, shape.rows * blocks + 1))
    size = 2 * PAGE * shape.kv_heads * shape.width
    pool = jax.random.normal(jax.random.key(0), (pages.size + 1, 1, size), jnp.bfloat16)
    q = jax.random.normal(jax.random.key(1), (shape.rows, 1, shape.kv_heads, shape.group, shape.width), jnp.bfloat16)
    positions = np.full((shape.rows, 1), shape.context - 1, np.int32)
    return q, pool, pages.reshape(shape.rows, blocks).astype(np.int32), positions


def kernel(q: Array, pool: Array, pages: Array, positions: Array, *, spec: AttentionSpec) -> Array:
    last = (PAGE, positions, jnp.int32(FULL), spec)
    return paged_decode.decode_pages(q, pool, pages, jnp.int32(0), *last, interpret=jax.default_backend() != "gpu")


def xla(q: Array, pool: Array, pages: Array, positions: Array, *, spec: AttentionSpec) -> Array:
    with mock.patch.object(paged_decode, "why_not", lambda *_: "it is compared"):
        return paged_attention(q, pool, Table(pages, jnp.int32(0), PAGE), positions, jnp.int32(FULL), spec)


def seconds(call: Callable[[], Array]) -> list[float]:
    """Of one call, in each of a few rounds; the first is not counted."""
    found = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(CALLS)])
        found.append((time.perf_counter() - start) / CALLS)
    return found[1:]


def measure(shape: Shape) -> dict[str, Any]:
    """Both, and how far their results are apart."""
    given = [jax.device_put(x) for x in arrays(shape)]
    spec = AttentionSpec(shape.width**-0.5)
    found: dict[str, Any] = {"bytes": shape.bytes}
    results = []
    for name, attend in (("kernel", kernel), ("xla", xla)):
        compiled = jax.jit(partial(attend, spec=spec)).lower(*given).compile()
        results.append(np.asarray(compiled(*given), np.float32))
        found[name] = seconds(partial(compiled, *given))
    found["difference"] = float(np.linalg.norm(results[0] - results[1]) / np.linalg.norm(results[1]))
    return found


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| shape | | microseconds (range) | TB/s of keys and values |", "|---|---|---|---|"]
    for name, found in report.items():
        for which in ("kernel", "xla"):
            rate = found["bytes"] / median(found[which]) / 1e12
            lines.append(f"| {name} | {which} | {machine.spread([1e6 * s for s in found[which]])} | {rate:.2f} |")
        lines.append(f"| | apart by | {found['difference']:.1e} of the norm | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, in the interpreter where there is no GPU")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    gpu = gpu_name()
    if gpu is None and not chosen.tiny:
        print("skipped: no GPU here (nvidia-smi finds none); nothing was measured")
        return
    facts = {**machine.facts(PACKAGES), "gpu": gpu}
    report = {name: measure(shape) for name, shape in (TINY if chosen.tiny else SHAPES).items()}
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps({"machine": facts, "shapes": report}, indent=2) + "\n")
    print(f"{table(report)}\n\nGPU: {gpu}. {machine.lines(facts)}")


if __name__ == "__main__":
    main()
