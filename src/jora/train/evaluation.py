"""The loss of held-out data during training."""

from __future__ import annotations

import math
from typing import Any, Protocol

from jora.data.batches import Batches
from jora.reporting import Reporter
from jora.train.feed import to_devices
from jora.train.programs import Programs


class Evaluated(Protocol):
    """What is kept of the evaluations so far."""

    best_loss: float | None
    best_step: int | None
    evaluations_since_best: int


def is_best(progress: Evaluated, loss: float, step: int) -> bool:
    """Enter the loss of an evaluation into `progress`; whether it is the lowest so far."""
    if progress.best_loss is not None and loss >= progress.best_loss:
        progress.evaluations_since_best += 1
        return False
    progress.best_loss, progress.best_step, progress.evaluations_since_best = loss, step, 0
    return True


def evaluation_loss(
    batches: Batches, programs: Programs, trained: Any, constant: Any, params: Any, reporter: Reporter
) -> tuple[float, int]:
    """(mean -log p in nats per answer token, answer tokens) of all of `batches`, without dropout."""
    plan = batches.plan(0)
    reporter.start(len(plan), "evaluating, batches")
    sums, answers = [], 0.0
    for number, step in enumerate(plan, start=1):
        host = batches.build(step)
        layout, packed = programs.program.layout, programs.options.packing
        run = programs.evaluate[step.shape]
        instances = batches.instances_of(step)
        batch = to_devices(host, layout, packed=packed, stacked=False, instances=instances)
        total, _ = run(trained, constant, params, batch)
        sums.append(total)  # read at the end, so that the devices never wait
        answers += float(host[0].answer_weights.sum())
        reporter.update(number)
    loss = math.fsum(float(x) for x in sums) / answers
    reporter.finish(loss=loss)
    return loss, int(answers)
