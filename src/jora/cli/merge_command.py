"""`jora merge`."""

from __future__ import annotations

from dataclasses import dataclass

from jora.cli.checks import check_names, check_new_model
from jora.cli.common import ModelOptions, open_model
from jora.reporting import Reporter


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Write base and adapter as one Hugging Face model directory."""

    adapter: str
    """An adapter directory made for this model."""
    out: str
    """Directory to write, new or empty."""


def run(options: Options, reporter: Reporter) -> None:
    """Check, load, merge, save."""
    check_new_model(options.out, options.model)
    check_names(options.model, options.adapter)
    model = open_model(options, reporter)
    import jora

    jora.merge(model, jora.load_adapter(options.adapter, model)).save(options.out, reporter=reporter)
    reporter.note(f"merged model written to {options.out}")
