"""One LoRA training step of Jora beside HF PEFT and TRL, on this CPU: time, peak memory, and the floor of both.

Every contestant has a process of its own and the same model (fp32), first LoRA factors (all linears) and row of RAFT
data. They take their steps in turn, A B C D A B C D ..., so that what else the machine does hits all alike. Only one
computes at a time. Step 1 must give the same loss everywhere (1e-3), else nothing is reported.

    python benchmarks/train_vs_peft.py --out build/train_vs_peft.json

writes the numbers to that file and prints a Markdown table. docs/benchmarks.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import floor
import machine
from worker import Worker

HERE = Path(__file__).resolve().parent
PEERS = ("peft-checkpointing", "peft", "trl")
PACKAGES = ("jax", "jaxlib", "torch", "transformers", "peft", "trl")
TITLES = {
    "peft-checkpointing": "HF PEFT, gradient checkpointing",
    "peft": "HF PEFT, no checkpointing",
    "trl": "TRL SFTTrainer, its defaults",
}
AGREEMENT = 1e-3
RATE = 2e-4


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face directory; default: the demo's Gemma 3 270M, converted once")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="tokens of the row")
    parser.add_argument("--answers", type=int, default=64, help="tokens of it that carry loss")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (the first checks the loss)")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--plain-up-to", type=int, default=512, help="longest row for PEFT without checkpointing")
    parser.add_argument(
        "--remat",
        nargs="+",
        default=["auto"],
        choices=["auto", "none", "selective", "full"],
        help="Jora's rematerialisation; each one named is a contestant",
    )
    parser.add_argument("--random-tokens", action="store_true", help="for a model without a tokenizer")
    parser.add_argument("--out", type=Path, help="JSON with every number")
    chosen = parser.parse_args(arguments)
    if chosen.warmup < 1 or chosen.steps < 1:
        parser.error("at least one warm-up step and one timed step are needed")
    return chosen


class Contestant(Worker):
    """A running `contestants.py`."""

    def __init__(self, name: str, directory: Path) -> None:
        self.steps: list[dict[str, float]] = []
        super().__init__(name, HERE / "contestants.py", [name, str(directory)], directory)

    def step(self) -> dict[str, float]:
        """One training step, from the command to its answer."""
        self.steps.append(self.ask("step"))
        return self.steps[-1]

    @property
    def title(self) -> str:
        return f"Jora, remat {self.ready['remat']}" if self.name.startswith("jora") else TITLES[self.name]


def measure(chosen: argparse.Namespace, length: int, directory: Path) -> dict[str, Any]:
    """All contestants at one length."""
    request = {
        "model": str(chosen.model),
        "length": length,
        "answers": chosen.answers,
        "rank": chosen.rank,
        "rate": RATE,
        "max_steps": chosen.warmup + chosen.steps,
        "random_tokens": chosen.random_tokens,
    }
    (directory / "request.json").write_text(json.dumps(request))
    subprocess.run([sys.executable, str(HERE / "prepare.py"), str(directory)], check=True)
    shape = json.loads((directory / "shape.json").read_text())
    config = SimpleNamespace(**shape["config"])
    rates = {library: floor.rate_of(library, config, length) for library in ("jax", "torch")}
    names = [f"jora:{policy}" for policy in chosen.remat]
    names += [peer for peer in chosen.peers if peer != "peft" or length <= chosen.plain_up_to]
    contestants: list[Contestant] = []
    try:
        for name in names:
            note(f"{length} tokens: loading {name}")
            contestants.append(Contestant(name, directory))
        for number in range(chosen.warmup + chosen.steps):
            for contestant in contestants:
                took = contestant.step()["seconds"]
                note(f"{length} tokens, step {number + 1}: {contestant.name} {took:.2f} s")
            if number == 0:
                check_losses(contestants)
    finally:
        for contestant in contestants:
            contestant.stop()
    results = [result(contestant, chosen.warmup) for contestant in contestants]
    first = results[0]["losses"]
    apart = {
        other["title"]: max(abs(a - b) for a, b in zip(first, other["losses"], strict=True)) for other in results[1:]
    }
    seconds = shape["flops"]["total"] / max(rates.values())
    found = {"length": length, "flops": shape["flops"], "matmul_flops_per_s": rates, "floor_seconds": seconds}
    return {**found, "loss_difference_all_steps": apart, "contestants": results}


def check_losses(contestants: list[Contestant]) -> None:
    """Raises SystemExit where the contestants did not compute the same thing."""
    losses = {contestant.name: contestant.steps[0]["loss"] for contestant in contestants}
    if max(losses.values()) - min(losses.values()) > AGREEMENT:
        raise SystemExit(f"step 1: the losses differ by more than {AGREEMENT}, so the work is not the same: {losses}")


def result(contestant: Contestant, warmup: int) -> dict[str, Any]:
    """The numbers of one contestant."""
    timed = contestant.steps[warmup:]
    return {
        "name": contestant.name,
        "title": contestant.title,
        "ready": contestant.ready,
        "seconds": [step["seconds"] for step in timed],
        "cpu_seconds": [step["cpu_seconds"] for step in timed],
        "peak_bytes": contestant.steps[-1]["peak_bytes"],
        "losses": [step["loss"] for step in contestant.steps],
    }


def table(found: list[dict[str, Any]]) -> str:
    """Markdown. Ratios are to PEFT with gradient checkpointing, where it took part."""
    head = "| tokens | | seconds a step (range) | ratio | CPU s | peak GiB | ratio | x floor | loss of step 1 |"
    rows = [head, "|---|---|---|---|---|---|---|---|---|"]
    for run in found:
        against = next((c for c in run["contestants"] if c["name"] == "peft-checkpointing"), None)
        for c in run["contestants"]:
            time_ratio = memory_ratio = "-"
            if against is not None:
                time_ratio = f"{statistics.median(c['seconds']) / statistics.median(against['seconds']):.2f}"
                memory_ratio = f"{c['peak_bytes'] / against['peak_bytes']:.2f}"
            gap = statistics.median(c["seconds"]) / run["floor_seconds"]
            cells = [run["length"], c["title"], machine.spread(c["seconds"]), time_ratio]
            cells += [f"{statistics.median(c['cpu_seconds']):.2f}", f"{c['peak_bytes'] / machine.GIB:.2f}"]
            cells += [memory_ratio, f"{gap:.2f}", f"{c['losses'][0]:.4f}"]
            rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def floors(found: list[dict[str, Any]]) -> str:
    """The floor of each length in words."""
    lines = []
    for run in found:
        parts = ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in run["flops"].items() if name != "total")
        rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in run["matmul_flops_per_s"].items())
        apart = ", ".join(f"{title} {value:.1e}" for title, value in run["loss_difference_all_steps"].items())
        lines.append(
            f"Floor at {run['length']} tokens: {run['floor_seconds']:.2f} s = {run['flops']['total'] / 1e9:,.0f} GFLOP "
            f"({parts}) over the faster of the measured rates in GFLOP/s ({rates}). Largest difference of a loss to "
            f"the first contestant's over all steps: {apart or 'nobody else took part'}."
        )
    return "\n\n".join(lines)


def note(text: str) -> None:
    """Progress, kept apart from the table."""
    print(text, file=sys.stderr, flush=True)


def demo_model() -> str:
    """The demo's Gemma as a Hugging Face directory in the user's cache; made on the first call."""
    from jora.demo.run import prepare_model

    return str(prepare_model())


def main() -> None:
    chosen = options()
    chosen.model = chosen.model or demo_model()
    facts = machine.facts(PACKAGES)  # before the load that we make ourselves
    found = []
    for length in chosen.lengths:
        with tempfile.TemporaryDirectory(prefix="jora-benchmark-") as directory:
            found.append(measure(chosen, length, Path(directory)))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        asked = {name: value for name, value in vars(chosen).items() if name not in ("out", "model")}
        report = {"machine": facts, "model": Path(chosen.model).name, "options": asked, "lengths": found}
        chosen.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{Path(chosen.model).name}, fp32, LoRA rank {chosen.rank} on all linears, 1 row, {chosen.answers} answer")
    print(f"tokens; median of {chosen.steps} steps after {chosen.warmup}.\n\n{table(found)}\n")
    print(f"{floors(found)}\n\n{machine.lines(facts)}")


if __name__ == "__main__":
    main()
