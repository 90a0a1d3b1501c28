"""Chat with documents: the prompt is a RAFT data set's, citations point at the source's own characters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.data.tokenizers import llama3

from jora.cli.main import run
from jora.data.chat import Template, fill_documents, prompt_tokens
from jora.data.documents import read_documents
from jora.data.formats import parse_example
from jora.data.index import build_index, open_index, read_index, write_index
from jora.data.questions import read_questions
from jora.data.raft import RaftOptions, build_raft, write
from jora.data.tokenise import tokenise_prompt
from jora.errors import InputError
from jora.serve.http.documents import Retriever

FACTS = {"apple": "red", "lemon": "yellow", "plum": "blue", "leaf": "green", "coal": "black", "milk": "white"}
OPTIONS = RaftOptions(
    chunk_tokens=64, contexts=3, max_context_tokens=240, eval_contexts="retrieved", instruction="Be brief."
)


@pytest.fixture(scope="module")
def tokenizer():
    return llama3()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Six documents, and a question about each."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "documents" / "fruit").mkdir(parents=True)
    lines = []
    for thing, colour in FACTS.items():
        quote = f"The colour of {thing} is {colour}."
        broken = quote.replace(" is", "\n  is")  # a quote stands there but for white space
        text = f"  About {thing}.\n\n{broken}\nThat is all that anybody knows about the colour of this thing.\n"
        (root / "documents" / "fruit" / f"{thing}.txt").write_text(text)
        lines.append(json.dumps({"question": f"What colour is {thing}?", "answer": colour, "quote": quote}))
    (root / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def retriever(inputs, tokenizer) -> Retriever:
    return Retriever(build_index(read_documents(inputs / "documents"), tokenizer, OPTIONS), tokenizer)


def ask(thing: str) -> list[dict]:
    return [{"role": "user", "content": f"What colour is {thing}?"}]


def test_the_prompt_is_the_one_of_evaluation_with_retrieved_contexts(inputs, tokenizer, retriever):
    documents, questions = read_documents(inputs / "documents"), read_questions(inputs / "questions.jsonl")
    built = build_raft(documents, [], tokenizer, OPTIONS, questions)
    assert len(built.eval) == len(FACTS)
    template = Template(tokenizer)
    for line in built.eval:
        example = parse_example(line)
        filled = retriever.fill([{"role": "user", "content": line["question"]}], 1000)
        assert filled.messages == [dict(m) for m in fill_documents(example).messages[:-1]]
        ours = template.encode(template.render(filled.messages, "chat", generate=True))[0]
        assert ours == prompt_tokens(example, template).tolist()
        for limit in (len(ours) - 10, len(ours) - 60):  # shortened as there, too
            _, used = tokenise_prompt(example, template, max_length=limit)
            shorter = retriever.fill([{"role": "user", "content": line["question"]}], limit)
            assert shorter.messages == [dict(m) for m in fill_documents(used).messages[:-1]]
            assert [p.text for p in shorter.documents] == [d.text for d in used.documents]


def test_the_index_on_disk_finds_the_same(inputs, tokenizer, retriever, tmp_path):
    write_index(retriever.index, tmp_path / "index")
    read = Retriever(open_index(tmp_path / "index", tokenizer), tokenizer)
    for thing in FACTS:
        assert read.fill(ask(thing), 1000) == retriever.fill(ask(thing), 1000)
    assert read.index.options == OPTIONS
    for file in (tmp_path / "index").rglob("*"):
        assert file.is_dir() or file.suffix in {".json", ".jsonl", ".npy"}
    write_index(retriever.index, tmp_path / "index")  # an index may be replaced, nothing else
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("keep me")
    with pytest.raises(InputError, match=r"precious\.txt, which is no part of an index"):
        write_index(retriever.index, tmp_path / "other")


def test_documents_are_indexed_on_the_spot(inputs, tokenizer):
    index = open_index(inputs / "documents", tokenizer)
    filled = Retriever(index, tokenizer).fill(ask("plum"), 1000)
    assert filled.documents[0].source == "fruit/plum.txt"
    assert "The colour of plum\n  is blue." in filled.messages[0]["content"]


@pytest.mark.parametrize("broken", ["manifest.json", "chunks.jsonl", "bm25/params.index.json", "pickle"])
def test_a_broken_index_is_one_line(retriever, tmp_path, broken):
    import numpy as np

    write_index(retriever.index, tmp_path / "index")
    if broken == "pickle":
        np.save(tmp_path / "index" / "bm25" / "data.csc.index.npy", np.array([{"an": "object"}]), allow_pickle=True)
    else:
        (tmp_path / "index" / broken).write_text("{")
    with pytest.raises(InputError, match=r"index|JSON"):
        read_index(tmp_path / "index")


def test_a_data_set_is_no_index(retriever, tmp_path):
    write_index(retriever.index, tmp_path / "index")
    (tmp_path / "index" / "manifest.json").write_text('{"inputs": {}}')
    with pytest.raises(InputError, match="a data set, and no index: make one with `jora index`"):
        read_index(tmp_path / "index")


def test_scores_of_other_chunks_are_refused(retriever, tmp_path):
    write_index(retriever.index, tmp_path / "index")
    chunks = tmp_path / "index" / "chunks.jsonl"
    chunks.write_text("".join(chunks.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match="make it again"):
        read_index(tmp_path / "index")


def test_citations_point_into_the_source(inputs, retriever):
    filled = retriever.fill(ask("lemon"), 1000)
    answer = (
        "##begin_quote## The colour of lemon is yellow. ##end_quote##\n"
        "##begin_quote## Lemons are blue. ##end_quote##\n##Answer: yellow"
    )
    found, claimed = filled.citations(answer)
    text = (inputs / "documents" / found["source"]).read_text()
    assert found["source"] == "fruit/lemon.txt" and found["title"] == "lemon"
    assert text[found["start"] : found["end"]] == "The colour of lemon\n  is yellow."
    listed = filled.listed()
    placed = listed[found["document"] - 1]
    assert placed["source"] == found["source"] and [entry["document"] for entry in listed] == [1, 2, 3]
    assert text[placed["start"] : placed["end"]] == filled.documents[found["document"] - 1].text
    assert claimed == {"document": None, "title": None, "source": None, "quote": "Lemons are blue."} | {
        "start": None,
        "end": None,
    }
    assert filled.citations("yellow") == []


def test_the_rest_of_the_conversation_stays(retriever):
    before = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "result", "tool_call_id": "1"},
    ]
    filled = retriever.fill([*before, *ask("coal")], 1000)
    assert filled.messages[:-1] == before
    assert "The colour of coal\n  is black." in filled.messages[-1]["content"]
    untouched = retriever.fill(before, 1000)
    assert untouched.messages == before and untouched.documents == () and untouched.citations("x") == []


def test_what_cannot_be_asked(retriever):
    with pytest.raises(InputError, match="cannot be asked with documents"):
        retriever.fill([{"role": "user", "content": "What is {documents}?"}], 1000)
    with pytest.raises(InputError, match="cannot be shortened"):
        retriever.fill(ask("plum"), 5)


def test_the_index_command_takes_the_data_sets_options(inputs, tokenizer, retriever, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    documents, questions = read_documents(inputs / "documents"), read_questions(inputs / "questions.jsonl")
    write(build_raft(documents, [], tokenizer, OPTIONS, questions), tmp_path / "data")
    argv = ["index", "--documents", str(inputs / "documents"), "--model", str(tmp_path / "model")]
    run([*argv, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "as-trained")])
    assert read_index(tmp_path / "as-trained").options == OPTIONS
    assert read_index(tmp_path / "as-trained").chunks == retriever.index.chunks
    run([*argv, "--chunk-tokens", "32", "--out", str(tmp_path / "own")])
    assert read_index(tmp_path / "own").options == RaftOptions(chunk_tokens=32)
    with pytest.raises(InputError, match="raft build"):
        run([*argv, "--data", str(inputs), "--out", str(tmp_path / "none")])
