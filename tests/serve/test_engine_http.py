"""The HTTP app over the real engine: what the schema allows, at its extremes, is answered."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from tests.serve.bases import VOCAB, base

from jora.data.chat import Template
from jora.inference.ends import end_tokens
from jora.serve.async_engine import AsyncEngine
from jora.serve.engine import Engine
from jora.serve.http.app import create_app
from jora.serve.http.server import Server
from jora.serve.http.tokens import Text
from jora.serve.text.grammar import Grammars

PROMPT = "Hello"
MOST = 8  # tokens of an answer
EXTREMES: list[dict[str, Any]] = [
    *({"seed": seed} for seed in (-(2**63), -3, 0, 2**63 - 1)),
    *({"temperature": heat} for heat in (0, 1e-300, 2, 100)),
    *({"top_p": mass} for mass in (1e-300, 1)),
    *({"top_k": count} for count in (-1, 0, 1, 2**31 - 1)),
    *({"min_p": share} for share in (0, 1e-300, 1)),
    {"n": 2},
    {"n": 2, "temperature": 0, "stream": True},
    {"presence_penalty": 2, "frequency_penalty": 2, "repetition_penalty": 100},
    {"presence_penalty": -2, "frequency_penalty": -2, "repetition_penalty": 5e-324},
    {"temperature": 0, "repetition_penalty": 5e-324, "prompt_logprobs": 20},
    {"logit_bias": {str(token): -100 for token in range(258)}},
    {"logit_bias": {"65": 100, "257": -100}},
    {"stop": "é"},
    {"stop": [chr(code) for code in range(64, 128)], "include_stop_str_in_output": True},
    {"stop": "A" * 4096, "logit_bias": {"32": 100}, "stream": True},
    {"stop_token_ids": list(range(256)), "ignore_eos": True},
    {"stop_token_ids": list(range(32)), "ignore_eos": True, "min_tokens": 2},
    {"min_tokens": MOST, "temperature": 100},
    {"timeout": 86400},
]


@asynccontextmanager
async def served(engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app, without a port."""
    model, running = base(), AsyncEngine(engine)
    text = Text(model.tokenizer, engine.max_length, VOCAB)
    grammars = Grammars(model.tokenizer, VOCAB, end_tokens(model, Template(model.tokenizer)))
    transport = httpx.ASGITransport(create_app(Server(running, text, grammars, "base", ready=True)))
    running.start()
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=60) as client:
            yield client
    finally:
        running.stop()


async def complete(client: httpx.AsyncClient, **options: Any) -> httpx.Response:
    body = {"model": "base", "prompt": PROMPT, "max_tokens": MOST, "logprobs": 20, **options}
    return await client.post("/v1/completions", json=body)


async def chat(client: httpx.AsyncClient, **options: Any) -> httpx.Response:
    messages = [{"role": "user", "content": PROMPT}]
    body = {"model": "base", "messages": messages, "max_tokens": MOST, "logprobs": True, "top_logprobs": 20, **options}
    return await client.post("/v1/chat/completions", json=body)


def check(response: httpx.Response, options: dict[str, Any]) -> None:
    assert response.status_code == 200, (options, response.text)
    if options.get("stream"):
        chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        assert response.text.endswith("data: [DONE]\n\n") and all("error" not in chunk for chunk in chunks), options
        ends = [choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
        assert sorted(ends) == list(range(options.get("n", 1)))
        return
    body = response.json()
    assert [choice["index"] for choice in body["choices"]] == list(range(options.get("n", 1)))
    tokens = 0
    for choice in body["choices"]:
        assert choice["finish_reason"] in ("stop", "length")
        assert isinstance(choice["text"] if "text" in choice else choice["message"]["content"], str)
        values = choice["logprobs"].get("token_logprobs") or [
            entry["logprob"] for entry in choice["logprobs"]["content"]
        ]
        assert values and all(math.isfinite(value) and value <= 1e-3 for value in values), (options, values)
        tokens += len(values)
    assert 1 <= body["usage"]["completion_tokens"] <= MOST * len(body["choices"])
    assert tokens <= body["usage"]["completion_tokens"]


def in_loop(test: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test, 60)

    asyncio.run(bounded())


def test_what_the_schema_allows_is_answered(engine: Engine) -> None:
    async def test() -> None:
        async with served(engine) as client:
            asked = [(way, options) for options in EXTREMES for way in (complete, chat)]
            found = await asyncio.gather(*(way(client, **options) for way, options in asked))
        for response, (_, options) in zip(found, asked, strict=True):
            check(response, options)

    in_loop(test())


def test_echoes_scores_and_many_prompts(engine: Engine) -> None:
    async def test() -> None:
        async with served(engine) as client:
            scored = await complete(client, echo=True, max_tokens=0)
            several = await complete(client, prompt=[PROMPT, "b"], n=2, seed=-1)
        assert scored.status_code == several.status_code == 200
        values = scored.json()["choices"][0]["logprobs"]["token_logprobs"]
        assert values[0] is None and len(values) == len(PROMPT) and all(map(math.isfinite, values[1:]))
        assert len(several.json()["choices"]) == 4

    in_loop(test())


def test_seeds_of_any_sign_give_answers_of_their_own(engine: Engine) -> None:
    async def test() -> None:
        async with served(engine) as client:

            async def drawn(seed: int) -> list[str]:
                found = await complete(client, seed=seed, temperature=2, ignore_eos=True)
                return found.json()["choices"][0]["logprobs"]["tokens"]

            assert await drawn(-3) == await drawn(-3) != await drawn(3)

    in_loop(test())


def test_a_nucleus_of_nothing_is_the_likeliest_token(engine: Engine) -> None:
    async def test() -> None:
        async with served(engine) as client:

            async def tokens(**options: Any) -> list[str]:
                found = await complete(client, ignore_eos=True, **options)
                return found.json()["choices"][0]["logprobs"]["tokens"]

            assert await tokens(top_p=1e-300, temperature=2) == await tokens(temperature=0)

    in_loop(test())
