"""`jora estimate`."""

from __future__ import annotations

from dataclasses import dataclass, field

import tyro

from jora.cli.common import ModelOptions, quant_kind, start_devices
from jora.cli.method_choice import MethodChoice
from jora.reporting import Reporter
from jora.train.options import TrainOptions


@dataclass(frozen=True, kw_only=True)
class Options(MethodChoice, ModelOptions):
    """Compile one train step without weights: what it needs per device, and whether that fits."""

    answers: int = 256
    """Tokens a row that carry loss."""
    device_gib: float | None = None
    """Memory of the device that is meant, in GiB, of which nine tenths count; by default this machine's. An accelerator
    is meant, so --dtype auto is then bfloat16."""
    training: tyro.conf.OmitArgPrefixes[TrainOptions] = field(default_factory=TrainOptions)


def run(options: Options, reporter: Reporter) -> None:
    """Compile and print."""
    method = options.build_method()
    start_devices(options.mesh, reporter)
    from jora.train import estimate

    reporter.note("compiling one step ...")
    result = estimate(
        options.model,
        method,
        options=options.training,
        mesh=options.mesh,
        dtype=options.dtype,
        quant=quant_kind(options),
        answers=options.answers,
        device_gib=options.device_gib,
    )
    print(result.table())
