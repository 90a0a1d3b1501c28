"""How long the train step takes to compile as a model gets deeper, and how long until the first step is done.

Layers are scanned, so depth should cost nothing: 32 against 2 layers of a Llama, 36 against 6 of a Gemma 3 (tiny
widths, and the real width of Llama-2-7B; compiling needs no weights). Each figure is the median of fresh processes
without a compilation cache. Then the real Gemma 3 270M: from the start of the process to the end of its first step.

    python benchmarks/compile_time.py --out build/compile_time.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine

LENGTH, ANSWERS, RANK = 512, 64, 16
PACKAGES = ("jax", "jaxlib")

_LLAMA: dict[str, Any] = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4}
_GEMMA: dict[str, Any] = {
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window": 128,
    "query_pre_attn_scalar": 16,
    "tie_word_embeddings": True,
}


def _sizes(vocab: int, hidden: int, mlp: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-tiny": {**_LLAMA, **_sizes(512, 64, 128, 4, 2, 16), "tie_word_embeddings": False},
    "llama-7b": {**_LLAMA, **_sizes(32000, 4096, 11008, 32, 32, 128), "tie_word_embeddings": False},
    "gemma3-tiny": {**_GEMMA, **_sizes(512, 64, 128, 4, 2, 16)},
}
CASES = (("llama-tiny", 2, 32), ("llama-7b", 2, 32), ("gemma3-tiny", 6, 36))


def config_json(shape: str, layers: int) -> dict[str, Any]:
    """The config.json of a shape with so many layers; every sixth layer of a Gemma 3 sees everything."""
    found = {**SHAPES[shape], "num_hidden_layers": layers}
    if shape.startswith("gemma3"):
        kinds = ["full_attention" if (n + 1) % 6 == 0 else "sliding_attention" for n in range(layers)]
        found["layer_types"] = kinds
    return found


def compile_once(shape: str, layers: int, remat: str) -> dict[str, float]:
    """Trace, lower and compile one train step on shapes alone, in this process."""
    import jax.numpy as jnp

    from jora.data.batches import Shape
    from jora.methods.lora import LoRA
    from jora.models.families import config_from_hf
    from jora.sharding import single_device
    from jora.train.estimation import abstract_programs
    from jora.train.options import TrainOptions

    config = config_from_hf(config_json(shape, layers))
    jnp.zeros(1).block_until_ready()  # the backend has started
    programs = abstract_programs(config, single_device(), LoRA(rank=RANK), TrainOptions(), jnp.dtype(jnp.float32))
    start, cpu = time.perf_counter(), time.process_time()
    traced = programs.trace_train(Shape(1, LENGTH, ANSWERS), programs.program._replace(remat=remat))
    lowered = traced.lower()
    middle = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    return {"trace": middle - start, "compile": end - middle, "total": end - start, "cpu": time.process_time() - cpu}


def first_step(model: str, remat: str, started: float) -> dict[str, float]:
    """From `started` (the clock's time when the process was started) to the end of the first step."""
    marks = {"start": started, "python": time.time()}
    import jax
    import numpy as np

    from jora.data.batches import Batches, Tokenised
    from jora.methods.lora import LoRA
    from jora.models.model import load_model
    from jora.train.feed import Schedule, batch_options, to_devices
    from jora.train.optimizer import make_optimizer
    from jora.train.options import TrainOptions
    from jora.train.programs import Programs, abstract_params_of
    from jora.train.state import abstract_adapter, abstract_train_state, first_train_state
    from jora.train.step import Program

    marks["imports"] = time.time()
    base = load_model(model, dtype="float32")
    marks["load"] = time.time()
    adapter = LoRA(rank=RANK).init(base, jax.random.key(0))
    options = TrainOptions(batch_size=1, max_steps=1, max_length=LENGTH)
    tokens = np.random.default_rng(0).integers(3, base.config.vocab_size, LENGTH).astype(np.int32)
    batches = Batches([Tokenised(tokens, np.arange(LENGTH) >= LENGTH - ANSWERS)], batch_options(options, base.layout))
    schedule = Schedule(batches, 1, 1)
    optimizer = make_optimizer(options, 1)
    shapes = abstract_adapter(adapter.method, adapter.state, base.config, base.layout)
    abstract = abstract_train_state(shapes.trained, optimizer, base.layout)
    program = Program(base.config, base.layout, adapter.method, optimizer, "none")
    programs = Programs(program, abstract, shapes.constant, abstract_params_of(base), options)
    train_step = programs.compile_train(schedule.shapes[0], program._replace(remat=remat))
    marks["adapter and compile"] = time.time()
    state = first_train_state(adapter, abstract, optimizer)
    batch = to_devices(batches.build(schedule.step(0)[1]), base.layout, packed=False)
    seed = jax.device_put(np.uint32(0), base.layout.sharding(()))
    jax.block_until_ready(train_step(state, adapter.state.constant, base.params, batch, seed))
    marks["step"] = time.time()
    names = list(marks)
    parts = {name: marks[name] - marks[before] for before, name in itertools.pairwise(names)}
    return {**parts, "total": marks["step"] - started}


def _fresh(*arguments: str) -> dict[str, float]:
    """One measurement in a process of its own."""
    # A cache on disk, which a user may have set up, would hide what is measured.
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, __file__, *arguments]
    run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def report(chosen: argparse.Namespace) -> dict[str, Any]:
    """All measurements."""
    facts = machine.facts(PACKAGES)
    depths = []
    for shape, shallow, deep in CASES:
        if shape not in chosen.shapes:
            continue
        runs: dict[int, list[dict[str, float]]] = {shallow: [], deep: []}
        for _ in range(chosen.repeats):
            for layers in (shallow, deep):
                runs[layers].append(_fresh("--one", shape, str(layers), "--remat", chosen.remat))
                print(f"{shape}, {layers} layers: {runs[layers][-1]['total']:.2f} s", file=sys.stderr, flush=True)
        found = {layers: _medians(all_runs) for layers, all_runs in runs.items()}
        ratio = found[deep]["total"] / found[shallow]["total"]
        depths.append({"shape": shape, "layers": [shallow, deep], "seconds": found, "ratio": ratio, "runs": runs})
    start = None
    if not chosen.skip_first_step:
        model = chosen.model or _demo_model()
        tries = []
        for _ in range(chosen.repeats):
            tries.append(_fresh("--first-step", model, repr(time.time()), "--remat", chosen.remat))
        start = {"model": Path(model).name, "seconds": _medians(tries), "runs": tries}
    return {"machine": facts, "remat": chosen.remat, "depths": depths, "first_step": start}


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    rows = [
        "| shape | layers | trace + compile, s | layers | trace + compile, s | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for case in found["depths"]:
        (shallow, deep), seconds = case["layers"], case["seconds"]
        few, many = (f"{seconds[n]['total']:.2f} ({seconds[n]['cpu']:.2f})" for n in (shallow, deep))
        rows.append(f"| {case['shape']} | {shallow} | {few} | {deep} | {many} | {case['ratio']:.2f} |")
    text = "\n".join(rows)
    if found["first_step"]:
        parts = dict(found["first_step"]["seconds"])
        total = parts.pop("total")
        named = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
        text += f"\n\nFrom the start of the process to the end of the first step, {found['first_step']['model']}: "
        text += f"{total:.1f} s ({named})."
    return f"{text}\n\nRemat {found['remat']}, 1 x {LENGTH} tokens. {machine.lines(found['machine'])}"


def _demo_model() -> str:
    from jora.demo.run import prepare_model

    return str(prepare_model())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="for the first step; default: the demo's Gemma 3 270M")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes for each figure")
    parser.add_argument("--remat", default="none", choices=["none", "selective", "full"])
    parser.add_argument("--skip-first-step", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON with every number")
    parser.add_argument("--one", nargs=2, metavar=("SHAPE", "LAYERS"), help=argparse.SUPPRESS)
    parser.add_argument("--first-step", nargs=2, metavar=("MODEL", "STARTED"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(compile_once(chosen.one[0], int(chosen.one[1]), chosen.remat)))
    elif chosen.first_step:
        print(json.dumps(first_step(chosen.first_step[0], chosen.remat, float(chosen.first_step[1]))))
    else:
        found = report(chosen)
        if chosen.out:
            chosen.out.parent.mkdir(parents=True, exist_ok=True)
            chosen.out.write_text(json.dumps(found, indent=2) + "\n")
        print(table(found))


if __name__ == "__main__":
    main()
