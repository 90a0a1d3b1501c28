"""`jora train`."""

from __future__ import annotations

from dataclasses import dataclass, field

import tyro

from jora.cli.checks import check_file, check_names, check_parent
from jora.cli.common import ModelOptions, open_model, quant_kind
from jora.cli.method_choice import MethodChoice
from jora.errors import InputError
from jora.reporting import Reporter
from jora.train.options import TrainOptions


@dataclass(frozen=True, kw_only=True)
class Options(MethodChoice, ModelOptions):
    """Fine-tune an adapter: OUT gets adapter/ (of method full: model/), checkpoints/, metrics.jsonl, config.yaml."""

    data: str
    """JSON lines to learn from: messages, or prompt and completion."""
    eval_data: str | None = None
    """JSON lines to evaluate on while training."""
    out: str
    """The run directory."""
    adapter: str | None = None
    """An adapter directory to train further; its own options hold."""
    training: tyro.conf.OmitArgPrefixes[TrainOptions] = field(default_factory=TrainOptions)


def _check(options: Options) -> None:
    from jora.train.record import open_directory

    check_file("--data", options.data)
    if options.eval_data is not None:
        check_file("--eval-data", options.eval_data)
    check_parent(options.out)
    open_directory(options.out, options.training.resume)  # makes nothing yet
    check_names(options.model, options.adapter)


def run(options: Options, reporter: Reporter) -> None:
    """Check, load and train."""
    from jora.models.model import check_dense

    method = options.build_method()  # before the model: a mistake in it should not wait for the weights
    if options.adapter is not None and options.chooses_method():
        raise InputError("jora train: --adapter brings its own rank, targets and so on; leave those options out")
    check_dense(method, quant_kind(options))
    _check(options)
    model = open_model(options, reporter)
    import jora

    jora.train(
        model,
        options.adapter or method,
        options.data,
        out=options.out,
        options=options.training,
        eval_data=options.eval_data,
        reporter=reporter,
    )
