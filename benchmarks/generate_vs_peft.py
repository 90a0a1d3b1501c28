"""`jora.generate` beside HF PEFT's `generate`, on this machine: prompts read, and tokens written, a second.

Both have the same model (fp32), LoRA adapter (all linears, not merged, random factors) and random prompts, answer
greedily, and stop for no token. Each has a process of its own; they take turns, and only one computes at a time. A
length is measured twice a round, with one new token and with --new: the difference is the time of the decode steps.

    python benchmarks/generate_vs_peft.py --out build/generate.json

The floor of a decode step is that of docs/benchmarks.md, "A decode step and its floor", at the context's mean length.
Greedy answers must agree for the first tokens of each prompt; random words make ties, so a later one may differ.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np
from worker import Worker

Play = Callable[[np.ndarray, int], list[list[int]]]
TITLES = {"jora": "Jora", "peft": "HF PEFT"}
PACKAGES = ("jax", "jaxlib", "torch", "transformers", "peft")
AGREE = 4  # first tokens of every answer that must be the same


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face directory; default: the demo's Gemma 3 270M, converted once")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1900], help="tokens of a prompt")
    parser.add_argument("--rows", type=int, default=4, help="prompts at a time")
    parser.add_argument("--new", type=int, default=65, help="tokens of an answer")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
    parser.add_argument("--out", type=Path, help="JSON with every number")
    parser.add_argument("--contestant", nargs=3, metavar=("NAME", "MODEL", "ADAPTER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def jora_player(model: str, adapter: str) -> Play:
    """What `jora generate` runs."""
    import jora
    from jora.inference.tokens import generate_tokens

    base = jora.load_model(model, dtype="float32")
    tuned = jora.load_adapter(adapter, base)

    def play(prompts: np.ndarray, new: int) -> list[list[int]]:
        rows = [row.tolist() for row in prompts]
        return generate_tokens(base, rows, tuned, max_new_tokens=new, ends=(), batch_size=len(rows))

    return play


def peft_player(model: str, adapter: str) -> Play:
    """`PeftModel.generate` with PyTorch's fused attention."""
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    tuned = peft.PeftModel.from_pretrained(base, adapter).eval()
    tuned.generation_config.eos_token_id = None
    tuned.generation_config.pad_token_id = 0

    @torch.no_grad()
    def play(prompts: np.ndarray, new: int) -> list[list[int]]:
        ids = torch.from_numpy(prompts)
        mask = torch.ones_like(ids)
        out = tuned.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new)
        return out[:, prompts.shape[1] :].tolist()

    return play


def contest(name: str, model: str, adapter: str) -> None:
    """A contestant's process: a line of JSON (prompts, new) for a line of JSON (seconds, tokens)."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the libraries print
    play = {"jora": jora_player, "peft": peft_player}[name](model, adapter)
    print(json.dumps({"ready": machine.peak_bytes()}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = np.array(asked["prompts"], np.int64)
        start = time.perf_counter()
        tokens = play(prompts, asked["new"])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": tokens, "peak_bytes": machine.peak_bytes()}), file=answers)


def measure(contestants: list[Worker], vocab: int, length: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """All rounds at one prompt length: seconds of reading, and of one decode step, of each contestant."""
    read: dict[str, list[float]] = {each.name: [] for each in contestants}
    step: dict[str, list[float]] = {each.name: [] for each in contestants}
    draw, same = np.random.default_rng(length), []
    for number in range(-1, chosen.rounds):
        prompts = draw.integers(10, vocab // 2, (chosen.rows, length)).tolist()
        found = {}
        for each in contestants:
            one, all_new = (each.ask(json.dumps({"prompts": prompts, "new": new})) for new in (1, chosen.new))
            found[each.name] = np.array(all_new["tokens"])
            if number >= 0:
                read[each.name].append(one["seconds"])
                step[each.name].append((all_new["seconds"] - one["seconds"]) / (chosen.new - 1))
            print(f"{length} tokens, round {number + 1}: {each.name} {all_new['seconds']:.2f} s", file=sys.stderr)
        ours, theirs = found["jora"], found["peft"]
        if not np.array_equal(ours[:, :AGREE], theirs[:, :AGREE]):
            raise SystemExit(f"the answers differ within {AGREE} tokens: {ours[:, :AGREE]} and {theirs[:, :AGREE]}")
        same.append(float(np.mean(ours == theirs)))
    return {"length": length, "read": read, "step": step, "same_tokens": statistics.fmean(same)}


def with_floor(found: dict[str, Any], config: Any, chosen: argparse.Namespace) -> dict[str, Any]:
    """What a decode step takes at least on this machine."""
    from serving import decode_floor
    from serving.speeds import bandwidth, product_rate

    least = decode_floor.step(config, chosen.rows, found["length"] + chosen.new // 2, chosen.rank, 1)
    return {**found, "floor": least.seconds(bandwidth(), product_rate(config.embed, config.mlp))}


def table(found: list[dict[str, Any]]) -> str:
    """Markdown; medians with their range, ratios within a round."""
    head = "| prompt | | reading, s | a decode step, ms | x floor | of PEFT: reading | decoding |"
    rows = [head, "|---|---|---|---|---|---|---|"]
    for run in found:
        for name in run["read"]:
            read, step = run["read"][name], run["step"][name]
            cells = [run["length"], TITLES[name], machine.spread(read), machine.spread([1e3 * s for s in step])]
            cells.append(f"{statistics.median(step) / run['floor']:.1f}")
            for part in ("read", "step"):
                pairs = zip(run[part][name], run[part]["peft"], strict=True)
                cells.append("1" if name == "peft" else machine.spread([ours / theirs for ours, theirs in pairs]))
            rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def write_adapter(model: str, rank: int, directory: Path) -> Any:
    """A LoRA adapter with random factors, as a PEFT directory; the model's config."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    import jora
    from jora.models.model import Model
    from jora.models.params import abstract_params
    from jora.sharding import single_device
    from jora.train.estimation import read_config

    config, layout = read_config(model), single_device()
    shapes = Model(abstract_params(config, layout, jnp.float32), config, layout, {}, model, {})
    fresh = jora.LoRA(rank=rank, alpha=2 * rank).init(shapes, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(fresh.state.trained))))
    factors = jax.tree.map(lambda x: 0.02 * jax.random.normal(next(keys), x.shape), fresh.state.trained)
    jora.save_adapter(dataclasses.replace(fresh, state=fresh.state._replace(trained=factors)), directory)
    return config


def main() -> None:
    """Measure and print a table."""
    chosen = options()
    if chosen.contestant:
        return contest(*chosen.contestant)
    from jora.demo.run import prepare_model

    model = str(chosen.model or prepare_model())
    facts = machine.facts(PACKAGES)
    with tempfile.TemporaryDirectory(prefix="jora-benchmark-") as place:
        directory = Path(place)
        config = write_adapter(model, chosen.rank, directory / "adapter")
        arguments = [model, str(directory / "adapter")]
        contestants = [Worker(n, Path(__file__), ["--contestant", n, *arguments], directory) for n in TITLES]
        try:
            found = [measure(contestants, config.vocab_size, length, chosen) for length in chosen.lengths]
        finally:
            for each in contestants:
                each.stop()
    found = [with_floor(run, config, chosen) for run in found]
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        asked = {"rows": chosen.rows, "new": chosen.new, "rank": chosen.rank}
        chosen.out.write_text(json.dumps({"machine": facts, "options": asked, "lengths": found}, indent=2) + "\n")
    print(f"{Path(model).name}, fp32, LoRA rank {chosen.rank} on all linears, {chosen.rows} prompts, {chosen.new} new")
    print(f"tokens; median of {chosen.rounds} rounds. Equal tokens: ", end="")
    print(", ".join(f"{run['same_tokens']:.1%} at {run['length']}" for run in found))
    print(f"\n{table(found)}\n\n{machine.lines(facts)}")


if __name__ == "__main__":
    main()
