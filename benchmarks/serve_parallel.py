"""Tensor parallel serving: what devices exchange under Jora's plan for low-rank factors and under S-LoRA's.

    PYTHONPATH=src python benchmarks/serve_parallel.py --out build/serve_parallel.json

The programs are those that serve (a decode step, a prefill chunk), over all linears, with random weights in the shapes
of a small Llama and of Gemma 3 270M; `serving/parallel_plans.py` has the plans. Their logits must agree within 1e-5
of the largest, or the script stops. Devices are simulated on this CPU: counts, bytes and FLOPs are the compiler's and
carry over to real devices, seconds do not. `--quick` (two layers, less than 40 seconds) tries the script.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import machine

if TYPE_CHECKING:
    from serving.parallel_plans import Cost

BASES = ("llama-110m", "gemma-270m")
VOCABULARY = 4096  # the head is alike in all plans; a table of 262,144 words would hide the layers in the seconds
TOLERANCE = 1e-5
KIB, MIB = 1 << 10, 1 << 20
QUICK: dict[str, Any] = {"tensor": [4], "layers": 2, "chunk": 64, "context": 16, "rounds": 2}
HASTE = {"xla_backend_optimization_level": "0"}  # of the compiler, for --quick: the same exchanges, slower code


def options(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=list(BASES), help=f"of {', '.join(BASES)}, tiny")
    parser.add_argument("--tensor", type=int, nargs="+", default=[2, 4], help="simulated devices")
    parser.add_argument("--ranks", type=int, default=64, help="total rank: of a batch's adapters, of the prompt's one")
    parser.add_argument("--batch", type=int, default=16, help="rows of the decode step")
    parser.add_argument("--context", type=int, default=128, help="tokens that each of them has in the pool")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of the prefill")
    parser.add_argument("--layers", type=int, help="cut the model off after so many")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="other defaults: seconds instead of minutes")
    parser.add_argument("--out", type=Path, help="JSON with every number")
    if "--quick" in arguments:
        parser.set_defaults(**QUICK)
    return parser.parse_args(arguments)


def model_config(name: str, layers: int | None) -> Any:
    from serving.bases import BASES as SHAPES

    from jora.models.families import config_from_hf

    config = replace(config_from_hf(SHAPES[name]), vocab_size=VOCABULARY)
    return config if layers is None else replace(config, layers=layers, layer_kinds=config.layer_kinds[:layers])


def measure(name: str, tensor: int, step: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """One step of one model on so many devices: every plan's costs beside its formulas, and seconds in turn."""
    from serving.parallel_plans import Shape, all_plans, cost, expected, largest_difference

    from jora.sharding import MeshSpec, build_layout

    config = model_config(name, chosen.layers)
    layout = build_layout(MeshSpec(tensor=tensor), config.kv_heads)
    decode = Shape("decode", chosen.batch, 1, chosen.context)
    shape = decode if step == "decode" else Shape("prefill", 1, chosen.chunk, 0)
    programs, pool = all_plans(config, layout, chosen.ranks, shape, **(HASTE if chosen.quick else {}))
    seconds: dict[str, list[float]] = {plan: [] for plan in programs}
    for number in range(-1, chosen.rounds):  # the first round is not counted
        logits = {}
        for plan, program in programs.items():
            start = time.perf_counter()
            pool, logits[plan] = program.run(pool)
            logits[plan].block_until_ready()
            if number >= 0:
                seconds[plan].append(time.perf_counter() - start)
    apart = largest_difference(logits)
    if not apart <= TOLERANCE:
        raise SystemExit(f"{name}, tensor={tensor}, {step}: the plans' logits differ by {apart:.1e} of the largest")
    costs = {plan: cost(program.program, config.layers) for plan, program in programs.items()}
    base, plans = costs.pop("base"), {}
    for plan, whole in costs.items():
        formula = expected(plan, config, layout, chosen.ranks, shape)
        plans[plan] = {
            "added": numbers(whole.beyond(base), tensor),
            "formula": numbers(formula, tensor),
            "seconds": seconds[plan],
            "ratios": [own / of_base for own, of_base in zip(seconds[plan], seconds["base"], strict=True)],
        }
    return {
        "model": name,
        "tensor": tensor,
        "step": step,
        "base": {**numbers(base, tensor), "seconds": seconds["base"]},
        "plans": plans,
        "difference": apart,
    }


def numbers(cost: Cost, tensor: int) -> dict[str, Any]:
    """A cost as JSON has it, and as the tables print it."""
    exchanged = [{"kind": kind, "bytes": size, "times": n} for (kind, size), n in sorted(cost.exchanged.items())]
    return {"exchanged": exchanged, "sent": cost.sent(tensor), "flops": cost.flops, "resident": cost.resident}


# --- the report ---

HEAD = "model|devices|step|plan|exchanges a layer|sent, KiB|formula|MFLOP a layer|formula|held, MiB|formula|ms a step"


def table(results: list[dict[str, Any]]) -> str:
    """One line a plan; those of the adapters say what they add to the base."""
    names = HEAD.split("|")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for one in results:
        where = [one["model"], str(one["tensor"]), one["step"]]
        base = one["base"]
        cells = [exchanges(base), f"{base['sent'] / KIB:.1f}", "", "", "", "", "", milliseconds(base["seconds"])]
        lines.append("| " + " | ".join([*where, "base", *cells]) + " |")
        for plan, own in one["plans"].items():
            cells = [exchanges(own["added"])]
            for key, unit in (("sent", KIB), ("flops", 1e6), ("resident", MIB)):
                cells += [f"{own[part][key] / unit:.2f}" for part in ("added", "formula")]
            cells.append(f"{milliseconds(own['seconds'])}, {median(own['ratios']):.2f} x base")
            lines.append("| " + " | ".join([*where, "+ " + plan, *cells]) + " |")
    return "\n".join(lines)


def exchanges(cost: Mapping[str, Any]) -> str:
    """How often a layer runs which exchange, and what it leaves on a device."""
    return ", ".join(f"{e['times']} {e['kind']} of {e['bytes'] / KIB:g} KiB" for e in cost["exchanged"])


def milliseconds(seconds: list[float]) -> str:
    return machine.spread([1e3 * s for s in seconds])


def main() -> None:
    chosen = options(sys.argv[1:])
    facts = machine.facts(("jax", "jaxlib"))
    # What counts collectives lives with the tests, which hold it to be right.
    sys.path.insert(0, str(machine.ROOT))
    from jora.sharding import MeshSpec
    from jora.sharding.mesh import start_devices

    simulated = start_devices(MeshSpec(tensor=max(chosen.tensor)))
    cases = [(name, n, step) for name in chosen.bases for n in chosen.tensor for step in ("decode", "prefill")]
    results = []
    for case in cases:
        print(*case, file=sys.stderr, flush=True)
        results.append(measure(*case, chosen))
    asked = {name: value for name, value in vars(chosen).items() if name != "out"}
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps({"machine": facts, "options": asked, "results": results}, indent=2) + "\n")
    text = (
        "Of one device. Adapters' lines say what they add to the base's. Sent: by ring algorithms, a layer. Held: the"
        f" active set of all layers. Logits of the plans differ by {max(r['difference'] for r in results):.1e} of the"
        f" largest at most. {simulated or 'Real devices'}: seconds are this machine's and say nothing of others."
    )
    print(f"{table(results)}\n\n{text}\n\n{machine.lines(facts)}")


if __name__ == "__main__":
    main()
