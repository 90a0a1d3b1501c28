"""Incremental text against tokenizer.decode of the whole, over random tokens of each kind of tokenizer."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.data import tokenizers as made
from tests.serve.text.fallback import spm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jora.serve.text.detokenise import Detokeniser, TextStream

REAL = Path.home() / ".cache/jora/gemma-3-270m-from-q4_k_m"


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """byte: byte-level BPE. spm: SentencePiece-like with byte fallback. llama2: the same, whose decoder strips the
    first space."""
    if kind == "byte":
        return made.llama3()
    if kind == "real":
        return AutoTokenizer.from_pretrained(REAL)
    return spm(strip=kind == "llama2")


@cache
def detokeniser(kind: str) -> Detokeniser:
    return Detokeniser(tokenizer(kind))


def deltas(kind, tokens, **options):
    stream = TextStream(detokeniser(kind), **options)
    return [*(stream.push(token) for token in tokens), stream.finish()], stream.stopped_by


def whole(kind, tokens):
    return tokenizer(kind).decode(tokens, skip_special_tokens=True)


SOME_TEXT = st.text(alphabet="ab é日本😀👩‍👧\n .", max_size=12)
KINDS = ["byte", "spm", "llama2"]


def token_lists(kind: str) -> st.SearchStrategy[list[int]]:
    """Random tokens (halves of characters, invalid bytes, special tokens, ids that no token has) and real text."""
    encode = tokenizer(kind).backend_tokenizer.encode
    size = len(tokenizer(kind)) + 3
    written = SOME_TEXT.map(lambda text: encode(text, add_special_tokens=False).ids)
    broken = written.flatmap(lambda ids: st.integers(0, len(ids)).map(lambda n: ids[:n]))
    pieces = st.lists(st.integers(0, size - 1), max_size=6) | written | broken
    if detokeniser(kind).bytes:
        pieces |= st.lists(st.sampled_from(sorted(detokeniser(kind).bytes)), max_size=5)
    return st.lists(pieces, max_size=6).map(lambda lists: [token for ids in lists for token in ids])


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_are_the_whole(kind):
    @settings(deadline=None, max_examples=150)
    @given(tokens=token_lists(kind))
    def check(tokens):
        found, _ = deltas(kind, tokens)
        assert "".join(found) == whole(kind, tokens)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_given_out_stays_true(kind):
    """After every token: what has been given out begins the text of any continuation."""

    @settings(deadline=None, max_examples=60)
    @given(tokens=token_lists(kind))
    def check(tokens):
        stream, out = TextStream(detokeniser(kind)), ""
        for at, token in enumerate(tokens):
            out += stream.push(token)
            # More of the same character may come, or something else.
            for more in ([], tokens[at + 1 :], tokens[:1]):
                assert whole(kind, tokens[: at + 1] + more).startswith(out)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_as_soon_as_it_is_settled(kind):
    text = "The quick 日本 😀 answer"
    tokens = tokenizer(kind).backend_tokenizer.encode(text, add_special_tokens=False).ids
    # A byte-level character is settled with its last byte, a run of byte tokens with the token after it.
    byte = ["The", " quick", " ", "日", "", "本", " 😀", " answer", ""]
    spm = ["The quick", " ", *[""] * 6, "日本 ", *[""] * 4, "😀 ", "answ", "er", ""]
    assert deltas(kind, tokens)[0] == (byte if kind == "byte" else spm)


def test_special_tokens_are_not_shown_and_break_nothing():
    # The emoji's bytes with an end-of-turn between them are still an emoji, as decode has it.
    byte = tokenizer("byte")
    tokens = byte.backend_tokenizer.encode("😀 a", add_special_tokens=False).ids
    special = byte.convert_tokens_to_ids("<|eot_id|>")
    assert "".join(deltas("byte", [tokens[0], special, *tokens[1:], special])[0]) == "😀 a"


def test_a_run_of_bytes_goes_on_behind_what_is_not_shown():
    spm = tokenizer("spm")
    first, second, eos = spm.convert_tokens_to_ids(["<0xC3>", "<0xA9>", "<eos>"])
    for hidden in (eos, len(spm) + 2):  # the second is an id that only the model has
        assert deltas("spm", [first, second, hidden, first])[0] == [*[""] * 4, "\N{REPLACEMENT CHARACTER}" * 3]


def characters(text):
    """Tokens of single characters' bytes: the finest cut there is."""
    byte = tokenizer("byte")
    return [i for c in text for i in byte.backend_tokenizer.encode(c, add_special_tokens=False).ids]


def reference(text, stop, include):
    """Brute force: the first prefix that ends with a stop string; equally early, the longest."""
    for end in range(len(text) + 1):
        hits = [s for s in stop if text[:end].endswith(s)]
        if hits:
            longest = max(hits, key=len)
            return (text[:end] if include else text[: end - len(longest)]), longest
    return text, None


@settings(deadline=None, max_examples=300)
@given(
    text=st.text(alphabet="ab😀", max_size=14),
    stop=st.lists(st.text(alphabet="ab😀", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
    single=st.booleans(),
)
@example(text="aab", stop=["ab"], include=False, single=True)
@example(text="abac", stop=["abad", "ba"], include=False, single=True)
def test_stop_strings_against_brute_force(text, stop, include, single):
    tokens = characters(text) if single else tokenizer("byte").backend_tokenizer.encode(text).ids[1:]
    found, stopped_by = deltas("byte", tokens, stop=stop, include_stop=include)
    assert ("".join(found), stopped_by) == reference(text, stop, include)


def test_what_may_begin_a_stop_string_is_held_and_given_out_when_it_does_not():
    found, stopped_by = deltas("byte", characters("xENyEND."), stop=["END"])
    assert found == ["x", "", "", "ENy", "", "", "", "", ""] and stopped_by == "END"
    found, _ = deltas("byte", characters("xEN"), stop=["END"])
    assert found == ["x", "", "", "EN"]


def test_stop_strings_count_from_min_tokens_on():
    found, stopped_by = deltas("byte", characters("a.b.c"), stop=["."], min_tokens=3)
    assert "".join(found) == "a.b" and stopped_by == "."
    assert "".join(deltas("byte", characters("a.b.c"), stop=["."])[0]) == "a"


def test_a_stop_string_in_the_last_unsettled_text():
    """A newline of a byte-fallback vocabulary settles at the end only."""
    newline = tokenizer("spm").convert_tokens_to_ids("<0x0A>")
    assert deltas("spm", [newline], stop=["\n"]) == (["", ""], "\n")


def test_a_long_answer_is_not_decoded_again_and_again():
    counted = detokeniser("spm")
    lengths = []

    class Counting(Detokeniser):
        def decode(self, tokens):
            lengths.append(len(tokens))
            return super().decode(tokens)

    counted = Counting(tokenizer("spm"))
    word = tokenizer("spm").backend_tokenizer.encode("answer", add_special_tokens=False).ids
    stream = TextStream(counted)
    for token in word * 200:
        stream.push(token)
    for token in sorted(counted.bytes)[:1] * 500:
        stream.push(token)
    assert max(lengths) <= 4


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the demo's Gemma is not there")
def test_the_real_gemma_tokenizer():
    test_the_pieces_are_the_whole("real")
    text = json.dumps({"emoji": "😀👩‍👧", "cjk": "日本語", "spaces": "a   b\n\n\n c"}, ensure_ascii=False)
    tokens = tokenizer("real").backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(deltas("real", tokens)[0]) == text
