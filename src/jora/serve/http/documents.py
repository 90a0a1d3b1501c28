"""Chat with documents: the prompt that an adapter was trained on (`jora raft build`), and where its quotes stand.

The last user message is the question. It becomes the prompt of a RAFT example, with the documents that retrieval
finds for it; messages before it stay as they are. A conversation that does not end with a user's message (a tool's
result, an answer to be continued) is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jora.data import raft_format
from jora.data.chat import Template, fill_documents
from jora.data.documents import Chunk, Document
from jora.data.formats import DOCUMENTS_MARKER, ContextDocument, Example, Message
from jora.data.index import Index
from jora.data.questions import Finder
from jora.data.tokenise import tokenise_prompt
from jora.errors import InputError


@dataclass(frozen=True)
class Placed:
    """A text as it stands in a prompt: the beginning (all of it, unless it was shortened) of a chunk of `source`."""

    chunk: Chunk
    source: str
    text: str


@dataclass(frozen=True)
class Filled:
    """A conversation with its documents."""

    messages: list[dict[str, Any]]
    documents: tuple[Placed, ...] = ()

    def listed(self) -> list[dict[str, Any]]:
        """The documents of the prompt, in their order, numbered from 1, for an answer's `documents`.

        start, end: characters of the source's text (of HTML, the text that was extracted).
        """
        return [
            {
                "document": number,
                "title": placed.chunk.title,
                "source": placed.source,
                "start": placed.chunk.start,
                "end": placed.chunk.start + len(placed.text),
            }
            for number, placed in enumerate(self.documents, start=1)
        ]

    def citations(self, answer: str) -> list[dict[str, Any]]:
        """Where the quotes of an answer stand, for its `citations`.

        One entry a quote: document (its number in the prompt), title, source, quote, and start, end (characters of
        the quote in the source's text). The quote of which the model only claims that it stands there has None in
        all but `quote`: an application can tell it by that.
        """
        finder = Finder([Document(placed.chunk.title, placed.text) for placed in self.documents])
        return [self._citation(quote, finder) for quote in raft_format.parse(answer).quotes if quote]

    def _citation(self, quote: str, finder: Finder) -> dict[str, Any]:
        places = finder.places(quote)
        if not places:
            return dict.fromkeys(("document", "title", "source")) | {"quote": quote, "start": None, "end": None}
        place = places[0]
        placed = self.documents[place.document]
        return {
            "document": place.document + 1,
            "title": placed.chunk.title,
            "source": placed.source,
            "quote": quote,
            "start": placed.chunk.start + place.start,
            "end": placed.chunk.start + place.end,
        }


class Retriever:
    """Fills conversations from an index. `tokenizer`: the served model's."""

    def __init__(self, index: Index, tokenizer: Any) -> None:
        self.index = index
        self.template = Template(tokenizer)

    def fill(self, messages: Sequence[Mapping[str, Any]], limit: int) -> Filled:
        """The conversation with documents in its last message.

        Args:
            messages: with `role` and `content`, a string.
            limit: most tokens of the prompt; documents are shortened to it as `jora eval` shortens them.

        Raises:
            InputError: it does not fit even without documents, or holds the marker where documents go.
        """
        if not messages or messages[-1]["role"] != "user":
            return Filled([dict(message) for message in messages])
        question = messages[-1]["content"]
        if any(DOCUMENTS_MARKER in (message["content"] or "") for message in messages):
            raise InputError(f"messages: a text that holds {DOCUMENTS_MARKER} cannot be asked with documents")
        chunks = self.index.find(question, self.template.tokenizer)
        asked = Message(role="user", content=raft_format.prompt(question, self.index.options.instruction))
        example = Example(
            messages=(*(_as_message(message) for message in messages[:-1]), asked),
            documents=tuple(ContextDocument(chunk.title, chunk.text) for chunk in chunks),
            where="messages",
        )
        _, used = tokenise_prompt(example, self.template, max_length=limit)
        filled = [dict(message) for message in messages[:-1]]
        filled.append({**messages[-1], "content": fill_documents(used).messages[-1]["content"]})
        # Shortening drops documents from the end and text from the end of the last one: they pair up in order.
        placed = zip(chunks, used.documents or (), strict=False)
        return Filled(filled, tuple(Placed(c, self.index.sources[c.document], d.text) for c, d in placed))


def _as_message(message: Mapping[str, Any]) -> Message:
    return Message(role=message["role"], content=message["content"] or "")
