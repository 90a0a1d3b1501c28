"""A data set of examples as tokens within a maximum length, with a report of what did not fit.

Over-long examples are shortened on the document side (or dropped, or an error, by choice); the answer,
the question and documents marked `oracle` are never cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Int32

from jora.data.batches import Tokenised
from jora.data.chat import Template, prompt_tokens, tokenise_example
from jora.data.formats import Example
from jora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OverLong = Literal["shorten", "drop", "error"]
# A document of which fewer tokens than this would be left is removed whole: a stump tells nothing.
SHORTEST_REMAINDER = 32
# A cut goes back to the end of a word that is at most so many tokens away. Not every script has white space.
WORD_TOKENS = 8


@dataclass
class LengthReport:
    """What happened to the examples of a data set.

    Attributes:
        examples: examples read.
        kept: examples that became tokens (a conversation taken a turn at a time counts once).
        shortened: examples that lost document text.
        dropped: places (file:line) of examples that do not fit.
        longest: tokens of the longest example before shortening.
    """

    examples: int = 0
    kept: int = 0
    shortened: int = 0
    dropped: list[str] = field(default_factory=list)
    longest: int = 0

    def __str__(self) -> str:
        text = f"{self.examples} examples, longest {self.longest} tokens"
        if self.shortened:
            text += f"; {self.shortened} shortened in their documents"
        if self.dropped:
            text += f"; {len(self.dropped)} dropped as too long ({', '.join(self.dropped[:3])}"
            text += ", ...)" if len(self.dropped) > 3 else ")"
        return text


class TokenisedSet(NamedTuple):
    """`examples[i]` comes from the example with index `origins[i]` in the input."""

    examples: list[Tokenised]
    origins: list[int]
    report: LengthReport


def _beginning(text: str, excess: int, template: Template) -> str:
    """`text` without its last `excess` tokens (at least a character), "" where too little would be left of it."""
    _, offsets = template.encode(text)

    def end(count: int) -> int:
        # Of a character that is several tokens, each has the whole: it is kept whole or not at all.
        return min(offsets[count - 1][1], offsets[count][0])

    left = len(offsets) - excess
    while left >= SHORTEST_REMAINDER and end(left) >= len(text):
        left -= 1
    if left < SHORTEST_REMAINDER:
        return ""
    cut, near = end(left), end(max(left - WORD_TOKENS, SHORTEST_REMAINDER))
    if not text[cut].isspace() and (begun := re.search(r"\s\S*\Z", text[near:cut])):
        cut = near + begun.start()
    kept = text[:cut].rstrip()
    return kept if len(template.encode(kept)[0]) >= SHORTEST_REMAINDER else ""


def _without_last(example: Example, excess: int, template: Template) -> Example | None:
    """The example with at least `excess` tokens less in its last removable document, or that document gone.

    None where only oracle documents are left.
    """
    documents = list(example.documents or ())
    removable = [index for index, document in enumerate(documents) if not document.oracle]
    if not removable:
        return None
    victim = removable[-1]
    if kept := _beginning(documents[victim].text, excess, template):
        documents[victim] = replace(documents[victim], text=kept)
    else:
        del documents[victim]
    return replace(example, documents=tuple(documents))


def shorten(example: Example, excess: int, template: Template, measure: Callable[[Example], int]) -> Example | None:
    """Remove document text until `measure` (tokens over the limit) is not positive; None if it cannot be.

    Documents go from the last to the first, each only as far as needed: its trailing text is cut, or,
    where little would remain, it is removed. Documents marked `oracle` stay whole.
    """
    shorter: Example | None = example
    while shorter is not None and excess > 0:
        shorter = _without_last(shorter, excess, template)
        excess = 0 if shorter is None else measure(shorter)
    return shorter


def _longest(turns: Iterable[Tokenised]) -> int:
    return max(len(turn.tokens) for turn in turns)


def tokenise(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    over_long: OverLong = "shorten",
) -> TokenisedSet:
    """Examples as tokens with loss on their answers, none longer than `max_length`.

    Args:
        examples: from `formats.read_examples`.
        tokenizer: the model's (fast) tokenizer; its chat template is used.
        max_length: most tokens of one example.
        over_long: what to do with longer ones. "shorten" removes document text and drops what still does
            not fit (nothing but the report says so), "drop" drops them, "error" raises.

    Raises:
        InputError: see `chat.tokenise_example`; or an example is too long under "error".
    """
    template = Template(tokenizer)
    report = LengthReport()
    kept: list[Tokenised] = []
    origins: list[int] = []
    for index, example in enumerate(examples):
        turns = tokenise_example(example, template)
        longest = _longest(turns)
        report.examples += 1
        report.longest = max(report.longest, longest)
        if longest > max_length:
            if over_long == "error":
                raise InputError(
                    f"{example.where}: {longest} tokens, more than max_length {max_length}: "
                    "raise it, or choose to shorten or drop over-long examples"
                )
            shorter = None
            if over_long == "shorten":
                shorter = shorten(
                    example,
                    longest - max_length,
                    template,
                    lambda e: _longest(tokenise_example(e, template)) - max_length,
                )
            if shorter is None:
                report.dropped.append(example.where)
                continue
            report.shortened += 1
            turns = tokenise_example(shorter, template)
        report.kept += 1
        kept += turns
        origins += [index] * len(turns)
    return TokenisedSet(kept, origins, report)


def tokenise_prompt(
    example: Example, template: Template, *, max_length: int
) -> tuple[Int32[np.ndarray, " t"], Example]:
    """The prompt's tokens for generation, shortened in its documents to `max_length`, and what was used.

    Raises:
        InputError: the prompt does not fit even without its removable documents.
    """
    tokens = prompt_tokens(example, template)
    if len(tokens) <= max_length:
        return tokens, example
    shorter = shorten(
        example, len(tokens) - max_length, template, lambda e: len(prompt_tokens(e, template)) - max_length
    )
    if shorter is None:
        raise InputError(
            f"{example.where}: the prompt has {len(tokens)} tokens and cannot be shortened to {max_length}: "
            "allow a longer prompt or give fewer documents"
        )
    return prompt_tokens(shorter, template), shorter
