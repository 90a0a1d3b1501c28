"""Tokens per second and peak memory of LoRA training at Llama-2-7B's shape on one GPU, beside HF PEFT.

Random bf16 weights, LoRA r16 (fp32) on all linears, AdamW, one row of 512 and of 2048 tokens of which 64 carry loss.
Each contestant is a process of its own, one after the other (two copies of the weights would leave less memory to
both); it makes the weights once and goes through the lengths from the shortest on, each with a fresh adapter and
optimiser. jax's peak is that of the process so far, so that a longer row's is its own only where it needs more;
PyTorch's is reset between lengths. Needs jax with CUDA, optax and psutil for Jora; torch, transformers and peft for
the peers; nothing is downloaded and no other dependency of Jora is imported. What is known is printed at once, and
`--out` is written after every contestant.

    PYTHONPATH=src python benchmarks/gpu_llama7b.py --out build/gpu.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpu_children
import gpu_shapes
import machine
import numpy as np

RANK, ANSWERS, RATE = 16, 64, 2e-4
PACKAGES = ("jax", "jaxlib", "torch", "transformers", "peft")
CONTESTANTS = ("jora:none", "jora:selective", "jora:full", "peft", "peft-checkpointing")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# One step that returns its loss, and the peak bytes so far.
Contestant = tuple[Callable[[], float], Callable[[], int]]


def jora_base(hf: dict[str, Any], remat: str, allow_cpu: bool) -> Callable[[int], Contestant]:
    """Weights, once; then, for a length, the library's own train step."""
    import jax
    import jax.numpy as jnp

    from jora.data.batches import Batches, Tokenised
    from jora.methods.lora import LoRA
    from jora.models.families import config_from_hf
    from jora.models.model import Model
    from jora.sharding import single_device
    from jora.train.feed import Schedule, batch_options, to_devices
    from jora.train.optimizer import make_optimizer
    from jora.train.options import TrainOptions
    from jora.train.programs import Programs, abstract_params_of
    from jora.train.state import abstract_adapter, abstract_train_state, first_train_state
    from jora.train.step import Program

    gpu_children.check_device(jax.default_backend(), allow_cpu)
    config, layout = config_from_hf(hf), single_device()
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    model = Model(gpu_shapes.random_weights(config, layout, dtype), config, layout, hf, "", {})
    adapter = LoRA(rank=RANK).init(model, jax.random.key(0))

    def peak() -> int:
        return int((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", machine.peak_bytes()))

    def at_length(length: int) -> Contestant:
        constant: dict[str, Any] = {"schedule": "constant", "warmup": 0.0}  # as the peers have it
        options = TrainOptions(batch_size=1, max_steps=1000, max_length=length, learning_rate=RATE, **constant)
        loss = np.arange(length) >= length - ANSWERS
        example = Tokenised(gpu_shapes.row(length, config.vocab_size), loss)
        batches = Batches([example], batch_options(options, layout))
        schedule = Schedule(batches, 1, options.max_steps)
        optimizer = make_optimizer(options, schedule.total)
        shapes = abstract_adapter(adapter.method, adapter.state, config, layout)
        abstract = abstract_train_state(shapes.trained, optimizer, layout)
        program = Program(config, layout, adapter.method, optimizer, remat)  # type: ignore[arg-type]
        programs = Programs(program, abstract, shapes.constant, abstract_params_of(model), options)
        train_step = programs.compile_train(schedule.shapes[0], program)
        state = first_train_state(adapter, abstract, optimizer)
        batch = to_devices(batches.build(schedule.step(0)[1]), layout, packed=False)
        seed = jax.device_put(np.uint32(0), layout.sharding(()))

        def step() -> float:
            nonlocal state
            state, metrics = train_step(state, adapter.state.constant, model.params, batch, seed)
            return float(jax.block_until_ready((state, metrics))[1]["loss"])

        return step, peak

    return at_length


def peft_base(hf: dict[str, Any], checkpointing: bool, allow_cpu: bool) -> Callable[[int], Contestant]:
    """Weights, once; then, for a length, a step of HF PEFT with PyTorch's own attention kernels."""
    import peft
    import torch
    import transformers

    gpu = torch.cuda.is_available()
    gpu_children.check_device("gpu" if gpu else "cpu", allow_cpu)
    # fp32 products (the adapters') may use TF32, as jax's do by default.
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if gpu else "cpu")
    settings = {name: value for name, value in hf.items() if name != "model_type"}
    config = transformers.LlamaConfig(**settings, attn_implementation="sdpa")
    with device:
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if gpu else torch.float32)
    options = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS, task_type="CAUSAL_LM")
    # fp32 adapters on a bf16 base, as Jora has them
    model = peft.get_peft_model(base, options, autocast_adapter_dtype=True).train()
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    initial = [p.detach().to("cpu", copy=True) for p in trained]

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if gpu else machine.peak_bytes()

    def at_length(length: int) -> Contestant:
        with torch.no_grad():
            for parameter, value in zip(trained, initial, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
        ids = torch.from_numpy(gpu_shapes.row(length, hf["vocab_size"]).astype(np.int64))[None].to(device)
        labels = ids.clone()
        labels[:, : length - ANSWERS] = -100

        def step() -> float:
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if gpu:
                torch.cuda.synchronize()
            return float(loss.detach())

        return step, peak

    return at_length


def timed(build: Callable[[], Contestant], chosen: argparse.Namespace, since: float) -> dict[str, Any]:
    """The steps of one contestant at one length; `since`: when its first step began to be prepared (wall clock)."""
    step, peak = build()
    losses, seconds, first = [], [], 0.0
    for number in range(chosen.warmup + chosen.steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
        if number == 0:
            first = time.time() - since
    result = {"seconds": seconds[chosen.warmup :], "peak_bytes": peak(), "losses": losses}
    return {**result, "first_step_seconds": first}


def run_one(name: str, chosen: argparse.Namespace) -> None:
    """All lengths of one contestant in this process. The first one's start is that of the process."""
    kind, _, remat = name.partition(":")
    hf, since = gpu_shapes.llama(chosen.tiny), chosen.since
    if chosen.measure_rate:
        before = time.time()
        side = 256 if chosen.tiny else gpu_shapes.RATE_SIDE
        gpu_children.attempt(lambda: {"rate": gpu_shapes.matmul_rate(side)}, {})
        since += time.time() - before  # not a part of what a run would wait for
    base: list[Callable[[int], Contestant]] = []

    def at(length: int) -> Contestant:
        if not base:
            how: Any = partial(jora_base, hf, remat) if kind == "jora" else partial(peft_base, hf, "-" in name)
            base.append(how(chosen.allow_cpu))
        return base[0](length)

    for length in sorted(chosen.lengths):
        first_of_process = not base
        found = partial(timed, partial(at, length), chosen, since)
        gpu_children.attempt(found, {"name": name, "length": length, "first_of_process": first_of_process})
        since = time.time()


def run_all(chosen: argparse.Namespace, report: dict[str, Any]) -> None:
    """Every contestant into `report`; what fails (out of memory, say) is recorded with its error."""
    for name in chosen.contestants:
        arguments = ["--one", name, "--steps", str(chosen.steps), "--warmup", str(chosen.warmup)]
        arguments += ["--lengths", *map(str, sorted(chosen.lengths)), "--since", repr(time.time())]
        measures = name.startswith("jora") and report["rate"] is None
        flags = {"--tiny": chosen.tiny, "--allow-cpu": chosen.allow_cpu, "--measure-rate": measures}
        arguments += [flag for flag, given in flags.items() if given]
        done: set[int] = set()

        def seen(result: dict[str, Any], done: set[int] = done) -> None:
            if "length" not in result:
                report["rate"] = result.get("rate")
                gpu_children.say(f"products: {result}")
                return
            done.add(result["length"])
            report["runs"].append(with_floor(result, chosen.tiny, report["rate"]))
            gpu_children.say(table(report["runs"][-1:]).splitlines()[-1])

        started = time.monotonic()
        failed = gpu_children.run_child(__file__, arguments, chosen.timeout, seen)
        gpu_children.say(f"{name}: {failed or 'done'} after {time.monotonic() - started:.0f} s")
        for length in sorted(set(chosen.lengths) - done):
            report["runs"].append({"name": name, "length": length, "error": failed or "gave no result"})
        gpu_children.write(chosen.out, report)


def with_floor(run: dict[str, Any], tiny: bool, rate: float | None) -> dict[str, Any]:
    """The run with its FLOPs and, where the rate of products is known, the least seconds that they take."""
    flops = gpu_shapes.lora_flops(gpu_shapes.llama(tiny), run["length"], min(ANSWERS, run["length"]), RANK)
    return {**run, "flops": flops, "floor_seconds": flops["total"] / rate if rate else None}


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [
        "| tokens | | tokens/s | ms a step (range) | floor ms | x floor | peak GiB | first step after, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in found:
        if "error" in run:
            rows.append(f"| {run['length']} | {run['name']} | failed: {run['error']} | | | | | |")
            continue
        seconds = statistics.median(run["seconds"])
        least = run["floor_seconds"]
        floor = f"{1e3 * least:.2f} | {seconds / least:.2f}" if least else "| "
        first = f"{run['first_step_seconds']:.1f}{'' if run['first_of_process'] else ' (same process)'}"
        cells = (
            *(run["length"], run["name"], f"{run['length'] / seconds:,.0f}"),
            *(machine.spread([1e3 * one for one in run["seconds"]]), floor),
            *(f"{run['peak_bytes'] / machine.GIB:.2f}", first),
        )
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=150, metavar="SECONDS", help="for one contestant")
    parser.add_argument("--tiny", action="store_true", help="a tiny Llama, to try the script")
    parser.add_argument("--allow-cpu", action="store_true", help="run without a GPU, to try the script")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--since", type=float, default=time.time(), help=argparse.SUPPRESS)
    parser.add_argument("--measure-rate", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        run_one(chosen.one, chosen)
        return
    gpu = gpu_children.gpu_name()
    if gpu is None and not chosen.allow_cpu:
        print("skipped: no GPU here (nvidia-smi finds none); nothing was measured")
        return
    report: dict[str, Any] = {"machine": {**machine.facts(PACKAGES), "gpu": gpu}, "rate": None, "runs": []}
    run_all(chosen, report)
    rate = f"{report['rate'] / 1e12:.1f} TFLOP/s" if report["rate"] else "not measured"
    print(f"{table(report['runs'])}\n\nProducts of the floor: {rate}. GPU: {gpu}. {machine.lines(report['machine'])}")


if __name__ == "__main__":
    main()
