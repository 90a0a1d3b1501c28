"""fLoRA beside LoRA where each row of a batch has its own adapter: which is cheaper, up to what rank?

The paper (arXiv 2312.05677, section 3.3) counts one square weight [d, d], b rows of l tokens, c1 the cost of a
multiply-add in a batched product and c2 in an ordinary one:

  LoRA   2 c1 b l d r + c2 b l d^2        fLoRA   c2 r b l d^2
  fLoRA is cheaper while  2 c1 / (d c2) + 1 / r >= 1,  so up to  r = 1 / (1 - 2 c1 / (d c2))

This measures c1 and c2 here, prints the rank that the inequality predicts, and times forward passes of both, of
LoRA as one batched product (`bmm`) and as Jora trains it (`bank`: fixed rows a job, a product of its rows for each
group). The crossover is the largest rank at which fLoRA is not slower.

    python benchmarks/flora_crossover.py --width 2048 --rows 8 --tokens 1 64
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

PACKAGES = ("jax", "jaxlib")
REPEATS, SECONDS = 7, 0.05


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048, help="d: both sides of the weight")
    parser.add_argument("--rows", type=int, default=8, help="b: rows, each with its own adapter")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64], help="l: tokens of a row")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="JSON with every number")
    return parser.parse_args()


def best(run: Callable[..., Any], *arrays: Any) -> float:
    """Seconds of one call: the least mean of several loops of at least SECONDS."""
    import jax

    compiled = jax.jit(run).lower(*arrays).compile()
    compiled(*arrays).block_until_ready()
    start = time.perf_counter()
    compiled(*arrays).block_until_ready()
    count = max(1, math.ceil(SECONDS / max(time.perf_counter() - start, 1e-6)))
    found = math.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(count):
            result = compiled(*arrays)
        result.block_until_ready()
        found = min(found, (time.perf_counter() - start) / count)
    return found


def paths(rows: int, rank: int, width: int, dtype: Any) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """What is timed at a rank: (function of x, W and the adapters, the adapters)."""
    import jax
    import jax.numpy as jnp

    from jora.kernels.hadamard import hadamard_product
    from jora.methods.bank import BankProjection, Spans
    from jora.methods.lora import LoRAProjection
    from jora.models.adapted import Dense, Rows, Site
    from jora.sharding import single_device

    layout, spans = single_device(), Spans(1, ((rows, 1),))
    keys = iter(jax.random.split(jax.random.key(rank), 6))

    def draw(*shape: int) -> Any:
        return jax.random.normal(next(keys), shape, jnp.float32)

    def flora(x: Any, w: Any, inputs: Any, outputs: Any) -> Any:
        return hadamard_product(x, w, inputs, outputs, (None,), (None,), layout)

    def bmm(x: Any, w: Any, a: Any, b: Any) -> Any:
        return x @ w + jnp.matmul(jnp.matmul(x, a), b)

    def bank(x: Any, w: Any, a: Any, b: Any) -> Any:
        projection = BankProjection((LoRAProjection(a, b, jnp.ones(rows)),), spans)
        dense = Dense(w, None, (None,), (None,), layout)
        return projection.apply(x, dense, Site("q_proj", jnp.int32(0)), Rows())

    a, b = draw(rows, width, rank), draw(rows, rank, width)
    return {
        "flora": (flora, [draw(rows, rank, width), draw(rows, rank, width)]),
        "bmm": (bmm, [a.astype(dtype), b.astype(dtype)]),
        "bank": (bank, [a, b]),
    }


def measure(chosen: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Times in seconds, c1 / c2 at each rank, and both crossovers."""
    import jax
    import jax.numpy as jnp

    d, b, dtype = chosen.width, chosen.rows, jnp.dtype(chosen.dtype)
    x, w = (jax.random.normal(jax.random.key(n), s, dtype) for n, s in enumerate(((b, tokens, d), (d, d))))
    plain = best(lambda x, w: x @ w, x, w)
    found: dict[str, Any] = {"tokens": tokens, "base": plain, "ranks": {}}
    for rank in chosen.ranks:
        own = {name: best(run, x, w, *more) for name, (run, more) in paths(b, rank, d, dtype).items()}
        # One adapter for the whole batch: the cost must not depend on how many there are.
        run, more = paths(b, rank, d, dtype)["flora"]
        own["flora, one adapter"] = best(run, x, w, *(v[:1] for v in more))
        _, (left, right) = paths(b, rank, d, dtype)["bmm"]
        batched = best(lambda x, a, b: jnp.matmul(jnp.matmul(x, a), b), x, left, right)
        c1, c2 = batched / (2 * b * tokens * d * rank), plain / (b * tokens * d * d)
        share = 2 * c1 / (d * c2)
        found["ranks"][rank] = own | {"c1 / c2": c1 / c2, "predicted": math.inf if share >= 1 else 1 / (1 - share)}
    for rival in ("bmm", "bank"):
        won = [rank for rank, own in found["ranks"].items() if own["flora"] <= own[rival]]
        found[f"crossover {rival}"] = max(won, default=0)
    return found


def main() -> None:
    """Measure and print a table for each number of tokens."""
    chosen = options()
    facts = machine.facts(PACKAGES)
    print(machine.lines(facts))
    results = []
    for tokens in chosen.tokens:
        result = measure(chosen, tokens)
        results.append(result)
        print(
            f"\n{chosen.rows} rows of {tokens} tokens, width {chosen.width}; base alone {result['base'] * 1e3:.3f} ms"
        )
        print("\n| r | fLoRA ms | one adapter | bmm LoRA ms | bank LoRA ms | c1 / c2 | predicted crossover |")
        print("|---|---|---|---|---|---|---|")
        for rank, own in result["ranks"].items():
            times = [own[name] * 1e3 for name in ("flora", "flora, one adapter", "bmm", "bank")]
            cells = " | ".join(f"{ms:.3f}" for ms in times)
            print(f"| {rank} | {cells} | {own['c1 / c2']:.1f} | {own['predicted']:.1f} |", flush=True)
        print(f"\nmeasured crossover: {result['crossover bmm']} (bmm), {result['crossover bank']} (bank); 0: none")
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps({"machine": facts, "results": results}, indent=2))


if __name__ == "__main__":
    main()
