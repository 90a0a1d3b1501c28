"""`jora demo`."""

from __future__ import annotations

from dataclasses import dataclass

from jora.cli.common import start_devices
from jora.cli.options import CommandOptions
from jora.reporting import Reporter


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """The main job end to end: data set, fine-tuning, before and after, on a real model and real documents."""

    out: str = "jora-demo"
    """Directory for the data set, the run and the answers."""
    limit: int | None = None
    """Only so many questions for training and as many for evaluation: a quick look, not a result."""
    mesh: str | None = None
    """Devices to share the work, like tensor=2; a CPU simulates them."""


def run(options: Options, reporter: Reporter) -> None:
    """Run it, print the comparison."""
    start_devices(options.mesh, reporter)
    from jora.demo.run import run_demo
    from jora.ui.comparison import print_demo

    result = run_demo(options.out, limit=options.limit, mesh=options.mesh, reporter=reporter)
    print_demo(result)
