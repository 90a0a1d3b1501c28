"""One of two hosts that train together, as a process: `python host_worker.py TASK.json`, see `test_hosts.py`.

It imports nothing of the tests: they bring torch with them.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jora
from jora.data.batches import Tokenised
from jora.methods.registry import method_class
from jora.sharding import hosts, parse_mesh
from jora.train import TrainOptions


class Interrupting:
    """A reporter that presses Ctrl-C when it is told of a training step; None: never."""

    def __init__(self, step: int | None) -> None:
        self._step, self._training = step, False

    def start(self, total: int | None, what: str, done: int = 0) -> None:
        self._training = what.startswith("training")

    def update(self, done: int, **fields: Any) -> None:
        if self._training and done == self._step:
            signal.raise_signal(signal.SIGINT)

    def note(self, text: str) -> None: ...

    def finish(self, **fields: Any) -> None: ...


def examples(rows: list[list[list[int]]]) -> list[Tokenised]:
    return [Tokenised(np.array(tokens, np.int32), np.array(loss, bool)) for tokens, loss in rows]


def main(task: dict[str, Any]) -> None:
    """`runs`: (directory, method, its options); without a method it is a directory of an adapter to go on with."""
    jax.config.update("jax_default_matmul_precision", "highest")
    hosts.start_hosts(hosts.parse_hosts(task["hosts"]), parse_mesh(task["mesh"]))
    for out, method, options in task["runs"]:
        model = jora.load_model(task["model"], dtype="float32", mesh=task["mesh"])
        try:
            jora.train(
                model,
                method_class(method)(**options) if method else options,
                examples(task["data"]),
                out=out,
                options=TrainOptions(**task["options"]),
                eval_data=examples(task["eval_data"]) if task["eval_data"] else None,
                reporter=Interrupting(task["interrupt"]),
            )
        except KeyboardInterrupt:
            print("interrupted")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
