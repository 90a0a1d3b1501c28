"""Over-long examples: shortened in the documents, dropped or refused, never silently."""

from __future__ import annotations

import numpy as np
import pytest
from tests.data import tokenizers as make

from jora.data.chat import Template
from jora.data.formats import ContextDocument, Example, parse_example
from jora.data.tokenise import SHORTEST_REMAINDER, WORD_TOKENS, shorten, tokenise, tokenise_prompt
from jora.errors import InputError

ANSWER = "The answer is 42."


def raft(lengths: list[int], oracle: int | None = None, where: str = "f:1") -> Example:
    documents = [
        {"title": f"T{i}", "text": f"start{i} " + "lazy dog " * n + f"end{i}", "oracle": i == oracle}
        for i, n in enumerate(lengths)
    ]
    messages = [
        {"role": "user", "content": "{documents}\n\nQuestion: what?"},
        {"role": "assistant", "content": ANSWER},
    ]
    return parse_example({"messages": messages, "documents": documents}, where)


def text(example: Example, max_length: int) -> str:
    tokenizer = make.llama3()
    result = tokenise([example], tokenizer, max_length=max_length)
    assert result.report.shortened == 1 and result.report.kept == 1
    (one,) = result.examples
    assert len(one.tokens) <= max_length
    assert tokenizer.decode(one.tokens[one.loss]) == ANSWER + "<|eot_id|>"
    return tokenizer.decode(one.tokens)


def test_the_last_document_loses_its_end_first() -> None:
    shortened = text(raft([40, 40, 40]), 330)
    assert all(f"end{i}" in shortened for i in (0, 1)) and "start2" in shortened and "end2" not in shortened
    assert "Question: what?" in shortened
    assert shortened.count("</document>") == 3


def test_then_it_goes_whole() -> None:
    shortened = text(raft([40, 40, 40]), 260)
    assert "start2" not in shortened and "T2" not in shortened and "start0" in shortened


def test_the_oracle_stays_whole() -> None:
    shortened = text(raft([40, 40, 40], oracle=2), 250)
    assert "start2" in shortened and "end2" in shortened and "end1" not in shortened


def test_what_cannot_be_shortened_is_dropped_and_reported() -> None:
    fits = raft([1])
    result = tokenise([raft([200], oracle=0, where="f:7"), fits], make.llama3(), max_length=200)
    assert result.report.dropped == ["f:7"]
    assert result.origins == [1] and len(result.examples) == 1
    assert "f:7" in str(result.report) and "1 dropped" in str(result.report)
    long_answer = Example(prompt="x", completion="lazy dog " * 200, where="f:8")
    assert tokenise([long_answer], make.llama3(), max_length=50).report.dropped == ["f:8"]


def test_by_choice_dropped_or_an_error() -> None:
    long = raft([40, 40])
    assert tokenise([long], make.llama3(), max_length=100, over_long="drop").report.dropped == ["f:1"]
    with pytest.raises(InputError, match=r"f:1: \d+ tokens, more than max_length 100"):
        tokenise([long], make.llama3(), max_length=100, over_long="error")


def test_turns_of_one_conversation_keep_their_origin() -> None:
    turns = [{"role": role, "content": role} for role in ("user", "assistant") * 3]
    result = tokenise([raft([1]), parse_example({"messages": turns})], make.qwen3(), max_length=200)
    assert result.origins == [0, 1, 1, 1]


def test_prompts_for_generation_are_shortened_alike() -> None:
    template = Template(make.llama3())
    tokens, used = tokenise_prompt(raft([40, 40]), template, max_length=200)
    assert len(tokens) <= 200 and used.documents is not None
    whole, same = tokenise_prompt(raft([1]), template, max_length=200)
    assert same == raft([1])
    learned = tokenise([same], make.llama3(), max_length=200).examples[0]
    np.testing.assert_array_equal(learned.tokens[: len(whole)], whole)
    with pytest.raises(InputError, match="cannot be shortened"):
        tokenise_prompt(raft([200], oracle=0), template, max_length=100)


def cut(document: str, excess: int, tokenizer: str = "llama3") -> tuple[str | None, int]:
    """What is left of a document that is `excess` tokens too long (None: it went), and the tokens that were free."""
    template = Template(getattr(make, tokenizer)())
    alone = Example(
        prompt="{documents}", completion="x", documents=(ContextDocument("", document),), document_template="{text}"
    )

    def count(example: Example) -> int:
        return sum(len(template.encode(one.text)[0]) for one in example.documents or ())

    limit = max(0, count(alone) - excess)
    shorter = shorten(alone, excess, template, lambda e: count(e) - limit)
    assert shorter is not None and shorter.documents is not None
    if not shorter.documents:
        return None, limit
    assert document.startswith(shorter.documents[0].text)
    return shorter.documents[0].text, limit - count(shorter)


@pytest.mark.parametrize("tokenizer", ["llama3", "qwen3", "gemma"])
@pytest.mark.parametrize(
    "document",
    ["保証\n" + "…" * 20, "保証書を無くさないでください。" * 4, "😀" * 30, "👩‍🔬 " + "😀🇩🇪" * 9],
    ids=["dots", "japanese", "emoji", "flags"],
)
def test_text_without_spaces_loses_as_little_as_needed(tokenizer: str, document: str) -> None:
    for excess in range(1, 12):
        kept, free = cut(document, excess, tokenizer)
        assert kept is not None and 0 <= free < 4  # tokens of one character


@pytest.mark.parametrize("text", ["😀", "…" * 10, "…" * 40, " ", " \n" * 60, "  \u3000" * 40 + "end"])
def test_every_document_can_be_removed(text: str) -> None:
    for excess in (1, 2, 30, 1000):
        kept, free = cut(text, excess)
        assert kept is None or (kept.strip() and free >= 0)
    assert cut(text, 1000)[0] is None


def test_blanks_are_no_remainder() -> None:
    assert cut(" " * 100, 5)[0] is None
    assert cut("word" + "\n" * 100, 5)[0] is None


def test_a_word_is_not_cut() -> None:
    document = "What is the answer to the lazy dog? " * 8
    words = document.split()
    for excess in range(1, 40):
        kept, free = cut(document, excess)
        assert kept is not None and kept.split() == words[: len(kept.split())]
        assert 0 <= free <= WORD_TOKENS


def test_the_end_of_a_word_is_a_place_to_cut() -> None:
    assert cut("lazy dog " * 40 + "fox.", 2)[0] == ("lazy dog " * 40).rstrip()


def test_fewer_tokens_than_a_remainder_go_whole() -> None:
    template = Template(make.llama3())
    document = "lazy dog " * 60
    total = len(template.encode(document)[0])
    for left in range(SHORTEST_REMAINDER - 2, SHORTEST_REMAINDER + 12):
        kept, _ = cut(document, total - left)
        assert (kept is None) == (left < SHORTEST_REMAINDER)
        assert kept is None or len(template.encode(kept)[0]) >= SHORTEST_REMAINDER
