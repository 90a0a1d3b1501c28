"""Reading documents and cutting them into chunks."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data import tokenizers as make

from jora.data.documents import Document, chunk_around, chunk_documents, read_documents, split, token_offsets
from jora.errors import InputError

TOKENIZER = make.llama3()
PARAGRAPHS = "\n\n".join(
    f"Paragraph {i} begins here. It has a second sentence, which is longer. And it ends." for i in range(12)
)


def test_a_directory_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("\ufeffplain text", encoding="utf-8")
    (tmp_path / "a.md").write_text("intro\n\n# The *title* #\n\nbody", encoding="utf-8")
    (tmp_path / "sub" / "c.html").write_text(
        "<html><head><title>A &amp; B</title><style>p {}</style><script>var x</script></head><body>"
        "<h1>Head</h1><p>One\n  two &lt;3</p><pre>  x = 1\n    y</pre><ul><li>i</li><li>j</li></ul></body></html>",
        encoding="utf-8",
    )
    (tmp_path / "d.jsonl").write_text('{"title": "t", "text": "x"}\n{"title": "u", "text": " "}\n')
    (tmp_path / "e.bin").write_bytes(b"\xff")
    found = read_documents(tmp_path)
    assert [(d.title, d.path) for d in found] == [
        ("The *title*", "a.md"),
        ("b", "b.txt"),
        ("t", "d.jsonl"),
        ("A & B", "sub/c.html"),
    ]
    assert found[1].text == "plain text"
    assert found[3].text == "Head\n\nOne two <3\n\n  x = 1\n    y\n\ni\nj"
    assert read_documents(tmp_path / "a.md")[0].path == "a.md"


def test_bad_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_documents(tmp_path / "none")
    with pytest.raises(InputError, match="no document with text"):
        read_documents(tmp_path)
    (tmp_path / "x.pdf").write_text("x")
    with pytest.raises(InputError, match=r"cannot read \.pdf"):
        read_documents(tmp_path / "x.pdf")
    (tmp_path / "x.jsonl").write_text('{"text": "x"}')
    with pytest.raises(InputError, match=r"x\.jsonl:1: .*`title`"):
        read_documents(tmp_path / "x.jsonl")
    (tmp_path / "l.txt").write_bytes(b"\xe9")
    with pytest.raises(InputError, match=r"l\.txt: not UTF-8"):
        read_documents(tmp_path / "l.txt")


@settings(deadline=None, max_examples=40)
@given(st.text(st.sampled_from("ab .\n?日😀"), max_size=400), st.integers(8, 40), st.integers(0, 4))
def test_chunks_cover_the_text_within_their_size(text: str, size: int, overlap: int) -> None:
    ranges = split(text, TOKENIZER, size, overlap)
    covered = set().union(*(range(*r) for r in ranges)) if ranges else set()
    assert all(text[i].isspace() or i in covered for i in range(len(text)))
    starts = [start for start, _ in token_offsets(text, TOKENIZER)]
    for begin, end in ranges:
        # A token of the whole text that begins in the range; emoji are several tokens of one character.
        assert sum(begin <= start < end for start in starts) <= size + 3
    for chunk in chunk_documents([Document("t", text)], TOKENIZER, size, overlap):
        assert chunk.text == text[chunk.start : chunk.end] == chunk.text.strip()


def test_borders_are_where_a_reader_would_put_them() -> None:
    document = Document("title", PARAGRAPHS)
    paragraph = len(token_offsets(PARAGRAPHS, TOKENIZER)) // 12
    for chunk in chunk_documents([document], TOKENIZER, paragraph * 2 + 5):
        assert chunk.text.startswith("Paragraph") and chunk.text.endswith("it ends.")
        assert chunk.title == "title"
    for chunk in chunk_documents([document], TOKENIZER, paragraph - 8):
        assert chunk.text.endswith(".") and re.match("Paragraph|It has|And it", chunk.text)


def test_overlap_repeats_the_end_of_the_last_chunk() -> None:
    chunks = chunk_documents([Document("t", PARAGRAPHS)], TOKENIZER, 64, 20)
    apart = chunk_documents([Document("t", PARAGRAPHS)], TOKENIZER, 64, 0)
    assert all(one.end > other.start for one, other in pairwise(chunks))
    assert all(one.end <= other.start for one, other in pairwise(apart))
    with pytest.raises(InputError, match="overlap at most half"):
        chunk_documents([Document("t", PARAGRAPHS)], TOKENIZER, 64, 40)


@pytest.mark.parametrize("size", [40, 64, 200, 5000])
def test_a_chunk_around_a_quote_holds_it_whole(size: int) -> None:
    documents = [Document("t", PARAGRAPHS)]
    for quote in ("ends.\n\nParagraph 5 begins here.", "Paragraph 0 begins", "And it ends."):
        start = PARAGRAPHS.rindex(quote)
        chunk = chunk_around(documents, 0, start, start + len(quote), TOKENIZER, size)
        assert chunk is not None and quote in chunk.text
        assert len(token_offsets(chunk.text, TOKENIZER)) <= size + 1
    assert chunk_around(documents, 0, 0, len(PARAGRAPHS), TOKENIZER, 40) is None
