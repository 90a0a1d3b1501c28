"""`jora train`."""

from __future__ import annotations

from dataclasses import dataclass, field

import tyro

from jora.cli.checks import check_file, check_names, check_parent
from jora.cli.common import ModelOptions, open_model, quant_kind
from jora.cli.method_choice import MethodChoice
from jora.errors import InputError
from jora.reporting import SILENT, Reporter
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
    hosts: str | None = None
    """Several hosts, this command on each: HOST:PORT,INDEX,COUNT, or auto under Slurm, Open MPI or on Cloud TPUs."""
    training: tyro.conf.OmitArgPrefixes[TrainOptions] = field(default_factory=TrainOptions)


def _check(options: Options) -> None:
    from jora.sharding.hosts import parse_hosts
    from jora.train.record import open_directory

    if options.hosts is not None:
        parse_hosts(options.hosts)
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
    if options.hosts is not None:
        reporter = _meet(options, reporter)
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


def _meet(options: Options, reporter: Reporter) -> Reporter:
    """Meet the other hosts; only the first goes on to show its progress."""
    from jora.sharding import hosts, parse_mesh

    assert options.hosts is not None
    hosts.start_hosts(hosts.parse_hosts(options.hosts), parse_mesh(options.mesh))
    import jax

    if not hosts.first():
        return SILENT
    reporter.note(f"{jax.process_count()} hosts with {jax.device_count()} devices")
    return reporter
