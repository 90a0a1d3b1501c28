"""From a request's fields to `SamplingOptions`, and to the grammar that the answer must keep."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from jora.errors import InputError
from jora.serve.http.errors import invalid
from jora.serve.http.schemas import Generation, ResponseFormat
from jora.serve.requests import SamplingOptions
from jora.serve.text.grammar import Kind

ANY_OBJECT = {"type": "object"}


class Structure(NamedTuple):
    """What an answer must be: as `jora.serve.text.grammar` names the kinds."""

    kind: Kind
    source: str
    param: str  # the field that asked for it


def structure(body: Generation, response_format: ResponseFormat | None) -> Structure | None:
    """The one structure that a request asks for. Raises `ApiError` where it asks for two."""
    found: list[Structure] = []
    if response_format is not None:
        found += _of_format(response_format)
    found += _of_guided(body)
    if body.structured_outputs is not None:
        extra = body.structured_outputs
        found += _given("structured_outputs", extra.json_, extra.regex, extra.choice, extra.grammar)
        if extra.json_object:
            found.append(json_structure(ANY_OBJECT, "structured_outputs"))
    if len(found) > 1:
        raise invalid(
            f"{found[0].param} and {found[1].param} both say what the answer must be: give one", found[1].param
        )
    return found[0] if found else None


def _of_format(wanted: ResponseFormat) -> list[Structure]:
    if wanted.type == "json_object":
        return [json_structure(ANY_OBJECT, "response_format")]
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise invalid("response_format of type json_schema needs `json_schema`", "response_format.json_schema")
        return [json_structure(wanted.json_schema.schema_, "response_format")]
    return []


def _of_guided(body: Generation) -> list[Structure]:
    return _given("guided_", body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)


def _given(
    prefix: str, schema: dict[str, Any] | str | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> list[Structure]:
    def param(name: str) -> str:
        return prefix + name if prefix.endswith("_") else f"{prefix}.{name}"

    found = []
    if schema is not None:
        found.append(json_structure(schema, param("json")))
    if regex is not None:
        found.append(Structure("regex", regex, param("regex")))
    if choice is not None:
        found.append(Structure("regex", "|".join(map(re.escape, choice)), param("choice")))
    if grammar is not None:
        found.append(Structure("grammar", grammar, param("grammar")))
    return found


def json_structure(schema: dict[str, Any] | str, param: str) -> Structure:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise invalid(f"{param} is not JSON", param) from None
    return Structure("json_schema", json.dumps(schema), param)


def sampling_options(
    body: Generation,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    grammar: Any,
    vocab_size: int,
) -> SamplingOptions:
    """`SamplingOptions` of a request's fields. Raises `ApiError` for values that do not go together."""
    stop = body.stop or []
    try:
        return SamplingOptions(
            max_tokens=max_tokens,
            min_tokens=body.min_tokens,
            temperature=_or(body.temperature, 1.0),
            top_k=max(0, body.top_k or 0),
            top_p=_or(body.top_p, 1.0),
            min_p=_or(body.min_p, 0.0),
            presence_penalty=_or(body.presence_penalty, 0.0),
            frequency_penalty=_or(body.frequency_penalty, 0.0),
            repetition_penalty=_or(body.repetition_penalty, 1.0),
            seed=body.seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            include_stop=body.include_stop_str_in_output,
            ignore_eos=body.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            n=body.n or 1,
            logit_bias=_biases(body.logit_bias or {}, vocab_size),
            grammar=grammar,
        )
    except InputError as error:
        raise invalid(str(error), str(error).split()[0].rstrip(":")) from None


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _biases(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    found = {}
    for name, bias in given.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab_size):
            raise invalid(f"logit_bias: {name[:40]!r} is not a token id below {vocab_size}", "logit_bias")
        found[int(name)] = float(bias)
    return found


def checked_stream(body: Generation) -> bool:
    """Whether to stream. Raises `ApiError` for options that go only with it, or only without."""
    stream = bool(body.stream)
    if body.stream_options is not None and not stream:
        raise invalid("stream_options is for stream = true", "stream_options")
    if body.prompt_logprobs is not None and stream:
        raise invalid("prompt_logprobs is not available in a stream", "prompt_logprobs")
    return stream
