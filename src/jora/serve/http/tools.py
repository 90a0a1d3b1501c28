"""Tool calls in the text of an answer, as the common model families write them, and the schema that forces them.

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>          Hermes, Qwen
    [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]              Mistral (also NAME[ARGS]{...})
    <|python_tag|>{"name": ..., "parameters": {...}}; {...}           Llama 3
    {"name": ..., "parameters": {...}}                                Llama 3 and others, at the start of the answer
    ```tool_code
    f(x=1)
    ```                                                               Gemma
    [f(x=1), g()]                                                     pythonic, at the start of the answer

All are recognised, whatever the model: they cannot be confused, and a fine-tuned model may write another than its
base. Forms that begin with no mark of their own count as calls only where they name a tool of the request. What looks
like a call and is none (broken JSON, an unknown name) is passed on as text, whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from jora.serve.http.tool_formats import DECODER, Call, call_of, parse_bare, parse_marked

_CLOSERS = {
    "<tool_call>": "</tool_call>",
    "```tool_code": "```",
    "[TOOL_CALLS]": None,
    "<|python_tag|>": None,
}  # a mark's end; None: the end of the answer
_BARE_KEYS = ("name", "parameters", "arguments", "type", "function")
_BARE_OBJECT = re.compile(r'\{\s*(?:"(?P<key>[a-z]*)(?P<closed>"?).*)?', re.DOTALL)
_BARE_LIST = re.compile(r"\[\s*(?:(?P<object>\{.*)|(?P<name>[A-Za-z_][\w.-]*)(?P<call>\(?).*)?", re.DOTALL)


class Found(NamedTuple):
    """What is settled of an answer's text."""

    content: str
    calls: list[Call]


class ToolStream:
    """Splits an answer that comes in pieces into content and calls. A call is reported when it is complete."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._held = ""  # text that may yet be (in) a call
        self._mark: str | None = None  # inside this
        self._space = ""  # white space before it: not content where a call follows
        self._bare = False  # inside a form without a mark
        self._begun = False  # something other than white space was passed on, or a call
        self._any_call = False

    def feed(self, text: str) -> Found:
        self._held += text
        content, calls = "", list[Call]()
        while True:
            found = self._step()
            if found is None:
                return Found(content, calls)
            content += found.content
            calls += found.calls

    def finish(self) -> Found:
        """The answer has ended: what was held back."""
        held, self._held = self._held, ""
        if self._mark is not None:
            calls = parse_marked(self._mark, held)
            return self._passed(Found("", calls) if calls else Found(self._space + self._mark + held, []))
        if self._bare and (calls := self._known(parse_bare(held))):
            return Found("", calls)
        return self._passed(Found(held, []))

    def _step(self) -> Found | None:
        """Take one piece off what is held; None when more text is needed."""
        if self._mark is not None:
            return self._close(self._mark)
        if not self._begun and self._might_be_bare():
            self._bare = True
            return None
        self._bare = False
        at, mark = min(((self._held.find(mark), mark) for mark in _CLOSERS if mark in self._held), default=(-1, ""))
        if mark:
            before, self._held, self._mark = self._held[:at], self._held[at + len(mark) :], mark
            content = before.rstrip()
            self._space = before[len(content) :]
            return self._passed(Found(content, []))
        keep = _kept(self._held)
        if keep == len(self._held):
            return None
        content, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._passed(Found(content, []))

    def _close(self, mark: str) -> Found | None:
        closer = _CLOSERS[mark]
        if closer is None:
            return None
        end = self._held.find(closer)
        if end < 0:
            return None
        body, self._held, self._mark = self._held[:end], self._held[end + len(closer) :], None
        calls = parse_marked(mark, body)
        return self._passed(Found("", calls) if calls else Found(self._space + mark + body + closer, []))

    def _might_be_bare(self) -> bool:
        text = self._held.lstrip()
        if match := _BARE_OBJECT.fullmatch(text):
            key = match["key"] or ""
            return key in _BARE_KEYS if match["closed"] else any(known.startswith(key) for known in _BARE_KEYS)
        if text.startswith("[TOOL_CALLS]"[: len(text)]):
            return False  # it has a mark
        if match := _BARE_LIST.fullmatch(text):
            if match["object"] is not None:
                return True
            name = match["name"] or ""
            return name in self._names if match["call"] else any(known.startswith(name) for known in self._names)
        return False

    def _known(self, calls: list[Call]) -> list[Call]:
        return calls if all(call.name in self._names for call in calls) else []

    def _passed(self, found: Found) -> Found:
        """White space around calls is not content."""
        content = found.content
        if self._any_call and not content.strip():
            content = ""
        self._any_call |= bool(found.calls)
        self._begun |= bool(content.strip()) or bool(found.calls)
        return Found(content, found.calls)


def _kept(text: str) -> int:
    """Characters at the end that may be the beginning of a mark, with the white space before them."""
    longest = 0
    for mark in _CLOSERS:
        for size in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:size]):
                longest = size
                break
    before = text[: len(text) - longest]
    return len(text) - len(before.rstrip())


def forced_schema(tools: Iterable[tuple[str, dict[str, Any] | None]], several: bool) -> dict[str, Any]:
    """The JSON schema of an answer that consists of calls: a list of {"name", "arguments"}."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, parameters in tools
    ]
    bound = {} if several else {"maxItems": 1}
    return {"type": "array", "minItems": 1, "items": {"anyOf": calls}, **bound}


class ForcedStream:
    """As `ToolStream`, for an answer under `forced_schema`: every call is reported as soon as it is complete."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> Found:
        self._held += text
        calls: list[Call] = []
        while "}" in text:
            start = self._held.find("{")
            try:
                value, end = DECODER.raw_decode(self._held, start)
            except (ValueError, RecursionError):
                break
            call = call_of(value)
            if call is None:
                break
            calls.append(call)
            self._held = self._held[end:]
        return Found("", calls)

    def finish(self) -> Found:
        """What a limit cut off is content, so that it is not lost."""
        held, self._held = self._held, ""
        return Found("" if not held.strip(" \t\r\n,[]") else held, [])


class NamedStream:
    """As `ToolStream`, for an answer that is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name, self._text = name, ""

    def feed(self, text: str) -> Found:
        self._text += text
        return Found("", [])

    def finish(self) -> Found:
        return Found("", [Call(self._name, self._text)])


class PlainStream:
    """As `ToolStream`, where there are no tools."""

    def feed(self, text: str) -> Found:
        return Found(text, [])

    def finish(self) -> Found:
        return Found("", [])


AnswerStream = ToolStream | ForcedStream | NamedStream | PlainStream


def split(stream: AnswerStream, pieces: Sequence[str]) -> Found:
    """A whole answer."""
    found = [*map(stream.feed, pieces), stream.finish()]
    return Found("".join(each.content for each in found), [call for each in found for call in each.calls])
