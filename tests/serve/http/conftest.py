"""A server on a port, with clients."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from tests.serve.http.fakes import FakeEngine, Running, default_script, make_server, served


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with served(make_server()) as found:
        yield found


@pytest.fixture
def engine(running: Running) -> FakeEngine:
    """The running server's engine, as if new."""
    fake = running.engine
    fake.wait(lambda: fake.running == 0)  # what the test before left behind
    fake.__init__(fake.tokenizer, default_script)  # type: ignore[misc]
    return fake


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[openai.OpenAI]:
    with running.openai() as found:
        yield found


@pytest.fixture(scope="module")
def http(running: Running) -> Iterator[httpx.Client]:
    with running.http() as found:
        yield found
