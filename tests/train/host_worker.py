"""One of two hosts that train together, as a process: `python host_worker.py TASK.json`, see `test_hosts.py`."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Any

import jax
from tests.train.conftest import Reporter, examples, options

import jora
from jora.sharding import hosts, parse_mesh

RUN = options(max_steps=8, eval_every=4, save_every=100)


def main(task: dict[str, Any]) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    hosts.start_hosts(hosts.parse_hosts(task["hosts"]), parse_mesh(task["mesh"]))

    def on_step(step: int) -> None:
        if task["interrupted"] and step == 2:
            signal.raise_signal(signal.SIGINT)

    model = jora.load_model(task["model"], dtype="float32", mesh=task["mesh"])
    data, held_out = examples(10), examples(4, seed=7)
    run = dataclasses.replace(RUN, resume=task["resume"])
    reporter = Reporter(on_step)
    try:
        jora.train(model, task["adapter"], data, out=task["out"], options=run, eval_data=held_out, reporter=reporter)
    except KeyboardInterrupt:
        print("interrupted")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
