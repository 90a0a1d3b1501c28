"""Structured output: which tokens a JSON schema, regular expression or grammar allows next (llguidance)."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt32
from llguidance import LLMatcher, LLParserLimits
from llguidance.hf import from_tokenizer

from jora.errors import InputError

Kind = Literal["json_schema", "json_object", "regex", "grammar"]

# Unbounded, a model that likes spaces writes nothing else until max_tokens ends it.
_JSON: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}
_LIMITS = LLParserLimits(verbose_errors=False)  # otherwise an error quotes the whole grammar


class Grammars:
    """Compiles grammars for one model; keeps those last used. May be used from several threads.

    tokenizer: a PreTrainedTokenizerFast, converted once (about a second). vocabulary: of the model, which decides the
    width of a mask. ends: the tokens that end an answer; they are allowed where the grammar is complete, only.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Sequence[int], kept: int = 128):
        self._tokenizer = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(ends))
        self._kept = kept
        self._compiled: OrderedDict[tuple[str, str], Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, kind: Kind, text: str = "") -> Grammar:
        """json_schema: a schema, as JSON. json_object: any object; no text. regex: the whole answer matches it (syntax
        of Rust's regex). grammar: Lark, as llguidance documents it.

        Raises InputError, with the library's reason, for one that is wrong, can match nothing, or is not supported.
        """
        key = (kind, text)
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
        grammar = Grammar(self._matcher(kind, text))
        with self._lock:
            self._compiled[key] = grammar
            while len(self._compiled) > self._kept:
                self._compiled.popitem(last=False)
        return grammar

    def _matcher(self, kind: Kind, text: str) -> LLMatcher:
        try:
            source = _source(kind, text)
        except ValueError as error:
            raise _refusal(kind, str(error)) from error
        if problem := LLMatcher.validate_grammar(source, self._tokenizer):
            raise _refusal(kind, problem)
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise _refusal(kind, matcher.get_error())
        return matcher


def _source(kind: Kind, text: str) -> str:
    match kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(text, defaults=_JSON)
        case "json_object":
            return LLMatcher.grammar_from_json_schema(json.dumps({"type": "object"}), defaults=_JSON)
        case "regex":
            return LLMatcher.grammar_from_regex(text)
        case "grammar":
            return LLMatcher.grammar_from_lark(text)
    raise ValueError("use json_schema, json_object, regex or grammar")


def _refusal(kind: str, problem: str) -> InputError:
    return InputError(f"{kind} cannot be used: {' '.join(problem.split())}")


class Grammar:
    """A compiled grammar; every answer has a state of its own."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def start(self, tokens: Sequence[int] = ()) -> GrammarState:
        """The state after these tokens of an answer (none at its beginning; all, where it is taken up again)."""
        state = GrammarState(self._matcher.deep_copy())
        for token in tokens:
            state.advance(token)
        return state


class GrammarState:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def mask(self) -> UInt32[np.ndarray, " w"]:
        """The tokens that may come next: token t is bit t % 32 of word t // 32. Once finished: the ends alone.

        Raises InputError where the grammar has become more complex than llguidance's limits.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        return words

    def advance(self, token: int) -> None:
        """The answer goes on with `token`. Raises InputError where the grammar does not allow it."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """Nothing but an end can follow."""
        return self._matcher.is_stopped()

    @property
    def complete(self) -> bool:
        """The answer may end here."""
        return self._matcher.is_accepting()

    def copy(self) -> GrammarState:
        """A state that goes its own way from here."""
        return GrammarState(self._matcher.deep_copy())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"the grammar cannot go on: {' '.join(self._matcher.get_error().split())}")


__all__ = ["Grammar", "GrammarState", "Grammars", "Kind"]
