"""Decode steps of the serving engine at Llama-2-7B's shape on one GPU, beside the floor of the bytes they must move.

    PYTHONPATH=src python benchmarks/gpu_serve7b.py --out build/gpu_serve7b.json

Random bf16 weights, 64 rows of about 1,024 tokens, rank-8 adapters on all linears: 0, 1 and 64 distinct ones.
eta = floor / measured, the floor being the bytes of `serving/decode_floor.py` over the bandwidth that a copy reaches
here. Once more with short contexts, which leaves the weights; and what one adapter costs on its way from the host.
Programs are compiled when they are first needed, before the steps that are timed.

`--tiny` tries the script on any machine and measures nothing of interest.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import machine
from gpu_children import gpu_name, say, write
from gpu_shapes import llama, random_weights
from serving import bases, decode_floor, engine_runs
from serving.trace import Arrival

PACKAGES = ("jax", "jaxlib")
SHORT = 16  # tokens of the prompts where the weights are what a step reads
TINY: dict[str, Any] = {"tiny": True, "rows": 4, "prompt": 40, "steps": 3, "distinct": [0, 1, 4], "pool_gib": 0.02}


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="sequences that decode together")
    parser.add_argument("--prompt", type=int, default=960, help="tokens of each row's prompt")
    parser.add_argument("--distinct", type=int, nargs="+", default=[0, 1, 64], help="adapters in one batch")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16, help="decode steps of each timing")
    parser.add_argument("--rounds", type=int, default=3, help="timings, one after the other over the same rows")
    parser.add_argument("--pool-gib", type=float, default=48.0)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--out", type=Path, help="JSON, written after each measurement")
    if "--tiny" in arguments:
        parser.set_defaults(**TINY)
    return parser.parse_args(arguments)


def make_model(directory: Path, tiny: bool) -> Any:
    """Random weights on the device; only a tokenizer is written, and the config that adapters are made for."""
    import jax
    import jax.numpy as jnp

    from jora.models.families import config_from_hf
    from jora.models.model import Model
    from jora.sharding import single_device

    hf = {**llama(tiny), "bos_token_id": 1, "eos_token_id": 2}
    config, layout = config_from_hf(hf), single_device()
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf))
    bases._write_tokenizer(hf, directory)
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    identity = {"name": directory.name, "fingerprint": ""}
    return Model(random_weights(config, layout, dtype), config, layout, hf, str(directory), identity)


def make_engine(model: Any, adapters: Path, chosen: argparse.Namespace) -> Any:
    from jora.serve import Engine, EngineOptions

    most = max(chosen.distinct)
    buckets = tuple(sorted({chosen.rank * max(k, 1) for k in chosen.distinct}))
    steps = chosen.steps * chosen.rounds
    return Engine(
        model,
        EngineOptions(
            pool_bytes=int(chosen.pool_gib * 2**30),
            max_batch=chosen.rows,
            chunk=-(-chosen.prompt // 16) * 16,
            rank_buckets=buckets,
            product_buckets=(),
            max_length=chosen.prompt + engine_runs.answer_tokens(chosen.rows, steps),
            prefix_cache=False,
            max_queue=max(1024, most),
        ),
        str(adapters),
    )


def load_seconds(engine: Any, count: int) -> dict[str, float]:
    """One token from each adapter in turn, twice: what a request for a cold adapter waits for, and for a warm one."""
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    for kind in ("cold", "warm"):
        for number in range(count):
            start = time.perf_counter()
            engine_runs.play(engine, [Arrival(number, 0.0, tuple(range(5, 5 + SHORT)), 1, number)], f"{kind}-{number}")
            found[kind].append(time.perf_counter() - start)
    stats = engine.stats()
    # The first two of each kind compiled programs.
    waits = {f"{kind}_first_token_seconds": median(times[2:] or times) for kind, times in found.items()}
    return {**waits, "disk_to_host_seconds": stats.adapter_load_seconds / max(1, stats.adapter_loads)}


def host_to_device(model: Any, rank: int) -> dict[str, float]:
    """Seconds that an adapter's bytes take from the host's memory to the device, and into its pages."""
    import jax
    import numpy as np

    size = decode_floor.adapter_entries(model.config, rank) * model.dtype.itemsize
    block = np.random.default_rng(0).integers(0, 255, size, np.uint8)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        jax.device_put(block).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return {"bytes": size, "copy_seconds": median(seconds[2:])}


def copy_bandwidth(gib: float) -> float:
    """Bytes a second of a copy on the device, read and written."""
    import jax
    import jax.numpy as jnp

    array = jax.random.bits(jax.random.key(0), (int(gib * 2**30) // 4,), jnp.uint32)
    other = jax.jit(lambda x: x + jnp.uint32(1))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(10):  # dispatched together: a wait after each would be a part of its time
            array = other(array)
        array.block_until_ready()
        seconds.append((time.perf_counter() - start) / 10)
    return 2 * array.nbytes / median(seconds[1:])


def decode_seconds(engine: Any, chosen: argparse.Namespace, distinct: int, prompt: int) -> tuple[list[float], float]:
    """(seconds of a step in each timing, mean context of the rows): engine steps, host included."""
    run, rows = f"decode-{prompt}-{distinct}", chosen.rows
    trace = [
        Arrival(
            n,
            0.0,
            tuple(5 + (n * 131 + i * 7919) % 400 for i in range(prompt)),
            engine_runs.answer_tokens(rows, chosen.steps * chosen.rounds),
            n % distinct if distinct else None,
        )
        for n in range(rows)
    ]
    for arrival in trace:
        engine.submit(engine_runs.request(arrival, run))
    got = {f"{run}/{n}": 0 for n in range(rows)}

    def step() -> int:
        made = 0
        for event in engine.step():
            if event.finish not in (None, "length"):
                raise SystemExit(f"{event.request} ended with {event.finish}: {event.error}")
            got[event.request] += len(event.tokens)
            made += len(event.tokens)
        return made

    while min(got.values()) == 0:
        step()
    for _ in range(engine_runs.SKIP):
        step()
    times = []
    for _ in range(chosen.rounds):
        start = time.perf_counter()
        made = sum(step() for _ in range(chosen.steps))
        times.append((time.perf_counter() - start) / chosen.steps)
        if made != rows * chosen.steps:
            raise SystemExit(f"{run}: {made} tokens in {chosen.steps} steps of {rows} rows")
    context = prompt + sum(got.values()) / rows - chosen.steps * chosen.rounds / 2
    engine_runs._clear(engine, set(got))
    return times, context


def program_seconds(engine: Any, chosen: argparse.Namespace, context: int, distinct: int) -> float:
    """Seconds of the decode program alone, dispatched again and again: what is left when the host costs nothing.

    It writes into pages that may be an adapter's: what the engine answers afterwards means nothing, only its times do.
    """
    import jax
    import numpy as np

    from jora.serve.device.programs import decode

    executor, rows = engine.executor, chosen.rows
    blocks = executor.pool_layout.blocks(context)
    tables = np.zeros_like(executor.tables)
    per_table = tables.shape[0] * rows * blocks
    pages = np.random.default_rng(0).permutation(np.arange(1, engine.pages.total))
    tables[:, :, :blocks] = np.resize(pages, per_table).reshape(tables.shape[0], rows, blocks)
    active = executor.active if distinct else executor._no_adapters
    numbers = np.arange(rows, dtype=np.int32) % distinct if distinct else np.full(rows, -1, np.int32)
    arguments = (executor.samples.last, np.full(rows, context - 1, np.int32), numbers, tables)

    def once() -> Any:
        executor.pool, logits = decode(
            engine.model.params, active, executor.pool, *arguments, None, program=executor.program
        )
        return logits

    once().block_until_ready()
    start = time.perf_counter()
    for _ in range(10):
        logits = once()
    jax.block_until_ready((executor.pool, logits))
    return (time.perf_counter() - start) / 10


def measure(chosen: argparse.Namespace, directory: Path, report: dict[str, Any]) -> None:
    began = time.perf_counter()
    model = make_model(directory / "base", chosen.tiny)
    config, itemsize = model.config, model.dtype.itemsize
    most = max(chosen.distinct)
    bases.write_adapters(directory / "base", directory / "adapters", most, [chosen.rank], distinct=2)
    say(f"model and adapters made in {time.perf_counter() - began:.0f} s")
    report["bandwidth"] = bandwidth = copy_bandwidth(0.01 if chosen.tiny else 2.0)
    report["host_to_device"] = host_to_device(model, chosen.rank)
    engine = make_engine(model, directory / "adapters", chosen)
    report["load"] = load_seconds(engine, most)
    say(f"adapters loaded, {time.perf_counter() - began:.0f} s: {report['load']}")
    report["steps"] = []
    for prompt in (SHORT, chosen.prompt):
        for k in chosen.distinct:
            seconds, context = decode_seconds(engine, chosen, k, prompt)
            alone = program_seconds(engine, chosen, int(context), k)
            floor = decode_floor.step(config, chosen.rows, int(context), chosen.rank, k, itemsize).bytes / bandwidth
            found = {"distinct": k, "context": context, "seconds": seconds, "floor_seconds": floor}
            report["steps"].append({**found, "program_seconds": alone})
            say(f"{k} adapters, context {context:.0f}: {1e3 * median(seconds):.2f} ms, program {1e3 * alone:.2f} ms")
            write(chosen.out, report)
    engine.close()


def table(report: dict[str, Any]) -> str:
    """Markdown; the tax is against the base alone at the same context."""
    lines = [
        "| context | adapters | ms a step | program alone, ms | floor, ms | eta | tax |",
        "|---|---|---|---|---|---|---|",
    ]
    base: dict[str, Any] | None = None
    for step in report["steps"]:
        if step["distinct"] == 0:
            base = step
        taken, floor = median(step["seconds"]), step["floor_seconds"]
        tax = "" if base is None else f"{100 * (taken / median(base['seconds']) - 1):.1f} %"
        lines.append(
            f"| {step['context']:.0f} | {step['distinct']} | {machine.spread([1e3 * s for s in step['seconds']])} | "
            f"{1e3 * step['program_seconds']:.2f} | {1e3 * floor:.2f} | {floor / taken:.2f} | {tax} |"
        )
    moved, load = report["host_to_device"], report["load"]
    return "\n".join(lines) + (
        f"\n\nCopy on the device: {report['bandwidth'] / 1e12:.2f} TB/s, read and written. An adapter of "
        f"{moved['bytes'] / 1e6:.1f} MB: host to device {1e3 * moved['copy_seconds']:.2f} ms; disk to host "
        f"{1e3 * load['disk_to_host_seconds']:.0f} ms; first token {1e3 * load['cold_first_token_seconds']:.0f} ms "
        f"cold, {1e3 * load['warm_first_token_seconds']:.0f} ms warm."
    )


def main() -> None:
    chosen = options(sys.argv[1:])
    gpu = gpu_name()
    if gpu is None and not chosen.tiny:
        print("skipped: no GPU here (nvidia-smi finds none); nothing was measured")
        return
    asked = {name: value for name, value in vars(chosen).items() if name != "out"}
    report: dict[str, Any] = {"machine": {**machine.facts(PACKAGES), "gpu": gpu}, "options": asked}
    with tempfile.TemporaryDirectory(prefix="jora-benchmark-") as directory:
        measure(chosen, Path(directory), report)
    write(chosen.out, report)
    print(f"{table(report)}\n\nGPU: {gpu}. {machine.lines(report['machine'])}")


if __name__ == "__main__":
    main()
