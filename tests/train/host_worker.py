"""One of several hosts that train together, as a process: `python host_worker.py TASK.json`, see `test_hosts.py`."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import jax


def main(task: dict[str, Any]) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    from jora.sharding import hosts, parse_mesh

    if task["hosts"] is not None:
        hosts.start_hosts(hosts.parse_hosts(task["hosts"]), parse_mesh(task["mesh"]))

    from tests.train.conftest import Reporter, examples, options

    import jora

    def on_step(step: int) -> None:
        if step == task.get("interrupt"):
            signal.raise_signal(signal.SIGINT)

    model = jora.load_model(task["model"], dtype="float32", mesh=task["mesh"])
    chosen = options(max_steps=4, eval_every=2, save_every=100, resume=task.get("resume", False))
    try:
        jora.train(
            model,
            task.get("adapter") or jora.LoRA(rank=4, dropout=0.1, targets="all-linear"),
            examples(10),
            out=Path(task["out"]),
            options=chosen,
            eval_data=examples(4, seed=7),
            reporter=Reporter(on_step),
        )
    except KeyboardInterrupt:
        print("interrupted")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
