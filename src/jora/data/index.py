"""Documents made ready to be searched while a model is served: chunks, and BM25 over them, in a directory.

manifest.json   the options (as `jora raft build` records them), counts, hashes
chunks.jsonl    {"document", "title", "source", "start", "end", "text"} a line
bm25/           what bm25s saves, without pickle
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from jora.data.contexts import best_chunks, searched
from jora.data.documents import Chunk, Document, chunk_documents, read_documents
from jora.data.formats import json_objects
from jora.data.manifest import content_hash, versions
from jora.data.raft import RaftOptions
from jora.data.retrieval import BM25
from jora.errors import InputError
from jora.files import atomic_directory, check_holds_only

MANIFEST, CHUNKS, SCORES = "manifest.json", "chunks.jsonl", "bm25"
VERSION = 1


@dataclass(frozen=True)
class Index:
    """Chunks of documents and their ranking. `sources[document]`: the document's path, as it was read."""

    chunks: tuple[Chunk, ...]
    sources: tuple[str, ...]
    bm25: BM25
    options: RaftOptions
    manifest: dict[str, Any]

    def find(self, question: str, tokenizer: Callable[..., Any]) -> list[Chunk]:
        """The chunks for the prompt of a question, the best first; chosen as in a data set of retrieved contexts."""
        ranking = self.bm25.rank(question, len(self.chunks))
        return [self.chunks[i] for i in best_chunks(ranking, self.chunks, tokenizer, self.options)]


def build_index(documents: Sequence[Document], tokenizer: Callable[..., Any], options: RaftOptions) -> Index:
    """Chunk and index documents.

    Args:
        documents: from `documents.read_documents`.
        tokenizer: a fast Hugging Face tokenizer (of the model to be served), which measures the chunks.
        options: chunk_tokens, chunk_overlap, contexts, max_context_tokens and instruction are used: those that an
            adapter was trained with suit it best.

    Raises:
        InputError: no document holds a word.
    """
    chunks = chunk_documents(documents, tokenizer, options.chunk_tokens, options.chunk_overlap)
    bm25 = BM25([searched(chunk) for chunk in chunks])
    if not bm25.vocabulary:
        raise InputError("the documents hold no word to search for")
    manifest = {
        "index": VERSION,
        "options": asdict(options),
        "documents": content_hash([asdict(document) for document in documents]),
        "chunks": len(chunks),
        "versions": versions(tokenizer),
    }
    return Index(tuple(chunks), tuple(document.path for document in documents), bm25, options, manifest)


def check_out(out: str | os.PathLike[str]) -> None:
    """Raise InputError where `out` is a file, or a directory that holds anything but an index."""
    check_holds_only(Path(out).expanduser(), (MANIFEST, CHUNKS, SCORES), "an index")


def write_index(index: Index, out: str | os.PathLike[str]) -> None:
    """Write an index directory, all or nothing; an index that stands there is replaced.

    Raises:
        InputError: see `check_out`.
    """
    check_out(out)
    with atomic_directory(Path(out).expanduser()) as directory:
        with (directory / CHUNKS).open("w", encoding="utf-8", newline="\n") as file:
            for chunk in index.chunks:
                line = asdict(chunk) | {"source": index.sources[chunk.document]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        index.bm25.save(directory / SCORES)
        text = json.dumps(index.manifest, ensure_ascii=False, indent=2) + "\n"
        (directory / MANIFEST).write_text(text, encoding="utf-8", newline="\n")


def read_index(path: str | os.PathLike[str]) -> Index:
    """The index that `write_index` wrote.

    Raises:
        InputError: this is no index, or not a whole one.
    """
    directory = Path(path).expanduser()
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if "index" not in manifest:
            raise InputError(f"{directory}: a data set, and no index: make one with `jora index`")
        if manifest["index"] != VERSION:
            raise InputError(f"{directory}: an index of version {manifest['index']}: make it again with `jora index`")
        options = options_of(manifest)
        chunks, sources = _read_chunks(directory / CHUNKS)
        bm25 = BM25.load(directory / SCORES)
    except InputError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{directory}: not a whole index ({error}): make it again with `jora index`") from error
    if bm25.size != len(chunks):
        raise InputError(
            f"{directory}: {len(chunks)} chunks and scores of {bm25.size}: make it again with `jora index`"
        )
    return Index(chunks, sources, bm25, options, manifest)


def _read_chunks(file: Path) -> tuple[tuple[Chunk, ...], tuple[str, ...]]:
    names = [field.name for field in fields(Chunk)]
    chunks, sources = [], {}
    for _, value in json_objects(file):
        chunk = Chunk(**{name: value[name] for name in names})
        chunks.append(chunk)
        sources[chunk.document] = value["source"]
    return tuple(chunks), tuple(sources.get(i, "") for i in range(max(sources, default=-1) + 1))


def options_of(manifest: dict[str, Any]) -> RaftOptions:
    """The options that a manifest of an index or of `jora raft build` records."""
    known = {field.name for field in fields(RaftOptions)}
    return RaftOptions(**{name: value for name, value in manifest["options"].items() if name in known})


def open_index(
    path: str | os.PathLike[str], tokenizer: Callable[..., Any], options: RaftOptions | None = None
) -> Index:
    """An index directory, or documents (as `read_documents` reads them) that are indexed now, with `options`."""
    if (Path(path).expanduser() / MANIFEST).is_file():
        return read_index(path)
    return build_index(read_documents(path), tokenizer, options or RaftOptions())
