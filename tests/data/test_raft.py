"""RAFT sets: what stands in the prompts, what is learned, and that nothing is left to chance."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data import tokenizers as make

from jora.data.documents import Document, token_offsets
from jora.data.formats import parse_example, read_examples
from jora.data.questions import Question, read_questions
from jora.data.raft import RaftOptions, build_raft, report, write
from jora.data.raft_format import ABSTENTION, normalise, parse, stands_in, target
from jora.data.tokenise import tokenise
from jora.errors import InputError

TOKENIZER = make.llama3()
TOPICS = ["apple", "bridge", "castle", "dragon", "engine", "forest", "garden", "harbour"]


def topic_text(topic: str) -> str:
    """Ten paragraphs about one topic, each with a sentence of its own."""
    return "\n\n".join(
        f"The {topic} has a part number {i}. Its colour\nis shade {topic}{i} of the wheel, as every {topic} "
        f"keeper knows. Some say more about the {topic}, others less."
        for i in range(10)
    )


DOCUMENTS = [Document(topic, topic_text(topic), f"{topic}.txt") for topic in TOPICS]
QUESTIONS = [
    Question(
        f"What colour is part number {i} of the {topic}?",
        f"shade {topic}{i}",
        topic,
        f"Its colour is shade {topic}{i} of the wheel",
        f"q.jsonl:{t * 10 + i}",
    )
    for t, topic in enumerate(TOPICS)
    for i in range(10)
]
OPTIONS = RaftOptions(seed=3, chunk_tokens=70)


def build(options: RaftOptions = OPTIONS, questions: list[Question] = QUESTIONS, **more: Any):
    return build_raft(DOCUMENTS, questions, TOKENIZER, options, **more)


def holds(line: dict[str, Any], question: Question) -> list[bool]:
    return [normalise(question.quote or "") in normalise(d["text"]) for d in line["documents"]]


def test_one_oracle_and_no_distractor_twice() -> None:
    result = build(replace(OPTIONS, oracle_absent=0.0))
    assert len(result.train) == len(QUESTIONS) and not result.eval
    places = set()
    for line, question in zip(result.train, QUESTIONS, strict=True):
        found = holds(line, question)
        assert found == [d["oracle"] for d in line["documents"]] and sum(found) == 1
        texts = [d["text"] for d in line["documents"]]
        assert len(set(texts)) == len(texts) == 4
        places.add(found.index(True))
        assert line["messages"][-1]["content"] == target(question.answer, question.quote)
    assert places == {0, 1, 2, 3}  # shuffled


def test_distractors_are_hard_not_random() -> None:
    hard = build(replace(OPTIONS, random_share=0.0)).manifest
    mixed = build(replace(OPTIONS, random_share=0.5)).manifest
    random = build(replace(OPTIONS, random_share=1.0)).manifest
    chunks = hard["chunks"]
    assert chunks > 60
    # The three best of all chunks but the oracle have ranks 1 to 4; random ones the middle on average.
    assert hard["train"]["distractors_mean_rank"] < 5
    assert random["train"]["distractors_mean_rank"] == pytest.approx(chunks / 2, rel=0.15)
    total = mixed["train"]["distractors_hard"] + mixed["train"]["distractors_random"]
    assert mixed["train"]["distractors_random"] / total == pytest.approx(0.5, abs=0.05)
    assert hard["train"]["distractors_random"] == random["train"]["distractors_hard"] == 0


@pytest.mark.parametrize("kind", ["answer", "abstain"])
def test_the_oracle_is_absent_in_the_stated_share(kind: Any) -> None:
    result = build(replace(OPTIONS, oracle_absent=0.3, absent_target=kind))
    absent = [line for line in result.train if not line["oracle_in_context"]]
    assert len(absent) / len(QUESTIONS) == pytest.approx(0.3, abs=0.12)
    assert len(absent) == result.manifest["train"]["oracle_absent_by_choice"]
    questions = {question.question: question for question in QUESTIONS}
    for line in absent:
        question = questions[line["question"]]
        assert not any(holds(line, question)) and len(line["documents"]) == 4
        expected = question.answer if kind == "answer" else ABSTENTION
        assert line["messages"][-1]["content"] == f"##Answer: {expected}"  # nothing to cite
        assert line["answer"] == expected and line["quote"] is None


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(build(replace(OPTIONS, eval_fraction=0.2)), tmp_path / name)
    write(build(replace(OPTIONS, eval_fraction=0.2, seed=4)), tmp_path / "other")
    for file in ("train.jsonl", "eval.jsonl", "manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
        assert (tmp_path / "one" / file).read_bytes() != (tmp_path / "other" / file).read_bytes()


def test_other_questions_change_nothing_about_a_question() -> None:
    few = {line["question"]: line for line in build(questions=QUESTIONS[30:50]).train}
    many = {line["question"]: line for line in build().train}
    assert all(many[question] == line for question, line in few.items())


def test_evaluation_questions_by_fraction_or_given() -> None:
    result = build(replace(OPTIONS, eval_fraction=0.25))
    assert len(result.train) + len(result.eval) == len(QUESTIONS)
    assert len(result.eval) / len(QUESTIONS) == pytest.approx(0.25, abs=0.12)
    assert all(line["oracle_in_context"] for line in result.eval)
    given = build(questions=QUESTIONS[:20], eval_questions=QUESTIONS[20:])
    assert (len(given.train), len(given.eval)) == (20, 60)
    with pytest.raises(InputError, match=r"q\.jsonl:19: this question is also one for training"):
        build(questions=QUESTIONS[:20], eval_questions=QUESTIONS[19:])
    with pytest.raises(InputError, match="not both"):
        build(replace(OPTIONS, eval_fraction=0.5), eval_questions=QUESTIONS)


def test_retrieved_contexts_are_what_retrieval_finds() -> None:
    options = replace(OPTIONS, eval_contexts="retrieved", oracle_absent=1.0)
    vague = replace(QUESTIONS[0], question="Which shade?", where="q.jsonl:99")
    result = build(options, QUESTIONS[40:], eval_questions=[*QUESTIONS[:40], vague])
    for line, question in zip(result.eval, [*QUESTIONS[:40], vague], strict=True):
        assert line["oracle_in_context"] == any(holds(line, question))
        assert not any(d["oracle"] for d in line["documents"])  # shortening must not know it
        assert line["answer"] == question.answer
    assert result.eval[0]["oracle_in_context"] and not result.eval[-1]["oracle_in_context"]
    assert result.manifest["eval"]["oracle_in_context"] < 41


def test_a_quote_that_a_border_cuts_gets_a_chunk_of_its_own() -> None:
    quote = "others less.\n\nThe castle has a part number 4"
    for size in (40, 70, 100):
        for number in range(1, 10):
            cut = f"others less. The castle has a part number {number}"
            question = Question("Which part?", "it", "castle", cut)
            options = replace(OPTIONS, chunk_tokens=size, oracle_absent=0.0, random_share=0.5)
            (line,) = build(options, [question]).train
            found = holds(line, question)
            assert sum(found) == 1 and found == [d["oracle"] for d in line["documents"]]
            # No distractor touches the quote: half of it would be half an oracle.
            oracle = line["documents"][found.index(True)]
            for document in line["documents"]:
                ends_inside = normalise(document["text"]).endswith("others less.")
                follows = f"{document['text']}\n\nThe castle has a part number {number}" in DOCUMENTS[2].text
                assert document is oracle or not (ends_inside and follows)
            assert len(token_offsets(oracle["text"], TOKENIZER)) <= size + 1
    assert quote in DOCUMENTS[2].text


def test_what_is_in_no_document_is_listed(tmp_path: Path) -> None:
    lost = [
        Question("Who?", "nobody", None, "this stands nowhere", "q.jsonl:7"),
        Question("Where?", "nowhere", "atlantis", None, "q.jsonl:8"),
        Question("When?", "never", "apple", QUESTIONS[15].quote, "q.jsonl:9"),
    ]
    result = build(questions=[*QUESTIONS[:5], *lost])
    assert len(result.train) == 5
    listed = result.manifest["train"]["unresolved"]
    assert [entry["where"] for entry in listed] == ["q.jsonl:7", "q.jsonl:8", "q.jsonl:9"]
    assert [entry["reason"] for entry in listed] == [
        "the quote is not in any document",
        "no document is called 'atlantis'",
        "the quote is not in document 'apple'",
    ]
    assert sum("left out: q.jsonl:" in line for line in report(result)) == 3
    with pytest.raises(InputError, match="none of 3 questions"):
        build(questions=lost)


def test_a_source_without_a_quote() -> None:
    question = replace(QUESTIONS[23], quote=None)
    (line,) = build(replace(OPTIONS, oracle_absent=0.0), [question]).train
    (oracle,) = [d for d in line["documents"] if d["oracle"]]
    assert "shade castle3 " in oracle["text"]
    assert [d["title"] == "castle" for d in line["documents"]] == [d["oracle"] for d in line["documents"]]
    assert line["messages"][-1]["content"] == "##Answer: shade castle3"


def test_contexts_keep_to_their_token_budget() -> None:
    options = replace(OPTIONS, chunk_tokens=70, max_context_tokens=200)
    result = build(options)
    for line in result.train:
        example = parse_example({**line, "messages": line["messages"]})
        assert example.documents
        from jora.data.chat import render_documents

        text = render_documents(example.documents, example.document_template)
        assert len(token_offsets(text, TOKENIZER)) <= 200
    assert result.manifest["train"]["prompts_with_fewer_contexts"] > 0
    with pytest.raises(InputError, match="less than one chunk"):
        replace(options, max_context_tokens=60)


def test_the_written_set_is_training_data(tmp_path: Path) -> None:
    result = build(replace(OPTIONS, oracle_absent=0.0))
    write(result, tmp_path / "set")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["manifest.json", "train.jsonl"]
    examples = read_examples(tmp_path / "set" / "train.jsonl")
    made = tokenise(examples, TOKENIZER, max_length=700)
    assert made.report.kept == len(QUESTIONS) and made.report.shortened == 0
    one, question = made.examples[11], QUESTIONS[11]
    learned = TOKENIZER.decode(one.tokens[one.loss])
    assert learned == target(question.answer, question.quote) + "<|eot_id|>"
    assert np.flatnonzero(one.loss)[0] > 200  # documents, instruction and question carry none
    assert question.question in TOKENIZER.decode(one.tokens[~one.loss])
    short = tokenise(examples, TOKENIZER, max_length=360).examples[11]
    assert normalise(question.quote or "") in normalise(TOKENIZER.decode(short.tokens[~short.loss]))
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["options"]["seed"] == 3 and manifest["inputs"]["questions"]["count"] == len(QUESTIONS)
    assert {"numpy", "bm25s", "tokenizer_sha256"} <= manifest["versions"].keys()


def test_the_manifest_knows_its_inputs() -> None:
    changed = [replace(QUESTIONS[0], answer="other"), *QUESTIONS[1:]]
    one, other = build().manifest["inputs"], build(questions=changed).manifest["inputs"]
    assert one["documents"] == other["documents"] and one["questions"] != other["questions"]


def test_a_directory_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        write(build(questions=QUESTIONS[:3]), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_reading_questions(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    good = {"question": "q", "answer": "a", "quote": "x", "note": 1}
    file.write_text(json.dumps(good) + "\n")
    assert read_questions(file) == [Question("q", "a", None, "x", f"{file}:1")]
    for bad, message in [
        ({"question": "q", "answer": "a"}, "give a `quote`"),
        ({"question": "q", "quote": "x"}, "`answer`"),
        ({**good, "quote": 3}, "`quote`"),
        ({**good, "question": "see {documents}"}, "marker"),
        ({**good, "question": "x \ud83d"}, r"\\ud83d alone is half of a character"),
    ]:
        file.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(InputError, match=rf"q\.jsonl:2: .*{message}"):
            read_questions(file)
    file.write_text("")
    with pytest.raises(InputError, match="no question"):
        read_questions(file)


def test_replies_are_read_as_they_are_written() -> None:
    assert parse(target("42 of\n it", "a \n quote")) == (["a quote"], "42 of it")
    assert parse("Because ##begin_quote## x ##end_quote## and so 7") == (["x"], "Because and so 7")
    assert parse("##begin_quote## never ends") == ([], "")
    assert parse("just 7") == ([], "just 7")
    assert stands_in("a  b", ["x", "y a\nb z"]) and not stands_in("a c", ["a b c"]) and not stands_in(" ", ["a"])


@pytest.mark.parametrize("option", ["random_share", "oracle_absent", "eval_fraction"])
def test_shares_are_shares(option: str) -> None:
    with pytest.raises(InputError, match=f"{option} is 1.5"):
        RaftOptions(**{option: 1.5})
