"""What can be checked before a model is loaded is checked before: the loading of a large one takes minutes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.bytewise import bytewise_llama

import jora
from jora.cli.main import run
from jora.data.formats import read_examples
from jora.errors import InputError

NEEDED = {
    "train": ["--data", "data.jsonl", "--out", "run"],
    "eval": ["--data", "data.jsonl"],
    "generate": ["--prompt", "a"],
    "merge": ["--adapter", "adapter", "--out", "out"],
}


class Loaded(Exception):
    """The command got as far as loading the model."""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with things to name; no model can be loaded."""

    def load_model(*_: object, **__: object) -> None:
        raise Loaded

    monkeypatch.setattr(jora, "load_model", load_model)
    monkeypatch.chdir(tmp_path)
    for name, marker in {"model": "config.json", "other": "config.json", "adapter": "adapter_config.json"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / marker).write_text("{}")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "empty").mkdir()
    (tmp_path / "ran").mkdir()
    (tmp_path / "ran" / "config.yaml").write_text("")
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    (tmp_path / "broken.jsonl").write_text("{\n")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "given", "words"),
    [
        ("train", ["--data", "nope.jsonl"], "--data nope.jsonl: no such file"),
        ("train", ["--data", "thesis"], "--data thesis is a directory: give a file"),
        ("train", ["--eval-data", "nope.jsonl"], "--eval-data nope.jsonl: no such file"),
        ("train", ["--out", "data.jsonl"], "data.jsonl is a file: give a directory"),
        ("train", ["--out", "data.jsonl/run"], "--out data.jsonl/run: .*data.jsonl is a file"),
        ("train", ["--out", "ran"], "ran holds a run already"),
        ("train", ["--out", "thesis"], "thesis is not empty and holds no run"),
        ("train", ["--out", "empty", "--resume"], "empty holds no run to resume"),
        ("eval", ["--data", "nope.jsonl"], "--data nope.jsonl: no such file"),
        ("eval", ["--data", "broken.jsonl"], "broken.jsonl:1: not JSON"),
        ("eval", ["--out", "thesis"], "--out thesis is a directory: give a file"),
        ("eval", ["--out", "data.jsonl/rows"], "--out data.jsonl/rows: .*data.jsonl is a file"),
        ("eval", ["--batch-size", "0"], "--batch-size must be at least 1, found 0"),
        ("eval", ["--limit", "0"], "--limit must be at least 1, found 0"),
        ("eval", ["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, found 0"),
        ("eval", ["--max-length", "0"], "--max-length must be at least 1, found 0"),
        ("eval", ["--max-length", "128"], "--max-length 128 leaves no room for a prompt"),
        ("generate", ["--out", "thesis"], "--out thesis is a directory: give a file"),
        ("generate", ["--prompts", "data.jsonl"], "give --prompt TEXT or --prompts FILE, not both"),
        ("generate", ["--batch-size", "0"], "--batch-size must be at least 1, found 0"),
        ("generate", ["--max-new-tokens", "-1"], "--max-new-tokens must be at least 1, found -1"),
        ("generate", ["--temperature", "-1"], "temperature must be at least 0, found -1"),
        ("generate", ["--top-p", "0"], "top_p must be in"),
        ("generate", ["--top-k", "-1"], "top_k must be at least 0"),
        ("generate", ["--min-p", "2"], "min_p must be in"),
        ("generate", ["--seed", "-1"], "--seed must be at least 0, found -1"),
        ("merge", ["--out", "model"], "--out model is the --model directory: give another directory"),
        ("merge", ["--out", "link"], "--out link is the --model directory"),
        ("merge", ["--out", "other"], "--out other holds a model already: give another directory or delete it first"),
        ("merge", ["--out", "thesis"], "--out thesis holds other files: give a new or empty directory"),
        ("merge", ["--out", "data.jsonl"], "--out data.jsonl is a file: give a directory"),
    ],
)
def test_a_mistake_is_found_before_the_model_is_loaded(place, command, given, words):
    with pytest.raises(InputError, match=f"^(jora generate: )?{words}"):
        run([command, "--model", "model", *NEEDED[command], *given])
    assert not (place / "run").exists() and not any((place / "empty").iterdir())  # looking makes nothing


@pytest.mark.parametrize("command", NEEDED)
def test_an_adapter_is_looked_for_before_the_model_is_loaded(place, command):
    needed = [command, "--model", "model", *NEEDED[command]]
    with pytest.raises(InputError, match=r"^--adapter \./nope: no such adapter; give an adapter directory or a hub id"):
        run([*needed, "--adapter", "./nope"])
    with pytest.raises(InputError, match=r"^--adapter ran: holds no adapter_config\.json and no jora\.json"):
        run([*needed, "--adapter", "ran"])
    with pytest.raises(InputError, match=r"^--adapter ran/adaptr: no such directory, and the hub did not give it"):
        run([*needed, "--adapter", "ran/adaptr"])  # a hub id by its form


@pytest.mark.parametrize("command", NEEDED)
def test_a_hub_id_is_no_mistake(place, command, monkeypatch):
    fetched = []

    def resolve(name: str) -> Path:
        fetched.append(name)
        return place / "adapter"

    monkeypatch.setattr("jora.methods.storage.resolve", resolve)
    with pytest.raises(Loaded):
        run([command, *NEEDED[command], "--model", "org/base", "--adapter", "org/adapter"])
    assert fetched == ["org/adapter"]  # a base may be large: it is fetched when all else is well


@pytest.mark.parametrize("command", NEEDED)
def test_what_is_right_is_loaded(place, command):
    out = {"train": "new/run", "merge": "empty"}.get(command, "new/rows.jsonl")
    with pytest.raises(Loaded):
        run([command, "--model", "model", *NEEDED[command], "--adapter", "adapter", "--out", out])


@pytest.mark.parametrize("command", [["raft", "build", "--questions", "data.jsonl"], ["index"]])
@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("data.jsonl", "data.jsonl is a file: give a directory"),
        ("data.jsonl/new", "--out data.jsonl/new: .*data.jsonl is a file"),
        ("thesis", "thesis holds chapter.txt, which is no part of (a data set|an index): give another"),
        ("locked/new", "--out locked/new: .* cannot be written to; give another path"),
    ],
)
def test_where_documents_go_is_looked_at_before_they_are_read(place, monkeypatch, command, out, words):
    def read_documents(path: str) -> None:
        raise Loaded

    monkeypatch.setattr("jora.data.documents.read_documents", read_documents)
    needed = [*command, "--model", "model", "--documents", "thesis"]
    for good in ("new/data", "empty"):
        with pytest.raises(Loaded):
            run([*needed, "--out", good])
    monkeypatch.setattr(os, "access", lambda *_: not out.startswith("locked"))  # root may write anywhere
    with pytest.raises(InputError, match=f"^{words}"):
        run([*needed, "--out", out])


def test_a_data_set_and_an_index_do_not_replace_each_other(place):
    for name, file in {"data": "train.jsonl", "index": "chunks.jsonl"}.items():
        (place / name).mkdir()
        (place / name / file).write_text("")
        (place / name / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"^data holds train\.jsonl, which is no part of an index"):
        run(["index", "--model", "model", "--documents", "thesis", "--out", "data"])
    with pytest.raises(InputError, match=r"^index holds chunks\.jsonl, which is no part of a data set"):
        run(["raft", "build", "--model", "model", "--documents", "a", "--questions", "b", "--out", "index"])


def test_a_missing_file_of_prompts_is_named_by_its_option(place):
    with pytest.raises(InputError, match=r"^--prompts nope\.txt: no such file"):
        run(["generate", "--model", "model", "--prompts", "nope.txt"])


JOBS = """
out: many
jobs:
  - {name: good, data: data.jsonl}
  - {name: bad, data: data.jsonl}
"""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("bad, data: data", "bad, data: nope"), r"job bad: data nope\.jsonl: no such file"),
        (("data.jsonl}\n", "data.jsonl, eval_data: thesis}\n"), "job good: eval_data thesis is a directory"),
        (("out: many", "out: thesis"), "thesis is not empty and holds no run"),
        (("out: many", "out: data.jsonl/x"), "--out data.jsonl/x: .*data.jsonl is a file"),
        (("out: many", "out: many\nmodel: ./nope"), r"\./nope"),
    ],
)
def test_jobs_are_looked_at_before_the_model_is_loaded(place, change, words):
    model = [] if "model" in change[1] else ["--model", "model"]
    (place / "jobs.yaml").write_text(JOBS.replace(*change, 1))
    with pytest.raises(InputError, match=f"^{words}"):
        run(["train-many", "jobs.yaml", *model])
    assert not (place / "many").exists()
    (place / "jobs.yaml").write_text(JOBS)
    with pytest.raises(Loaded):
        run(["train-many", "jobs.yaml", "--model", "model"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--model", "./nope"], r"\./nope"),
        (["--adapters", "nope"], "--adapters nope: no such directory$"),
        (["--adapters", "data.jsonl"], "--adapters data.jsonl is a file: give a directory"),
        (["--documents", "nope"], "--documents nope: no such directory or file"),
    ],
)
def test_what_is_to_be_served_is_looked_for_before_the_model_is_loaded(place, given, words):
    with pytest.raises(InputError, match=f"^{words}"):
        run(["serve", "--port", "0", *(given if "--model" in given else ["--model", "model", *given])])
    with pytest.raises(Loaded):
        run(["serve", "--port", "0", "--model", "model", "--adapters", "ran", "--documents", "thesis"])


def test_a_tilde_is_the_home_directory_in_a_file_too(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    (place / "prompts.txt").write_text("a prompt\n")
    with pytest.raises(Loaded):
        run(["generate", "--model", "model", "--prompts", "~/prompts.txt"])
    (place / "train.yaml").write_text("model: ~/model\ndata: ~/data.jsonl\nout: ~/new\n")
    with pytest.raises(Loaded):
        run(["train", "--config", "train.yaml"])
    read = json.loads((place / "data.jsonl").read_text())
    assert [example.prompt for example in read_examples("~/data.jsonl")] == [read["prompt"]]


def test_a_run_may_be_resumed(place):
    with pytest.raises(Loaded):
        run(["train", "--model", "model", "--data", "data.jsonl", "--out", "ran", "--resume"])


def test_a_place_that_cannot_be_written_to_is_found_first(place, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(InputError, match=r"^--out rows\.jsonl: .* cannot be written to; give another path"):
        run(["eval", "--model", "model", "--data", "data.jsonl", "--out", "rows.jsonl"])


def test_convert_replaces_no_model(place):
    (place / "model.gguf").write_bytes(b"")
    for out, words in {"other": "holds a model already", "model.gguf": "is a file", "thesis": "other files"}.items():
        with pytest.raises(InputError, match=f"^--out {out} .*{words}"):
            run(["convert", "--model", "model.gguf", "--out", out])


def test_metrics_are_printed_even_where_the_rows_cannot_be_written(tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "data.jsonl", tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    model = bytewise_llama(tmp_path / "model")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", ".rows.jsonl.tmp")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match=r"^--out \S+/rows\.jsonl: could not be written: No space left on device$"):
        run(["eval", "--model", model, "--data", str(data), "--out", str(out), "--max-new-tokens", "2"])
    assert json.loads(capsys.readouterr().out)["examples"] == 1
