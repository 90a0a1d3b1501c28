"""Answer scores: examples with the values that SQuAD's rules give, worked out by hand."""

from __future__ import annotations

import pytest

from jora.inference.metrics import exact_match, f1, normalised, score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, sat!", "cat sat"),
        ("an apple a day", "apple day"),
        ("Another theory", "another theory"),
        ("don't", "dont"),
        ("  ", ""),
    ],
)
def test_normalised(text, expected):
    assert normalised(text) == expected


def test_exact_match_takes_any_reference():
    assert exact_match("The answer.", ["no", "answer"]) == 1.0
    assert exact_match("answer 2", ["answer"]) == 0.0
    assert exact_match("x", []) == 0.0


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("a red fox", ["the red fox"], 1.0),
        ("red fox jumps", ["fox jumps high"], 2 / 3),
        ("fox fox", ["fox"], 2 / 3),
        ("nothing", ["something"], 0.0),
        ("red", ["blue", "red fox"], 2 / 3),
        ("", ["red"], 0.0),
        ("the", ["a"], 1.0),
        ("red", [], 0.0),
    ],
)
def test_f1(prediction, references, expected):
    assert f1(prediction, references) == pytest.approx(expected)


def test_score_reads_the_answer_after_its_mark_and_checks_quotes():
    text = (
        "##begin_quote## Cats sleep  a lot. ##end_quote## and ##begin_quote## Dogs fly. ##end_quote##\n"
        "##Answer: They sleep"
    )
    found = score(text, ["##Answer: they sleep"], ["All cats do.\nCats sleep a\nlot. Yes.", "Dogs"])
    assert found == ("They sleep", 1.0, 1.0, 2, 1)


def test_score_without_mark_takes_what_is_beside_the_quotes():
    found = score("##begin_quote## x ##end_quote## forty two", ["forty two"], ["x"])
    assert (found.exact_match, found.quotes, found.quotes_found) == (1.0, 1, 1)


def test_a_quote_may_not_join_two_documents():
    assert score("##begin_quote## one two ##end_quote##", ["z"], ["zero one", "two three"]).quotes_found == 0


def test_an_empty_quote_is_not_found():
    assert score("##begin_quote####end_quote## z", ["z"], ["abc"])[3:] == (1, 0)
