"""Everything around generation: models, adapters, states, errors, tokens, many at once."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.serve.http.fakes import FakeEngine, Running, default_script, make_server, served

from jora.errors import InputError
from jora.serve.http.auth import Keys
from jora.serve.requests import FinishReason, Rejected

HELLO: Any = [{"role": "user", "content": "hello"}]


def is_error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def test_models(client: openai.OpenAI, engine: FakeEngine) -> None:
    base, alpha, beta = client.models.list().data
    assert (base.id, alpha.id, beta.id) == ("tiny", "alpha", "beta")
    assert base.model_extra == {"root": "tiny", "parent": None, "max_model_len": 1 << 20}
    wanted = {"root": "somewhere", "parent": "tiny", "max_model_len": 1 << 20, "rank": 16, "method": "dora"}
    assert client.models.retrieve("beta").model_extra == wanted
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("a/b/../c")
    assert caught.value.code == "model_not_found"


def test_adapters_come_and_go(client: openai.OpenAI, engine: FakeEngine, http: httpx.Client) -> None:
    new = {"lora_name": "team/new", "lora_path": "new"}
    assert http.post("/v1/load_lora_adapter", json=new).status_code == 200
    assert engine.known["team/new"].path == "new"
    assert client.models.retrieve("team/new").id == "team/new"
    assert client.completions.create(model="team/new", prompt="a").model == "team/new"
    assert is_error(http.post("/v1/load_lora_adapter", json=new), 400)["param"] == "lora_name"
    assert http.post("/v1/load_lora_adapter", json={**new, "load_inplace": True}).status_code == 200
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "team/new"}).status_code == 200
    assert is_error(http.post("/v1/unload_lora_adapter", json={"lora_name": "team/new"}), 404)
    bad = {"lora_name": "x", "lora_path": "../../etc"}
    assert is_error(http.post("/v1/load_lora_adapter", json=bad), 400)["param"] == "lora_path"
    assert is_error(http.post("/v1/load_lora_adapter", json={**new, "lora_name": "tiny"}), 400)


def test_adapters_are_fixed_unless_told_otherwise() -> None:
    with served(make_server(allow_adapter_loading=False)) as running, running.http() as http:
        is_error(http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "x"}), 403)
        is_error(http.post("/v1/unload_lora_adapter", json={"lora_name": "alpha"}), 403)
        assert set(running.engine.known) == {"alpha", "beta"}


def test_an_unknown_model(client: openai.OpenAI, engine: FakeEngine) -> None:
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model="gamma", prompt="a", stream=stream)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue(client: openai.OpenAI, engine: FakeEngine, stream: bool) -> None:
    engine.refusal = Rejected("the queue is full", 2.3)
    with pytest.raises(openai.RateLimitError, match="the queue is full") as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, stream=stream)
    assert caught.value.response.headers["retry-after"] == "3"
    engine.refusal = InputError("it does not fit")
    with pytest.raises(openai.BadRequestError, match="it does not fit"):
        client.completions.create(model="tiny", prompt="a", stream=stream)


@pytest.mark.parametrize(("ends", "status"), [("deadline", 504), ("error", 400), ("cancelled", 503)])
def test_an_answer_that_the_engine_ends(
    client: openai.OpenAI, engine: FakeEngine, ends: FinishReason, status: int
) -> None:
    engine.ends = ends
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="tiny", prompt="a", max_tokens=100, n=2)
    assert caught.value.status_code == status
    with pytest.raises(openai.APIError, match=caught.value.body["message"]):  # type: ignore[index]
        list(client.completions.create(model="tiny", prompt="a", max_tokens=100, stream=True))


def test_the_end_of_the_engine_is_not_the_requests_fault(engine: FakeEngine, http: httpx.Client) -> None:
    engine.ends, engine.failure = "error", RuntimeError("secret")
    response = http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 500})
    assert is_error(response, 500)["code"] == "engine_failed" and "secret" not in response.text
    is_error(http.get("/health"), 503)


def test_a_bug_in_the_engine_is_an_error_without_details(engine: FakeEngine, http: httpx.Client) -> None:
    engine.refusal = RuntimeError("secret")
    response = http.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
    assert "secret" not in str(is_error(response, 500))
    assert response.headers["connection"] == "close"


def test_the_first_of_many_prompts_that_fails_cancels_the_others(engine: FakeEngine, http: httpx.Client) -> None:
    engine.prefill, engine.refusal, engine.refuse_after = 30.0, InputError("it does not fit"), 2
    is_error(http.post("/v1/completions", json={"model": "tiny", "prompt": ["a", "b", "c"]}), 400)
    assert engine.running == 0 and [stage for _, stage in engine.cancelled] == ["prefill"] * 2


def test_tokenize(engine: FakeEngine, http: httpx.Client) -> None:
    text = "naïve 🚀 <|im_end|>"
    body = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert body["tokens"] == engine.tokenizer(text)["input_ids"] and body["count"] == len(body["tokens"])
    assert body["max_model_len"] == 1 << 20 and body["token_strs"][0] == engine.tokenizer.decode(body["tokens"][:1])
    back = http.post("/detokenize", json={"tokens": body["tokens"], "model": "alpha"}).json()
    assert back == {"prompt": text}
    chat = http.post("/tokenize", json={"model": "tiny", "messages": HELLO}).json()
    http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO})
    assert tuple(chat["tokens"]) == engine.requests[0].prompt and "token_strs" not in chat
    is_error(http.post("/tokenize", json={"prompt": "a", "model": "gamma"}), 404)
    is_error(http.post("/detokenize", json={"tokens": [10**6]}), 400)
    is_error(http.post("/tokenize", json={"neither": 1}), 400)


def test_states(running: Running, engine: FakeEngine, http: httpx.Client) -> None:
    server = running.server
    asked = {"model": "tiny", "prompt": "a"}
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").status_code == 200
    assert set(http.get("/version").json()) == {"version"}
    try:
        server.ready = False
        is_error(http.get("/ready"), 503)
        is_error(http.post("/v1/completions", json=asked), 503)
        server.ready = server.draining = True
        assert is_error(http.get("/ready"), 503)["message"] == "draining"
        response = http.post("/v1/completions", json=asked)
        assert is_error(response, 503) and "retry-after" in response.headers
        assert http.get("/health").status_code == 200 and http.get("/v1/models").status_code == 200
    finally:
        server.ready, server.draining = True, False
    engine.failure = RuntimeError("gone")
    is_error(http.get("/health"), 503)
    is_error(http.get("/ready"), 503)


def test_metrics_see_the_requests(engine: FakeEngine, http: httpx.Client) -> None:
    def count(name: str) -> float:
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = count("jora_prompt_tokens_total"), count('jora_requests_total{outcome="stop"}')
    body = http.post("/v1/completions", json={"model": "tiny", "prompt": ["a", "hello"], "max_tokens": 500}).json()
    after = count("jora_prompt_tokens_total"), count('jora_requests_total{outcome="stop"}')
    assert (after[0] - before[0], after[1] - before[1]) == (body["usage"]["prompt_tokens"], 2)
    assert count("jora_pool_pages") == 4


def test_what_is_not_there(http: httpx.Client) -> None:
    error = is_error(http.post("/v1/embeddings", json={"model": "tiny", "input": "x"}), 400)
    assert "embeddings" in error["message"]
    is_error(http.get("/v2/nothing"), 404)
    is_error(http.get("/v1/completions"), 405)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"model": "tiny", "prompt": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "a", "seed": 1' + b"0" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "a", "seed": 1' + b"0" * 50 + b"}",
        b'{"model": "tiny", "prompt": "half \\ud800"}',
        b'{"model": "ti\\ud800ny", "prompt": "a"}',
        b'{"model": "tiny", "prompt": "a", "\\udcff": 1}',
        b'{"model": "tiny", "prompt": "a", "guided_json": {"\\ud800": "broken"}}',
    ],
)
def test_hostile_bodies(engine: FakeEngine, http: httpx.Client, body: bytes) -> None:
    is_error(http.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 400)


def test_a_grammar_is_bounded(http: httpx.Client, engine: FakeEngine) -> None:
    asked = {"model": "tiny", "prompt": "a"}
    assert http.post("/v1/completions", json={**asked, "guided_regex": "a" * (1 << 17)}).status_code == 200
    error = is_error(http.post("/v1/completions", json={**asked, "guided_regex": "a" * (1 + (1 << 17))}), 400)
    assert error["param"] == "guided_regex" and len(engine.requests) == 1


def test_hostile_conversations(engine: FakeEngine, http: httpx.Client) -> None:
    def post(text: str) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return http.post("/v1/chat/completions", content=text.encode(), headers=headers)

    asked = '{"model": "tiny", "messages": [{"role": "user", "content": "a"}], '
    is_error(post(asked + '"chat_template_kwargs": {"mood": "\\ud800"}}'), 400)
    schema = '{"a":' * 900 + "1" + "}" * 900
    deep = asked + '"tools": [{"type": "function", "function": {"name": "f", "parameters": ' + schema + "}}]}"
    assert post(deep).status_code in (200, 400)
    template = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "{{ 1/0 }}{% raw %}"}]})
    assert post(template).status_code == 200


def test_any_unicode_comes_back(client: openai.OpenAI, engine: FakeEngine) -> None:
    text = "a\u2028b\u2029c\x85d\r\n\x00\x1f\ufeff\u202e é 😀 data: [DONE]\n\n end"
    engine.script = lambda request, index: text
    assert client.chat.completions.create(model="tiny", messages=HELLO).choices[0].message.content == text
    stream = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == text
    assert text in engine.tokenizer.decode(engine.requests[-1].prompt)


def test_a_body_that_is_too_large() -> None:
    with served(make_server(body_bytes=1000)) as running, running.http() as http:
        is_error(http.post("/v1/completions", json={"model": "tiny", "prompt": "a" * 1000}), 413)
        assert http.post("/v1/completions", json={"model": "tiny", "prompt": "a" * 100}).status_code == 200


def test_a_prompt_that_is_too_long() -> None:
    with served(make_server(max_length=8)) as running, running.http() as http:
        error = is_error(http.post("/v1/completions", json={"model": "tiny", "prompt": [5] * 8}), 400)
        assert error["code"] == "context_length_exceeded" and running.engine.requests == []
        assert http.post("/v1/completions", json={"model": "tiny", "prompt": [5] * 7}).status_code == 200


def test_keys(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text(
        "keys:\n- {key: one, client: acme, adapters: [alpha]}\n- {key: two, client: fast, rate: 0.001}\n"
    )
    (tmp_path / "keys.yaml").chmod(0o600)
    keys = Keys.load(tmp_path / "keys.yaml")
    with served(make_server(keys=keys)) as running, running.http() as http:
        is_error(http.get("/v1/models"), 401)
        is_error(http.post("/v1/completions", json={"model": "tiny", "prompt": "a"}), 401)
        is_error(http.post("/tokenize", json={"prompt": "a"}), 401)
        is_error(http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "x"}), 401)
        assert http.get("/health").status_code == 200
    with served(make_server(keys=keys)) as running, running.openai("one") as one, running.openai("two") as two:
        assert [model.id for model in one.models.list()] == ["tiny", "alpha"]
        one.completions.create(model="alpha", prompt="a")
        assert running.engine.requests[0].client == "acme"
        with pytest.raises(openai.PermissionDeniedError):
            one.completions.create(model="beta", prompt="a")
        with pytest.raises(openai.NotFoundError):
            one.models.retrieve("beta")
        two.completions.create(model="tiny", prompt="a")
        with pytest.raises(openai.RateLimitError) as caught:
            two.completions.create(model="tiny", prompt="a")
        assert int(caught.value.response.headers["retry-after"]) > 900


def test_a_rate_is_of_answers(tmp_path: Path) -> None:
    """One request for many of them is no way around it; one that is refused has had none."""
    (tmp_path / "keys.yaml").write_text("keys: [{key: one, client: acme, rate: 2}]")
    (tmp_path / "keys.yaml").chmod(0o600)
    header = {"Authorization": "Bearer one"}
    with served(make_server(keys=Keys.load(tmp_path / "keys.yaml"))) as running, running.http() as http:

        def ask(**body: Any) -> httpx.Response:
            return http.post("/v1/completions", json={"model": "tiny", "prompt": "a", **body}, headers=header)

        running.engine.refusal = Rejected("the queue is full", 3.0)
        assert is_error(ask(n=128), 429)["message"] == "the queue is full"
        running.engine.refusal = None
        assert ask(prompt=[[1, 2]] * 100, n=2).status_code == 200
        refused = ask()
        assert "2 requests a second" in is_error(refused, 429)["message"]
        assert 95 <= int(refused.headers["retry-after"]) <= 100
        assert running.server.open == 0


def test_fifty_at_once(running: Running, engine: FakeEngine) -> None:
    engine.delay, engine.together = 0.005, 50

    async def one(client: openai.AsyncOpenAI, number: int) -> None:
        text = "a" * (number + 1)
        asked: Any = {"model": ("tiny", "alpha", "beta")[number % 3], "max_tokens": 500}
        if number % 2:
            answer = await client.completions.create(prompt=text, **asked)
            found = answer.choices[0].text
        else:
            stream = await client.completions.create(prompt=text, stream=True, **asked)
            found = "".join([part.choices[0].text async for part in stream])
        [request] = [r for r in engine.requests if list(r.prompt) == engine.tokenizer(text)["input_ids"]]
        assert found == default_script(request, 0)

    async def all_of_them() -> None:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            await asyncio.gather(*(one(client, number) for number in range(50)))

    asyncio.run(all_of_them())
    assert len(engine.requests) == 50 and engine.peak == 50 and engine.cancelled == []


def test_the_time_limit_is_on_the_engines_clock(http: httpx.Client, engine: FakeEngine) -> None:
    before = time.monotonic()
    http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "timeout": 100})
    deadline = engine.requests[0].deadline
    assert deadline is not None and 100 <= deadline - before < 120
