"""Training examples from JSON lines.

One object a line, in one of these forms (docs/raft.md describes the fields in full):

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}                        plain text, no chat template
    {"prompt": [{"role": ...}], "completion": [{"role": ...}]}    messages, loss on the completion only

and, with any of them, `"documents": [{"title": "...", "text": "...", "oracle": false}]`: the texts that
replace the marker `{documents}` in the prompt, kept apart so that a long example can be shortened there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from jora.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
DOCUMENTS_MARKER = "{documents}"
DOCUMENT_TEMPLATE = '<document title="{title}">\n{text}\n</document>'


class Message(TypedDict):
    """One turn. `reasoning_content`: what an assistant thought, for the templates that have it."""

    role: str
    content: str
    reasoning_content: NotRequired[str]


@dataclass(frozen=True)
class ContextDocument:
    """A text in the prompt. `oracle`: it holds the answer, so shortening must not remove it."""

    title: str
    text: str
    oracle: bool = False


@dataclass(frozen=True)
class Example:
    """One training example: `messages`, or plain `prompt` and `completion` (then `messages` is empty).

    Attributes:
        messages: the conversation; empty for plain text.
        prompt: plain text before the answer, "" for a conversation.
        completion: plain text to learn, "" for a conversation.
        loss_from: index of the first message that may carry loss.
        documents: what replaces `{documents}` in the prompt; None: that text has no special meaning.
        document_template: how one document is written; `{title}` and `{text}` are replaced.
        where: file:line, for messages to the user.
        extra: further fields of the line (`id`, `question`, `answer`, `quote`, ...), untouched.
    """

    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""
    loss_from: int = 0
    documents: tuple[ContextDocument, ...] | None = None
    document_template: str = DOCUMENT_TEMPLATE
    where: str = "example"
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        """The text that is to be generated: the completion, or the last message if an assistant's."""
        if not self.messages:
            return self.completion
        last = self.messages[-1]
        return last["content"] if last["role"] == "assistant" else ""


_KNOWN = ("messages", "prompt", "completion", "documents", "document_template")
# Two of these make a character. JSON allows one alone, which is no character and cannot be written.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def json_objects(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of every line that is not empty.

    Raises:
        InputError: the file is missing or not UTF-8, a line is not a JSON object, or it holds half a character.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{file} is a directory: give a .jsonl file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 at byte {error.start}: save it as UTF-8") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            message = f"{where}: not JSON ({error.msg} at column {error.colno}): one object a line"
            raise InputError(message) from None
        if not isinstance(value, dict):
            raise InputError(f"{where}: a JSON object is needed, this is a {type(value).__name__}")
        if _SURROGATE.search(line):
            _check_whole_characters(value, where)
        yield where, value


def _check_whole_characters(value: dict[str, Any], where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise InputError(f"{where}: {half} alone is half of a character: write both halves, or remove it") from None


def _messages(value: Any, name: str, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: `{name}` must be a list of messages that is not empty")
    for index, message in enumerate(value):
        place = f"{where}: {name}[{index}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"{place}: a message is an object with `role` and `content`")
        if message["role"] not in ROLES:
            raise InputError(f"{place}: role {message['role']!r} is not one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise InputError(f"{place}: `content` must be a string (only text is supported)")
        if unknown := message.keys() - {"role", "content", "reasoning_content"}:
            raise InputError(f"{place}: field {min(unknown)!r} is not supported: remove it")
    return tuple(value)


def _documents(value: Any, where: str) -> tuple[ContextDocument, ...]:
    if not isinstance(value, list):
        raise InputError(f"{where}: `documents` must be a list of objects with `title` and `text`")
    documents = []
    for index, item in enumerate(value):
        fits = isinstance(item, dict) and isinstance(item.get("text"), str)
        if not fits or not isinstance(item.get("title", ""), str):
            raise InputError(f"{where}: documents[{index}] must have the strings `title` and `text`")
        oracle = item.get("oracle", False)
        if not isinstance(oracle, bool):
            raise InputError(f"{where}: documents[{index}]: `oracle` must be true or false")
        documents.append(ContextDocument(item.get("title", ""), item["text"], oracle))
    return tuple(documents)


def _prompt_texts(prompt: str, messages: Sequence[Message]) -> list[str]:
    return [prompt, *(message["content"] for message in messages if message["role"] != "assistant")]


def parse_example(value: Mapping[str, Any], where: str = "example") -> Example:
    """One example from a parsed line.

    Args:
        value: the JSON object.
        where: file:line, for the error message.

    Raises:
        InputError: no known form, a field of the wrong type, or documents without their one marker.
    """
    documents = _documents(value["documents"], where) if "documents" in value else None
    template = value.get("document_template", DOCUMENT_TEMPLATE)
    if not isinstance(template, str) or "{text}" not in template:
        raise InputError(f"{where}: `document_template` must be a string that contains {{text}}")
    messages: tuple[Message, ...] = ()
    prompt = completion = ""
    loss_from = 0
    if "messages" in value:
        if "prompt" in value or "completion" in value:
            raise InputError(f"{where}: give either `messages` or `prompt` and `completion`, not both")
        messages = _messages(value["messages"], "messages", where)
    elif "prompt" in value and "completion" in value:
        if isinstance(value["prompt"], str) and isinstance(value["completion"], str):
            prompt, completion = value["prompt"], value["completion"]
        elif isinstance(value["prompt"], list) and isinstance(value["completion"], list):
            before = _messages(value["prompt"], "prompt", where)
            messages = before + _messages(value["completion"], "completion", where)
            loss_from = len(before)
        else:
            raise InputError(f"{where}: `prompt` and `completion` must both be strings or both message lists")
    else:
        raise InputError(f"{where}: no `messages` and no `prompt` with `completion`: found {sorted(value)}")
    markers = sum(text.count(DOCUMENTS_MARKER) for text in _prompt_texts(prompt, messages))
    if documents is not None and markers != 1:
        raise InputError(
            f"{where}: with `documents`, the prompt must hold {DOCUMENTS_MARKER} once, not {markers} times"
        )
    extra = {key: item for key, item in value.items() if key not in _KNOWN}
    return Example(messages, prompt, completion, loss_from, documents, template, where, extra)


def read_examples(path: str | os.PathLike[str]) -> list[Example]:
    """All examples of a .jsonl file.

    Raises:
        InputError: with file:line; or the file holds no example.
    """
    examples = [parse_example(value, where) for where, value in json_objects(path)]
    if not examples:
        raise InputError(f"{path}: no example in this file: one JSON object a line is needed")
    return examples
