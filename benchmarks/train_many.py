"""Sixteen LoRA jobs of ranks 4 to 64 in one batch, beside one adapter on as many tokens and sixteen separate steps.

All train all linears of Gemma 3 270M; every job has one row. The three take their steps in turn, in one process:

  many      one step of `jora train-many`: 16 jobs, ranks 4, 8, 16, 32, 64, 4, ...
  one       one step of `jora train` with a batch of 16 rows; its rank is the mean of the jobs' ranks
  separate  sixteen steps of `jora train`, one row each, with each job's own rank

    python benchmarks/train_many.py --lengths 64 256 --out build/train_many.json

Memory is the compiler's: arguments (weights, adapters, moments, batch) and what a step adds. What "many" may hold is
what "one" holds, and the other jobs' factors, gradients and two moments (fp32: 16 bytes a parameter).
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

RANKS = (4, 8, 16, 32, 64)
PACKAGES = ("jax", "jaxlib")
Step = Callable[[], None]


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face directory or .gguf; default: the demo's Gemma 3 270M")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256], help="tokens of a row")
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each")
    parser.add_argument("--remat", default="selective", choices=["none", "selective", "full"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="JSON with every number")
    return parser.parse_args()


def row(base: Any, length: int, seed: int) -> Any:
    """Random tokens, the last quarter of them the answer."""
    return random_row(base, length, max(1, length // 4), seed)


def ranks_of(jobs: int) -> list[int]:
    """The jobs' ranks."""
    return [RANKS[number % len(RANKS)] for number in range(jobs)]


def single(base: Any, rank: int, rows: int, length: int, remat: Any) -> tuple[Step, Any, int]:
    """(one step of `jora train`, its compiled program, trained parameters)."""
    from jora.methods.lora import LoRA

    return compiled_step(base, LoRA(rank=rank), [row(base, length, n) for n in range(rows)], remat)


def many(base: Any, jobs: int, length: int, remat: Any) -> tuple[Step, Any, int]:
    """(one step of `jora train-many`, its compiled program, trained parameters of all jobs)."""
    import jax
    import numpy as np

    from jora.methods.lora import LoRA
    from jora.train.feed import to_devices
    from jora.train.many.api import prepare
    from jora.train.many.feed import assemble, job_rows
    from jora.train.many.jobs import Job
    from jora.train.many.plan import bank_of, choose_programs, group_jobs
    from jora.train.many.programs import SETTING_TYPES, BankPrograms
    from jora.train.many.state import empty_arrays, moves
    from jora.train.many.step import Settings
    from jora.train.options import TrainOptions

    chosen = TrainOptions(batch_size=1, max_steps=1, max_length=length)
    prepared = [
        prepare(Job(name=f"j{n}", data=[row(base, length, n)], method=LoRA(rank=rank), options=chosen), base)
        for n, rank in enumerate(ranks_of(jobs))
    ]
    groups = group_jobs(prepared, base, None)
    programs = BankPrograms(base, groups, prepared, deterministic=False)
    planned = choose_programs(groups, prepared)[0]
    programs.steps[planned] = programs.compile_step(planned, remat)
    arrays = [empty_arrays(each) for each in programs.arrays]
    for k, group in enumerate(groups):
        enter = moves(programs.arrays[k], programs.jobs[k]).enter
        for place, number in enumerate(group.jobs):
            first = prepared[number].job.method.init(base, jax.random.key(0)).state
            arrays[k] = enter(arrays[k], place, first)
    order = [number for group in groups for number in group.jobs]
    bank = bank_of(groups, planned.kinds, base.layout.batch_shards)
    rows = {place: job_rows(prepared[number], 0, planned).rows for place, number in enumerate(order)}
    batch = to_devices(assemble(rows, bank, programs.parts, planned), base.layout, packed=False)
    numbers = (True, 0, 2e-4, 0.9, 0.999, 1e-8, 0.0, 1.0)
    settings = tuple(
        Settings(*(np.full(g.kind.jobs, v, dtype) for v, dtype in zip(numbers, SETTING_TYPES, strict=True)))
        for g in groups
    )
    settings = jax.device_put(settings, base.layout.sharding(()))

    def step() -> None:
        programs.step(arrays, batch, settings, planned)
        jax.block_until_ready([each.state for each in arrays])

    trained = sum(math.prod(leaf.shape) for each in programs.arrays for leaf in jax.tree.leaves(each.state.trained))
    return step, programs.steps[planned], trained


def compare(base: Any, length: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Steps of all three in turn, and what they hold."""
    from jora.train.memory import ProgramMemory

    ranks = ranks_of(chosen.jobs)
    mean = round(sum(ranks) / len(ranks))
    together, together_program, all_trained = many(base, chosen.jobs, length, chosen.remat)
    one, one_program, one_trained = single(base, mean, chosen.jobs, length, chosen.remat)
    apart = {rank: single(base, rank, 1, length, chosen.remat)[0] for rank in dict.fromkeys(ranks)}

    def separate() -> None:
        for rank in ranks:
            apart[rank]()

    steps: dict[str, Step] = {"many": together, "one": one, "separate": separate}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(chosen.steps + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    memory = {name: ProgramMemory.of(p) for name, p in (("many", together_program), ("one", one_program))}
    allowed = memory["one"].total + 16 * (all_trained - one_trained)
    ratios = {
        name: [a / b for a, b in zip(seconds["many"], seconds[name], strict=True)] for name in ("one", "separate")
    }
    return {
        "length": length,
        "ranks": ranks,
        "seconds": seconds,
        "ratios": ratios,
        "median": {name: statistics.median(values) for name, values in ratios.items()},
        "memory": {name: m._asdict() | {"total": m.total} for name, m in memory.items()},
        "memory_allowed": allowed,
    }


def main() -> None:
    """Measure and print a table."""
    chosen = options()
    from jora.demo.gemma import gemma_gguf
    from jora.models.model import load_model

    facts = machine.facts(PACKAGES)
    base = load_model(chosen.model or gemma_gguf(), dtype=chosen.dtype)
    print(machine.lines(facts), "\n")
    print("| tokens a job | many s | one adapter s | separate s | many / one | many / separate | MiB many, allowed |")
    print("|---|---|---|---|---|---|---|")
    found = []
    for length in chosen.lengths:
        result = compare(base, length, chosen)
        found.append(result)
        seconds = " | ".join(machine.spread(result["seconds"][name]) for name in ("many", "one", "separate"))
        ratios = " | ".join(machine.spread(result["ratios"][name]) for name in ("one", "separate"))
        memory = f"{result['memory']['many']['total'] / 2**20:.0f}, {result['memory_allowed'] / 2**20:.0f}"
        print(f"| {length} | {seconds} | {ratios} | {memory} |", flush=True)
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps({"machine": facts, "lengths": found}, indent=2))


if __name__ == "__main__":
    main()
