"""The demo's questions are found in the documents of every Python we support, and are as varied as we say."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path

import pytest

from jora.demo import python_docs
from jora.demo.python_docs import Question, Split, documents, load_questions, resolve, write_inputs
from jora.errors import InputError

SPLITS: tuple[Split, ...] = ("train", "heldout")
VERSIONS = ("3.11", "3.12", "3.13")
RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _flat(text: str) -> str:
    """Without any white space: docutils breaks lines after hyphens too."""
    return "".join(text.split())


def _all_questions() -> list[Question]:
    return [question for split in SPLITS for question in load_questions(split)]


@functools.cache
def _topics(version: str) -> Mapping[str, str]:
    """The topics of another installed Python, read by that Python; skips the test where there is none."""
    if version == RUNNING:
        from pydoc_data.topics import topics

        return topics
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    pyenv = sorted(root.glob(f"versions/{version}.*/bin/python"))
    on_path = shutil.which(f"python{version}")
    program = "import json, sys; assert sys.version.startswith(sys.argv[1] + '.'); "
    program += "from pydoc_data.topics import topics; sys.stdout.buffer.write(json.dumps(topics).encode())"
    for python in [*map(str, pyenv), *([on_path] if on_path else [])]:
        run = subprocess.run([python, "-I", "-c", program, version], capture_output=True)
        if run.returncode == 0:
            return json.loads(run.stdout)
    pytest.skip(f"no Python {version} with pydoc_data on this machine")


def test_counts() -> None:
    train, heldout = load_questions("train"), load_questions("heldout")
    assert len(train) >= 160
    assert len(heldout) >= 56
    assert len({question.topic for question in train + heldout}) >= 60


def test_topics_kept_for_evaluation() -> None:
    train = {question.topic for question in load_questions("train")}
    heldout = {question.topic for question in load_questions("heldout")}
    assert len(heldout - train) >= 17


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("split", SPLITS)
def test_resolves_on_each_python(split: Split, version: str) -> None:
    questions = load_questions(split)
    resolved = resolve(questions, _topics(version))
    assert len(resolved.questions) + len(resolved.missing) == len(questions)
    reasons = [(missing.question.question, missing.reason) for missing in resolved.missing]
    assert len(resolved.questions) >= 0.95 * len(questions), reasons


@pytest.mark.parametrize("version", VERSIONS)
def test_quotes_stand_in_the_documents(version: str) -> None:
    topics = _topics(version)
    texts = {document["title"]: " ".join(document["text"].split()) for document in documents(topics)}
    for question in resolve(_all_questions(), topics).questions:
        assert question.quote in texts[question.source]
        assert _flat(question.quote) in _flat(topics[question.topic])
        assert 5 <= len(question.quote.split()) <= 60
        assert question.quote == " ".join(question.quote.split())


def test_no_quote_stands_in_a_second_document() -> None:
    # a distractor that holds the oracle's text would be a wrong label; a shared passage would leak topics
    texts = {document["title"]: _flat(document["text"]) for document in documents()}
    for question in resolve(_all_questions()).questions:
        holders = [title for title, text in texts.items() if _flat(question.quote) in text]
        assert holders == [question.source]


def test_no_template_makes_a_tenth_of_the_questions(record_property: Callable[[str, object], None]) -> None:
    for split in SPLITS:
        questions = load_questions(split)
        first = Counter(_words(question.question)[0] for question in questions)
        first_two = Counter(tuple(_words(question.question)[:2]) for question in questions)
        word, times = first.most_common(1)[0]
        record_property(f"{split}_first_word_share", f"{word}: {times / len(questions):.3f}")
        print(f"{split}: most frequent first words {first.most_common(5)} of {len(questions)}")
        assert times <= 0.2 * len(questions)
        assert first_two.most_common(1)[0][1] <= 0.1 * len(questions)


def test_no_question_or_passage_twice() -> None:
    questions = resolve(_all_questions()).questions
    assert len({tuple(_words(question.question)) for question in questions}) == len(questions)
    assert len({(question.topic, question.quote) for question in questions}) == len(questions)


def test_no_passage_of_the_held_out_part_is_trained_on() -> None:
    train = [(q.topic, _flat(q.quote)) for q in resolve(load_questions("train")).questions]
    for question in resolve(load_questions("heldout")).questions:
        quote = _flat(question.quote)
        same_topic = [other for topic, other in train if topic == question.topic]
        assert not [other for other in same_topic if quote in other or other in quote]


def test_answers_are_short_and_in_our_words() -> None:
    for question in resolve(_all_questions()).questions:
        assert 3 <= len(question.answer.split()) <= 25, question.answer
        assert " ".join(_words(question.answer)) not in " ".join(_words(question.quote)), question.answer


def test_anchors_copy_no_passage() -> None:
    for question in _all_questions():
        assert len(question.quote_start.split()) <= 13
        assert len(question.quote_end.split()) <= 9
        assert not question.quote


def test_each_passage_is_in_one_document_only() -> None:
    found = documents()
    assert len({document["title"] for document in found}) == len(found) >= 75
    owner: dict[str, str] = {}
    for document in found:
        for paragraph in document["text"].split("\n\n"):
            if len(paragraph.split()) >= 20:
                assert owner.setdefault(_flat(paragraph), document["title"]) == document["title"]


def test_one_pair_of_anchors_fits_other_markup_and_wrapping() -> None:
    question = Question("?", "", "t", "The x value of self-made", "never reaches *zero*")
    wordings = [
        'T\n*\n\nSay. The "x" value of self-\nmade things\nnever reaches *zero*. More.',
        "T\n*\n\nSay. The `x` value\n   of self-made things never reaches\n   \u2018zero\u2019. More.",
    ]
    assert [resolve([question], {"t": text}).questions[0].quote for text in wordings] == [
        'The "x" value of self-made things never reaches *zero*.',
        "The `x` value of self-made things never reaches \u2018zero\u2019.",
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quote_start": "words that no document has"}, "'words that no document has'"),
        ({"quote_end": "nor this ending anywhere"}, "'nor this ending anywhere'"),
        ({"quote_start": '"*"'}, "an anchor holds no word"),
        ({"topic": "no-such-topic"}, "'no-such-topic'"),
    ],
)
def test_a_broken_anchor_is_listed(changes: dict[str, str], reason: str) -> None:
    questions = load_questions("train")[:3]
    broken = replace(questions[1], **changes)
    resolved = resolve([questions[0], broken, questions[2]])
    assert [q.question for q in resolved.questions] == [questions[0].question, questions[2].question]
    assert [missing.question for missing in resolved.missing] == [broken]
    assert reason in resolved.missing[0].reason


def test_a_passage_too_long_or_ambiguous_is_listed() -> None:
    topics = {"t": "one two three four five. " + "word " * 60 + "one two six four five. seven eight nine ten"}
    for start, end, reason in [
        ("one two three", "seven eight", "no passage of 5 to 60 words"),
        ("three four", "four five", "no passage of 5 to 60 words"),
        ("one two", "four five", "2 passages fit"),
    ]:
        (missing,) = resolve([Question("?", "", "t", start, end)], topics).missing
        assert reason in missing.reason


def test_written_inputs(tmp_path: Path) -> None:
    counts = write_inputs(tmp_path, "heldout")
    rows, texts = (
        [json.loads(line) for line in (tmp_path / name).read_text("utf-8").splitlines()]
        for name in ("questions-heldout.jsonl", "documents.jsonl")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents.jsonl", "questions-heldout.jsonl"]
    assert counts.asked == len(load_questions("heldout"))
    assert counts.resolved == len(rows) == counts.asked - counts.missing
    assert texts == documents()
    titles = {document["title"] for document in texts}
    for row in rows:
        assert set(row) == {"question", "answer", "source", "quote"}
        assert row["source"] in titles


def test_missing_questions_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = load_questions("train")[:4]
    questions[2] = replace(questions[2], quote_end="words that no document has")
    monkeypatch.setattr(python_docs, "load_questions", lambda split: questions)
    assert write_inputs(tmp_path, "train") == (4, 3, 1)


def test_unknown_part() -> None:
    with pytest.raises(InputError, match=r"'test'.*train, heldout"):
        load_questions("test")  # type: ignore[arg-type]


def test_standard_library_only() -> None:
    program = "import sys, jora.demo.python_docs as d; d.resolve(d.load_questions('train')); "
    program += "print(sorted({'jax', 'numpy', 'torch', 'transformers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert [field.name for field in fields(Question)][:3] == ["question", "answer", "topic"]
