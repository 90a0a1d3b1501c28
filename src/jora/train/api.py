"""`jora.train`: from a model, a method and data to a run directory with an adapter.

out/config.yaml     every option of the run
out/metrics.jsonl   a line a step and evaluation
out/checkpoints/    what `resume` needs
out/adapter/        the result; of method full out/model/, a Hugging Face directory
"""

from __future__ import annotations

import os
from typing import Any

import jax

from jora.data.batches import Batches, Tokenised, prompt_of
from jora.errors import InputError
from jora.methods.method import Adapter
from jora.methods.storage import load_adapter
from jora.methods.targets import check_options_match
from jora.models.model import Model
from jora.reporting import SILENT, Reporter
from jora.sharding import hosts
from jora.train.examples import Data, load_examples
from jora.train.feed import batch_options
from jora.train.loop import Run, TrainResult
from jora.train.options import TrainOptions
from jora.train.record import INSTANCES, digest_of, open_directory


def train(
    model: Model,
    method: Any,
    data: Data,
    *,
    out: str | os.PathLike[str],
    options: TrainOptions | None = None,
    eval_data: Data | None = None,
    reporter: Reporter = SILENT,
) -> TrainResult:
    """Fine-tune `model` by `method` on `data`; only method `Full` changes the model's own weights.

    Args:
        model: from `load_model`.
        method: a method with its options, like `LoRA(rank=16)`, or an adapter to train further: its directory or hub
            id, which config.yaml names, or the adapter itself.
        data: a .jsonl file, its parsed lines, or a list of `Tokenised`.
        out: the run's directory, new or empty; with `options.resume` that of the run to continue.
        options: see `TrainOptions`.
        eval_data: for evaluations during training; the adapter of the best one is the result.
        reporter: told of progress.

    Raises:
        InputError: data, options or directory cannot be used; an adapter of another model; `resume` with another
            model, method, data or option than the run began with; a loss that is not finite.
        KeyboardInterrupt: after a checkpoint was written.
    """
    options = options or TrainOptions()
    given = {"data": data, "eval_data": eval_data}
    if isinstance(method, str | os.PathLike):
        given["adapter"] = method
        method = load_adapter(method, model)
    if isinstance(method, Adapter):
        model.parts_of(method)
    else:
        model.check_method(method)
        check_options_match(method, model.config)
    directory = open_directory(out, options.resume)
    hosts.barrier("the run's directory was looked at")  # the first will write into it
    examples = load_examples(data, model, options, reporter, "training data")
    held_out = None if eval_data is None else load_examples(eval_data, model, options, reporter, "evaluation data")
    adapter = method if isinstance(method, Adapter) else method.init(model, jax.random.key(options.seed))
    if hosts.several():
        _check_hosts(adapter, model)

    def batches_of(examples: list[Tokenised], evaluation: bool = False) -> Batches:
        slots = adapter.method.prompt_slots
        cut = batch_options(options, model.layout, evaluation=evaluation, prompt_slots=slots)
        prompts = [prompt_of(example).tolist() for example in examples]
        instances = adapter.method.instances(model, prompts, directory / INSTANCES, reporter)
        return Batches(examples, cut, options.seed, instances)

    batches = batches_of(examples)
    evaluation = None if held_out is None else batches_of(held_out, evaluation=True)
    start = digest_of(method) if isinstance(method, Adapter) else None
    run = Run(model, adapter, batches, evaluation, directory, options, reporter, start)
    return run.execute(given)


def _check_hosts(adapter: Adapter, model: Model) -> None:
    """Raise InputError for a method that needs all of the model in one process."""
    if adapter.method.instance_width(model.config):
        name = adapter.method.name
        raise InputError(f"method {name} over several hosts: the vectors of prompts are made in one process only")
