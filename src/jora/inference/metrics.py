"""Scores of generated answers: SQuAD's exact match and F1, and whether quotes are real. Pure Python.

Normalisation and scores follow SQuAD (arXiv 1606.05250); the answer's form is RAFT's (`data/raft_format.py`).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from jora.data import raft_format

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Scores(NamedTuple):
    """One prediction's scores. `answer` is what was scored; `quotes_found` of its `quotes` are in the documents."""

    answer: str
    exact_match: float
    f1: float
    quotes: int
    quotes_found: int


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals one of the references, else 0.0."""
    return float(normalised(prediction) in {normalised(r) for r in references})


def f1(prediction: str, references: Sequence[str]) -> float:
    """The best F1 of normalised words over the references; 0.0 without references."""
    return max((_f1(normalised(prediction).split(), normalised(r).split()) for r in references), default=0.0)


def _f1(prediction: list[str], reference: list[str]) -> float:
    if not prediction or not reference:
        return float(prediction == reference)  # both empty: nothing was to be said, and nothing was
    common = sum((Counter(prediction) & Counter(reference)).values())
    return 2 * common / (len(prediction) + len(reference))


def score(text: str, references: Sequence[str], documents: Sequence[str]) -> Scores:
    """Scores of a generated text against reference answers and the texts that stood in its prompt.

    Both sides are read as RAFT answers: what follows "##Answer:" counts, or all but the quotes.
    """
    reply = raft_format.parse(text)
    answers = [raft_format.parse(reference).answer for reference in references]
    found = sum(raft_format.stands_in(quote, documents) for quote in reply.quotes)
    return Scores(reply.answer, exact_match(reply.answer, answers), f1(reply.answer, answers), len(reply.quotes), found)
