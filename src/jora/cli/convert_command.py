"""`jora convert`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jora.cli.checks import check_new_model
from jora.cli.options import CommandOptions
from jora.reporting import Reporter


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Write a .gguf file as a Hugging Face model directory: weights, config.json, tokenizer."""

    model: str
    """The .gguf file."""
    out: str
    """Directory to write, new or empty."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; auto keeps the file's own and writes a quantised file in bfloat16."""


def run(options: Options, reporter: Reporter) -> None:
    """Convert a tensor at a time."""
    check_new_model(options.out, options.model)
    from jora.models.convert import convert

    convert(options.model, options.out, dtype=options.dtype, reporter=reporter)
    reporter.note(f"model written to {options.out}")
