"""The demo end to end over two simulated devices, with a tiny random model in Gemma's place."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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


@pytest.mark.slow
def test_the_whole_demo_over_two_devices(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "prepare_model", lambda reporter: tiny)
    monkeypatch.setattr(demo, "ANSWER_TOKENS", 8)
    out = tmp_path / "demo"
    for stale in (out / "inputs", out / "run"):  # an earlier demo's, whose place this one takes
        stale.mkdir(parents=True)
    (out / "run" / "config.yaml").write_text("epochs: 9\n")
    result = demo.run_demo(out, limit=8, mesh="tensor=2")
    assert len(result.before.rows) == len(result.after.rows) == 8
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
