"""The demo's documents (the topics that Python ships) and the questions about them that this project ships.

A question names its supporting passage by the passage's first and last few words; the passage itself is cut
from the installed `pydoc_data.topics`, so that no documentation text is copied into this project. Python
versions wrap lines and mark up code differently: passages are found by their words and signs, whatever white
space and quoting marks stand between them. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict, get_args

from jora.errors import InputError
from jora.files import atomic_write

Split = Literal["train", "heldout"]

DOCUMENTS_FILE = "documents.jsonl"
MIN_QUOTE_WORDS = 5
MAX_QUOTE_WORDS = 60
_SHARED_PARAGRAPH_WORDS = 8  # a shorter paragraph ("Example:") may stand in several documents

_MARKS = "\"'`*\\\u201c\u201d\u2018\u2019"
_TOKEN = re.compile(rf"\w+|[^\w\s{re.escape(_MARKS)}]")
_PARAGRAPH_BREAK = re.compile(r"\n[ \t]*\n")
_WRAPPED_HYPHEN = re.compile(r"(?<=\w)-\n[ \t]*(?=\w)")
_RULE = re.compile(r"([*=~-])\1+")


class Document(TypedDict):
    """One text that the RAFT builder cuts into chunks."""

    title: str
    text: str


@dataclass(frozen=True)
class Question:
    """A question, its answer in our words, and where the answer is supported.

    `quote` and `source` (the title of the document) are empty until `resolve` has found the passage.
    """

    question: str
    answer: str
    topic: str
    quote_start: str
    quote_end: str
    quote: str = ""
    source: str = ""


class Missing(NamedTuple):
    """A question whose passage these documents do not have, and why."""

    question: Question
    reason: str


class Resolved(NamedTuple):
    """The questions with their quotes, and those left out."""

    questions: tuple[Question, ...]
    missing: tuple[Missing, ...]


class Counts(NamedTuple):
    """How many questions were asked of the documents, how many found their quote, how many did not."""

    asked: int
    resolved: int
    missing: int


class _Word(NamedTuple):
    text: str
    start: int
    end: int


def _words(text: str) -> list[_Word]:
    """Words and signs of `text` with their offsets; quoting marks, emphasis and white space are left out."""
    return [_Word(m.group(), m.start(), m.end()) for m in _TOKEN.finditer(text)]


def _key(text: str) -> tuple[str, ...]:
    return tuple(word.text for word in _words(text))


def _installed_topics() -> Mapping[str, str]:
    from pydoc_data.topics import topics  # half a megabyte of text: read on demand

    return topics


def _split_heading(topic: str, text: str) -> tuple[str, list[str]]:
    """The title of a topic without its markup, and its paragraphs."""
    paragraphs = _PARAGRAPH_BREAK.split(_WRAPPED_HYPHEN.sub("-", text).strip("\n"))
    heading, _, rule = paragraphs[0].partition("\n")
    if _RULE.fullmatch(rule.strip()):
        return heading.replace('"', "").replace("`", "").strip(), paragraphs[1:]
    return topic, paragraphs


def _documents_by_topic(topics: Mapping[str, str]) -> dict[str, Document]:
    """One document per topic, each passage in one document only.

    Python's larger topics repeat smaller ones word for word ("compound" holds all of "with"). A passage is
    kept in the smallest topic that has it: otherwise the oracle's text could come back as one of its own
    distractors, and a topic kept for evaluation would be read in training. A topic with nothing of its own
    (`else` is `if`) is left out.
    """
    owner: dict[tuple[str, ...], str] = {}
    documents: dict[str, Document] = {}
    for topic in sorted(sorted(topics, reverse=True), key=lambda name: len(topics[name])):
        title, paragraphs = _split_heading(topic, topics[topic])
        kept = []
        for paragraph in paragraphs:
            key = _key(paragraph)
            shared = len(paragraph.split()) >= _SHARED_PARAGRAPH_WORDS
            if key and (not shared or owner.setdefault(key, topic) == topic):
                kept.append(paragraph)
        if sum(len(paragraph.split()) for paragraph in kept) >= _SHARED_PARAGRAPH_WORDS:
            documents[topic] = Document(title=title, text="\n\n".join(kept))
    return {topic: documents[topic] for topic in sorted(documents)}


def documents(topics: Mapping[str, str] | None = None) -> list[Document]:
    """Every topic as a document, in the order of the topics' names.

    Args:
        topics: topic -> text, as `pydoc_data.topics.topics`; by default that of the running Python.
    """
    return list(_documents_by_topic(_installed_topics() if topics is None else topics).values())


def load_questions(split: Split) -> list[Question]:
    """The questions of one part, without quotes.

    Raises:
        InputError: there is no such part.
    """
    if split not in get_args(Split):
        raise InputError(f"questions: no part named {split!r}; use one of {', '.join(get_args(Split))}")
    text = resources.files("jora.demo").joinpath("questions", f"{split}.jsonl").read_text(encoding="utf-8")
    return [Question(**json.loads(line)) for line in text.splitlines()]


def _find(words: Sequence[_Word], anchor: tuple[str, ...]) -> list[int]:
    """The indices into `words` at which `anchor` begins."""
    return [
        at
        for at in range(len(words) - len(anchor) + 1)
        if words[at].text == anchor[0] and all(words[at + offset].text == text for offset, text in enumerate(anchor))
    ]


def _cut(text: str, start: int, end: int) -> str:
    """`text[start:end]` with the marks that touch it and a full stop, on one line."""
    while start > 0 and text[start - 1] in _MARKS:
        start -= 1
    while end < len(text) and text[end] in _MARKS:
        end += 1
    if text[end : end + 1] == ".":
        end += 1
    return " ".join(text[start:end].split())


def _quote(text: str, words: Sequence[_Word], question: Question) -> tuple[str, str]:
    """The passage and "", or "" and the reason why there is none."""
    first, last = _key(question.quote_start), _key(question.quote_end)
    if not first or not last:
        return "", "an anchor holds no word"
    starts, ends = _find(words, first), [at + len(last) for at in _find(words, last)]
    if not starts or not ends:
        absent = question.quote_end if starts else question.quote_start
        return "", f"the document does not have the words {absent!r}"
    candidates = set()
    for at in starts:
        # the nearest end; the anchors of a short passage may overlap
        nearest = bisect_left(ends, at + max(len(first), len(last)))
        if nearest < len(ends):
            candidates.add(_cut(text, words[at].start, words[ends[nearest] - 1].end))
    fitting = {quote for quote in candidates if MIN_QUOTE_WORDS <= len(quote.split()) <= MAX_QUOTE_WORDS}
    if not fitting:
        return "", f"no passage of {MIN_QUOTE_WORDS} to {MAX_QUOTE_WORDS} words between the anchors"
    if len(fitting) > 1:
        return "", f"{len(fitting)} passages fit the anchors"
    return fitting.pop(), ""


def resolve(questions: Iterable[Question], topics: Mapping[str, str] | None = None) -> Resolved:
    """Cut each question's quote from the documents.

    A quote has 5 to 60 words, white space collapsed, and is the only passage between its anchors. What cannot
    be found (another Python words it differently) is listed in `missing` with the reason.

    Args:
        questions: from `load_questions`.
        topics: topic -> text; by default that of the running Python.
    """
    by_topic = _documents_by_topic(_installed_topics() if topics is None else topics)
    words = {topic: _words(document["text"]) for topic, document in by_topic.items()}
    found: list[Question] = []
    missing: list[Missing] = []
    for question in questions:
        document = by_topic.get(question.topic)
        if document is None:
            missing.append(Missing(question, f"there is no topic {question.topic!r}"))
            continue
        quote, reason = _quote(document["text"], words[question.topic], question)
        if quote:
            found.append(replace(question, quote=quote, source=document["title"]))
        else:
            missing.append(Missing(question, reason))
    return Resolved(tuple(found), tuple(missing))


def questions_file(split: Split) -> str:
    """The name under which `write_inputs` writes the questions of one part."""
    return f"questions-{split}.jsonl"


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_inputs(directory: str | os.PathLike[str], split: Split) -> Counts:
    """Write what `jora raft build` reads: `documents.jsonl` (all documents) and `questions-SPLIT.jsonl`.

    Documents have `title` and `text`; questions `question`, `answer`, `source` (the title of a document) and
    `quote`. Questions without a quote are left out and counted; `resolve` says which and why.
    """
    asked = load_questions(split)
    resolved = resolve(asked)
    _write_jsonl(Path(directory) / DOCUMENTS_FILE, documents())
    _write_jsonl(
        Path(directory) / questions_file(split),
        (
            {"question": q.question, "answer": q.answer, "source": q.source, "quote": q.quote}
            for q in resolved.questions
        ),
    )
    return Counts(len(asked), len(resolved.questions), len(resolved.missing))
