"""/v1/chat/completions through the real `openai` client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from tests.serve.http.fakes import FakeEngine, default_script, make_server, served

from jora.data.chat import Template

HELLO: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME: Any = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def prompt_of(engine: FakeEngine) -> str:
    return engine.tokenizer.decode(engine.requests[-1].prompt)


def test_every_sampling_parameter_reaches_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.chat.completions.create(
        model="alpha",
        messages=HELLO,
        max_completion_tokens=7,
        temperature=0.3,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=2**62,
        n=2,
        stop="x1",
        logprobs=True,
        top_logprobs=3,
        logit_bias={"5": 1},
        response_format={"type": "json_object"},
        user="somebody",
        metadata={"a": "b"},
        store=False,
        modalities=["text"],
        service_tier="auto",
        parallel_tool_calls=True,
        extra_body={"top_k": 4, "min_p": 0.1, "min_tokens": 2, "ignore_eos": True, "timeout": 5},
    )
    [request] = engine.requests
    sampling = request.sampling
    assert request.adapter == "alpha" and request.deadline is not None
    assert (sampling.max_tokens, sampling.min_tokens, sampling.n, sampling.seed) == (7, 2, 2, 2**62)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.3, 0.9, 4, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.stop) == (0.5, -0.5, ("x1",))
    assert (sampling.ignore_eos, sampling.logprobs, sampling.logit_bias) == (True, 3, {5: 1.0})
    assert sampling.grammar == ("json_schema", '{"type": "object"}')


def test_an_answer(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO)
    [choice] = answer.choices
    assert choice.message.content == default_script(engine.requests[0], 0)
    assert (choice.message.role, choice.finish_reason, choice.logprobs) == ("assistant", "stop", None)
    assert prompt_of(engine) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert engine.requests[0].sampling.max_tokens is None
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    prompt = len(engine.requests[0].prompt)
    assert (answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens) == (prompt, prompt // 2)


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_what_one_answer_says(client: openai.OpenAI, engine: FakeEngine, n: int) -> None:
    asked: Any = {"model": "beta", "messages": HELLO, "n": n, "logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(**asked)
    parts = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage
    assert all(part.usage is None for part in parts[:-1])
    assert len({(part.id, part.created, part.object) for part in parts}) == 1
    for choice in whole.choices:
        mine = [c for part in parts for c in part.choices if c.index == choice.index]
        assert [part.delta.role for part in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert "".join(part.delta.content or "" for part in mine) == choice.message.content
        assert [part.finish_reason for part in mine] == [None] * (len(mine) - 1) + ["stop"]
        logprobs = [entry for part in mine if part.logprobs for entry in part.logprobs.content or []]
        assert choice.logprobs is not None and logprobs == choice.logprobs.content


def test_logprobs_hold_the_bytes(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request, index: "x 🚀 é"
    answer = client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert bytes(b for entry in logprobs.content for b in entry.bytes or []).decode() == "x 🚀 é"
    assert all(entry.top_logprobs == [] for entry in logprobs.content)


def test_prompt_logprobs(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, extra_body={"prompt_logprobs": 0})
    entries = answer.model_extra["prompt_logprobs"]  # type: ignore[index]
    assert entries[0] is None and len(entries) == len(engine.requests[0].prompt)


def test_what_the_template_is_given(client: openai.OpenAI, engine: FakeEngine) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "be kind"},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},  # type: ignore[list-item]
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        ],
        tools=[TIME],
        extra_body={"chat_template_kwargs": {"mood": "glad"}, "add_generation_prompt": False},
    )
    assert prompt_of(engine) == (
        '<|im_start|>tools\n{"type": "function", "function": {"name": "time"}}\n<|im_end|>\n'
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nrain<|im_end|>\nglad"
    )


def test_an_answer_can_be_continued(client: openai.OpenAI, engine: FakeEngine) -> None:
    messages: Any = [*HELLO, {"role": "assistant", "content": "Well, I"}]
    client.chat.completions.create(model="tiny", messages=messages, extra_body={"continue_final_message": True})
    assert prompt_of(engine).endswith("<|im_start|>assistant\nWell, I")


def test_a_tool_call(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request, index: f"Let me see.\n{CALL}"
    [choice] = client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER]).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    [call] = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "weather" and call.id
    assert json.loads(call.function.arguments) == {"city": "Köln"}
    [silent] = client.chat.completions.create(model="tiny", messages=HELLO).choices
    assert silent.message.content == engine.script(engine.requests[0], 0) and silent.finish_reason == "stop"
    [none] = client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER], tool_choice="none").choices
    assert none.message.tool_calls is None and "weather" not in prompt_of(engine)


def test_streamed_tool_calls(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request, index: f"Let me see.\n{CALL}\n{CALL}"
    stream = client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER], stream=True)
    parts = [part.choices[0] for part in stream]
    assert "".join(part.delta.content or "" for part in parts) == "Let me see."
    calls = [call for part in parts for call in part.delta.tool_calls or []]
    assert [call.index for call in calls] == [0, 1] and len({call.id for call in calls}) == 2
    assert [json.loads(call.function.arguments or "") for call in calls if call.function] == [{"city": "Köln"}] * 2
    assert [part.finish_reason for part in parts][-2:] == [None, "tool_calls"]


def test_the_clients_own_accumulation_of_a_stream(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request, index: f"Ah.{CALL}"
    with client.chat.completions.stream(model="tiny", messages=HELLO, tools=[WEATHER]) as stream:
        final = stream.get_final_completion()
    [call] = final.choices[0].message.tool_calls or []
    assert (final.choices[0].message.content, call.function.name) == ("Ah.", "weather")


def test_forced_tools(client: openai.OpenAI, engine: FakeEngine) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "tools": [WEATHER, TIME]}
    engine.script = lambda request, index: '[{"name": "weather", "arguments": {"city": "x"}}]'
    [choice] = client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert [call.function.name for call in choice.message.tool_calls or []] == ["weather"]  # type: ignore[union-attr]
    kind, source = engine.requests[-1].sampling.grammar
    schema = json.loads(source)
    assert kind == "json_schema" and schema["maxItems"] == 1
    assert [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]] == ["weather", "time"]

    engine.script = lambda request, index: '{"city": "y"}'
    named: Any = {"type": "function", "function": {"name": "weather"}}
    [choice] = client.chat.completions.create(**asked, tool_choice=named).choices
    [call] = choice.message.tool_calls or []
    assert (call.function.arguments, choice.finish_reason) == ('{"city": "y"}', "stop")  # type: ignore[union-attr]
    assert engine.requests[-1].sampling.grammar == ("json_schema", json.dumps(WEATHER["function"]["parameters"]))
    parts = [part.choices[0] for part in client.chat.completions.create(**asked, tool_choice=named, stream=True)]
    pieces = [call.function for part in parts for call in part.delta.tool_calls or [] if call.function]
    assert "".join(piece.arguments or "" for piece in pieces) == '{"city": "y"}'


def test_parsed_answers(client: openai.OpenAI, engine: FakeEngine) -> None:
    from pydantic import BaseModel

    class City(BaseModel):
        name: str

    engine.script = lambda request, index: '{"name": "Köln"}'
    answer = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=City)
    assert answer.choices[0].message.parsed == City(name="Köln")
    kind, source = engine.requests[0].sampling.grammar
    assert kind == "json_schema" and json.loads(source)["properties"] == City.model_json_schema()["properties"]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities.1"),
        ({"functions": []}, "functions"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [TIME, TIME]}, "tools"),
        ({"tools": [TIME], "tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools.0.type"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages.0.tool_calls",
        ),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"mood": [1]}}, "messages"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, engine: FakeEngine, given: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body=given)
    assert caught.value.param == param
    assert engine.requests == []


def test_the_refusal_of_an_image_names_it(client: openai.OpenAI, engine: FakeEngine) -> None:
    content: Any = [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
    with pytest.raises(openai.BadRequestError, match="text only; parts of type 'image_url' are not supported"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])


def test_a_base_without_a_chat_template() -> None:
    """It is prompted as an adapter was trained on it; there is no place for tools."""
    conversation: Any = [{"role": "system", "content": "Be kind."}, *HELLO]
    with served(make_server(template=None)) as running, running.openai() as client:
        client.chat.completions.create(model="tiny", messages=conversation)
        tokenizer = running.engine.tokenizer
        trained = Template(tokenizer).render(conversation, "here", generate=True)
        assert "Be kind." in trained and trained.endswith("Assistant:")
        assert tokenizer.decode(running.engine.requests[0].prompt) == trained
        with pytest.raises(openai.BadRequestError, match="no place for tools"):
            client.chat.completions.create(model="tiny", messages=HELLO, tools=[TIME])
        with pytest.raises(openai.BadRequestError, match="'start' cannot be set"):
            extra = {"chat_template_kwargs": {"start": "x"}}
            client.chat.completions.create(model="tiny", messages=HELLO, extra_body=extra)


def test_a_template_without_tools_refuses_them() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with (
        served(make_server(template)) as running,
        running.openai() as client,
        pytest.raises(openai.BadRequestError, match="no place for tools"),
    ):
        client.chat.completions.create(model="tiny", messages=HELLO, tools=[TIME])


class Documents:
    """A retriever that puts a document in front of the question, and finds a quote in the answer."""

    documents = ("one",)

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def fill(self, messages: list[dict[str, Any]], limit: int) -> Documents:
        self.limit = limit
        self.messages = [{**messages[-1], "content": f"document: {messages[-1]['content']}"}]
        return self

    def listed(self) -> list[dict[str, Any]]:
        return [{"document": 1}]

    def citations(self, answer: str) -> list[dict[str, Any]]:
        return [{"quote": answer[:6]}]


def test_documents_and_citations() -> None:
    documents: Any = Documents()
    with served(make_server(retriever=documents, max_length=500)) as running, running.openai() as client:
        answer = client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=100)
        assert "document: hello" in prompt_of(running.engine) and documents.limit == 400
        assert answer.model_extra == {"documents": [{"document": 1}]}
        assert answer.choices[0].message.model_extra == {"citations": [{"quote": "Answer"}]}
        back: Any = [*HELLO, answer.choices[0].message.model_dump(exclude_none=True), *HELLO]
        assert client.chat.completions.create(model="tiny", messages=back).choices
        parts = list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
        assert [part.model_extra for part in parts] == [{"documents": [{"document": 1}]}] + [{}] * (len(parts) - 1)
        extras = [part.choices[0].delta.model_extra for part in parts]
        assert extras == [{}] * (len(parts) - 1) + [{"citations": [{"quote": "Answer"}]}]
