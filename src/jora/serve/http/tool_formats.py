"""One tool call or several, whole, in each of the forms of `tools`. All is parsed, nothing is ever run."""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any, NamedTuple

_MISTRAL = re.compile(r"\s*(?P<name>[\w.-]+)\s*(?:\[ARGS\])?\s*(?=\{)")
DECODER = json.JSONDecoder()


class Call(NamedTuple):
    """A function to call; `arguments` is JSON."""

    name: str
    arguments: str


def parse_marked(mark: str, body: str) -> list[Call]:
    if mark == "```tool_code":
        return _parse_python(body)
    if mark == "[TOOL_CALLS]" and (named := _MISTRAL.match(body)):
        return _parse_named(body, named)
    return _parse_json(body) or (_parse_python(body) if mark == "<|python_tag|>" else [])


def parse_bare(text: str) -> list[Call]:
    return _parse_json(text) or _parse_python(text)


def _parse_named(body: str, named: re.Match[str] | None) -> list[Call]:
    """NAME[ARGS]{...}, any number of them."""
    calls = []
    while named is not None:
        try:
            value, end = DECODER.raw_decode(body, named.end())
        except (ValueError, RecursionError):
            return []
        call = _made(named["name"], value)
        if call is None:
            return []
        calls.append(call)
        body = body[end:].removeprefix("[TOOL_CALLS]")
        named = _MISTRAL.match(body)
    return calls if not body.strip() else []


def _parse_json(text: str) -> list[Call]:
    """Objects, or lists of them, one after the other with ";", "," or white space between; [] if anything is not."""
    calls: list[Call] = []
    at = 0
    while (at := _skip(text, at)) < len(text):
        try:
            value, at = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        for one in value if isinstance(value, list) else [value]:
            call = call_of(one)
            if call is None:
                return []
            calls.append(call)
    return calls


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n;,":
        at += 1
    return at


def call_of(value: Any) -> Call | None:
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name", value.get("function"))
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models quote them
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return _made(name, arguments)


def _made(name: str, arguments: Any) -> Call | None:
    try:
        return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except (ValueError, TypeError):  # NaN, or a Python literal that JSON has not
        return None


def _parse_python(text: str) -> list[Call]:
    """Python calls with literal keyword arguments: a list of them, or one a line. Parsed, never run."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes in what a model wrote
            body = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    nodes = [node.value for node in body if isinstance(node, ast.Expr)]
    if len(nodes) != len(body):
        return []
    if len(nodes) == 1 and isinstance(nodes[0], ast.List):
        nodes = nodes[0].elts
    calls = [_python_call(node) for node in nodes]
    return [call for call in calls if call is not None] if all(calls) else []


def _python_call(node: ast.expr) -> Call | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print" and node.args:
        node = node.args[0]  # Gemma writes print(f(x=1))
    if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
        return None
    try:
        arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    return _made(ast.unparse(node.func), arguments)
