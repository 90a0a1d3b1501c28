"""`jora index`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jora.cli.checks import check_parent
from jora.cli.common import open_tokenizer
from jora.cli.options import CommandOptions
from jora.errors import InputError
from jora.reporting import Reporter

if TYPE_CHECKING:
    from jora.data.raft import RaftOptions


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Make documents ready for `jora serve --documents OUT`."""

    documents: str
    """A file or directory of .txt, .md, .html or .jsonl documents."""
    model: str
    """The model to be served: its tokenizer measures the chunks."""
    out: str
    """Directory to write; an index that stands there is replaced."""
    data: str | None = None
    """A data set of `jora raft build`: the options that it was built with hold, so that prompts are as in training."""
    chunk_tokens: int | None = None
    """Most tokens of a chunk; 256 by default."""
    chunk_overlap: int | None = None
    """Tokens that neighbouring chunks share; 0 by default."""
    contexts: int | None = None
    """Documents in a prompt; 4 by default."""
    max_context_tokens: int | None = None
    """Most tokens of all documents in a prompt as they are written there; no limit by default."""
    instruction: str | None = None
    """What the prompt asks for, between documents and question; by default that of `jora raft build`."""


def run(options: Options, reporter: Reporter) -> None:
    """Check, read, index, write, report."""
    from jora.data.documents import read_documents
    from jora.data.index import build_index, check_out, write_index

    check_out(options.out)
    check_parent(options.out)
    settings = _settings(options, reporter)
    documents = read_documents(options.documents)
    index = build_index(documents, open_tokenizer(options.model), settings)
    write_index(index, options.out)
    reporter.note(f"{len(documents)} documents, {len(index.chunks)} chunks: index written to {options.out}")


def _settings(options: Options, reporter: Reporter) -> RaftOptions:
    from jora.data.raft import RaftOptions

    settings = RaftOptions() if options.data is None else _trained_with(options.data)
    if settings.retriever != "bm25":
        reporter.note(f"{options.data} was built with {settings.retriever} retrieval; the index has bm25 alone")
    names = ("chunk_tokens", "chunk_overlap", "contexts", "max_context_tokens", "instruction")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return replace(settings, **given)


def _trained_with(data: str) -> RaftOptions:
    from jora.data.index import options_of

    path = Path(data).expanduser() / "manifest.json"
    try:
        return options_of(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: give a data set of `jora raft build`") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a manifest of `jora raft build` ({error})") from error
