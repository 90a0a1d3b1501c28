"""`jora.train_many`: many adapters of one base, trained in one batch.

out/config.yaml      all jobs and options; `jora train-many` reads it again
out/results.json     what became of each job
out/checkpoints/     what `resume` needs, of all jobs at once
out/<job>/           as `jora.train` writes it: config.yaml, metrics.jsonl, adapter/
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from jora.data.batches import Batches
from jora.methods.bank import check_bankable
from jora.methods.method import Adapter, State
from jora.methods.targets import check_options_match
from jora.models.model import Model
from jora.reporting import SILENT, Reporter
from jora.train.examples import digest, load_examples
from jora.train.feed import Schedule, batch_options
from jora.train.many.jobs import Job, ManyOptions, check_jobs
from jora.train.many.loop import ManyRun
from jora.train.many.plan import Prepared
from jora.train.many.record import JobResult, write_many_config
from jora.train.record import identity, open_directory


def train_many(
    model: Model,
    jobs: Sequence[Job],
    *,
    out: str | os.PathLike[str],
    options: ManyOptions | None = None,
    reporter: Reporter = SILENT,
) -> list[JobResult]:
    """Train an adapter for each of `jobs`; one forward and backward pass of `model` serves all of them.

    Each result is that of `jora.train` with the same method, data and options. A job ends on its own: after its
    last step, where its evaluations get no better (`patience`), or where its loss is no number; the others go on.

    Args:
        model: from `load_model`.
        jobs: see `Job`.
        out: the run's directory, new or empty; with `options.resume` that of the run to continue.
        options: what the jobs share, see `ManyOptions`.
        reporter: told of progress.

    Returns:
        What became of each job, in their order.

    Raises:
        InputError: a job's data or options, or the directory, cannot be used; two jobs of one name; `resume` with
            other jobs than the run began with; every job failed.
        KeyboardInterrupt: after a checkpoint was written.
    """
    options = options or ManyOptions()
    check_jobs(jobs)
    directory = open_directory(out, options.resume)
    prepared = [prepare(job, model, reporter) for job in jobs]
    run = ManyRun(model, prepared, directory, options, reporter)
    return run.execute(lambda about: write_many_config(directory, model, jobs, options, about))


def prepare(job: Job, model: Model, reporter: Reporter = SILENT) -> Prepared:
    """A job's data as batches, its steps, and what decides its numbers."""
    options = job.options
    model.check_method(job.method)
    check_options_match(job.method, model.config)
    check_bankable(job.method, model, f"job {job.name}")
    examples = load_examples(job.data, model, options, reporter, f"job {job.name}, training data")
    evaluation, eval_digest = None, None
    if job.eval_data is not None:
        held_out = load_examples(job.eval_data, model, options, reporter, f"job {job.name}, evaluation data")
        evaluation = Batches(held_out, batch_options(options, model.layout, evaluation=True), options.seed)
        eval_digest = digest(held_out)
    batches = Batches(examples, batch_options(options, model.layout), options.seed)
    schedule = Schedule(batches, options.epochs, options.max_steps)
    adapter = Adapter(job.method, State(None, None), model.config)
    found = identity(model, adapter, options, schedule.total, digest(examples), eval_digest)
    return Prepared(job, batches, evaluation, schedule, found)
