"""Evaluation: the loss against transformers and torch, the scores against hand-made predictions."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from tests.inference.characters import talking

from jora.data.batches import Tokenised
from jora.data.chat import Template, fill_documents, tokenise_example
from jora.data.formats import parse_example, read_examples
from jora.errors import InputError
from jora.inference.decode import prefill
from jora.inference.evaluate import _answered, evaluate
from jora.inference.generate import generate


def line(question: str, answer: str, documents: list[str], **extra: Any) -> dict[str, Any]:
    return {
        "question": question,
        "answer": answer,
        "messages": [
            {"role": "user", "content": "{documents}\nQ: " + question},
            {"role": "assistant", "content": f"##Answer: {answer}"},
        ],
        "documents": [{"title": f"d{i}", "text": text, "oracle": i == 0} for i, text in enumerate(documents)],
        **extra,
    }


LINES = [
    line("Who?", "Ada", ["Ada wrote it.", "Bob did not."]),
    line("When was that then?", "1843", ["In 1843."]),
    line("Why?", "to sum", ["It was to sum numbers.", "No.", "Yes."]),
]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    hf, model = talking("qwen25", folder)
    data = folder / "eval.jsonl"
    data.write_text("".join(json.dumps(entry) + "\n" for entry in LINES))
    return hf, model, data


def expected_nll(hf: Any, turn: Tokenised) -> tuple[float, int]:
    tokens, loss = turn
    with torch.no_grad():
        scores = hf(torch.tensor(tokens[None].astype(np.int64))).logits[0]
    targets = np.flatnonzero(loss)
    nll = torch.nn.functional.cross_entropy(
        scores[targets - 1], torch.tensor(tokens[targets].astype(np.int64)), reduction="sum"
    )
    return float(nll), len(targets)


def test_the_loss_is_transformers_loss_of_the_answers(setting):
    hf, model, data = setting
    result = evaluate(model, data, max_new_tokens=4, batch_size=2)
    template = Template(model.tokenizer)
    expected = [expected_nll(hf, *tokenise_example(example, template)) for example in read_examples(data)]
    assert result.loss == pytest.approx(sum(n for n, _ in expected) / sum(c for _, c in expected), rel=1e-4)
    for row, (nll, count) in zip(result.rows, expected, strict=True):
        assert row.loss == pytest.approx(nll / count, rel=1e-4)
        assert row.answer_tokens == count


THINKING = (  # what an earlier turn of the assistant says is short, as thinking is dropped
    "{% for m in messages %}[{{ m.role }}]"
    "{{ m.content if loop.last or m.role == 'user' else m.content[:2] }}{% if m.role == 'assistant' %}<end_of_turn>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = {"messages": [{"role": role, "content": f"{role} says {n}"} for n in "12" for role in ("user", "assistant")]}


@pytest.mark.parametrize("mesh", [None, "data=2", "fsdp=2,tensor=2"])
@pytest.mark.parametrize("template", [None, THINKING], ids=["whole", "by turns"])
def test_every_turn_counts(template, mesh, tmp_path):
    """All turns as one text, or each as one of its own, on any mesh; an example of one turn beside it."""
    hf, model = talking("gemma3", tmp_path, mesh)
    if template:
        model.tokenizer.chat_template = template
    examples = [parse_example(TURNS), parse_example(LINES[0])]
    assert len(tokenise_example(examples[0], Template(model.tokenizer))) == (2 if template else 1)
    result = evaluate(model, examples, max_new_tokens=4, batch_size=3)
    for row, example in zip(result.rows, examples, strict=True):
        turns = [expected_nll(hf, turn) for turn in tokenise_example(example, Template(model.tokenizer))]
        assert row.answer_tokens == sum(count for _, count in turns)
        assert row.loss == pytest.approx(sum(nll for nll, _ in turns) / row.answer_tokens, rel=1e-4)
        assert row.prediction == generate(model, fill_documents(example).messages[:-1], max_new_tokens=4)


def test_a_prompt_is_read_once(setting, monkeypatch):
    """Answer and loss come of one pass."""
    _, model, data = setting
    monkeypatch.setattr("jora.inference.evaluate._answer_nll", None)
    read = []

    def counting(*args, **options):
        read.append(np.asarray(args[2]).shape)
        return prefill(*args, **options)

    monkeypatch.setattr("jora.inference.tokens.prefill", counting)
    evaluate(model, data, max_new_tokens=4, batch_size=2)
    assert [rows for rows, _ in read] == [2, 2]


def answering(monkeypatch, texts: list[str]) -> None:
    """Let the model 'write' these texts: what it really writes is the subject of test_generate."""

    def writing(*args):
        return texts, _answered(*args)[1]

    monkeypatch.setattr("jora.inference.evaluate._answered", writing)


def test_scores_and_rows(setting, monkeypatch, tmp_path):
    _, model, data = setting
    answering(
        monkeypatch,
        [
            "##begin_quote## Ada  wrote it. ##end_quote##\n##Answer: Ada.",
            "##begin_quote## In 1900. ##end_quote##\n##Answer: in 1843",
            "I do not",
        ],
    )
    result = evaluate(model, data, out=tmp_path / "rows.jsonl")
    assert result.exact_match == pytest.approx(1 / 3)
    assert result.f1 == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert result.quote_share == 0.5
    assert result.answered == pytest.approx(2 / 3)
    assert result.metrics()["examples"] == 3
    rows = [json.loads(text) for text in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == [entry["question"] for entry in LINES]
    assert rows[1]["references"] == ["1843"]
    assert rows[1]["answer"] == "in 1843"
    assert rows[0]["quotes_found"] == 1
    assert rows[0]["loss"] == result.rows[0].loss
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_what_the_model_writes_is_scored(setting):
    _, model, data = setting
    result = evaluate(model, data, max_new_tokens=6)
    documents = "\n\n".join(
        f'<document title="d{i}">\n{text}\n</document>' for i, text in enumerate(["Ada wrote it.", "Bob did not."])
    )
    assert result.rows[0].prediction == generate(model, f"[user]{documents}\nQ: Who?\n[assistant]", max_new_tokens=6)


def test_limit_takes_the_first(setting, monkeypatch):
    _, model, data = setting
    answering(monkeypatch, ["Ada"])
    assert [row.question for row in evaluate(model, data, limit=1).rows] == ["Who?"]


def test_no_quote_has_no_share(setting, monkeypatch):
    _, model, data = setting
    answering(monkeypatch, ["Ada"])
    assert evaluate(model, data, limit=1).quote_share is None


def test_several_references_and_plain_prompts(setting, monkeypatch):
    _, model, _ = setting
    answering(monkeypatch, ["two", "##begin_quote## cd ##end_quote## yes"])
    examples = [
        parse_example({"prompt": "1+1?", "completion": " 2", "answer": ["2", "two"]}),
        parse_example({"prompt": "ab cd", "completion": "yes"}),
    ]
    result = evaluate(model, examples)
    assert (result.exact_match, result.quote_share, result.answered) == (1.0, 1.0, 1.0)
    assert result.rows[0].references == ("2", "two")


def test_long_prompts_lose_documents_in_loss_and_prompt_alike(setting, monkeypatch):
    hf, model, _ = setting
    notes = []

    class Listener:
        note = notes.append

        def start(self, *args):
            pass

        update = finish = lambda self, *args, **fields: None

    answering(monkeypatch, ["x"])
    long = parse_example(line("Who?", "Ada", ["Ada.", "filler " * 30]))
    short = parse_example(line("Who?", "Ada", ["Ada."]))
    result = evaluate(model, [long], max_length=120, max_new_tokens=20, reporter=Listener())
    nll, count = expected_nll(hf, *tokenise_example(short, Template(model.tokenizer)))
    assert result.rows[0].loss == pytest.approx(nll / count, rel=1e-4)
    assert notes == ["1 of 1 prompts shortened in their documents to 120 tokens"]


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, {}, "no answer to compare"),
        (LINES[0], dict(limit=0), "limit"),
        (LINES[0], dict(max_length=20, max_new_tokens=20), "leaves no room"),
        (LINES[0], dict(max_length=40, max_new_tokens=20), "cannot be shortened"),
    ],
)
def test_bad_input_is_refused(setting, example, options, message):
    with pytest.raises(InputError, match=message):
        evaluate(setting[1], [parse_example(example)], **options)
