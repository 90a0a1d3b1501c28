"""`jora serve` as a process: what it prints, OpenAI's client, clients that leave, hostile adapters, SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from safetensors.numpy import load_file, save_file
from tests.bytewise import bytewise_tokenizer
from tests.serve.bases import greedy, merged
from tests.serve.process import ADAPTERS, POSITIONS, SECONDS, Serving, command, make_adapters, make_base, serving

pytestmark = pytest.mark.slow

ROOT, ACME, SLOW = "sk-root", "sk-acme", "sk-slow"  # keys
NAMES = (None, *ADAPTERS)
HELLO: Any = [{"role": "user", "content": "Hello"}]
TOKENIZER = bytewise_tokenizer()
LETTERS = {str(TOKENIZER.convert_tokens_to_ids(letter)): 100.0 for letter in "abcdefghijklmnopqrstuvwxyz"}
EXACT: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Paris"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
QUOTE = "##begin_quote## within 30 days ##end_quote##"
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, adapters/, documents/, and a file of keys."""
    directory = tmp_path_factory.mktemp("serve")
    (directory / "documents").mkdir()
    (directory / "documents" / "returns.md").write_text("# Returns\n\nGoods go back within 30 days.\n")
    make_adapters(make_base(directory / "base"), directory / "adapters")
    acme, slow = f"{{key: {ACME}, client: acme, adapters: ['team/*']}}", f"{{key: {SLOW}, client: slow, rate: 0.001}}"
    (directory / "keys.yaml").write_text(f"keys: [{{key: {ROOT}, client: root}}, {acme}, {slow}]")
    (directory / "keys.yaml").chmod(0o600)
    return directory


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Serving]:
    options = {
        "--model": directory / "base",
        "--adapters": directory / "adapters",
        "--keys": directory / "keys.yaml",
        "--documents": directory / "documents",
        "--pool-gb": 0.02,
        "--max-batch": 4,
        "--chunk": 64,
        "--rank-buckets": 16,
    }
    words = [str(word) for pair in options.items() for word in pair]
    with serving(directory / "log", *words, "--allow-adapter-loading", key=ROOT) as running:
        yield running


@pytest.fixture
def client(server: Serving) -> Iterator[openai.OpenAI]:
    with server.openai() as found:
        yield found


@pytest.fixture(scope="module")
def expected(directory: Path) -> Callable[[str | None, str, int], str]:
    """What transformers answers with the adapter that PEFT merged (fLoRA and NOLA: numpy)."""
    model = cache(lambda name: merged("llama2", None if name is None else copied(directory, name)))

    def answer(name: str | None, prompt: str, count: int) -> str:
        return TOKENIZER.decode(greedy(model(name), TOKENIZER(prompt)["input_ids"], count), skip_special_tokens=True)

    return answer


def copied(directory: Path, name: str) -> Path:
    """An adapter away from the served directory: the oracle may write beside it."""
    return shutil.copytree(directory / "adapters" / name, directory / "copies" / name)


# --- at start ---


def test_it_says_what_it_serves_where_and_how_to_ask(server: Serving) -> None:
    assert server.told[0].split() == f"serving base, 5 adapters: {', '.join(sorted(ADAPTERS))}".split()
    assert server.told[1].split() == ["at", f"{server.url}/v1"]
    assert "weights" in server.told[2] and "page pool 19 MiB" in server.told[2] and "active" in server.told[2]
    line = "\n".join(server.told[3:5]).removeprefix("try")
    answer = subprocess.run(
        ["bash", "-c", f"{line} --silent --fail"],
        env={**os.environ, "KEY": ROOT},
        capture_output=True,
        check=True,
        timeout=60,
    )
    body = json.loads(answer.stdout)
    assert body["model"] == "dora" and body["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "./absent"], "absent"),
        (["--model", "BASE", "--adapters", "./absent"], "no such directory"),
        (["--model", "BASE", "--chunk", "100"], "multiple of page_tokens"),
        (["--model", "BASE", "--keys", "./absent"], "--keys"),
        (["--model", "BASE", "--no-such-option"], "no-such-option"),
    ],
)
def test_a_wrong_option_is_one_line(directory: Path, options: list[str], message: str) -> None:
    argv = command(*(str(directory / "base") if word == "BASE" else word for word in options), "--port", "0")
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=directory, timeout=60)
    said = [line for line in done.stderr.splitlines() if not line.startswith("loading")]
    assert done.returncode == 2 and len(said) == 1 and message in said[0], done.stderr


# --- OpenAI's client ---


def test_every_adapter_answers_as_transformers_does(
    server: Serving, client: openai.OpenAI, expected: Callable[[str | None, str, int], str]
) -> None:
    """One by one, then in one batch, with prompts of more than a chunk among them."""
    prompts = {name: f"{name}: " + "Good morning! " * (1 + 9 * at % 20) for at, name in enumerate(NAMES)}

    def ask(name: str | None) -> str:
        asked: Any = {"model": name or "base", "prompt": prompts[name], "max_tokens": 24}
        return client.completions.create(**asked, **EXACT).choices[0].text

    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(asyncio.to_thread(ask, name) for name in NAMES * 2))

    wanted = [expected(name, prompts[name], 24) for name in NAMES]
    assert len(set(wanted)) == len(NAMES)
    assert [ask(name) for name in NAMES] == wanted
    assert asyncio.run(all_at_once()) == wanted * 2


def test_models(client: openai.OpenAI) -> None:
    found = {model.id: model.model_extra for model in client.models.list()}
    assert set(found) == {"base", *ADAPTERS}
    eight = found["team/eight"]
    assert eight is not None and (eight["parent"], eight["rank"], eight["method"]) == ("base", 8, "lora")


def test_chat_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    asked: Any = {"model": "one", "messages": HELLO, "max_completion_tokens": 20, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**asked, **EXACT)
    assert whole.choices[0].finish_reason == "length" and whole.usage is not None
    assert whole.usage.completion_tokens == 20
    parts = list(client.chat.completions.create(**asked, **EXACT, stream=True, stream_options={"include_usage": True}))
    assert parts[-1].usage is not None and parts[-1].usage.completion_tokens == 20
    choices = [part.choices[0] for part in parts[:-1]]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    streamed = [token for choice in choices if choice.logprobs for token in choice.logprobs.content or ()]
    assert whole.choices[0].logprobs is not None and len(streamed) == 20
    for token, same in zip(streamed, whole.choices[0].logprobs.content or (), strict=True):
        # The second prompt was in the prefix cache: what it computes is rounded otherwise.
        assert token.token == same.token and token.logprob == pytest.approx(same.logprob, abs=1e-4)
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].token == token.token
        assert token.logprob == token.top_logprobs[0].logprob < 0


def test_n_seed_and_stop(client: openai.OpenAI) -> None:
    def ask(**changes: Any) -> list[str]:
        asked: Any = {"model": "team/eight", "prompt": "Hi", "max_tokens": 30, "logit_bias": LETTERS, "seed": 7}
        answer = client.completions.create(**{**asked, "temperature": 1.5, "n": 3, **changes})
        return [choice.text for choice in answer.choices]

    first = ask()
    assert len(set(first)) == 3 and all(len(text) == 30 and text.isalpha() for text in first)
    assert ask() == first and ask(n=1) == first[:1] and ask(seed=8) != first
    stop = first[0][10:13]
    assert ask(n=1, stop=stop) == [first[0][: first[0].index(stop)]]
    assert ask(temperature=0) == ask(temperature=0, n=1, seed=None) * 3


def test_structured_output(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}}
    answers = client.chat.completions.create(
        model="dora", messages=HELLO, response_format=wanted, n=4, seed=1, max_completion_tokens=1500
    )
    for choice in answers.choices:
        found = json.loads(choice.message.content or "")
        assert found["city"] in ("Oslo", "Paris") and 0 <= found["days"] <= 9 and choice.finish_reason == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tools(client: openai.OpenAI, choice: Any) -> None:
    asked: Any = {"model": "base", "messages": HELLO, "tools": TOOLS, "tool_choice": choice, "seed": 1}
    message = client.chat.completions.create(**asked, parallel_tool_calls=False).choices[0].message
    [call] = message.tool_calls or ()
    assert call.type == "function" and call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"city", "days"}
    answered: Any = [
        *HELLO,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "Rain"},
    ]
    after = client.chat.completions.create(model="base", messages=answered, tools=TOOLS, max_completion_tokens=5)
    assert after.usage is not None and after.usage.completion_tokens <= 5


def test_documents_stand_in_the_prompt(client: openai.OpenAI) -> None:
    asked: Any = {"model": "base", "messages": [{"role": "user", "content": "When do goods go back?"}]}
    quote = {"type": "json_schema", "json_schema": {"name": "quote", "schema": {"const": QUOTE}}}
    answer = client.chat.completions.create(**asked, response_format=quote)
    [document] = (answer.model_extra or {})["documents"]
    assert document["source"].endswith("returns.md") and document["document"] == 1
    [citation] = (answer.choices[0].message.model_extra or {})["citations"]
    assert citation["document"] == 1 and citation["quote"] == "within 30 days"
    assert answer.usage is not None and answer.usage.prompt_tokens > 100  # bytes: the question has 22


def test_fifty_at_once(server: Serving, client: openai.OpenAI) -> None:
    """Whole and streamed, chat and plain, of all adapters: each as if it were alone."""

    def asked(number: int) -> tuple[bool, dict[str, Any]]:
        words = "word " * (1 + number % 7)
        common = {"model": NAMES[number % len(NAMES)] or "base", "max_tokens": 10 + number % 5, **EXACT}
        chat = number % 3 == 0
        said = {"messages": [{"role": "user", "content": words}]} if chat else {"prompt": words}
        return chat, {**common, **said}

    def alone(number: int) -> str:
        chat, body = asked(number)
        if chat:
            return client.chat.completions.create(**body).choices[0].message.content
        return client.completions.create(**body).choices[0].text

    async def one(parallel: openai.AsyncOpenAI, number: int) -> str:
        chat, body = asked(number)
        if number % 2 and chat:
            parts = await parallel.chat.completions.create(**body, stream=True)
            return "".join([part.choices[0].delta.content or "" async for part in parts])
        if number % 2:
            texts = await parallel.completions.create(**body, stream=True)
            return "".join([part.choices[0].text async for part in texts])
        if chat:
            return (await parallel.chat.completions.create(**body)).choices[0].message.content
        return (await parallel.completions.create(**body)).choices[0].text

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=ROOT, max_retries=0) as parallel:
            return await asyncio.gather(*(one(parallel, number) for number in range(50)))

    assert asyncio.run(together()) == [alone(number) for number in range(50)]


# --- clients that leave, and one that is slow ---


def test_clients_that_leave_give_their_pages_back(server: Serving) -> None:
    """In decode (four, all rows), in the queue (one), and in the prefill of a long prompt."""

    def pages(found: dict[str, float], *owners: str) -> float:
        return sum(found[f'jora_pool_pages{{owner="{owner}"}}'] for owner in owners)

    before = server.idle()
    everything = pages(before, "free", "kv", "adapter", "cache")
    assert pages(before, "kv") == 0
    decoding = [server.ask(prompt=letter) for letter in "abcd"]
    server.wait(lambda found: found["jora_requests_running"] == 4)
    waiting = server.ask(prompt="e")
    found = server.wait(lambda found: found["jora_requests_waiting"] == 1)
    assert pages(found, "kv") > 0 and pages(found, "free", "kv", "adapter", "cache") == everything
    waiting.close()
    found = server.wait(lambda found: found["jora_requests_waiting"] == 0)
    assert found["jora_requests_running"] == 4
    for connection in decoding:
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.close()
    found = server.idle()
    assert pages(found, "kv") == 0 and pages(found, "free", "kv", "adapter", "cache") == everything
    prefill = server.ask(prompt="p" * (POSITIONS - 50), max_tokens=50)
    server.wait(lambda found: found["jora_requests_running"] == 1)
    prefill.close()
    after = server.idle()
    assert pages(after, "kv") == 0 and pages(after, "free", "kv", "adapter", "cache") == everything
    name = "jora_generated_tokens_total"
    assert after[name] - found[name] < 25  # of 50: it left in its prefill, or soon after on a busy machine
    cancelled = 'jora_requests_total{outcome="cancelled"}'
    assert after[cancelled] == before.get(cancelled, 0) + 6


def test_a_slow_reader_holds_up_nobody(server: Serving, client: openai.OpenAI) -> None:
    count = 1500
    with server.ask(receive_bytes=4096, prompt="a", max_tokens=count, logprobs=20) as connection:
        server.wait(lambda found: found["jora_requests_running"] == 1)
        for _ in range(3):
            assert client.completions.create(model="one", prompt="b", max_tokens=5, **EXACT).usage
        server.idle()  # its own answer is whole by now, too
        data = b""
        while b"data: [DONE]" not in data[-200:]:
            piece = connection.recv(1 << 20)
            assert piece
            data += piece
    events = [json.loads(line[6:]) for line in data.decode().splitlines() if line.startswith('data: {"id"')]
    assert sum(len(event["choices"][0]["logprobs"]["tokens"]) for event in events if event["choices"]) == count
    assert events[-1]["choices"][0]["finish_reason"] == "length"


# --- adapters that come and go, good ones and others ---


def test_an_adapter_is_loaded_asked_and_unloaded(
    server: Serving, client: openai.OpenAI, directory: Path, expected: Callable[[str | None, str, int], str]
) -> None:
    (directory / "adapters" / ".new").mkdir()  # a name with a dot is not served by itself
    shutil.copytree(directory / "adapters" / "one", directory / "adapters" / ".new" / "fresh")
    with server.http() as http:
        loaded = http.post("/v1/load_lora_adapter", json={"lora_name": "fresh", "lora_path": ".new/fresh"})
        assert loaded.status_code == 200, loaded.text
        answer = client.completions.create(model="fresh", prompt="Hello", max_tokens=12, **EXACT)
        assert answer.choices[0].text == expected("one", "Hello", 12)
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "fresh"}).status_code == 200
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="fresh", prompt="Hello", max_tokens=12)
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "fresh"}).status_code == 404


def test_an_adapter_that_is_put_into_the_directory_is_served(
    client: openai.OpenAI, directory: Path, expected: Callable[[str | None, str, int], str]
) -> None:
    shutil.copytree(directory / "adapters" / "one", directory / "outside")
    os.rename(directory / "outside", directory / "adapters" / "later")
    answer = client.completions.create(model="later", prompt="Hello", max_tokens=12, **EXACT)
    assert answer.choices[0].text == expected("one", "Hello", 12)
    shutil.rmtree(directory / "adapters" / "later")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="later", prompt="Hello", max_tokens=12)


def _huge_header(path: Path) -> None:
    weights = path / "adapter_model.safetensors"
    weights.write_bytes((1 << 62).to_bytes(8, "little") + weights.read_bytes()[8:])


def _nan(path: Path) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    next(iter(tensors.values())).fill(np.nan)
    save_file(tensors, path / "adapter_model.safetensors")


def _another_base(path: Path) -> None:
    config = json.loads((path / "jora.json").read_text())
    config["base"] = {"name": "other", "fingerprint": "0" * 64}
    (path / "jora.json").write_text(json.dumps(config))


def _pickled(path: Path) -> None:
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")


def _link(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to("/etc")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_huge_header, "header"),
        (_nan, "NaN"),
        (_another_base, "another base"),
        (_pickled, "pickled"),
        (_link, "outside|within"),
    ],
)
def test_a_bad_adapter_is_refused_in_one_line(
    server: Serving, client: openai.OpenAI, directory: Path, spoil: Callable[[Path], None], message: str
) -> None:
    path = directory / "adapters" / ".bad"
    shutil.copytree(directory / "adapters" / "one", path)
    before = server.idle()
    try:
        spoil(path)
        with server.http() as http:
            refused = http.post("/v1/load_lora_adapter", json={"lora_name": "bad", "lora_path": ".bad"})
    finally:
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    _is_refused(refused, message, directory)
    after = server.idle()
    assert {n: v for n, v in after.items() if "pages" in n} == {n: v for n, v in before.items() if "pages" in n}
    assert client.completions.create(model="one", prompt="still here", max_tokens=3).choices


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("../../evil", "one", "name"),
        ("a/../../b", "one", "name"),
        ("/etc/passwd", "one", "name"),
        ("bad", "../../etc", "outside|within"),
        ("bad", "/etc", "outside|within"),
        ("bad", "one/../../keys.yaml", "outside|within"),
        ("bad", "absent", "no directory|no such"),
        ("bad\n500 injected", "one", "name"),
    ],
)
def test_names_and_paths_stay_in_the_directory(
    server: Serving, directory: Path, name: str, path: str, message: str
) -> None:
    with server.http() as http:
        refused = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})
        asked = http.post("/v1/completions", json={"model": name, "prompt": "a"})
    _is_refused(refused, message, directory)
    assert asked.status_code in (400, 404) and "\n" not in asked.json()["error"]["message"]


def _is_refused(response: httpx.Response, message: str, directory: Path) -> None:
    assert response.status_code == 400, response.text
    told = response.json()["error"]["message"]
    assert any(part in told for part in message.split("|")), told
    assert "\n" not in told and len(told) < 500 and str(directory) not in told


# --- keys ---


def test_keys(server: Serving) -> None:
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/health", timeout=SECONDS).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        server.openai("wrong").models.list()
    with server.openai(ACME) as acme, server.openai(SLOW) as slow, server.http(ACME) as http:
        assert {model.id for model in acme.models.list()} == {"base", "team/eight"}
        assert acme.completions.create(model="team/eight", prompt="a", max_tokens=2).choices
        with pytest.raises(openai.PermissionDeniedError):
            acme.completions.create(model="one", prompt="a")
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "one"}).status_code == 403
        slow.completions.create(model="base", prompt="a", max_tokens=2)
        with pytest.raises(openai.RateLimitError) as refused:
            slow.completions.create(model="base", prompt="a", max_tokens=2)
    assert int(refused.value.response.headers["retry-after"]) > 100
    assert server.metrics()['jora_client_service_tokens_total{client="acme"}'] > 0


# --- the end ---


def test_sigterm_under_load_finishes_what_was_taken(directory: Path) -> None:
    """Two run and two wait when it comes: all four get their whole answers; who comes later gets 503."""
    small = ("--max-batch", "2", "--chunk", "16", "--rank-buckets", "1", "--targets", "q_proj", "--pool-gb", "0.02")
    log = directory / "drain-log"
    with serving(log, "--model", str(directory / "base"), *small) as server:
        assert "no adapters yet" in server.told[0]
        answers: dict[int, httpx.Response] = {}
        body = {"model": "base", "max_tokens": 800, "ignore_eos": True, "stream": True}

        def ask(number: int) -> None:
            prompt = "a" * (number + 1)
            answers[number] = httpx.post(f"{server.url}/v1/completions", json={**body, "prompt": prompt}, timeout=60)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        server.wait(lambda found: found["jora_requests_running"] == found["jora_requests_waiting"] == 2)
        server.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + 10
        while httpx.get(f"{server.url}/ready", timeout=SECONDS).status_code == 200:
            assert time.monotonic() < until
        late = httpx.post(f"{server.url}/v1/completions", json={**body, "prompt": "a"}, timeout=SECONDS)
        assert late.status_code == 503 and "retry-after" in late.headers and not answers
        assert httpx.get(f"{server.url}/health", timeout=SECONDS).status_code == 200
        for thread in threads:
            thread.join()
        assert server.process.wait(timeout=20) == 0
        for answer in answers.values():
            assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
            assert '"finish_reason":"length"' in answer.text and '"error"' not in answer.text
        host, port = server.url.removeprefix("http://").split(":")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)))
    assert "SIGTERM" in log.read_text() and "Traceback" not in log.read_text()
