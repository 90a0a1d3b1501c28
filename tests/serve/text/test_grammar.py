"""Random sampling under a grammar: whatever the logits, what comes out is in the language."""

from __future__ import annotations

import json
import re
from functools import cache

import jsonschema_rs
import numpy as np
import pytest
from tests.data import tokenizers as made
from tests.serve.text.fallback import spm

from jora.errors import InputError
from jora.serve.text.grammar import Grammars

VOCAB = 500  # more than the tokenizer has, as models have
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["adapter", "base"]},
        "rank": {"type": "integer", "minimum": 1, "maximum": 64},
        "on": {"type": "boolean"},
        "parts": {
            "type": "array",
            "items": {"type": ["integer", "null"], "minimum": -9, "maximum": 999},
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["name", "kind", "rank", "on", "parts"],
    "additionalProperties": False,
}
REGEX = r"(yes|no): [0-9]{2,4}(é|😀)?"
LARK = 'start: "(" expr ")"\nexpr: /[0-9]{1,3}/ | /[0-9]{1,3}/ "+" /[0-9]{1,2}/'


@cache
def tokenizer(kind="byte"):
    return made.llama3() if kind == "byte" else spm()


@cache
def ends(kind="byte"):
    return tuple(tokenizer(kind).convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"]))


@cache
def grammars(kind="byte"):
    return Grammars(tokenizer(kind), max(VOCAB, len(tokenizer(kind))), ends(kind))


def allowed(state) -> np.ndarray:
    return np.nonzero(np.unpackbits(state.mask().view(np.uint8), bitorder="little"))[0]


def answer(grammar, rng, kind="byte", limit=400):
    """Tokens drawn from random logits, until an end."""
    state, tokens = grammar.start(), []
    for _ in range(limit):
        logits = rng.normal(0, 3, max(VOCAB, len(tokenizer(kind))))
        choices = allowed(state)
        assert bool(set(choices) & set(ends(kind))) == state.complete  # an end exactly where it may end
        token = int(choices[logits[choices].argmax()])
        state.advance(token)
        if token in ends(kind):
            assert state.finished
            return tokens
        tokens.append(token)
    raise AssertionError(f"no end after {limit} tokens: {tokenizer(kind).decode(tokens)!r}")


@pytest.mark.parametrize("kind", ["byte", "spm"])
def test_a_schema_gives_valid_json(kind):
    grammar, rng = grammars(kind).compile("json_schema", json.dumps(SCHEMA)), np.random.default_rng(0)
    texts = {tokenizer(kind).decode(answer(grammar, rng, kind, 2000)) for _ in range(15)}
    for text in texts:
        jsonschema_rs.validate(SCHEMA, json.loads(text))
    assert len(texts) == 15


def test_a_json_object_is_one():
    state = grammars().compile("json_object").start()
    for token in (
        tokenizer().backend_tokenizer.encode('{"a": [1, {"b": null}], "c": "d"}', add_special_tokens=False).ids
    ):
        assert token in allowed(state) and not state.complete
        state.advance(token)
    assert state.complete and state.finished and set(allowed(state)) == set(ends())
    assert tokenizer().convert_tokens_to_ids("[") not in allowed(grammars().compile("json_object").start())


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [("regex", REGEX, REGEX), ("grammar", LARK, r"\([0-9]{1,3}(\+[0-9]{1,2})?\)")],
)
def test_answers_match_as_a_whole(kind, text, pattern):
    grammar, rng = grammars().compile(kind, text), np.random.default_rng(1)
    texts = {tokenizer().decode(answer(grammar, rng)) for _ in range(20)}
    assert all(re.fullmatch(pattern, found) for found in texts) and len(texts) > 10


def test_white_space_in_json_ends():
    state = grammars().compile("json_schema", json.dumps({"type": "object"})).start()
    space = tokenizer().convert_tokens_to_ids("Ġ")
    state.advance(tokenizer().convert_tokens_to_ids("{"))
    for _ in range(64):
        state.advance(space)
    assert space not in allowed(state)


def test_a_state_can_be_copied_and_replayed():
    grammar, rng = grammars().compile("regex", REGEX), np.random.default_rng(2)
    tokens = answer(grammar, rng)
    state = grammar.start()
    for at, token in enumerate(tokens):
        np.testing.assert_array_equal(grammar.start(tokens[:at]).mask(), state.mask())
        copy = state.copy()
        before = state.mask().copy()
        copy.advance(token)
        np.testing.assert_array_equal(state.mask(), before)
        state = copy
    assert state.complete


def test_a_token_that_is_not_allowed_is_an_error():
    state = grammars().compile("regex", "[0-9]+").start()
    with pytest.raises(InputError, match="doesn't satisfy the grammar"):
        state.advance(tokenizer().convert_tokens_to_ids("a"))


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json_schema", "{", "EOF|parsing"),
        ("json_schema", '{"type": "nothing"}', "nothing"),
        ("json_schema", '{"type": "string", "minLength": 5, "maxLength": 2}', "Unsatisfiable"),
        ("regex", "[0-9", "unclosed character class"),
        ("grammar", "start: missing", "missing"),
        ("yaml", "a: b", "json_schema, json_object, regex or grammar"),
    ],
)
def test_a_wrong_grammar_is_one_clear_line(kind, text, message):
    with pytest.raises(InputError, match=message) as refusal:
        grammars().compile(kind, text)
    assert "\n" not in str(refusal.value) and kind in str(refusal.value)


def test_the_last_used_grammars_are_kept():
    few = Grammars(tokenizer(), VOCAB, ends(), kept=2)
    a, b = few.compile("regex", "a"), few.compile("regex", "b")
    assert few.compile("regex", "a") is a
    few.compile("regex", "c")
    assert few.compile("regex", "a") is a and few.compile("regex", "b") is not b
    assert len(few._compiled) == 2


def test_masks_have_the_models_width():
    assert grammars().compile("regex", "a").start().mask().shape == (-(-VOCAB // 32),)
