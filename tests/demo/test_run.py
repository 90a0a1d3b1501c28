"""The demo end to end over two simulated devices, with a tiny random model in Gemma's place."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import jora
import jora.demo.run as demo
from jora.demo import python_docs
from jora.errors import InputError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model whose tokenizer knows the documents, so that chunks and quotes have about Gemma's lengths."""
    directory = tmp_path_factory.mktemp("tiny")
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    pieces.train_from_iterator((document["text"] for document in python_docs.documents()), trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def earlier(out: Path, *names: str) -> None:
    """What an earlier demo left in `out`: its inputs and, without names, a run."""
    for name in names or ("inputs/documents.jsonl", "inputs/questions-train.jsonl", "run/config.yaml", "run/old"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("epochs: 9\n")


class Loaded(Exception):
    """The demo got as far as loading its model."""


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo ends where it would build its data, the model being loaded."""

    def build_data(*_: object) -> None:
        raise Loaded

    monkeypatch.setattr(demo, "prepare_model", lambda reporter: "model")
    monkeypatch.setattr(jora, "load_model", lambda *_, **__: None)
    monkeypatch.setattr(demo, "build_data", build_data)


def test_the_questions_it_asks_come_from_everywhere():
    """Enough of them, once each, and topics that only the held-out part has."""
    asked = {
        split: demo.spread(python_docs.resolve(python_docs.load_questions(split)).questions, most)
        for split, most in demo.QUESTIONS.items()
    }
    assert len(asked["train"]) >= 150 and len(asked["heldout"]) >= 50
    assert all(len({q.question for q in questions}) == len(questions) for questions in asked.values())
    trained = {question.topic for question in asked["train"]}
    everything = {question.topic for question in python_docs.load_questions("train")}
    assert len({question.topic for question in asked["heldout"]} - everything) >= 15
    assert len(trained) > 0.9 * len(everything)
    assert demo.spread("abc", 9) == ["a", "b", "c"]


@pytest.mark.slow
def test_the_whole_demo_over_two_devices(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "prepare_model", lambda reporter: tiny)
    monkeypatch.setattr(demo, "ANSWER_TOKENS", 8)
    out = tmp_path / "demo"
    earlier(out)  # whose place this one takes
    result = demo.run_demo(out, limit=8, mesh="tensor=2")
    resolved = python_docs.resolve(python_docs.load_questions("heldout")).questions
    expected = [each.question for each in demo.spread(resolved, demo.QUESTIONS["heldout"])[:8]]
    assert [row.question for row in result.before.rows] == [row.question for row in result.after.rows] == expected
    assert result.after.loss < result.before.loss  # a random model learns something from anything
    assert result.asked.tuned and result.asked.question and result.asked.documents
    assert len((out / "data" / "train.jsonl").read_text().splitlines()) == 8
    written = [json.loads(line)["prediction"] for line in (out / "after.jsonl").read_text().splitlines()]
    assert written == [row.prediction for row in result.after.rows]
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    assert peft.PeftModel.from_pretrained(base, result.adapter).peft_config["default"].r == demo.recipe()[0].rank


def test_what_is_no_demo_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds something that is no demo"):
        demo.run_demo(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["inputs/documents.jsonl", "run/config.yaml"], "holds something that is no demo"),
        (["inputs/mine.txt"], "holds something that is no demo"),
        (
            ["inputs/documents.jsonl", "inputs/questions-train.jsonl", "run/mine.txt"],
            r"run is no run of a demo, it has no config\.yaml: delete it or give another --out",
        ),
        (
            ["inputs/documents.jsonl", "inputs/questions-train.jsonl", "run/config.yaml", "data/mine.csv"],
            r"data holds mine\.csv, which is no part of a data set",
        ),
    ],
)
def test_directories_of_the_same_names_are_left_alone(tmp_path, built, names, words):
    earlier(tmp_path, *names)
    with pytest.raises(InputError, match=words):
        demo.run_demo(tmp_path)
    assert all((tmp_path / name).exists() for name in names)


def test_the_earlier_run_goes_when_the_model_is_there(tmp_path, built, monkeypatch):
    earlier(tmp_path)
    with pytest.raises(Loaded):
        demo.run_demo(tmp_path)
    assert not (tmp_path / "run").exists()
    with pytest.raises(Loaded):
        demo.run_demo(tmp_path)  # an interrupted one: inputs and no run
    earlier(tmp_path)

    def absent(reporter: object) -> None:
        raise InputError("the model is not installed")

    monkeypatch.setattr(demo, "prepare_model", absent)
    with pytest.raises(InputError, match="not installed"):
        demo.run_demo(tmp_path)
    assert (tmp_path / "run" / "old").exists()


def test_a_tilde_is_the_home_directory(tmp_path, built, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    earlier(tmp_path / "demo")
    with pytest.raises(Loaded):
        demo.run_demo("~/demo")
    assert not (tmp_path / "demo" / "run").exists()


def test_limit_must_be_positive(tmp_path):
    with pytest.raises(InputError, match="limit must be at least 1"):
        demo.run_demo(tmp_path / "out", limit=0)


def test_the_model_is_converted_once(tmp_path, monkeypatch):
    made = []

    def convert(source, out, reporter):
        made.append(source)
        out.mkdir(parents=True)
        (out / "config.json").write_text("{}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "gemma_gguf", lambda: "file.gguf")
    monkeypatch.setattr("jora.models.convert.convert", convert)
    assert demo.prepare_model() == demo.prepare_model() == tmp_path / "jora" / demo.MODEL_NAME
    assert made == ["file.gguf"]
