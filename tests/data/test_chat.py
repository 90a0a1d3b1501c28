"""Which tokens carry loss, template by template. Oracles: the tokenizer's own decoding and rendering."""

from __future__ import annotations

import numpy as np
import pytest
from tests.data import tokenizers as make
from transformers import PreTrainedTokenizerFast

from jora.data.batches import Tokenised
from jora.data.chat import Template, prompt_tokens, tokenise_example
from jora.data.formats import Example, Message, parse_example
from jora.errors import InputError

TURNS: tuple[Message, ...] = (
    {"role": "user", "content": "What is a generator?"},
    {"role": "assistant", "content": "A function with yield. 日本語 😀"},
    {"role": "user", "content": "And lambda?"},
    {"role": "assistant", "content": "A function without a name."},
)


def learned(one: Tokenised, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each run of tokens that carry loss."""
    runs: list[list[int]] = []
    for index in np.flatnonzero(one.loss):
        if not runs or one.loss[index - 1] == 0:
            runs.append([])
        runs[-1].append(int(one.tokens[index]))
    return [tokenizer.decode(run) for run in runs]


def tokenised(value: Example, tokenizer: PreTrainedTokenizerFast) -> list[Tokenised]:
    return tokenise_example(value, Template(tokenizer))


@pytest.mark.parametrize(
    ("tokenizer", "end"),
    [
        (make.llama3(), "<|eot_id|>"),
        (make.llama3(make.LLAMA3_MARKED), "<|eot_id|>"),
        (make.gemma(), "<end_of_turn>"),
    ],
    ids=["llama3", "llama3-marked", "gemma"],
)
def test_loss_on_every_assistant_turn_and_its_end(tokenizer: PreTrainedTokenizerFast, end: str) -> None:
    (one,) = tokenised(Example(TURNS), tokenizer)
    oracle = tokenizer.apply_chat_template(list(TURNS), tokenize=True, return_dict=True)["input_ids"]
    assert one.tokens.tolist() == oracle
    assert one.tokens.tolist().count(tokenizer.bos_token_id) == 1  # not doubled
    assert learned(one, tokenizer) == [TURNS[1]["content"] + end, TURNS[3]["content"] + end]


def test_marks_and_rendering_agree() -> None:
    (marked,) = tokenised(Example(TURNS), make.llama3(make.LLAMA3_MARKED))
    (rendered,) = tokenised(Example(TURNS), make.llama3())
    np.testing.assert_array_equal(marked.tokens, rendered.tokens)
    np.testing.assert_array_equal(marked.loss, rendered.loss)


def test_an_end_token_outside_the_marks_is_learned_too() -> None:
    outside = make.LLAMA3_MARKED.replace(
        "{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}",
        "{{ m.content | trim }}{% endgeneration %}{{ '<|eot_id|>' }}",
    )
    assert outside != make.LLAMA3_MARKED
    (one,) = tokenised(Example(TURNS), make.llama3(outside))
    (rendered,) = tokenised(Example(TURNS), make.llama3())
    np.testing.assert_array_equal(one.loss, rendered.loss)


def test_a_template_that_drops_thinking_is_taken_a_turn_at_a_time() -> None:
    tokenizer = make.qwen3()
    turns = [dict(turn) for turn in TURNS]
    turns[1]["reasoning_content"] = "They ask about yield"
    first, second = tokenised(parse_example({"messages": turns}), tokenizer)
    # As each turn is generated: its own thinking in front, that of earlier turns gone.
    assert learned(first, tokenizer) == [f"<think>\nThey ask about yield\n</think>\n\n{TURNS[1]['content']}<|im_end|>"]
    assert learned(second, tokenizer) == [f"<think>\n\n</think>\n\n{TURNS[3]['content']}<|im_end|>"]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(second.tokens) == whole
    assert "yield\n</think>" not in whole


def test_one_turn_of_such_a_template_stays_one_example() -> None:
    (one,) = tokenised(Example(TURNS[:2]), make.qwen3())
    assert learned(one, make.qwen3()) == [f"<think>\n\n</think>\n\n{TURNS[1]['content']}<|im_end|>"]


def test_a_template_that_cannot_be_followed_is_refused_by_name() -> None:
    tokenizer = make.qwen3(make.THINKING_PROMPT)
    tokenizer.name_or_path = "some/model"
    with pytest.raises(InputError, match=r"here:3: the chat template of tokenizer some/model writes"):
        tokenised(Example(TURNS, where="here:3"), tokenizer)


def test_a_template_that_refuses_says_where_and_why() -> None:
    system: Message = {"role": "system", "content": "Be brief."}
    with pytest.raises(InputError, match=r"file:9: .*System role not supported"):
        tokenised(Example((system, *TURNS), where="file:9"), make.gemma())


@pytest.mark.parametrize("make_tokenizer", [make.llama3, make.qwen3, make.gemma])
def test_prompt_and_completion(make_tokenizer) -> None:
    tokenizer = make_tokenizer()
    (one,) = tokenised(Example(prompt="Question: x 😀?\nAnswer:", completion=" the answer"), tokenizer)
    added = tokenizer("Question: x 😀?\nAnswer: the answer")["input_ids"]  # with BOS, where it adds one
    assert one.tokens.tolist() == [*added, tokenizer.eos_token_id]
    assert learned(one, tokenizer) == [" the answer" + tokenizer.eos_token]
    prompt = prompt_tokens(Example(prompt="Question: x 😀?\nAnswer:"), Template(tokenizer))
    assert prompt.tolist() == tokenizer("Question: x 😀?\nAnswer:")["input_ids"]


def test_special_tokens_in_plain_text_are_not_doubled() -> None:
    tokenizer = make.llama3()
    (one,) = tokenised(Example(prompt="<|begin_of_text|>a", completion=" b<|end_of_text|>"), tokenizer)
    assert one.tokens.tolist().count(tokenizer.bos_token_id) == 1
    assert one.tokens.tolist().count(tokenizer.eos_token_id) == 1
    assert one.loss[-1]


def test_the_border_does_not_change_tokenisation() -> None:
    tokenizer = make.qwen3()
    (one,) = tokenised(Example(prompt="The quick bro", completion="wn fox"), tokenizer)
    assert one.tokens[:-1].tolist() == tokenizer("The quick brown fox")["input_ids"]
    # The token that straddles the border holds the answer's first letters: it is learned.
    assert learned(one, tokenizer)[0].endswith("own fox<|endoftext|>")


def test_no_template_falls_back_to_the_documented_one() -> None:
    tokenizer = make.llama3(None)
    (one,) = tokenised(Example(TURNS), tokenizer)
    eos = tokenizer.eos_token
    assert tokenizer.decode(one.tokens) == (
        f"{tokenizer.bos_token}User: {TURNS[0]['content']}\n\nAssistant: {TURNS[1]['content']}{eos}\n\n"
        f"User: {TURNS[2]['content']}\n\nAssistant: {TURNS[3]['content']}{eos}\n\n"
    )
    assert learned(one, tokenizer) == [f" {TURNS[1]['content']}{eos}", f" {TURNS[3]['content']}{eos}"]


def test_loss_on_the_completion_only() -> None:
    value = {"prompt": list(TURNS[:3]), "completion": [TURNS[3]]}
    for template in (make.LLAMA3, make.LLAMA3_MARKED):
        tokenizer = make.llama3(template)
        (one,) = tokenised(parse_example(value), tokenizer)
        assert learned(one, tokenizer) == [TURNS[3]["content"] + "<|eot_id|>"]


@pytest.mark.parametrize("make_tokenizer", [make.llama3, make.qwen3, make.gemma])
def test_the_prompt_is_what_the_answer_follows_in_training(make_tokenizer) -> None:
    tokenizer = make_tokenizer()
    example = Example(TURNS)
    prompt = prompt_tokens(example, Template(tokenizer))
    last = tokenised(example, tokenizer)[-1]
    np.testing.assert_array_equal(last.tokens[: len(prompt)], prompt)
    assert last.loss[len(prompt)] and not last.loss[len(prompt) - 1]


def test_documents_are_written_into_the_prompt_as_they_are() -> None:
    example = parse_example(
        {
            "messages": [
                {"role": "user", "content": "{documents}\n\nQuestion: {title}?"},
                {"role": "assistant", "content": "{documents} stay"},
            ],
            "documents": [{"title": "T{text}", "text": "a {title} b"}, {"title": "U", "text": "c"}],
        }
    )
    tokenizer = make.llama3()
    (one,) = tokenised(example, tokenizer)
    text = tokenizer.decode(one.tokens)
    assert '<document title="T{text}">\na {title} b\n</document>\n\n<document title="U">\nc\n</document>' in text
    assert "Question: {title}?" in text
    assert learned(one, tokenizer) == ["{documents} stay<|eot_id|>"]


def test_todays_date_is_not_in_the_data() -> None:
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}" + make.LLAMA3
    tokenizer = make.llama3("Today: {{ date_string }}" + dated)
    (one,) = tokenised(Example(TURNS), tokenizer)
    assert "Today: 26 Jul 2024" in tokenizer.decode(one.tokens)


def test_bad_conversations_are_refused() -> None:
    with pytest.raises(InputError, match="no assistant turn"):
        tokenised(Example(TURNS[:1]), make.llama3())
    with pytest.raises(InputError, match="first message is the assistant"):
        tokenised(Example(TURNS[1:]), make.llama3())
    tokenizer = make.llama3()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no eos_token"):
        Template(tokenizer)
