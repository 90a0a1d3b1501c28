"""Training data in any form a caller may have it, as tokens."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jora.data.batches import Tokenised
from jora.data.formats import Example, parse_example, read_examples
from jora.data.tokenise import tokenise
from jora.errors import InputError
from jora.models.model import Model
from jora.reporting import Reporter
from jora.train.options import TrainOptions

# A .jsonl file, its parsed lines, examples, or tokens that are ready.
Data = str | os.PathLike[str] | Sequence[Mapping[str, Any] | Example | Tokenised]


def load_examples(data: Data, model: Model, options: TrainOptions, reporter: Reporter, what: str) -> list[Tokenised]:
    """Tokens with loss on the answers; `reporter` is told what was shortened or dropped.

    Raises:
        InputError: what `data.formats` and `data.tokenise` refuse; nothing is left; a token that the model's
            vocabulary does not have.
    """
    examples = _tokens(data, model, options, reporter, what)
    words = model.config.vocab_size
    for number, example in enumerate(examples):
        # On the devices a number outside the table would read some other word's vector.
        if np.any((example.tokens < 0) | (example.tokens >= words)):
            raise InputError(f"{what}: example {number} has a token outside the model's vocabulary (0 to {words - 1})")
    return examples


def _tokens(data: Data, model: Model, options: TrainOptions, reporter: Reporter, what: str) -> list[Tokenised]:
    if not isinstance(data, str | os.PathLike):
        ready = [example for example in data if isinstance(example, Tokenised)]
        if ready and len(ready) == len(data):
            return _within(ready, options, reporter, what)
    found = tokenise(_examples(data, what), model.tokenizer, max_length=options.max_length, over_long=options.too_long)
    reporter.note(f"{what}: {found.report}")
    if not found.examples:
        raise InputError(f"{what}: no example fits in max_length {options.max_length}: raise it")
    return found.examples


def _examples(data: Data, what: str) -> list[Example]:
    if isinstance(data, str | os.PathLike):
        return read_examples(data)
    examples = []
    for number, value in enumerate(data):
        if isinstance(value, Example):
            examples.append(value)
        elif isinstance(value, Mapping):
            examples.append(parse_example(value, f"{what}[{number}]"))
        else:
            raise InputError(f"{what}[{number}] is a {type(value).__name__}: give a path, or a list of one kind")
    return examples


def _within(ready: list[Tokenised], options: TrainOptions, reporter: Reporter, what: str) -> list[Tokenised]:
    """Ready tokens have no documents to shorten: what is too long can only be dropped."""
    kept = [example for example in ready if len(example.tokens) <= options.max_length]
    dropped = len(ready) - len(kept)
    if dropped and options.too_long != "drop":
        raise InputError(
            f"{what}: {dropped} of {len(ready)} examples have more than max_length {options.max_length} tokens: "
            "raise it or set too_long to drop"
        )
    if dropped:
        reporter.note(f"{what}: {len(ready)} examples, {dropped} dropped as too long")
    return kept


def digest(examples: Sequence[Tokenised]) -> str:
    """A fingerprint (sha256) of the examples and their order."""
    found = hashlib.sha256()
    for example in examples:
        found.update(len(example.tokens).to_bytes(8, "little"))
        found.update(np.ascontiguousarray(example.tokens, np.int32).tobytes())
        found.update(np.ascontiguousarray(example.loss, np.uint8).tobytes())
    return found.hexdigest()[:32]
