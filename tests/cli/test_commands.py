"""The commands in a row on a tiny model: raft build, train, resume from its own config, eval, generate, merge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
import yaml
from tests.bytewise import bytewise_llama

from jora.cli.main import run
from jora.cli.options import read_options
from jora.errors import InputError

FACTS = {"apple": "red", "lemon": "yellow", "plum": "blue", "leaf": "green", "coal": "black", "milk": "white"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A random two-layer Llama that reads bytes."""
    return bytewise_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(model, tmp_path_factory) -> Path:
    """What `jora raft build` makes of six documents and as many questions."""
    inputs = tmp_path_factory.mktemp("inputs")
    documents = inputs / "documents"
    documents.mkdir()
    lines = []
    for thing, colour in FACTS.items():
        quote = f"The colour of {thing} is {colour}."
        (documents / f"{thing}.txt").write_text(f"About {thing}. {quote} That is all.")
        lines.append(json.dumps({"question": f"What colour is {thing}?", "answer": colour, "quote": quote}))
    (inputs / "questions.jsonl").write_text("\n".join(lines) + "\n")
    out = inputs / "data"
    build = ["raft", "build", "--documents", str(documents), "--questions", str(inputs / "questions.jsonl")]
    run([*build, "--model", model, "--out", str(out), "--contexts", "2", "--eval-fraction", "0.4"])
    return out


@pytest.fixture(scope="module")
def trained(model, data, tmp_path_factory) -> Path:
    """A run directory of `jora train`, options from a file and from the command line."""
    directory = tmp_path_factory.mktemp("train")
    config = directory / "options.yaml"
    config.write_text(f"model: {model}\nlearning_rate: 5e-3\nbatch_size: 2\nrank: 8\nmax_steps: 2\n")
    out = directory / "run"
    run(["train", "--config", str(config), "--data", str(data / "train.jsonl"), "--out", str(out), "--rank", "4"])
    return out


def test_data_set_is_built(data):
    counts = json.loads((data / "manifest.json").read_text())
    assert counts["train"]["examples"] + counts["eval"]["examples"] == len(FACTS)
    assert len((data / "eval.jsonl").read_text().splitlines()) == counts["eval"]["examples"] > 0


def test_training_obeys_file_and_command_line(trained):
    adapter = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 4  # the command line's, not the file's
    steps = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert max(step["step"] for step in steps) == 2


def test_the_config_of_a_run_is_a_config_file(trained):
    from jora.cli.train_command import Options

    options = read_options(Options, ["--config", str(trained / "config.yaml")], "jora train")
    assert (options.training.learning_rate, options.training.max_steps, options.method_options.rank) == (5e-3, 2, 4)
    assert options.out == str(trained)
    assert set(yaml.safe_load((trained / "config.yaml").read_text())) > {"model", "data", "rank", "targets"}


def test_eval_prints_metrics_and_writes_rows(model, data, trained, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    adapter = str(trained / "adapter")
    command = ["eval", "--model", model, "--data", str(data / "eval.jsonl"), "--max-new-tokens", "8"]
    run([*command, "--adapter", adapter, "--out", str(rows)])
    tuned = json.loads(capsys.readouterr().out)
    run(command)
    base = json.loads(capsys.readouterr().out)
    assert tuned["examples"] == len(rows.read_text().splitlines())
    assert np.isfinite(tuned["loss"]) and tuned["loss"] != base["loss"]


def test_generate_answers_one_prompt_and_a_file(model, data, tmp_path, capsys):
    options = ["--model", model, "--max-new-tokens", "4"]
    run(["generate", *options, "--prompt", "What colour is milk?", "--plain"])
    single = capsys.readouterr().out
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\nWhat colour is milk?\n\nor\u2028snow?\r\n", encoding="utf-8")
    run(["generate", *options, "--prompts", str(prompts), "--plain"])
    answers = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    assert answers[0] == {"prompt": "What colour is milk?", "answer": single.removesuffix("\n")}
    assert [row["prompt"] for row in answers[1:]] == ["or\u2028snow?"]  # only a line's end ends a prompt
    out = tmp_path / "answers.jsonl"
    run(["generate", *options, "--prompt", "What colour is milk?", "--plain", "--out", str(out)])
    assert [json.loads(line) for line in out.read_text().splitlines()] == answers[:1]
    run(["generate", *options, "--prompts", str(data / "eval.jsonl"), "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows and all(row["prompt"][-1]["role"] == "user" for row in rows)
    assert "The colour of" in rows[0]["prompt"][-1]["content"]  # the documents stand in the prompt


def test_merge_writes_a_model_that_transformers_loads(model, trained, tmp_path):
    out = tmp_path / "merged"
    run(["merge", "--model", model, "--adapter", str(trained / "adapter"), "--out", str(out)])
    merged = transformers.AutoModelForCausalLM.from_pretrained(out)
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    changed = merged.model.layers[0].self_attn.q_proj.weight - base.model.layers[0].self_attn.q_proj.weight
    assert changed.abs().max() > 0


def test_what_is_written_to_the_current_directory_is_there(model, trained, data, tmp_path, monkeypatch):
    inputs = data.parent
    raft = ["raft", "build", "--questions", str(inputs / "questions.jsonl"), "--contexts", "2"]
    for name, command, file in (
        ("merged", ["merge", "--adapter", str(trained / "adapter")], "model.safetensors"),
        ("data", [*raft, "--documents", str(inputs / "documents")], "train.jsonl"),
        ("index", ["index", "--documents", str(inputs / "documents")], "chunks.jsonl"),
    ):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        run([*command, "--model", model, "--out", "."])
        assert Path(file).stat().st_size > 0  # by way of the directory that the shell is in
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "index", "merged"]


def test_estimate_needs_no_weights(model, tmp_path, capsys):
    config = json.loads((Path(model) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    run(["estimate", "--model", str(tmp_path), "--batch-size", "2", "--max-length", "64", "--mesh", "tensor=2"])
    assert "a device" in capsys.readouterr().out


def test_training_further_keeps_the_adapters_own_options(model, data, trained, tmp_path):
    common = ["train", "--model", model, "--data", str(data / "train.jsonl"), "--max-steps", "1", "--batch-size", "2"]
    adapter = ["--adapter", str(trained / "adapter")]
    with pytest.raises(InputError, match="--adapter brings its own rank"):
        run([*common, *adapter, "--out", str(tmp_path / "no"), "--rank", "2"])
    run([*common, *adapter, "--out", str(tmp_path / "more")])
    assert json.loads((tmp_path / "more" / "adapter" / "adapter_config.json").read_text())["r"] == 4
    run(["train", "--config", str(tmp_path / "more" / "config.yaml"), "--out", str(tmp_path / "again")])
    again, more = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("again", "more"))
    assert again.read_bytes() == more.read_bytes()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ([], "give --prompt TEXT or --prompts FILE"),
        (["--prompt", "a", "--prompts", "b"], "give --prompt TEXT or --prompts FILE, not both"),
        (["--prompt", " "], "--prompt is empty: give a text"),
    ],
)
def test_generate_wants_one_source_of_prompts(model, extra, words):
    with pytest.raises(InputError, match=words):
        run(["generate", "--model", model, *extra])
