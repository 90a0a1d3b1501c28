"""Tokens per second and peak memory of LoRA training at Llama-2-7B's shape on one GPU, beside HF PEFT.

Random bf16 weights, LoRA r16 (fp32) on all linears, AdamW, one row of 512 and of 2048 tokens of which 64 carry loss.
Each contestant runs in a process of its own, one after the other: two copies of the weights would leave less memory
to both. Needs jax with CUDA, optax and psutil for Jora; torch, transformers and peft for the peers; nothing is
downloaded and no other dependency of Jora is imported.

This script has not run on a GPU yet: only `--tiny --allow-cpu`, in fp32, was tried.

    PYTHONPATH=src python benchmarks/gpu_llama7b.py --out build/gpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np

RANK, ANSWERS, RATE = 16, 64, 2e-4
PACKAGES = ("jax", "jaxlib", "torch", "transformers", "peft")
CONTESTANTS = ("jora:none", "jora:selective", "jora:full", "peft", "peft-checkpointing")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(tiny: bool) -> dict[str, Any]:
    """The config.json of Llama 2 7B, or of a tiny Llama that tries the script."""
    sizes = TINY if tiny else SIZES
    fixed = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10_000.0}
    heads = {"num_key_value_heads": sizes["num_attention_heads"], "tie_word_embeddings": False}
    return {**fixed, **sizes, **heads, "vocab_size": 512 if tiny else 32_000, "max_position_embeddings": 4096}


def row(length: int, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, vocabulary, length).astype(np.int32)


def jora_step(hf: dict[str, Any], length: int, remat: str) -> tuple[Callable[[], float], Callable[[], int]]:
    """(one step, peak bytes so far) of the library's own train step."""
    import jax
    import jax.numpy as jnp

    from jora.data.batches import Batches, Tokenised
    from jora.methods.lora import LoRA
    from jora.models.families import config_from_hf
    from jora.models.model import Model
    from jora.models.params import random_params
    from jora.sharding import single_device
    from jora.train.feed import Schedule, batch_options, to_devices
    from jora.train.optimizer import make_optimizer
    from jora.train.options import TrainOptions
    from jora.train.programs import Programs, abstract_params_of
    from jora.train.state import abstract_adapter, abstract_train_state, first_train_state
    from jora.train.step import Program

    config, layout = config_from_hf(hf), single_device()
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    model = Model(random_params(config, layout, dtype), config, layout, hf, "", {})
    adapter = LoRA(rank=RANK).init(model, jax.random.key(0))
    options = TrainOptions(batch_size=1, max_steps=1000, max_length=length, learning_rate=RATE)
    example = Tokenised(row(length, config.vocab_size), np.arange(length) >= length - ANSWERS)
    batches = Batches([example], batch_options(options, layout))
    schedule = Schedule(batches, 1, options.max_steps)
    optimizer = make_optimizer(options, schedule.total)
    shapes = abstract_adapter(adapter.method, adapter.state, config, layout)
    abstract = abstract_train_state(shapes.trained, optimizer, layout)
    program = Program(config, layout, adapter.method, optimizer, remat)
    programs = Programs(program, abstract, shapes.constant, abstract_params_of(model), options)
    train_step = programs.compile_train(schedule.shapes[0], program)
    state = first_train_state(adapter, abstract, optimizer)
    batch = to_devices(batches.build(schedule.step(0)[1]), layout, packed=False)
    seed = jax.device_put(np.uint32(0), layout.sharding(()))

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, adapter.state.constant, model.params, batch, seed)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    def peak() -> int:
        return int((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", machine.peak_bytes()))

    return step, peak


def peft_step(hf: dict[str, Any], length: int, checkpointing: bool) -> tuple[Callable[[], float], Callable[[], int]]:
    """(one step, peak bytes so far) of HF PEFT with PyTorch's own attention kernels."""
    import peft
    import torch
    import transformers

    gpu = torch.cuda.is_available()
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
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    ids = torch.from_numpy(row(length, hf["vocab_size"]).astype(np.int64))[None].to(device)
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

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if gpu else machine.peak_bytes()

    return step, peak


def run_one(name: str, length: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Time one contestant in this process."""
    kind, _, remat = name.partition(":")
    hf = llama(chosen.tiny)
    if kind == "jora":
        step, peak = jora_step(hf, length, remat)
    else:
        step, peak = peft_step(hf, length, name == "peft-checkpointing")
    losses, seconds = [], []
    for _ in range(chosen.warmup + chosen.steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[chosen.warmup :], "peak_bytes": peak(), "losses": losses}


def run_all(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Every contestant at every length; one that fails (out of memory, say) is recorded with its last line."""
    found = []
    for length in chosen.lengths:
        for name in chosen.contestants:
            arguments = ["--one", name, str(length), "--steps", str(chosen.steps), "--warmup", str(chosen.warmup)]
            command = [sys.executable, __file__, *arguments, *(["--tiny"] if chosen.tiny else [])]
            # jax otherwise takes most of the GPU's memory at once; the peak is what is really in use either way.
            environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            run = subprocess.run(command, capture_output=True, text=True, env=environment)
            print(f"{length} tokens, {name}: code {run.returncode}", file=sys.stderr, flush=True)
            result = {"name": name, "length": length}
            if run.returncode:
                print(run.stderr[-2000:], file=sys.stderr)
                error = (run.stderr.strip().splitlines() or [f"ended with code {run.returncode}"])[-1]
                found.append({**result, "error": error[:200]})
            else:
                found.append({**result, **json.loads(run.stdout.splitlines()[-1])})
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = ["| tokens | | tokens/s | ms a step (range) | peak GiB |", "|---|---|---|---|---|"]
    for run in found:
        if "error" in run:
            rows.append(f"| {run['length']} | {run['name']} | failed: {run['error']} | | |")
            continue
        milliseconds = [1e3 * seconds for seconds in run["seconds"]]
        rate = run["length"] / statistics.median(run["seconds"])
        peak = run["peak_bytes"] / machine.GIB
        rows.append(f"| {run['length']} | {run['name']} | {rate:,.0f} | {machine.spread(milliseconds)} | {peak:.2f} |")
    return "\n".join(rows)


def gpu_name() -> str | None:
    """The GPU by nvidia-smi, or None. jax and torch would start on it here, beside the contestants."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return (run.stdout.strip().splitlines() or [None])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a tiny Llama, to try the script")
    parser.add_argument("--allow-cpu", action="store_true", help="run without a GPU, to try the script")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "LENGTH"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(run_one(chosen.one[0], int(chosen.one[1]), chosen)))
        return
    gpu = gpu_name()
    if gpu is None and not chosen.allow_cpu:
        print("skipped: no GPU here (nvidia-smi finds none); nothing was measured")
        return
    found = run_all(chosen)
    facts = {**machine.facts(PACKAGES), "gpu": gpu}
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps({"machine": facts, "runs": found}, indent=2) + "\n")
    print(f"{table(found)}\n\nGPU: {gpu}. {machine.lines(facts)}")


if __name__ == "__main__":
    main()
