"""`jora serve --ray` as a user runs it: two replicas, one of which is killed under load."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
from tests.serve.bases import base, greedy, hf_base, merged, randomised
from tests.serve.engines import QV

import jora

pytest.importorskip("ray", reason="jora serve --ray needs the extra `ray`")
pytestmark = pytest.mark.slow

SRC = Path(jora.__file__).parents[1]
BATCH, COUNT, LENGTH = 4, 16, 1000
SIZES = f"--max-batch {BATCH} --chunk 16 --page-tokens 16 --rank-buckets 8 --pool-gb 0.02 --targets {' '.join(QV)}"
REPLICA = "ray::ServeReplica"


class Serving(NamedTuple):
    """A server with two replicas, and the directory of its adapters a0, a1, ..."""

    process: subprocess.Popen[str]
    http: httpx.Client
    adapters: Path

    def ask(self, model: str, tokens: int = 8, **more: Any) -> httpx.Response:
        body = {"model": model, "prompt": "hello", "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}
        return self.http.post("/v1/completions", json=body)

    def text(self, model: str, tokens: int = 8) -> str:
        response = self.ask(model, tokens)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    def stream(self, model: str, tokens: int, begun: Callable[[], None]) -> tuple[str, str | None]:
        """The text that came, and the code of the error that ended it."""
        body = {"model": model, "prompt": "hello", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        text, code = "", None
        with self.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        code = chunk["error"].get("code")
                    else:
                        begun()
                        text += chunk["choices"][0]["text"]
        return text, code

    def metric(self, name: str, **labels: str) -> list[float]:
        """The values of a metric whose labels have these values."""
        found = []
        for line in self.http.get("/metrics").text.splitlines():
            match = re.fullmatch(rf"{name}(?:{{(.*)}})? (\S+)", line)
            if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
                found.append(float(match[2]))
        return found

    def replicas(self) -> list[psutil.Process]:
        return [each for each in psutil.Process(self.process.pid).children(recursive=True) if _is_replica(each)]


def _is_replica(process: psutil.Process) -> bool:
    try:
        return " ".join(process.cmdline()).startswith(REPLICA)
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come true in time"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    directory = tmp_path_factory.mktemp("adapters")
    for seed in range(COUNT):
        adapter = randomised(jora.LoRA(rank=1 + seed % 2, targets=QV), base(), seed, 0.5)
        jora.save_adapter(adapter, directory / f"a{seed}")
    command = f"-m jora serve --ray --replicas 2 --port 0 --allow-adapter-loading {SIZES}".split()
    command += ["--model", hf_base()[1], "--adapters", str(directory), "--served-model-name", "base"]
    log = tmp_path_factory.mktemp("log") / "stderr"
    kept = {"JAX_COMPILATION_CACHE_DIR": str(log.parent), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env = {**os.environ, **kept, "PYTHONPATH": str(SRC), "JAX_PLATFORMS": "cpu"}
    env.pop("RAY_ADDRESS", None)
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, *command], env=env, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            address = next((line.split()[1] for line in process.stdout if line.startswith("at ")), None)
            assert address is not None, log.read_text()
            with httpx.Client(base_url=address.removesuffix("/v1"), timeout=180) as http:
                wait_for(lambda: _ready(http), 10)
                yield Serving(process, http, directory)
        finally:
            if process.poll() is None:
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    each.kill()


def _ready(http: httpx.Client) -> bool:
    try:
        return http.get("/ready").status_code == 200
    except httpx.ConnectError:
        return False


def together(count: int, function: Callable[[int], Any]) -> list[Future[Any]]:
    pool = ThreadPoolExecutor(count)
    futures = [pool.submit(function, at) for at in range(count)]
    pool.shutdown(wait=False)
    return futures


def test_an_adapter_stays_with_a_replica_and_the_base_is_everywhere(serving: Serving) -> None:
    names = [f"a{at}" for at in range(COUNT)]
    for _ in range(3):
        for name in names:
            serving.text(name, 1)
    # Each adapter was loaded once: all of its requests went to one replica. Both have some of them.
    assert serving.metric("jora_adapter_loads_total") == [COUNT]
    held = serving.metric("jora_replica_adapters", state="host")
    assert len(held) == 2 and sum(held) == COUNT and min(held) > 0
    asked = together(2 * BATCH, lambda _: serving.text("base", 900))
    wait_for(lambda: serving.metric("jora_replica_requests_running") == [BATCH, BATCH], 20)
    assert len({future.result() for future in asked}) == 1
    # One adapter that everybody wants does not wait for one replica.
    asked = together(2 * BATCH, lambda _: serving.text("a3", 900))
    wait_for(lambda: min(serving.metric("jora_replica_requests_running")) > 0, 20)
    assert len({future.result() for future in asked}) == 1


def test_answers_are_those_of_the_merged_model(serving: Serving) -> None:
    for name, directory in (("base", None), ("a1", serving.adapters / "a1")):
        wanted = greedy(merged("llama2", directory), base().tokenizer("hello")["input_ids"], 8)
        assert serving.text(name) == base().tokenizer.decode(wanted)


def test_who_leaves_takes_nothing_of_a_replica(serving: Serving) -> None:
    before = serving.metric("jora_client_service_tokens_total")[0]

    def leave(at: int) -> None:
        body = {"model": "base", "prompt": "bye", "max_tokens": LENGTH, "ignore_eos": True, "n": 8}
        soon = httpx.Timeout(30, read=0.5)
        with httpx.Client(base_url=serving.http.base_url, timeout=soon) as http, suppress(httpx.ReadTimeout):
            if at % 2:
                with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                    next(response.iter_lines())
            else:
                http.post("/v1/completions", json=body)

    def busy() -> float:
        return sum(serving.metric("jora_requests_waiting") + serving.metric("jora_requests_running"))

    for future in together(6, leave):
        future.result()
    wait_for(lambda: busy() == 0, 10)
    # 48 answers of 1000 tokens, at 2 each, were asked for.
    assert serving.metric("jora_client_service_tokens_total")[0] - before < 48_000


def test_all_replicas_load_and_unload(serving: Serving) -> None:
    def known() -> list[float]:
        return serving.metric("jora_replica_adapters", state="known")

    new = {"lora_name": "new", "lora_path": "a1"}
    assert serving.http.post("/v1/load_lora_adapter", json=new).status_code == 200
    assert known() == [COUNT + 1] * 2 and serving.text("new") == serving.text("a1") != serving.text("base")
    refused = serving.http.post("/v1/load_lora_adapter", json={"lora_name": "bad", "lora_path": "../.."})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "lora_path"
    assert serving.http.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 200
    assert known() == [COUNT] * 2 and serving.ask("new").status_code == 404
    assert serving.http.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 404


def test_grammars_refusals_and_deadlines_cross_processes(serving: Serving) -> None:
    found = serving.ask("a2", 40, guided_regex="[0-9]{3}", ignore_eos=False)
    assert re.fullmatch("[0-9]{3}", found.json()["choices"][0]["text"])
    assert serving.ask("nobody").status_code == 404
    assert serving.ask("base", 10**6).status_code == 400
    assert serving.ask("base", LENGTH, timeout=0.05).status_code == 504
    assert serving.ask("base", n=3).json()["usage"]["completion_tokens"] == 24


def test_a_killed_replica_loses_only_what_has_begun(serving: Serving) -> None:
    for at in range(8):
        named = {"lora_name": f"n{at}", "lora_path": f"a{at}"}
        assert serving.http.post("/v1/load_lora_adapter", json=named).status_code == 200
        assert serving.http.post("/v1/unload_lora_adapter", json={"lora_name": f"a{at + 8}"}).status_code == 200
    wanted = {name: serving.text(name, LENGTH) for name in ("base", "a0", "a1", "a2")}
    names = list(wanted)
    begun: set[int] = set()
    count = 4 * BATCH  # twice as many as can run
    streams = together(count, lambda at: serving.stream("base", LENGTH, lambda: begun.add(at)))
    wait_for(lambda: len(begun) >= 2 * BATCH, 20)
    whole = together(8, lambda at: serving.text(names[at % 4], LENGTH))
    killed = serving.replicas()
    assert len(killed) == 2
    killed[0].send_signal(signal.SIGKILL)
    ended = [future.result() for future in streams]
    lost = [text for text, code in ended if code is not None]
    assert {code for _, code in ended} == {None, "replica_lost"} and 0 < len(lost) <= 2 * BATCH
    assert all(len(text) > 0 and wanted["base"].startswith(text.rstrip("�")) for text in lost)
    assert all(text == wanted["base"] for text, code in ended if code is None)
    assert [future.result() for future in whole] == [wanted[names[at % 4]] for at in range(8)]

    # Its successor serves what was loaded, and not what was unloaded.
    wait_for(lambda: len(serving.metric("jora_replica_requests_running")) == 2, 60)
    for at in range(8):
        assert serving.text(f"n{at}") == serving.text(f"a{at}")
        assert serving.ask(f"a{at + 8}").status_code == 404
    assert {each.pid for each in serving.replicas()} - {each.pid for each in killed}


def test_sigterm_finishes_what_runs_and_leaves_no_process(serving: Serving) -> None:
    family = psutil.Process(serving.process.pid).children(recursive=True)
    (running,) = together(1, lambda _: serving.ask("a1", LENGTH))
    wait_for(lambda: sum(serving.metric("jora_requests_running")) == 1, 10)
    serving.process.send_signal(signal.SIGTERM)
    assert running.result().status_code == 200
    assert serving.process.wait(30) == 0
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert gone and not alive


@pytest.mark.filterwarnings("ignore:.* deprecated:pydantic.PydanticDeprecatedSince20")  # by ray.serve
def test_routing_bounds_the_load_of_a_replica() -> None:
    from jora.serve.ray.routing import order

    idle = {"x": 0, "y": 0, "z": 0}
    home = order("some adapter", idle, (), 4)[0]
    other = next(name for name in idle if name != home)
    assert {order(f"adapter {at}", idle, (), 4)[0] for at in range(50)} == set(idle)
    assert order("some adapter", {**idle, home: 3}, (), 4)[0] == home  # a batch has room
    assert order("some adapter", idle, {other}, 4)[0] == other
    assert order("some adapter", {**idle, other: 4}, {other}, 4)[-1] == other
    assert order("some adapter", {"x": 20, "y": 21, "z": 22} | {other: 23}, {other}, 4)[0] == other  # all are alike
    assert order("", {**idle, home: 1}, (), 4)[-1] == home


def test_without_ray_one_line_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError('no ray', name='ray')")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{SRC}"}
    command = [sys.executable, "-m", "jora", "serve", "--ray", "--port", "0", "--model", hf_base()[1]]
    found = subprocess.run(command, env=env, capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.count("\n") == 1 and "jora[ray]" in found.stderr


def test_a_cluster_that_is_not_there_is_found_out_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "jora", "serve", "--ray", "--port", "0", "--model", hf_base()[1]]
        env = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(SRC), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)  # Ray by itself: minutes
    assert done.returncode == 2, done.stderr
    assert f"RAY_ADDRESS={address}: no Ray cluster answers there" in done.stderr.splitlines()[-1]
