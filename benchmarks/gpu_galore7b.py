"""Full fine-tuning of a Llama 7B by GaLore on one GPU: peak memory, seconds a step, and that the loss falls.

Random bf16 weights of the paper's 7B (arXiv 2403.03507), one row of 256 tokens again and again, rank 1024, layer-wise
8-bit GaLore without clipping, P in bf16 and in int8; layer-wise 8-bit Adam beside it. The library's own train step, its
state donated as the trainer does. Each contestant is a process of its own without preallocation; what is known is
printed at once, and `--out` is written after every contestant.

Order in a process: one factorisation is timed; the step is compiled from shapes; weights (one kernel a stack, no
temporaries), optimiser state, steps. Peaks are recorded after each, so that it shows whose the last one is.

`galore_refresh` is twice the number of matrices (448 at 7B), staggered: after step 0, even steps refresh one matrix and
odd ones none. (At the paper's 200 every step would refresh one or two.) Step 0 refreshes all 224. Where that would take
more than `--first-refresh-limit` seconds by the factorisations that were timed, P starts as random columns instead and
the run at step 1; the report says so. Bytes and seconds of the other steps are the same.

    PYTHONPATH=src python benchmarks/gpu_galore7b.py --out build/galore7b.json
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpu_children
import gpu_shapes
import machine
import numpy as np

CONTESTANTS = ("galore-bf16", "galore-int8", "adamw8bit")
PACKAGES = ("jax", "jaxlib", "optax")
RATES = {"galore": 2e-4, "adamw": 5e-5}  # GaLore's is times 0.25 for matrices
LIMIT_GB = 24


def matrices_due(step: int, every: int, matrices: int) -> int:
    """How many of all matrices step number `step` gives new projections, staggered (`GaLore._due`)."""
    if step == 0:
        return matrices
    return sum((step + place * every // matrices) % every == 0 for place in range(matrices))


def options_of(name: str, length: int, rank: int, matrices: int) -> dict[str, Any]:
    """The `TrainOptions` of a contestant."""
    kind, _, precision = name.partition("-")
    common = {"batch_size": 1, "max_steps": 1000, "max_length": length, "schedule": "constant", "warmup": 0.0}
    common |= {"layerwise": True, "max_grad_norm": 0.0, "remat": "full"}
    if kind != "galore":
        return common | {"optimizer": name, "learning_rate": RATES["adamw"]}
    galore = {"rank": rank, "refresh": 2 * matrices, "svd": "randomised", "stagger": True}
    galore["projection"] = {"bf16": "bfloat16"}.get(precision, precision)
    prefixed = {f"galore_{key}": value for key, value in galore.items()}
    return common | prefixed | {"optimizer": "galore8bit", "learning_rate": RATES["galore"]}


def factorisation_seconds(config: Any, rank: int) -> dict[str, float]:
    """Seconds of one randomised factorisation of each shape of matrix, and of all matrices of the model."""
    import jax
    import jax.numpy as jnp

    from jora.models.config import LINEARS
    from jora.models.tensors import linear_shape
    from jora.optim.projection import leading_vectors

    found: dict[str, float] = {}
    total = 0.0
    for target in LINEARS:
        shape = linear_shape(config, target)
        m, n = sorted((shape.in_size, shape.out_size))
        if f"{m}x{n}" not in found:
            matrix = jax.random.normal(jax.random.key(0), (m, n), jnp.float32)
            factorise = jax.jit(lambda x: leading_vectors(x, rank, "randomised", jnp.uint32(0)))
            factorise(matrix).block_until_ready()
            start = time.perf_counter()
            factorise(matrix).block_until_ready()
            found[f"{m}x{n}"] = time.perf_counter() - start
            gpu_children.say(f"  one factorisation of {m}x{n}: {found[f'{m}x{n}']:.2f} s")
        total += config.layers * found[f"{m}x{n}"]
    return {**found, "all": total}


def random_projectors(state: Any) -> Any:
    """The train state with random columns as P, each of about length 1, and every layer at GaLore's step 1."""
    import jax
    import jax.numpy as jnp

    from jora.optim.projection import Int8Columns

    def columns(old: Any, seed: int) -> Any:
        rank = (old.codes if isinstance(old, Int8Columns) else old).shape[-1]
        side = jax.tree.leaves(old)[0].size // (jax.tree.leaves(old)[0].shape[0] * rank)
        leaves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), old)
        jax.tree.map(lambda x: x.delete(), old)  # the new one takes its place
        if not isinstance(old, Int8Columns):
            return gpu_shapes.random_array(leaves, seed, 1 / math.sqrt(side))
        scale = jax.device_put(jnp.full(leaves.scale.shape, 1 / (25 * math.sqrt(side))), leaves.scale.sharding)
        return Int8Columns(gpu_shapes.random_array(leaves.codes, seed, 25.0), scale)

    layers = state.optimizer.layers
    projectors = {name: columns(p, 100 + seed) for seed, (name, p) in enumerate(layers.projectors.items())}
    step = jax.device_put(jnp.ones_like(layers.step), layers.step.sharding)
    layers = layers._replace(step=step, projectors=projectors)
    return state._replace(optimizer=state.optimizer._replace(layers=layers))


def memory(when: str, quiet: bool = False) -> dict[str, Any]:
    """What jax's allocator has given out now and at most (on a CPU: the process's memory)."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    peak = int(stats.get("peak_bytes_in_use", machine.peak_bytes()))
    found: dict[str, Any] = {"when": when, "peak_bytes": peak, "bytes": int(stats.get("bytes_in_use", peak))}
    if not quiet:
        gpu_children.say(f"  {when}: {found['bytes'] / 1e9:.2f} GB in use, peak {peak / 1e9:.2f} GB")
    return found


def train(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Compile, make the state, take the steps."""
    import jax
    import jax.numpy as jnp
    from galore_memory import SIZES, paper_config

    from jora.data.batches import Batches, Tokenised
    from jora.methods.full import Full
    from jora.models.families import config_from_hf
    from jora.models.model import Model
    from jora.sharding import single_device
    from jora.train.estimation import abstract_programs
    from jora.train.feed import Schedule, batch_options, to_devices
    from jora.train.memory import ProgramMemory
    from jora.train.options import TrainOptions
    from jora.train.state import first_train_state

    gpu_children.check_device(jax.default_backend(), chosen.allow_cpu)
    config = config_from_hf(gpu_shapes.llama(True)) if chosen.tiny else paper_config("7B")
    rank = 16 if chosen.tiny else SIZES["7B"][-1]
    galore, matrices, layout = name.startswith("galore"), 7 * config.layers, single_device()
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    factorisation = factorisation_seconds(config, rank) if galore else {"all": 0.0}
    skips = factorisation["all"] > chosen.first_refresh_limit

    options = TrainOptions(**options_of(name, chosen.length, rank, matrices))
    example = Tokenised(gpu_shapes.row(chosen.length, config.vocab_size), np.ones(chosen.length, bool))
    batches = Batches([example], batch_options(options, layout))
    schedule = Schedule(batches, 1, options.max_steps)
    programs = abstract_programs(config, layout, Full(), options, dtype)
    program = programs.program._replace(remat="full")
    start = time.perf_counter()
    train_step = programs.compile_train(schedule.shapes[0], program)
    compile_seconds = time.perf_counter() - start
    analysis = ProgramMemory.of(train_step)
    gpu_children.say(f"  compiled in {compile_seconds:.1f} s; the compiler's analysis: {analysis.total / 1e9:.2f} GB")
    peaks = [memory("factorised, compiled")]

    weights = gpu_shapes.random_weights(config, layout, dtype)
    model = Model(weights, config, layout, {}, "", {})
    adapter = Full().init(model, jax.random.key(0))
    del weights
    peaks.append(memory("weights"))
    state = jax.block_until_ready(first_train_state(adapter, programs.state, program.optimizer))
    state = random_projectors(state) if skips else state
    params = adapter.method.rest(model.params)
    batch = to_devices(batches.build(schedule.step(0)[1]), layout, packed=False)
    seed = jax.device_put(np.uint32(0), layout.sharding(()))
    peaks.append(memory("optimiser state"))

    steps: list[dict[str, Any]] = []
    result = {
        "steps": steps,
        "analysis": {**analysis._asdict(), "total": analysis.total},
        "compile_seconds": compile_seconds,
        "factorisation_seconds": factorisation,
        "starts_from_random_projections": skips,
        "options": options_of(name, chosen.length, rank, matrices),
    }
    first = 1 if skips else 0
    for number in range(first, first + chosen.steps + 1):
        start = time.perf_counter()
        state, metrics = train_step(state, {}, params, batch, seed)
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - start
        due = matrices_due(number, options.galore_refresh, matrices) if galore else 0
        measured = {key: float(value) for key, value in metrics.items()}
        steps.append({"step": number, "seconds": seconds, "refreshed": due, **measured})
        gpu_children.say(f"  step {number}: {seconds:.3f} s, {due} matrices refreshed, {measured}")
        if number == first:
            peaks.append(memory("first step"))
        # Should the process be stopped, this much is known.
        gpu_children.emit({"name": name, **result, "memory": [*peaks, memory("last step", quiet=True)]})
    return {**result, "memory": [*peaks, memory("last step")]}


def run_all(chosen: argparse.Namespace, report: dict[str, Any]) -> None:
    """Every contestant into `report`; what fails is recorded with its error."""
    for name in chosen.contestants:
        arguments = ["--one", name, "--steps", str(chosen.steps), "--length", str(chosen.length)]
        arguments += ["--first-refresh-limit", str(chosen.first_refresh_limit)]
        arguments += ["--tiny"] * chosen.tiny + ["--allow-cpu"] * chosen.allow_cpu
        gpu_children.say(name)
        result: dict[str, Any] = {"name": name}
        started = time.monotonic()
        failed = gpu_children.run_child(__file__, arguments, chosen.timeout, result.update)
        seconds = time.monotonic() - started
        gpu_children.say(f"{name}: {failed or 'done'} after {seconds:.0f} s")
        if "steps" not in result:
            result.setdefault("error", failed or "gave no result")
        report["runs"].append({**result, "process_seconds": seconds, "ended": failed or "well"})
        gpu_children.write(chosen.out, report)


def table(found: list[dict[str, Any]]) -> str:
    """Markdown. The first step (which in GaLore may refresh everything) is not among the timed ones."""
    rows = [
        f"| | peak GB (GiB) | under {LIMIT_GB} GB | whose | analysis GB | plain step, ms (range) | with one refresh, ms"
        " (range) | first step, s | loss first, last | falls |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in found:
        if "error" in run:
            rows.append(f"| {run['name']} | failed: {run['error']} | | | | | | | | |")
            continue
        peaks = {one["when"]: one["peak_bytes"] for one in run["memory"]}
        before, last = peaks["optimiser state"], peaks["last step"]
        first, *timed = run["steps"]
        losses = [one["loss"] for one in run["steps"]]
        falls = all(map(math.isfinite, losses)) and losses[-1] < losses[0]
        plain = [1e3 * step["seconds"] for step in timed if not step["refreshed"]]
        refreshing = [1e3 * step["seconds"] for step in timed if step["refreshed"]]
        cells = (
            *(run["name"], f"{last / 1e9:.2f} ({last / machine.GIB:.2f})"),
            *("yes" if last < LIMIT_GB * 1e9 else "no", "the steps'" if last > before else "the making of the state"),
            f"{run['analysis']['total'] / 1e9:.2f}",
            *(machine.spread(times) if times else "" for times in (plain, refreshing)),
            f"{first['seconds']:.1f} ({first['refreshed']} refreshed)",
            f"{losses[0]:.4f}, {losses[-1]:.4f}",
            "yes" if falls else "no",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def notes(found: list[dict[str, Any]]) -> str:
    """How P was computed and where the runs began."""
    lines = []
    for run in found:
        if "error" in run:
            continue
        if run["ended"] != "well":
            lines.append(f"{run['name']}: {run['ended']}, with {len(run['steps'])} steps done.")
        if not run["name"].startswith("galore"):
            continue
        times: dict[str, float] = dict(run["factorisation_seconds"])
        total = times.pop("all")
        each = ", ".join(f"{shape}: {seconds:.2f} s" for shape, seconds in times.items())
        began = "random columns as P, at step 1" if run["starts_from_random_projections"] else "step 0, all matrices"
        lines.append(
            f"{run['name']}: factorisation {run['options']['galore_svd']} ({each}; {total:.0f} s for all matrices); "
            f"refresh every {run['options']['galore_refresh']} steps, staggered; began with {began}."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--steps", type=int, default=6, help="timed ones, after the first")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--timeout", type=float, default=240, metavar="SECONDS", help="for one contestant")
    parser.add_argument("--first-refresh-limit", type=float, default=60, metavar="SECONDS", help="see above")
    parser.add_argument("--tiny", action="store_true", help="a tiny Llama, to try the script")
    parser.add_argument("--allow-cpu", action="store_true", help="run without a GPU, to try the script")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        work: Callable[[], dict[str, Any]] = partial(train, chosen.one, chosen)
        gpu_children.attempt(work, {"name": chosen.one})
        return
    gpu = gpu_children.gpu_name()
    if gpu is None and not chosen.allow_cpu:
        print("skipped: no GPU here (nvidia-smi finds none); nothing was measured")
        return
    report: dict[str, Any] = {"machine": {**machine.facts(PACKAGES), "gpu": gpu}, "runs": []}
    run_all(chosen, report)
    print(f"{table(report['runs'])}\n\n{notes(report['runs'])}\n\nGPU: {gpu}. {machine.lines(report['machine'])}")


if __name__ == "__main__":
    main()
