"""`jora eval`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from jora.cli.common import ModelOptions, open_adapter, open_model
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


def run(options: Options, reporter: Reporter) -> None:
    """Load, evaluate, print."""
    model = open_model(options, reporter)
    import jora

    result = jora.evaluate(
        model,
        options.data,
        open_adapter(options.adapter, model),
        max_new_tokens=options.max_new_tokens,
        max_length=options.max_length,
        limit=options.limit,
        batch_size=options.batch_size,
        out=options.out,
        reporter=reporter,
    )
    print(json.dumps(result.metrics(), indent=2))
    if options.out is not None:
        reporter.note(f"{len(result.rows)} rows written to {options.out}")
