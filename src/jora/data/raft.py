"""Retrieval-augmented training examples: question + documents, one of which holds the answer.

After RAFT (Zhang et al., arXiv 2403.10131), with three differences: the distractors are the hardest
chunks that retrieval finds instead of random ones, every draw depends on (seed, question) alone, and
where the oracle is absent the target cites nothing, since there is nothing to cite. docs/raft.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jora.data.contexts import Context, ContextMaker, searched
from jora.data.documents import Document, chunk_documents
from jora.data.draws import text_key, uniform
from jora.data.manifest import content_hash, versions
from jora.data.questions import Question, Unresolved
from jora.data.raft_format import ABSTENTION, INSTRUCTION, prompt, target
from jora.data.retrieval import BM25, Fused, Retriever
from jora.errors import InputError
from jora.files import atomic_directory, check_holds_only

RetrieverName = Literal["bm25", "dense", "hybrid"]
SPLIT_STREAM = 1  # which draw decides between training and evaluation; contexts use others


@dataclass(frozen=True)
class RaftOptions:
    """How examples are built."""

    seed: int = 0
    """Every random choice follows from this and the question's text."""
    chunk_tokens: int = 256
    """Most tokens of a chunk."""
    chunk_overlap: int = 0
    """Tokens that neighbouring chunks share."""
    contexts: int = 4
    """Documents in a prompt: the oracle and its distractors."""
    max_context_tokens: int | None = None
    """Most tokens of all documents in a prompt as they are written there; None: no limit."""
    random_share: float = 0.2
    """Share of the distractors that are random chunks instead of the hardest."""
    oracle_absent: float = 0.2
    """Share of the training examples without the oracle (the paper's 1 - P)."""
    absent_target: Literal["answer", "abstain"] = "answer"
    """What to learn where the oracle is absent: the answer (as in the paper), or to say that it is."""
    abstention: str = ABSTENTION
    """The answer under `absent_target = abstain`."""
    retriever: RetrieverName = "bm25"
    """What finds distractors and retrieved contexts; dense and hybrid need the extra [dense]."""
    dense_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Embedding model of dense and hybrid retrieval."""
    eval_contexts: Literal["oracle", "retrieved"] = "oracle"
    """Evaluation prompts hold the oracle and distractors, or what retrieval finds."""
    eval_fraction: float = 0.0
    """Share of the questions set aside for evaluation, where there are no separate ones."""
    instruction: str = INSTRUCTION
    """What the prompt asks for, between documents and question."""

    def __post_init__(self) -> None:
        for name in ("random_share", "oracle_absent", "eval_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"raft option {name} is {getattr(self, name)}: it is a share from 0 to 1")
        if self.contexts < 1:
            raise InputError(f"raft option contexts is {self.contexts}: at least 1 document is needed")
        if self.eval_fraction == 1.0:
            raise InputError("raft option eval_fraction is 1: no question would be left for training")
        if self.max_context_tokens is not None and self.max_context_tokens < self.chunk_tokens:
            raise InputError(
                f"raft option max_context_tokens {self.max_context_tokens} is less than one chunk "
                f"({self.chunk_tokens} tokens): lower chunk_tokens"
            )


class RaftSet(NamedTuple):
    """Lines of train.jsonl and eval.jsonl (see `formats.parse_example`), and the manifest."""

    train: list[dict[str, Any]]
    eval: list[dict[str, Any]]
    manifest: dict[str, Any]


@dataclass
class _Counts:
    examples: int = 0
    oracle_absent: int = 0
    hard: int = 0
    random: int = 0
    ranks: list[int] = field(default_factory=list)  # of distractors, from 1
    oracle_ranks: list[int] = field(default_factory=list)  # of the best chunk with the quote, from 1
    oracle_in_context: int = 0
    short_contexts: int = 0
    unresolved: list[dict[str, str]] = field(default_factory=list)

    def add(self, context: Context) -> None:
        self.examples += 1
        self.oracle_absent += context.oracle_absent
        self.oracle_in_context += context.has_oracle
        self.hard += context.hard
        self.random += context.random
        self.ranks += context.ranks
        self.oracle_ranks += [context.oracle_rank] if context.oracle_rank else []
        self.short_contexts += context.short

    def summary(self) -> dict[str, Any]:
        return {
            "examples": self.examples,
            "oracle_in_context": self.oracle_in_context,
            "oracle_absent_by_choice": self.oracle_absent,
            "distractors_hard": self.hard,
            "distractors_random": self.random,
            "distractors_mean_rank": _mean(self.ranks),
            "oracle_mean_rank": _mean(self.oracle_ranks),
            "prompts_with_fewer_contexts": self.short_contexts,
            "unresolved": self.unresolved,
        }


def _mean(values: Sequence[int]) -> float | None:
    return round(sum(values) / len(values), 3) if values else None


def make_retriever(name: RetrieverName, texts: Sequence[str], dense_model: str) -> Retriever:
    """The retriever called `name` over `texts`."""
    if name == "bm25":
        return BM25(texts)
    from jora.data.dense import Dense

    dense = Dense(texts, dense_model)
    return dense if name == "dense" else Fused([BM25(texts), dense], len(texts))


def _line(question: Question, context: Context, options: RaftOptions) -> dict[str, Any]:
    answer, quote = question.answer, question.quote
    if context.oracle_absent:
        quote = None
        if options.absent_target == "abstain":
            answer = options.abstention
    return {
        "question": question.question,
        "answer": answer,
        "quote": quote,
        "source": context.source,
        "oracle_in_context": context.has_oracle,
        "messages": [
            {"role": "user", "content": prompt(question.question, options.instruction)},
            {"role": "assistant", "content": target(answer, quote)},
        ],
        "documents": [{"title": chunk.title, "text": chunk.text, "oracle": oracle} for chunk, oracle in context.chunks],
    }


def _build(
    questions: Iterable[Question], maker: Callable[[Question], Context], options: RaftOptions
) -> tuple[list[dict[str, Any]], _Counts]:
    counts = _Counts()
    lines = []
    for question in questions:
        try:
            context = maker(question)
        except Unresolved as reason:
            entry = {"where": question.where, "question": question.question, "reason": str(reason)}
            counts.unresolved.append(entry)
            continue
        counts.add(context)
        lines.append(_line(question, context, options))
    return lines, counts


def _set_aside(questions: Sequence[Question], options: RaftOptions) -> tuple[list[Question], list[Question]]:
    """Training and evaluation questions. Each question's draw is its own: additions move no other."""
    if not options.eval_fraction:
        return list(questions), []
    draws = [uniform(options.seed, text_key(q.question), SPLIT_STREAM) for q in questions]
    aside = [draw < options.eval_fraction for draw in draws]
    train = [q for q, out in zip(questions, aside, strict=True) if not out]
    held = [q for q, out in zip(questions, aside, strict=True) if out]
    if not held or not train:
        raise InputError(
            f"eval_fraction {options.eval_fraction} of {len(questions)} questions leaves {len(train)} for "
            f"training and {len(held)} for evaluation: change it, or give evaluation questions"
        )
    return train, held


def _refuse_repeats(train: Sequence[Question], held: Sequence[Question]) -> None:
    first: dict[str, str] = {}
    for question in train:
        first.setdefault(question.question, question.where)
    for question in held:
        if question.question in first:
            raise InputError(
                f"{question.where}: this question is also one for training ({first[question.question]}): "
                "remove it from one of the two"
            )


def build_raft(
    documents: Sequence[Document],
    questions: Sequence[Question],
    tokenizer: Callable[..., Any],
    options: RaftOptions | None = None,
    eval_questions: Sequence[Question] | None = None,
) -> RaftSet:
    """Training and evaluation examples for questions about documents.

    Args:
        documents: from `documents.read_documents`.
        questions: from `questions.read_questions`.
        tokenizer: a fast Hugging Face tokenizer (of the model to train), which measures the chunks.
        options: see `RaftOptions`.
        eval_questions: questions to evaluate on; None: `options.eval_fraction` of `questions`.

    Returns:
        The lines and a manifest. Questions whose support is not found are left out and listed in
        `manifest["train" | "eval"]["unresolved"]`; `report` prints them. The same input gives the same
        result, and a question's contexts do not change when others are added.

    Raises:
        InputError: no question can be used; or one is for training and for evaluation.
    """
    options = options or RaftOptions()
    if eval_questions is not None and options.eval_fraction:
        raise InputError("give evaluation questions or eval_fraction, not both")
    if eval_questions is None:
        train_questions, held = _set_aside(questions, options)
    else:
        train_questions, held = list(questions), list(eval_questions)
    _refuse_repeats(train_questions, held)
    chunks = chunk_documents(documents, tokenizer, options.chunk_tokens, options.chunk_overlap)
    retriever = make_retriever(options.retriever, [searched(chunk) for chunk in chunks], options.dense_model)
    maker = ContextMaker(documents, chunks, retriever, tokenizer, options)
    train, train_counts = _build(train_questions, maker.train, options)
    for_eval = maker.retrieved if options.eval_contexts == "retrieved" else maker.with_oracle
    evaluation, eval_counts = _build(held, for_eval, options)
    if not train and not evaluation:
        raise InputError(f"none of {len(questions)} questions is answered by the documents: check their quotes")
    manifest = {
        "options": asdict(options),
        "inputs": {
            "documents": content_hash([asdict(document) for document in documents]),
            "questions": content_hash([_content(question) for question in questions]),
            "eval_questions": content_hash([_content(question) for question in eval_questions or ()]),
        },
        "documents": len(documents),
        "chunks": len(chunks),
        "random_mean_rank": (len(chunks) + 1) / 2,
        "train": train_counts.summary(),
        "eval": eval_counts.summary(),
        "versions": versions(tokenizer),
    }
    return RaftSet(train, evaluation, manifest)


def _content(question: Question) -> dict[str, Any]:
    return {name: value for name, value in asdict(question).items() if name != "where"}


def report(result: RaftSet) -> list[str]:
    """Lines for the user: what was built, how hard the distractors are, what was left out."""
    manifest = result.manifest
    lines = [f"{manifest['documents']} documents, {manifest['chunks']} chunks"]
    for part in ("train", "eval"):
        counts = manifest[part]
        lines.append(
            f"{part}: {counts['examples']} examples, oracle in {counts['oracle_in_context']}; "
            f"distractors {counts['distractors_hard']} hard, {counts['distractors_random']} random, "
            f"mean retrieval rank {counts['distractors_mean_rank']} "
            f"(all random: {manifest['random_mean_rank']})"
        )
        lines += [f"left out: {entry['where']}: {entry['reason']}" for entry in counts["unresolved"]]
    return lines


def _write_json_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8", newline="\n")


def check_out(out: str | os.PathLike[str]) -> None:
    """Raise InputError where `out` is a file, or a directory that holds anything but a data set."""
    check_holds_only(Path(out).expanduser(), ("train.jsonl", "eval.jsonl", "manifest.json"), "a data set")


def write(result: RaftSet, out: str | os.PathLike[str]) -> None:
    """Write train.jsonl, eval.jsonl (each if it has a line) and manifest.json into `out`, all or nothing.

    Raises InputError as `check_out` does.
    """
    check_out(out)
    with atomic_directory(Path(out).expanduser()) as directory:
        for name, lines in (("train.jsonl", result.train), ("eval.jsonl", result.eval)):
            if lines:
                _write_json_lines(directory / name, lines)
        text = json.dumps(result.manifest, ensure_ascii=False, indent=2) + "\n"
        (directory / "manifest.json").write_text(text, encoding="utf-8", newline="\n")
