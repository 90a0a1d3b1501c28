"""Questions with their answers, and where in the documents their support stands."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jora.data.documents import Document
from jora.data.formats import DOCUMENTS_MARKER, json_objects
from jora.data.raft_format import normalise
from jora.errors import InputError


@dataclass(frozen=True)
class Question:
    """A question, its answer in words of its own, and its support: a quote, a source, or both.

    `source` is the title or the path of a document; `quote` stands in it but for white space.
    """

    question: str
    answer: str
    source: str | None = None
    quote: str | None = None
    where: str = "question"


class Place(NamedTuple):
    """Characters [start, end) of document `document` (an index)."""

    document: int
    start: int
    end: int


class Unresolved(Exception):
    """Why a question's support cannot be found: it is listed in the manifest, the build goes on."""


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Questions from JSON lines: {"question", "answer", "source" and/or "quote"}; other fields are ignored.

    Raises:
        InputError: with file:line, for a missing or mistyped field, or a file without questions.
    """
    found = []
    for where, value in json_objects(path):
        for name in ("question", "answer"):
            if not isinstance(value.get(name), str) or not value[name].strip():
                raise InputError(f"{where}: `{name}` must be a string that is not empty")
        for name in ("source", "quote"):
            if value.get(name) is not None and (not isinstance(value[name], str) or not value[name].strip()):
                raise InputError(f"{where}: `{name}` must be a string that is not empty, or be left out")
        if value.get("source") is None and value.get("quote") is None:
            raise InputError(f"{where}: give a `quote` from the documents, a `source` (its title), or both")
        if DOCUMENTS_MARKER in value["question"]:
            raise InputError(f"{where}: a question cannot hold the marker {DOCUMENTS_MARKER}")
        found.append(Question(value["question"], value["answer"], value.get("source"), value.get("quote"), where))
    if not found:
        raise InputError(f"{path}: no question in this file: one JSON object a line is needed")
    return found


class Finder:
    """Finds quotes and sources in a set of documents."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = documents
        self.normalised = [normalise(document.text) for document in documents]
        self.by_name: dict[str, list[int]] = {}
        for index, document in enumerate(documents):
            for name in {document.title, document.path}:
                self.by_name.setdefault(name, []).append(index)

    def sources(self, question: Question) -> list[int]:
        """Indices of the documents that the question names; all documents, if it names none."""
        if question.source is None:
            return list(range(len(self.documents)))
        if question.source not in self.by_name:
            raise Unresolved(f"no document is called {question.source!r}")
        return self.by_name[question.source]

    def places(self, quote: str, documents: Sequence[int] | None = None) -> list[Place]:
        """Every place where the quote stands, but for white space, in these documents (None: in all)."""
        wanted = normalise(quote)
        pattern = re.compile(r"\s+".join(map(re.escape, quote.split())))
        candidates = range(len(self.documents)) if documents is None else documents
        return [
            Place(index, *match.span())
            for index in candidates
            if wanted in self.normalised[index]
            for match in pattern.finditer(self.documents[index].text)
        ]
