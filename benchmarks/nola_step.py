"""A training step of NOLA beside one of LoRA, on the same model, row and rank: time, and what NOLA adds by count.

Both train all linears of Gemma 3 270M at rank 16; NOLA has 512 bases, shared. They take their steps in turn, L N L N
..., in one process, so that what else the machine does hits both alike. Each length is measured on its own.

    python benchmarks/nola_step.py --lengths 512 1024 2048 --out build/nola_step.json

What NOLA does beyond LoRA, once a step (not once a token), forward and again backward, for k bases and layers L:

  elements  k * 16 * (units of each factor shape): A has 640 (q, k, v, gate, up), 1,024 (o) and 2,048 (down) units,
            B 1,024 (q), 256 (k, v), 640 (o, down) and 2,048 (gate, up). Shapes are drawn once for all layers and
            targets that have them: 512 * 16 * 7,680 = 62.9 M elements, twice: 126 M elements. An element is
            about 14 integer operations without a branch, so a few G elements/s on two vectorising cores.
  products  2 k L * 16 * sum(in + out) = 2 * 512 * 18 * 16 * 13,184 = 3.9 GFLOP, twice: 7.8 GFLOP. The step's own
            products are 4 FLOP a weight and token: 205 GFLOP at 512 tokens, so 4 % of it there and 1 % at 2,048.

The floor printed beside the times is these FLOPs over the rate of a plain product, plus the elements over the rate at
which the kernel draws them for a single row of coefficients, both measured in this process.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
from one_step import compiled_step, random_row

RANK, BASES, ANSWERS = 16, 512, 64
PACKAGES = ("jax", "jaxlib")


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face directory or .gguf; default: the demo's Gemma 3 270M")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="tokens of the row")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each")
    parser.add_argument("--remat", default="selective", choices=["none", "selective", "full"])
    parser.add_argument("--basis", default="shared", choices=["shared", "unique"])
    parser.add_argument("--out", type=Path, help="JSON with every number")
    return parser.parse_args()


def stepper(base: Any, method: Any, length: int, remat: Any) -> tuple[Callable[[], float], dict[str, float]]:
    """(a call that takes one training step and gives its seconds, facts of the compiled program)."""
    take, compiled, trained = compiled_step(base, method, [random_row(base, length, ANSWERS)], remat)

    def step() -> float:
        start = time.perf_counter()
        take()
        return time.perf_counter() - start

    return step, {"trained": trained, "temporary_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20}


def counts(config: Any) -> dict[str, float]:
    """Elements drawn and FLOPs of the products, both passes of one step."""
    from jora.methods.lora import site_shape
    from jora.models.config import LINEARS

    shapes = [site_shape(config, target) for target in LINEARS]
    distinct = {(side, s.in_shape if side == "a" else s.out_shape) for s in shapes for side in "ab"}
    units = sum(math.prod(shape) for _, shape in distinct)
    factors = sum(s.in_size + s.out_size for s in shapes) * RANK
    return {"elements": 2 * BASES * RANK * units, "flops": 2 * 2 * BASES * config.layers * factors}


def rates(config: Any) -> dict[str, float]:
    """Elements a second that the kernel draws, and FLOPs a second of a product of the step's size."""
    import jax
    import jax.numpy as jnp

    from jora.kernels.random_basis import basis_keys, linear_combination

    units, keys = jnp.arange(2048, dtype=jnp.int32), basis_keys(0, BASES, 0)
    # One row of coefficients: a chunk is drawn, written and read once.
    draw = jax.jit(lambda row: linear_combination(row, keys, units, RANK))
    row = jax.random.normal(jax.random.key(0), (1, BASES))
    a = jax.random.normal(jax.random.key(0), (512, config.embed))
    b = jax.random.normal(jax.random.key(0), (config.embed, config.mlp))
    dot = jax.jit(jnp.dot)
    return {
        "elements": RANK * BASES * units.size / best(lambda: draw(row).block_until_ready()),
        "flops": 2 * a.size * config.mlp / best(lambda: dot(a, b).block_until_ready()),
    }


def best(call: Callable[[], Any], repeats: int = 9) -> float:
    """Seconds of one call, the least of a few."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def compare(base: Any, length: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Steps of both in turn."""
    from jora.methods.lora import LoRA
    from jora.methods.nola import NOLA

    methods = {"lora": LoRA(rank=RANK, alpha=2 * RANK), "nola": NOLA(rank=RANK, bases=BASES, basis=chosen.basis)}
    steps, facts = {}, {}
    for name, method in methods.items():
        steps[name], facts[name] = stepper(base, method, length, chosen.remat)
        steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(chosen.steps):
        for name, step in steps.items():
            seconds[name].append(step())
    pairs = [nola / lora for nola, lora in zip(seconds["nola"], seconds["lora"], strict=True)]
    return {"length": length, "seconds": seconds, "ratio": statistics.median(pairs), "ratios": pairs, "facts": facts}


def main() -> None:
    """Measure and print a table."""
    chosen = options()
    from jora.demo.gemma import gemma_gguf
    from jora.models.model import load_model

    facts = machine.facts(PACKAGES)
    base = load_model(chosen.model or gemma_gguf(), dtype="float32")
    work, speed = counts(base.config), rates(base.config)
    floor = {name: work[name] / speed[name] for name in work}
    print(machine.lines(facts))
    print(
        f"NOLA adds {work['elements'] / 1e6:.0f} M elements at {speed['elements'] / 1e9:.2f} G/s"
        f" = {floor['elements']:.3f} s and {work['flops'] / 1e9:.1f} GFLOP at {speed['flops'] / 1e9:.0f} GFLOP/s"
        f" = {floor['flops']:.3f} s\n"
    )
    print("| tokens | LoRA s | NOLA s | NOLA / LoRA | temporaries LoRA, NOLA (MiB) |")
    print("|---|---|---|---|---|")
    found = []
    for length in chosen.lengths:
        result = compare(base, length, chosen)
        found.append(result)
        lora, nola = (machine.spread(result["seconds"][name]) for name in ("lora", "nola"))
        memory = ", ".join(f"{result['facts'][name]['temporary_mib']:.0f}" for name in ("lora", "nola"))
        print(f"| {length} | {lora} | {nola} | {machine.spread(result['ratios'])} | {memory} |", flush=True)
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        everything = {"machine": facts, "work": work, "rates": speed, "floor": floor, "lengths": found}
        chosen.out.write_text(json.dumps(everything, indent=2))


if __name__ == "__main__":
    main()
