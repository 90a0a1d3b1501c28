"""Reading training JSON lines, with errors that name file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from jora.data.formats import ContextDocument, read_examples
from jora.errors import InputError

USER = '{"role": "user", "content": "q"}'


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_the_three_forms(tmp_path: Path) -> None:
    file = write(
        tmp_path / "train.jsonl",
        f'{{"messages": [{USER}, {{"role": "assistant", "content": "a\u2028b"}}], "id": 7}}',
        "",
        '{"prompt": "p", "completion": "c"}',
        f'{{"prompt": [{USER}], "completion": [{{"role": "assistant", "content": "a"}}]}}',
        '{"prompt": "{documents} q", "completion": "c", "documents": [{"title": "t", "text": "x", "oracle": true}]}',
    )
    messages, plain, lists, with_documents = read_examples(file)
    assert messages.answer == "a\u2028b" and messages.extra == {"id": 7}
    assert (plain.prompt, plain.completion, plain.answer, plain.messages) == ("p", "c", "c", ())
    assert plain.where == f"{file}:3"
    assert lists.loss_from == 1 and lists.answer == "a"
    assert plain.documents is None
    assert with_documents.documents == (ContextDocument("t", "x", True),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON object is needed"),
        ('{"text": "x"}', r"no `messages` .* found \['text'\]"),
        ('{"messages": []}', "not empty"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\]: a message is"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "role 'bot'"),
        ('{"messages": [{"role": "user", "content": ["x"]}]}', "must be a string"),
        ('{"messages": [{"role": "user", "content": "x", "tool_calls": []}]}', "'tool_calls' is not supported"),
        ('{"prompt": "x"}', "no `messages`"),
        ('{"prompt": "x", "completion": []}', "both be strings"),
        ('{"prompt": "x", "completion": "y", "documents": [{"text": "t"}]}', "once, not 0 times"),
        ('{"prompt": "{documents}{documents}", "completion": "y", "documents": []}', "once, not 2 times"),
        ('{"prompt": "{documents}", "completion": "y", "documents": [{"title": "t"}]}', r"documents\[0\]"),
        ('{"prompt": "x", "completion": "y", "document_template": "{title}"}', "document_template"),
        (r'{"prompt": "x", "completion": "y \ud83d"}', r"\\ud83d alone is half of a character: write both halves"),
        (r'{"prompt": "x", "completion": "y", "id": {"\uDe00z": 1}}', r"\\ude00 alone is half of a character"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = write(tmp_path / "train.jsonl", '{"prompt": "p", "completion": "c"}', line)
    with pytest.raises(InputError, match=rf"train\.jsonl:2: .*{message}"):
        read_examples(file)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="is a directory"):
        read_examples(tmp_path)
    with pytest.raises(InputError, match="no example"):
        read_examples(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(InputError, match="not UTF-8 at byte 12"):
        read_examples(tmp_path / "latin.jsonl")


def test_two_halves_are_a_character(tmp_path: Path) -> None:
    line = r'{"prompt": "\ud83d\uDE00", "completion": "\\ud83d"}'
    (one,) = read_examples(write(tmp_path / "train.jsonl", line))
    assert (one.prompt, one.completion) == ("\U0001f600", r"\ud83d")
