"""`jora raft build`."""

from __future__ import annotations

from dataclasses import dataclass, field

import tyro

from jora.cli.checks import check_parent
from jora.cli.common import open_tokenizer
from jora.cli.options import CommandOptions
from jora.data.raft import RaftOptions
from jora.reporting import Reporter


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Build retrieval-augmented examples: train.jsonl, eval.jsonl and manifest.json."""

    documents: str
    """A file or directory of .txt, .md, .html or .jsonl documents."""
    questions: str
    """JSON lines with question, answer, and source or quote."""
    eval_questions: str | None = None
    """More of the same, for eval.jsonl."""
    model: str
    """The model to be trained: its tokenizer measures the chunks."""
    out: str
    """Directory to write."""
    raft: tyro.conf.OmitArgPrefixes[RaftOptions] = field(default_factory=RaftOptions)


def run(options: Options, reporter: Reporter) -> None:
    """Check, read, build, write, report."""
    from jora.data import raft
    from jora.data.documents import read_documents
    from jora.data.questions import read_questions

    raft.check_out(options.out)
    check_parent(options.out)
    documents = read_documents(options.documents)
    questions = read_questions(options.questions)
    held = None if options.eval_questions is None else read_questions(options.eval_questions)
    tokenizer = open_tokenizer(options.model)
    built = raft.build_raft(documents, questions, tokenizer, options.raft, held)
    raft.write(built, options.out)
    for line in raft.report(built):
        reporter.note(line)
    reporter.note(f"data set written to {options.out}")
