"""`jora eval`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from jora.cli.checks import check_at_least_one, check_file, check_names, check_out_file
from jora.cli.common import ModelOptions, json_lines, open_adapter, open_model, write_out
from jora.errors import InputError
from jora.reporting import Reporter


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Score a model, with or without an adapter: one JSON object on standard output, a row per example in OUT."""

    data: str
    """JSON lines: eval.jsonl of `jora raft build`, or any training format."""
    adapter: str | None = None
    """An adapter directory; without it the base answers."""
    out: str | None = None
    """A JSONL file for the rows: question, prediction, answer, scores."""
    max_new_tokens: int = 128
    """Most tokens of a generated answer."""
    max_length: int | None = None
    """Most tokens of prompt and answer; longer prompts lose document text. None: the model's positions."""
    limit: int | None = None
    """Only the first so many examples."""
    batch_size: int = 8
    """Rows on the devices at a time."""


def _check(options: Options) -> None:
    check_at_least_one(options, "max_new_tokens", "max_length", "limit", "batch_size")
    if options.max_length is not None and options.max_length <= options.max_new_tokens:
        raise InputError(
            f"--max-length {options.max_length} leaves no room for a prompt beside --max-new-tokens "
            f"{options.max_new_tokens}: raise it, or lower --max-new-tokens"
        )
    check_file("--data", options.data)
    check_out_file(options.out)
    check_names(options.model, options.adapter)


def run(options: Options, reporter: Reporter) -> None:
    """Check, read the data, load, evaluate, print."""
    _check(options)
    from jora.data.formats import read_examples

    examples = read_examples(options.data)  # before the model: a mistake in it should not wait for the weights
    model = open_model(options, reporter)
    import jora

    result = jora.evaluate(
        model,
        examples,
        open_adapter(options.adapter, model),
        max_new_tokens=options.max_new_tokens,
        max_length=options.max_length,
        limit=options.limit,
        batch_size=options.batch_size,
        reporter=reporter,
    )
    print(json.dumps(result.metrics(), indent=2))  # first: they are not lost where the rows cannot be written
    if options.out is not None:
        write_out(options.out, json_lines(asdict(row) for row in result.rows))
        reporter.note(f"{len(result.rows)} rows written to {options.out}")
