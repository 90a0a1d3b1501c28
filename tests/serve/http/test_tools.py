"""Tool calls in the text of an answer, whole and in pieces of every size."""

from __future__ import annotations

import json

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jora.serve.http.tool_formats import Call
from jora.serve.http.tools import ForcedStream, Found, NamedStream, ToolStream, forced_schema, split

F = Call("f", '{"x": 1}')
G = Call("g", "{}")
CALLS = [
    (
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        "",
        [F, G],
    ),
    ('Sure.\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>\n', "Sure.", [F]),
    ('[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]', "", [F, G]),
    ('[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{}', "", [F, G]),
    ('{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}', "", [F, G]),
    ('<|python_tag|>{"name": "f", "parameters": {"x": 1}}', "", [F]),
    ('{"type": "function", "function": {"name": "f", "parameters": {"x": 1}}}', "", [F]),
    ('{"type": "function", "name": "f", "parameters": "{\\"x\\": 1}"}', "", [F]),
    ('\n[{"name": "f", "arguments": {"x": 1}}]', "", [F]),
    ("```tool_code\nprint(f(x=1))\ng()\n```", "", [F, G]),
    ('[f(x=1), g(), f(x={"a": [None, True, "é"]})]', "", [F, G, Call("f", '{"x": {"a": [null, true, "é"]}}')]),
    ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', "", [Call("other", "{}")]),
]
NO_CALLS = [
    "",
    " \n plain text ",
    '{"answer": 4}',
    '{"name": "unknown", "parameters": {}}',
    '{"name": "f", "parameters": {"x": NaN}}',
    '{"name": "f", "parameters": {"x": 1e999}}',
    '{"name": "f", "par',
    "[1, 2, 3]",
    "[f](http://x)",
    "[f(x=open('/etc/passwd'))]",
    "[f(1)]",
    "[h(x=1)]",
    "a < b and <tool_cal not",
    '<tool_call>{"name": broken</tool_call> and more',
    '<tool_call>{"name": "f", "arguments": {"x": 1}} but no end'[:30],
    "```python\nprint(1)\n```",
    "```tool_code\nimport os\n```",
    "[" * 3000,
    "{" * 3000,
]


@pytest.mark.parametrize(("text", "content", "calls"), CALLS)
def test_calls_of_every_family(text: str, content: str, calls: list[Call]) -> None:
    assert split(ToolStream({"f", "g"}), [text]) == Found(content, calls)
    assert split(ToolStream({"f", "g"}), list(text)) == Found(content, calls)


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_is_text_whole(text: str) -> None:
    assert split(ToolStream({"f", "g"}), [text]) == Found(text, [])
    assert split(ToolStream({"f", "g"}), list(text[:200])) == Found(text[:200], [])


_MARKS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "```tool_code", "```", "{", "}", '"name"'),
        *(": ", '{"name": "f", "arguments": {}}', "[f(x=1)]", ' "f"', "f", " ", "\n", "text", "\\d", "\0", "😀"),
    ]
)


@settings(deadline=None)
@given(st.lists(_MARKS, max_size=12).map("".join), st.data())
def test_how_it_is_cut_does_not_matter(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = split(ToolStream({"f"}), [text])
    assert split(ToolStream({"f"}), pieces) == whole
    if not whole.calls:
        assert whole.content == text
    for call in whole.calls:
        assert isinstance(json.loads(call.arguments), dict)


def test_text_flows_while_it_cannot_be_a_call() -> None:
    stream = ToolStream({"f"})
    assert stream.feed("Hello there, ").content == "Hello there,"
    assert stream.feed("[f] is {not} a <b>call").content == " [f] is {not} a <b>call"
    assert stream.feed(" <tool").content == ""
    assert stream.feed("box>").content == " <toolbox>"


def test_a_call_is_told_when_it_is_complete() -> None:
    stream = ToolStream({"f"})
    assert stream.feed('<tool_call>{"name": "f", "arguments": {"x": 1}}').calls == []
    assert stream.feed("</tool_call>").calls == [F]


def test_forced_calls() -> None:
    stream = ForcedStream()
    assert stream.feed('[{"name": "f", "arguments": {"x": 1}').calls == []
    assert stream.feed('}, {"name"').calls == [F]
    assert stream.feed(': "g", "arguments": {}}]') == Found("", [G])
    assert stream.finish() == Found("", [])
    cut = ForcedStream()
    cut.feed('[{"name": "f", "arg')
    assert cut.finish() == Found('[{"name": "f", "arg', [])
    assert split(NamedStream("f"), ['{"x"', ": 1}"]) == Found("", [F])


def test_the_schema_of_forced_calls_takes_what_is_meant() -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    schema = forced_schema([("f", parameters), ("g", None)], several=False)
    good = [[{"name": "f", "arguments": {"x": 1}}], [{"name": "g", "arguments": {}}]]
    bad = [[], [{"name": "h", "arguments": {}}], [{"name": "f", "arguments": {}}], good[0] * 2]
    for value in good:
        assert jsonschema_rs.is_valid(schema, value)
    for value in bad:
        assert not jsonschema_rs.is_valid(schema, value)
    assert jsonschema_rs.is_valid(forced_schema([("f", parameters)], several=True), good[0] * 2)
