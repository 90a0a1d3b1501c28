"""How a RAFT example is written, and how an answer in that form is read again.

Target, after RAFT (Zhang et al., arXiv 2403.10131), shortened to one citation and one answer:

    ##begin_quote## the supporting passage ##end_quote##
    ##Answer: the answer
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from jora.data.formats import DOCUMENTS_MARKER

BEGIN_QUOTE = "##begin_quote##"
END_QUOTE = "##end_quote##"
ANSWER = "##Answer:"

INSTRUCTION = (
    "Answer the question from the documents. First copy the passage that supports the answer between "
    f"{BEGIN_QUOTE} and {END_QUOTE}, then write {ANSWER} and a short answer."
)
ABSTENTION = "The documents do not answer this question."

_QUOTES = re.compile(re.escape(BEGIN_QUOTE) + r"(.*?)" + re.escape(END_QUOTE), re.DOTALL)


class Reply(NamedTuple):
    """A model's text taken apart: what it quotes, and what it answers."""

    quotes: list[str]
    answer: str


def normalise(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def prompt(question: str, instruction: str = INSTRUCTION) -> str:
    """The user's turn; `{documents}` stands where the documents go."""
    return f"{DOCUMENTS_MARKER}\n\n{instruction}\n\nQuestion: {question}"


def target(answer: str, quote: str | None) -> str:
    """The assistant's turn; without `quote`, the answer alone. The quote's white space is normalised."""
    final = f"{ANSWER} {normalise(answer)}"
    return final if quote is None else f"{BEGIN_QUOTE} {normalise(quote)} {END_QUOTE}\n{final}"


def parse(text: str) -> Reply:
    """Quotes and answer of a generated text; without `##Answer:`, what is left beside the quotes."""
    quotes = [normalise(quote) for quote in _QUOTES.findall(text)]
    before, marker, answer = text.rpartition(ANSWER)
    if not marker:
        answer = _QUOTES.sub(" ", before + answer).split(BEGIN_QUOTE, 1)[0]
    return Reply(quotes, normalise(answer))


def stands_in(quote: str, texts: Iterable[str]) -> bool:
    """Whether the quote stands word for word (but for white space) in one of the texts."""
    wanted = normalise(quote)
    return bool(wanted) and any(wanted in normalise(text) for text in texts)
