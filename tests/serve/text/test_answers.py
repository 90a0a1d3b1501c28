"""Answers: what is held back for a stop string becomes text, however an answer ends."""

from __future__ import annotations

from typing import Any

import pytest
from tests.serve.text.test_detokenise import characters, detokeniser, tokenizer

from jora.serve.answers import Answer
from jora.serve.requests import Request, SamplingOptions

EOS, STOP = 0, 7
TOKENS = characters("xEN")


class Grammar:
    """Ends after so many tokens."""

    def __init__(self, length: int) -> None:
        self.left = length

    def start(self) -> Grammar:
        return self

    def advance(self, token: int) -> None:
        self.left -= 1

    @property
    def finished(self) -> bool:
        return self.left == 0


def answer(most: int = 99, kind: str = "byte", **options: Any) -> Answer:
    return Answer(Request("r", (1,), SamplingOptions(**options)), 0, detokeniser(kind), (EOS,), most)


@pytest.mark.parametrize("how", ["end of turn", "stop token", "length", "deadline"])
def test_what_was_held_back_for_a_stop_string_is_in_the_last_event(how: str) -> None:
    assert EOS not in TOKENS and STOP not in TOKENS
    one = answer(3 if how == "length" else 99, stop=("END",), stop_token_ids=(STOP,))
    events = [one.take(token, None) for token in TOKENS]
    assert [event.text for event in events[:2]] == ["x", ""]
    if how == "deadline":
        events.append(one.end("deadline"))
    elif how != "length":
        events.append(one.take(EOS if how == "end of turn" else STOP, None))
    assert "".join(event.text for event in events) == "xEN"
    wanted = {"end of turn": ("stop", None), "stop token": ("stop", STOP)}.get(how, (how, None))
    assert (events[-1].finish, events[-1].stopped_by) == wanted and one.finished


def test_an_answer_ends_with_its_grammar() -> None:
    one = answer(grammar=Grammar(3), stop=("END",))
    events = [one.take(token, None) for token in TOKENS]
    assert [event.finish for event in events] == [None, None, "stop"]
    assert "".join(event.text for event in events) == "xEN"


@pytest.mark.parametrize("how", ["end of turn", "length"])
def test_a_stop_string_that_the_end_completes_is_what_ended_it(how: str) -> None:
    """A byte token is no text until it is known that no other byte follows."""
    one = answer(1 if how == "length" else 99, "spm", stop=("\n",))
    event = one.take(tokenizer("spm").convert_tokens_to_ids("<0x0A>"), None)
    if how == "end of turn":
        event = one.take(EOS, None)
    assert (event.text, event.finish, event.stopped_by) == ("", "stop", "\n")
