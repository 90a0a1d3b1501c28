"""Serving many adapters from one base: the floor of a decode step, S-LoRA's trace, and fairness between clients.

    python benchmarks/serve.py floor      decode steps with 0, 1, 5, 16 distinct adapters, beside their floor
    python benchmarks/serve.py trace      S-LoRA's synthetic trace: the engine with 0, 1, 16, 100 and 2000 adapters,
                                          merged switching, HF PEFT with adapter switching
    python benchmarks/serve.py fairness   two clients that both ask for too much, one twice as often: FCFS and VTC

`--quick` does each on a tiny model in less than two minutes: it tries the script and measures nothing of interest.
Contestants have their own processes and play in turn, so that what else the machine does hits all alike. `--out`
writes every number as JSON. docs/benchmarks.md says how to read the tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import machine
from serving import bases, decode_floor, metrics, tables
from serving.metrics import Served
from serving.processes import Contestant
from serving.trace import Arrival, Workload, clients, synthetic

PACKAGES = ("jax", "jaxlib", "torch", "transformers", "peft")
CONTESTANTS = ("engine:0", "engine:1", "engine:16", "engine:100", "engine:2000", "merged:100", "peft:100")
AGREE_ON = 8  # greedy tokens of each request that are compared

QUICK: dict[str, dict[str, Any]] = {
    "all": {"base": "tiny", "batch": 4, "pool_mib": 16, "rounds": 2, "rank_buckets": [32]},
    "floor": {"distinct": [0, 1, 2, 4], "prompt": 16, "steps": 8},
    "trace": {
        "contestants": ["engine:4", "engine:20", "merged:4", "peft:4"],
        "requests": 12,
        "rate": 2000.0,
        "inputs": [4, 24],
        "outputs": [4, 16],
        "limit": 15.0,
    },
    "fairness": {"seconds": 5.0, "inputs": [16, 16], "outputs": [16, 16]},
}


def options(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    for mode, add in (("floor", _floor_options), ("trace", _trace_options), ("fairness", _fairness_options)):
        own = modes.add_parser(mode)
        _common_options(own)
        add(own)
        if "--quick" in arguments:
            own.set_defaults(**QUICK["all"], **QUICK[mode])
    return parser.parse_args(arguments)


def _common_options(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(bases.BASES)
    parser.add_argument("--base", default="gemma-270m", help=f"{names} (random weights), or a Hugging Face directory")
    parser.add_argument("--batch", type=int, default=16, help="sequences that decode together")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8], help="adapter i has the i-th of these, in turn")
    parser.add_argument("--rank-buckets", type=int, nargs="+", help="of the engine; default: EngineOptions' own")
    parser.add_argument("--pool-mib", type=int, default=1024, help="the engine's page pool")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="other defaults: a tiny model, seconds instead of minutes")
    parser.add_argument("--out", type=Path, help="JSON with every number")


def _floor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--distinct", type=int, nargs="+", default=[0, 1, 5, 16], help="adapters in one batch; 0: base")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each row's prompt")
    parser.add_argument("--steps", type=int, default=32, help="timed decode steps of each round")


def _trace_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), help="kind:adapters")
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second: more than can be served")
    parser.add_argument("--cv", type=float, default=1.0, help="coefficient of variation of the intervals")
    parser.add_argument("--alpha", type=float, default=1.0, help="popularity; 1 is uniform, below it the first lead")
    parser.add_argument("--inputs", type=int, nargs=2, default=[8, 128], help="shortest and longest prompt, tokens")
    parser.add_argument("--outputs", type=int, nargs=2, default=[8, 128], help="shortest and longest answer, tokens")
    parser.add_argument("--distinct-files", type=int, default=16, help="of each rank; others are links")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which merged and peft begin nothing")
    parser.add_argument("--slo-ttft", type=float, default=6.0, help="seconds")
    parser.add_argument("--slo-tpot", type=float, default=0.2, help="seconds")
    parser.set_defaults(rounds=3)


def _fairness_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--load", type=float, nargs="+", default=[1.0, 2.0], help="of each client, in capacities")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--inputs", type=int, nargs=2, default=[64, 64], help="tokens (both alike)")
    parser.add_argument("--outputs", type=int, nargs=2, default=[64, 64], help="tokens (both alike)")
    parser.add_argument("--window", type=float, help="of the service difference; default: a tenth of --seconds")
    parser.set_defaults(rounds=3)


# --- what the modes share ---


def base_directory(chosen: argparse.Namespace, directory: Path) -> Path:
    """The base's directory; one of random weights is written there first."""
    if chosen.base not in bases.BASES:
        return Path(chosen.base).resolve()
    target = directory / chosen.base
    bases.write_base(chosen.base, target)
    return target


def engine_options(chosen: argparse.Namespace, longest: int) -> dict[str, Any]:
    """EngineOptions of every engine of a run."""
    sizes = {"pool_bytes": chosen.pool_mib << 20, "max_batch": chosen.batch, "max_length": longest}
    buckets = {"rank_buckets": tuple(chosen.rank_buckets)} if chosen.rank_buckets else {}
    return {**sizes, **buckets, "max_queue": 1 << 20}


def vocabulary(base: Path) -> int:
    return int(json.loads((base / "config.json").read_text())["vocab_size"])


@contextmanager
def loaded(names: list[str], task: dict[str, Any], directory: Path) -> Iterator[list[Contestant]]:
    """The contestants, each in its process, until the block ends."""
    (directory / "task.json").write_text(json.dumps(task))
    running: list[Contestant] = []
    try:
        for name in names:
            note(f"loading {name}")
            running.append(Contestant(name, directory))
        yield running
    finally:
        for contestant in running:
            contestant.stop()


def note(text: str) -> None:
    """Progress, kept apart from the tables."""
    print(text, file=sys.stderr, flush=True)


# --- floor ---


def measure_floor(chosen: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], str]:
    """Decode steps of every number of adapters in turn, one engine; ratios are to the same round's base."""
    from serving import engine_runs
    from serving.speeds import bandwidth, product_rate

    if len(chosen.ranks) > 1 or chosen.distinct[0] != 0:
        raise SystemExit("floor: one rank, and 0 (the base) as the first of --distinct, are needed")
    base, most = base_directory(chosen, directory), max(chosen.distinct)
    bases.write_adapters(base, directory / "adapters", most, chosen.ranks, distinct=most)
    longest = chosen.prompt + engine_runs.answer_tokens(chosen.batch, chosen.steps)
    engine = engine_runs.open_engine(str(base), str(directory / "adapters"), engine_options(chosen, longest))
    config = engine.model.config
    speed = {"bandwidth": bandwidth(), "rate": product_rate(config.embed, config.mlp)}
    engine_runs.load_all(engine, most)
    times: dict[int, list[Any]] = {k: [] for k in chosen.distinct}
    for number in range(-1, chosen.rounds):  # the first round is not counted
        for k in chosen.distinct:
            asked = (chosen.batch, k, chosen.prompt, chosen.steps, config.vocab_size)
            took = engine_runs.decode_time(engine, *asked, f"round{number}-{k}")
            note(f"round {number + 1}, {k} adapters: {1e3 * took.seconds:.2f} ms a step")
            if number >= 0:
                times[k].append(took)
    context = round(median(t.context for of in times.values() for t in of))
    found = []
    for k in chosen.distinct:
        floor = decode_floor.step(config, chosen.batch, context, chosen.ranks[0], k)
        alone = decode_floor.step(config, chosen.batch, context, chosen.ranks[0], 0)
        ratios = [t.seconds / b.seconds for t, b in zip(times[k], times[0], strict=True)]
        found.append(
            {
                "distinct": k,
                "seconds": [t.seconds for t in times[k]],
                "ratios": ratios,
                "bytes_ratio": floor.bytes / alone.bytes,
                "flops_ratio": floor.flops / alone.flops,
                "floor_ratio": floor.seconds(**speed) / alone.seconds(**speed),
                "floor_seconds": floor.seconds(**speed),
                "floor": floor._asdict(),
            }
        )
    report = {"context": context, "speed": speed, "formula": decode_floor.FORMULA, "steps": found}
    return report, tables.floor(report)


# --- trace ---


def measure_trace(chosen: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], str]:
    """Every contestant plays the same trace over its own number of adapters; another seed every round."""
    base = base_directory(chosen, directory)
    counts = sorted({int(name.partition(":")[2]) for name in chosen.contestants} - {0})
    folders = {str(n): str(directory / f"adapters-{n}") for n in counts}
    for n in counts:
        bases.write_adapters(base, Path(folders[str(n)]), n, chosen.ranks, chosen.distinct_files)
    longest = chosen.inputs[1] + chosen.outputs[1]
    task = {"base": str(base), "adapters": folders, "batch": chosen.batch, "options": engine_options(chosen, longest)}
    slo = metrics.Slo(chosen.slo_ttft, chosen.slo_tpot)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen.contestants}
    agreement: dict[str, list[float]] = {}
    with loaded(chosen.contestants, task, directory) as running:
        for number in range(chosen.rounds):
            answers: dict[str, list[Served]] = {}
            for contestant in running:
                kind, _, count = contestant.name.partition(":")
                trace = synthetic(workload(chosen, chosen.seed + number), int(count), vocabulary(base))
                limit = chosen.limit if kind in ("merged", "peft") else None
                contestant.play(warm_up(trace), f"warm-up-{number}")
                answers[contestant.name] = contestant.play(trace, f"round-{number}", limit)
                figures = metrics.summary([one for one in answers[contestant.name] if one.finished], slo)
                figures["last_arrival"] = trace[-1].time
                results[contestant.name].append(figures)
                note(f"round {number + 1}, {contestant.name}: {figures.get('requests_per_s', 0):.2f} requests/s")
            for pair, share in agreements(answers).items():
                agreement.setdefault(pair, []).append(share)
        peaks = {contestant.name: contestant.peak_bytes for contestant in running}
    report = {"rounds": results, "agreement": agreement, "peak_bytes": peaks}
    return report, tables.trace(report)


def workload(chosen: argparse.Namespace, seed: int) -> Workload:
    lengths = (tuple(chosen.inputs), tuple(chosen.outputs))
    return Workload(chosen.requests, chosen.rate, chosen.cv, chosen.alpha, *lengths, seed=seed)


def warm_up(trace: list[Arrival]) -> list[Arrival]:
    """A few of the trace's requests at once, with one adapter and with prompts turned round: nothing is cached."""
    first = trace[:4]
    return [a._replace(time=0.0, prompt=a.prompt[::-1], output=4, adapter=first[0].adapter) for a in first]


def agreements(answers: dict[str, list[Served]]) -> dict[str, float]:
    """Of contestants with equally many adapters: the share of requests whose first greedy tokens are the same."""
    found = {}
    for one, other in itertools.combinations(answers, 2):
        if one.partition(":")[2] != other.partition(":")[2]:
            continue
        left, right = ({a.number: a.tokens[:AGREE_ON] for a in answers[n] if a.finished} for n in (one, other))
        if both := left.keys() & right.keys():
            found[f"{one} {other}"] = sum(left[n] == right[n] for n in both) / len(both)
    return found


# --- fairness ---


def measure_fairness(chosen: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], str]:
    """Clients that each ask for more than their share, under FCFS and VTC; loads are in capacities of this machine."""
    base = base_directory(chosen, directory)
    inputs, outputs = chosen.inputs[1], chosen.outputs[1]
    task = {"base": str(base), "adapters": {}, "options": engine_options(chosen, inputs + outputs)}
    window = chosen.window or chosen.seconds / 10
    results: dict[str, list[dict[str, Any]]] = {"fcfs": [], "vtc": []}
    with loaded(list(results), task, directory) as running:
        capacity = median(_capacity(one, chosen.batch, inputs, outputs, vocabulary(base)) for one in running)
        rates = [load * capacity for load in chosen.load]
        note(f"capacity {capacity:.2f} requests/s; clients send {', '.join(f'{60 * r:.0f}' for r in rates)} a minute")
        for number in range(chosen.rounds):
            seed = chosen.seed + number
            trace = clients(rates, chosen.seconds, inputs, outputs, vocabulary(base), seed)
            for contestant in running:
                served = contestant.play(trace, f"round-{number}", chosen.seconds)
                apart = metrics.fairness(trace, served, chosen.seconds, window)
                done = sum(len(one.times) for one in served) / chosen.seconds
                results[contestant.name].append({**apart, "output_tokens_per_s": done})
                note(f"round {number + 1}, {contestant.name}: gap {apart['gap_end']:.0f}, {done:.0f} tokens/s")
    report = {"capacity": capacity, "rates": rates, "window": window, "rounds": results}
    return report, tables.fairness(report)


def _capacity(contestant: Contestant, batch: int, inputs: int, outputs: int, vocab: int) -> float:
    """Requests a second when there is always one waiting; the first run is not counted."""
    for number in range(2):
        trace = [a._replace(time=0.0) for a in clients([1.0], 4 * batch, inputs, outputs, vocab, seed=1000 + number)]
        served = contestant.play(trace, f"capacity-{number}")
    return len(served) / max(one.times[-1] for one in served)


def main() -> None:
    chosen = options(sys.argv[1:])
    facts = machine.facts(PACKAGES)  # before the load that we make ourselves
    measure = {"floor": measure_floor, "trace": measure_trace, "fairness": measure_fairness}[chosen.mode]
    with tempfile.TemporaryDirectory(prefix="jora-benchmark-") as directory:
        report, table = measure(chosen, Path(directory))
    asked = {name: value for name, value in vars(chosen).items() if name != "out"}
    if chosen.base not in bases.BASES:
        asked["base"] = Path(chosen.base).name
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps({"machine": facts, "options": asked, **report}, indent=2) + "\n")
    print(f"{tables.settings(asked)}\n\n{table}\n\n{machine.lines(facts)}")


if __name__ == "__main__":
    main()
