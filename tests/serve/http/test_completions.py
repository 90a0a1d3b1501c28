"""/v1/completions through the real `openai` client."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import openai
import pytest
from tests.serve.http.fakes import FakeEngine, default_script


def test_every_sampling_parameter_reaches_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.completions.create(
        model="alpha",
        prompt="hello",
        max_tokens=7,
        temperature=0.3,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=-3,
        n=2,
        best_of=2,
        stop=["x1", "y2"],
        logprobs=3,
        logit_bias={"5": -100, "6": 2},
        user="somebody",
        extra_body={
            "top_k": 4,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "min_tokens": 2,
            "stop_token_ids": [9],
            "ignore_eos": True,
            "include_stop_str_in_output": True,
            "prompt_logprobs": 1,
            "guided_regex": "a+",
        },
    )
    [request] = engine.requests
    sampling = request.sampling
    assert (request.adapter, request.client) == ("alpha", "default")
    assert list(request.prompt) == engine.tokenizer("hello")["input_ids"]
    assert (sampling.max_tokens, sampling.min_tokens, sampling.n, sampling.seed) == (7, 2, 2, -3)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.3, 0.9, 4, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.2)
    assert (sampling.stop, sampling.stop_token_ids, sampling.include_stop) == (("x1", "y2"), (9,), True)
    assert (sampling.ignore_eos, sampling.logprobs, sampling.prompt_logprobs) == (True, 3, 1)
    assert sampling.logit_bias == {5: -100.0, 6: 2.0}
    assert sampling.grammar == ("regex", "a+")


def test_defaults(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.completions.create(model="tiny", prompt="hello", extra_body={"top_k": -1})
    [request] = engine.requests
    assert (request.adapter, request.deadline, request.sampling.top_k) == (None, None, 0)
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.logprobs) == (16, 1.0, None)
    assert answer.choices[0].logprobs is None
    assert answer.object == "text_completion" and answer.model == "tiny" and answer.id.startswith("cmpl-")
    assert answer.system_fingerprint


def test_prompts_of_every_kind(client: openai.OpenAI, engine: FakeEngine) -> None:
    tokens = engine.tokenizer("hello")["input_ids"]
    for prompt, count in (("hello", 1), (["hello", "hello"], 2), (tokens, 1), ([tokens, tokens, tokens], 3)):
        engine.requests.clear()
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=500, n=2)
        assert [list(request.prompt) for request in engine.requests] == [tokens] * count
        assert [choice.index for choice in answer.choices] == list(range(2 * count))
        wanted = [default_script(request, index) for request in engine.requests for index in (0, 1)]
        assert [choice.text for choice in answer.choices] == wanted
        assert answer.usage is not None and answer.usage.prompt_tokens == count * len(tokens)
        generated = sum(len(engine.tokenizer(text)["input_ids"]) for text in wanted)
        assert answer.usage.completion_tokens == generated
        assert answer.usage.total_tokens == generated + count * len(tokens)
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == count * (len(tokens) // 2)


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_what_one_answer_says(client: openai.OpenAI, engine: FakeEngine, n: int) -> None:
    asked = {"model": "alpha", "prompt": ["a", "bc"], "max_tokens": 9, "n": n, "logprobs": 2, "echo": True}
    whole = client.completions.create(**asked)  # type: ignore[call-overload]
    parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    assert len(parts) > 2 * n
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage
    assert all(part.usage is None for part in parts[:-1])
    assert len({(part.id, part.created) for part in parts}) == 1
    for choice in whole.choices:
        mine = [c for part in parts for c in part.choices if c.index == choice.index]
        assert "".join(part.text for part in mine) == choice.text
        assert [part.finish_reason for part in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [x for part in mine for x in getattr(part.logprobs, name)]
            assert joined == getattr(choice.logprobs, name), name


def test_a_line_of_a_stream_is_one_for_every_reader(http: httpx.Client, engine: FakeEngine) -> None:
    """httpx, like `str.splitlines`, ends a line at Unicode's line ends too."""
    text = "a\x85b\u2028c\u2029d\x0ce\rf\ng"
    engine.script = lambda request, index: text
    asked = {"model": "tiny", "prompt": "a", "stream": True, "max_tokens": 100}
    with http.stream("POST", "/v1/completions", json=asked) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    assert "".join(choice["text"] for line in lines[:-1] for choice in json.loads(line)["choices"]) == text


def test_no_usage_unless_asked_for(client: openai.OpenAI, engine: FakeEngine) -> None:
    parts = list(client.completions.create(model="tiny", prompt="a", stream=True))
    assert all(part.usage is None and part.choices for part in parts)


def test_echo_with_logprobs(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.completions.create(model="tiny", prompt="hello 🚀", max_tokens=3, logprobs=1, echo=True)
    [choice] = answer.choices
    assert choice.text.startswith("hello 🚀Answer") and choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None and choice.logprobs.token_logprobs[0] is None
    tokens = choice.logprobs.tokens or []
    assert "".join(t for t in tokens if not t.startswith("bytes:")).startswith("hello")
    assert "bytes:\\x9a" in tokens  # a part of the emoji
    prompt = engine.requests[0].prompt
    assert len(tokens) == len(prompt) + 3 and choice.logprobs.text_offset is not None
    assert choice.logprobs.text_offset[1] == len(tokens[0])


def test_scoring_a_text_without_an_answer(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=0, logprobs=0, echo=True)
    assert answer.choices[0].text == "hello" and answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 0
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and len(logprobs.tokens or []) == len(engine.requests[0].prompt)


def test_prompt_logprobs(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.completions.create(model="tiny", prompt="hello", extra_body={"prompt_logprobs": 2})
    first, second, *_ = answer.choices[0].model_extra["prompt_logprobs"]  # type: ignore[index]
    token = engine.requests[0].prompt[1]
    assert first is None and len(second) == 2
    assert second[str(token)]["decoded_token"] == engine.tokenizer.decode([token])
    assert second[str(token)]["rank"] == 1


def test_no_infinity_reaches_json(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request, index: engine.tokenizer.decode([11 * 25])
    answer = client.completions.create(model="tiny", prompt="hello", logprobs=0)
    assert engine.logprobs(11 * 25, 0).logprob == -math.inf
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.token_logprobs == [-9999.0]


def test_finish_reasons(client: openai.OpenAI, engine: FakeEngine) -> None:
    assert client.completions.create(model="tiny", prompt="a", max_tokens=500).choices[0].finish_reason == "stop"
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).choices[0].finish_reason == "length"
    [choice] = client.completions.create(model="tiny", prompt="a", max_tokens=500, stop=" of").choices
    assert choice.text == "Answer 0" and choice.finish_reason == "stop"
    assert choice.model_extra == {"stop_reason": " of"}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"temperature": -1}, "temperature"),
        ({"temprature": 1}, "temprature"),
        ({"temperature": "1"}, "temperature"),
        ({"n": True}, "n"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop.0"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [[1], [-1]]}, "prompt.1.0"),
        ({"prompt": ["a", 1]}, "prompt.1"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "broken"}, "guided_regex"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, engine: FakeEngine, given: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", extra_body=given)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert engine.requests == []


def test_structures(client: openai.OpenAI, engine: FakeEngine) -> None:
    asked = [
        ({"guided_json": {"type": "string"}}, ("json_schema", '{"type": "string"}')),
        ({"guided_json": '{"type": "string"}'}, ("json_schema", '{"type": "string"}')),
        ({"guided_choice": ["a.", "b"]}, ("regex", r"a\.|b")),
        ({"guided_grammar": "start: A"}, ("grammar", "start: A")),
        ({"structured_outputs": {"regex": "b"}}, ("regex", "b")),
        ({"structured_outputs": {"json": {"type": "null"}}}, ("json_schema", '{"type": "null"}')),
        ({"structured_outputs": {"json_object": True}}, ("json_schema", '{"type": "object"}')),
        ({"response_format": {"type": "json_object"}}, ("json_schema", '{"type": "object"}')),
        ({"response_format": {"type": "text"}}, None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1]}}}},
            ("json_schema", '{"enum": [1]}'),
        ),
    ]
    for given, _ in asked:
        client.completions.create(model="tiny", prompt="a", extra_body=given)
    assert [request.sampling.grammar for request in engine.requests] == [wanted for _, wanted in asked]


def test_structures_are_what_the_grammars_compile() -> None:
    from tests.data import tokenizers

    from jora.serve.http.sampling import structure
    from jora.serve.http.schemas import CompletionRequest
    from jora.serve.text.grammar import Grammars

    tokenizer = tokenizers.qwen3()
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    asked = [
        ({"guided_json": {"type": "integer"}}, "42", "yes"),
        ({"guided_choice": ["a.b c-d", "yes#1"]}, "a.b c-d", "axb c-d"),
        ({"guided_choice": ["a.b c-d", "yes#1"]}, "yes#1", "yes"),
        ({"guided_regex": "[ab]+"}, "abba", "abc"),
        ({"guided_grammar": 'start: "yes" | "no"'}, "no", "maybe"),
        ({"structured_outputs": {"json_object": True}}, '{"a": 1}', "[1]"),
    ]
    for fields, good, bad in asked:
        found = structure(CompletionRequest(model="m", prompt="p", **fields), None)
        assert found is not None
        grammar = grammars.compile(found.kind, found.source)
        for text, fits in ((good, True), (bad, False)):
            state = grammar.start()
            allowed = True
            for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]:
                words = state.mask()
                allowed = allowed and bool(words[token // 32] >> (token % 32) & 1)
                if not allowed:
                    break
                if token != tokenizer.eos_token_id:
                    state.advance(token)
            assert allowed == fits, (fields, text)


@pytest.mark.parametrize("ends", ["stop", "deadline", "error"])
def test_every_stream_ends_with_done(engine: FakeEngine, http: httpx.Client, ends: Any) -> None:
    engine.ends = ends
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 500, "stream": True}
    found = [line for line in http.post("/v1/completions", json=asked).text.split("\n\n") if line]
    assert found[-1] == "data: [DONE]" and found.count("data: [DONE]") == 1
    assert ("error" in json.loads(found[-2].removeprefix("data: "))) == (ends != "stop")


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
@pytest.mark.parametrize("included", [True, False])
def test_usage_is_null_until_the_last_chunk(
    engine: FakeEngine, http: httpx.Client, path: str, asked: dict[str, Any], included: bool
) -> None:
    """The openai client reads null and nothing alike; others do not."""
    body = {"model": "tiny", "max_tokens": 500, "stream": True, "stream_options": {"include_usage": included}, **asked}
    *parts, _ = [line for line in http.post(path, json=body).text.split("\n\n") if line]
    chunks = [json.loads(part.removeprefix("data: ")) for part in parts]
    if included:
        assert all(chunk["usage"] is None for chunk in chunks[:-1]) and chunks[-1]["usage"]["total_tokens"] > 0
    else:
        assert not any("usage" in chunk for chunk in chunks)


def test_a_message_is_bounded(http: httpx.Client) -> None:
    body = http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "x" * 100_000: 1})
    assert body.status_code == 400 and len(body.json()["error"]["message"]) <= 2000
