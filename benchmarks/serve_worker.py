"""One contestant in its own process: it loads, then plays one trace for each line on its input.

`python serve_worker.py NAME TASK.json` answers on its output with one JSON object a line: first {"ready": peak bytes},
then the requests that it served in each trace. A line of input is {"trace": [arrivals], "run": name, "limit": seconds
or null}.

Names: engine:N (N adapters registered, 0 the base alone), merged:N, peft:N; vtc and fcfs are the engine over the
base under that scheduler.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import peak_bytes
from serving.metrics import Served
from serving.trace import Arrival

Player = Callable[[list[Arrival], str, float | None], list[Served]]
FOREVER = float("inf")


def player(name: str, task: dict[str, Any]) -> Player:
    """Load a contestant. task: base, adapters (a directory for each count), options, batch."""
    kind, _, count = name.partition(":")
    number = int(count or 0)
    adapters: str = task["adapters"][count] if number else ""
    if kind in ("peft", "merged") and not number:
        raise SystemExit(f"{name}: switching needs adapters")
    if kind == "peft":
        from serving import peft_runs

        model = peft_runs.open_peft(task["base"], adapters, number)
        return lambda trace, run, limit: peft_runs.play(model, trace, task["batch"], limit or FOREVER)
    from serving import engine_runs

    options = {**task["options"], **({"scheduler": kind} if kind in ("vtc", "fcfs") else {})}
    if kind == "merged":
        # What is cached was computed with other weights after a switch.
        engine = engine_runs.open_engine(task["base"], None, {**options, "prefix_cache": False})
        merger = engine_runs.Merger(engine, adapters)
        return lambda trace, run, limit: engine_runs.play_merged(engine, merger, trace, run, limit or FOREVER)
    engine = engine_runs.open_engine(task["base"], adapters or None, options)
    return lambda trace, run, limit: engine_runs.play(engine, trace, run, limit)


def main() -> None:
    name, task = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    # Answers go where stdout was; whatever else the libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    play = player(name, task)
    print(json.dumps({"ready": peak_bytes()}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        trace = [Arrival(*row)._replace(prompt=tuple(row[2])) for row in asked["trace"]]
        served = play(trace, asked["run"], asked["limit"])
        print(json.dumps({"served": served, "peak_bytes": peak_bytes()}), file=answers)


if __name__ == "__main__":
    main()
