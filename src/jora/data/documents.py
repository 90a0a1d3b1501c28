"""Documents from files, and chunks of them by tokens with borders where a reader would put them.

Formats: .txt, .md, .html/.htm, .jsonl ({"title": ..., "text": ...} a line), or a directory of these
(searched recursively, in sorted order; files with other endings are not documents and are passed over).
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from jora.data.formats import json_objects
from jora.errors import InputError


@dataclass(frozen=True)
class Document:
    """A text with its title. `path` is relative to what was given to `read_documents`."""

    title: str
    text: str
    path: str = ""


@dataclass(frozen=True)
class Chunk:
    """Characters [start, end) of document `document` (an index), without white space around them."""

    document: int
    title: str
    text: str
    start: int
    end: int


class _Text(HTMLParser):
    """Text of a page: block elements end a paragraph, scripts and styles are left out."""

    SILENT = frozenset({"script", "style", "template", "noscript", "svg", "nav"})
    BLOCKS = re.compile(
        r"address|article|aside|blockquote|br|d[dlt]|div|fig(ure|caption)|footer|form|h[1-6]|header|hr|li|main|"
        r"ol|p|pre|section|table|tr|ul"
    )
    SAME_PARAGRAPH = frozenset({"br", "tr", "li"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title = ""
        self.parts: list[str] = []
        self.silent = 0
        self.verbatim = 0
        self.in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.silent += tag in self.SILENT
        self.verbatim += tag == "pre"
        self.in_title = tag == "title" and not self.silent
        if self.BLOCKS.fullmatch(tag):
            self.parts.append("\n" if tag in self.SAME_PARAGRAPH else "\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.silent = max(0, self.silent - (tag in self.SILENT))
        self.verbatim = max(0, self.verbatim - (tag == "pre"))
        self.in_title = self.in_title and tag != "title"
        if self.BLOCKS.fullmatch(tag) and tag not in self.SAME_PARAGRAPH:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if self.in_title:
            self.title += data
        elif self.verbatim and not self.silent:
            self.parts.append(data)
        elif not self.silent:
            data = re.sub(r"\s+", " ", data)
            self.parts.append(data.lstrip() if self.parts and self.parts[-1].endswith("\n") else data)

    def text(self) -> str:
        joined = re.sub(r"[ \t]+\n", "\n", "".join(self.parts))
        return re.sub(r"\n{3,}", "\n\n", joined).strip()


def _html(text: str, stem: str) -> tuple[str, str]:
    page = _Text()
    page.feed(text)
    page.close()
    return " ".join(page.title.split()) or stem, page.text()


def _markdown(text: str, stem: str) -> tuple[str, str]:
    heading = re.search(r"^#\s+(.+?)\s*#*\s*$", text, re.MULTILINE)
    return (heading.group(1) if heading else stem), text


def _plain(text: str, stem: str) -> tuple[str, str]:
    return stem, text


READERS: dict[str, Callable[[str, str], tuple[str, str]]] = {
    ".txt": _plain,
    ".md": _markdown,
    ".html": _html,
    ".htm": _html,
}
ENDINGS = (*READERS, ".jsonl")


def _read_jsonl(file: Path, name: str) -> list[Document]:
    found = []
    for where, value in json_objects(file):
        title, text = value.get("title"), value.get("text")
        if not isinstance(title, str) or not isinstance(text, str):
            raise InputError(f"{where}: a document needs the strings `title` and `text`")
        found.append(Document(title, text, name))
    return found


def _read_file(file: Path, name: str) -> list[Document]:
    ending = file.suffix.lower()
    if ending == ".jsonl":
        return _read_jsonl(file, name)
    if ending not in READERS:
        raise InputError(f"{file}: cannot read {ending or 'a file without ending'}: give {', '.join(ENDINGS)}")
    try:
        raw = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 at byte {error.start}: save it as UTF-8") from None
    title, text = READERS[ending](raw, file.stem)
    return [Document(title, text, name)]


def read_documents(path: str | os.PathLike[str]) -> list[Document]:
    """All documents of a file or directory, without empty ones.

    Raises:
        InputError: nothing there, nothing readable in it, or a file that is not what its ending says.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        files = [file for file in root.rglob("*") if file.is_file() and file.suffix.lower() in ENDINGS]
        named = sorted((file.relative_to(root).as_posix(), file) for file in files)
        documents = [document for name, file in named for document in _read_file(file, name)]
    elif root.is_file():
        documents = _read_file(root, root.name)
    else:
        raise InputError(f"{root}: no such file or directory: give the documents")
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise InputError(f"{root}: no document with text: {', '.join(ENDINGS)} files are read")
    return documents


def token_offsets(text: str, tokenizer: Callable[..., Any]) -> list[tuple[int, int]]:
    """Characters of each token. `tokenizer` is a fast Hugging Face tokenizer or anything that answers alike."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["offset_mapping"]


# Where a chunk may end, the best first: after a paragraph, a sentence, a line, a word.
_BORDERS = tuple(re.compile(pattern) for pattern in (r"\n[ \t]*\n\s*", r"[.!?:;][\"')\]]*\s+", r"\n\s*", r"\s+"))


class Borders:
    """The places of one text where chunks may begin and end, by kind."""

    def __init__(self, text: str) -> None:
        self.places = [[match.end() for match in pattern.finditer(text)] for pattern in _BORDERS]

    def last(self, low: int, high: int) -> int:
        """The last place of the best kind in (low, high]; `high` itself if there is none."""
        for places in self.places:
            index = bisect_right(places, high) - 1
            if index >= 0 and places[index] > low:
                return places[index]
        return high

    def first(self, low: int, high: int) -> int:
        """The first place between sentences or words in [low, high]; `low` itself if there is none."""
        for places in (self.places[1], self.places[3]):
            index = bisect_left(places, low)
            if index < len(places) and places[index] <= high:
                return places[index]
        return low


def _chunk(documents: Sequence[Document], index: int, start: int, end: int) -> Chunk | None:
    document = documents[index]
    text = document.text[start:end]
    body = text.strip()
    if not body:
        return None
    start += len(text) - len(text.lstrip())
    return Chunk(index, document.title, body, start, start + len(body))


def split(text: str, tokenizer: Callable[..., Any], size: int, overlap: int = 0) -> list[tuple[int, int]]:
    """Character ranges of at most `size` tokens (as tokenised in the whole text) that cover `text`.

    A border is the last paragraph end in the second half of what fits, or else the last sentence, line or
    word end there. With `overlap`, a range starts up to that many tokens before the last one's end.
    """
    offsets = token_offsets(text, tokenizer)
    starts = [start for start, _ in offsets]
    ends = [end for _, end in offsets]
    borders = Borders(text)
    ranges = []
    begin = 0
    while begin < len(text) and offsets:
        # A border may lie inside a token (a word's token holds the space before it): count that token.
        first = bisect_right(ends, begin)
        if first + size >= len(offsets):
            ranges.append((begin, len(text)))
            break
        end = borders.last(max(begin, starts[first + size // 2]), starts[first + size])
        ranges.append((begin, end))
        begin = end
        if overlap:
            low = max(ranges[-1][0] + 1, starts[bisect_right(ends, end) - overlap])
            begin = borders.first(low, end - 1)
    return ranges


def chunk_documents(
    documents: Sequence[Document], tokenizer: Callable[..., Any], size: int, overlap: int = 0
) -> list[Chunk]:
    """Chunks of all documents in order, at most `size` tokens each, `overlap` tokens shared at borders."""
    if size < 8 or not 0 <= overlap <= size // 2:
        raise InputError(f"chunks of {size} tokens with overlap {overlap}: at least 8, overlap at most half")
    chunks: Iterable[Chunk | None] = (
        _chunk(documents, index, start, end)
        for index, document in enumerate(documents)
        for start, end in split(document.text, tokenizer, size, overlap)
    )
    return [chunk for chunk in chunks if chunk is not None]


def chunk_around(
    documents: Sequence[Document], index: int, start: int, end: int, tokenizer: Callable[..., Any], size: int
) -> Chunk | None:
    """A chunk of at most `size` tokens that holds characters [start, end) whole, in the middle if it can.

    None where these characters alone are more than `size` tokens.
    """
    text = documents[index].text
    offsets = token_offsets(text, tokenizer)
    first = max(0, bisect_right([begin for begin, _ in offsets], start) - 1)
    last = bisect_left([finish for _, finish in offsets], end)  # the token that holds the last character
    room = size - (last + 1 - first)
    if room < 0:
        return None
    borders = Borders(text)
    low = borders.first(offsets[first - room // 2][0], start) if first > room // 2 else 0
    limit = min(bisect_right([finish for _, finish in offsets], low) + size, len(offsets))
    high = len(text) if limit == len(offsets) else borders.last(end - 1, offsets[limit - 1][1])
    return _chunk(documents, index, min(low, start), max(high, end))
