"""The engine on a GPU: a mixed batch gives what transformers gives each request alone with its adapter merged."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.gpu.devices import gpu
from tests.serve.bases import greedy, hf_base, merged, randomised
from tests.serve.engines import OPTIONS, QV, ask, prompt, run, tokens

import jora
from jora.methods.method import Method
from jora.models.model import Model
from jora.serve.engine import Engine
from jora.serve.requests import Event, Request

pytestmark = pytest.mark.gpu

# Together they fill the bucket of eight ranks.
METHODS: dict[str, Method] = {
    "one": jora.LoRA(rank=1, targets=("q_proj",)),
    "three": jora.LoRA(rank=3, targets=QV),
    "dora": jora.DoRA(rank=2, targets=QV),
    "nola": jora.NOLA(rank=2, bases=16, targets=QV),
}
# The base's prompt has two chunks. It ends before the others do: a batch of the base alone is a program of its own.
REQUESTS = [
    ask("a", prompt(0, 9), "one"),
    ask("b", prompt(1, 21), max_tokens=3),
    ask("c", prompt(2, 5), "three"),
    ask("d", prompt(3, 16), "dora"),
    ask("e", prompt(4, 12), "nola"),
]


@pytest.fixture(scope="module")
def model() -> Model:
    return jora.load_model(hf_base()[1], dtype="float32")


@pytest.fixture(scope="module")
def adapters(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters")
    for seed, (name, method) in enumerate(METHODS.items()):
        jora.save_adapter(randomised(method, model, seed, 0.05 if name == "nola" else 0.3), directory / name)
    return directory


def answers(model: Model, adapters: Path, requests: Sequence[Request]) -> dict[str, list[Event]]:
    """What a new engine, which compiles as it goes, gives for all requests at once."""
    with closing(Engine(model, replace(OPTIONS, max_batch=len(REQUESTS)), adapters)) as engine:
        assert {array.dtype for array in (engine.executor.pool, model.params.embed)} == {np.dtype(model.dtype)}
        assert engine.executor.pool.devices() == {gpu()}
        for request in requests:
            if request.adapter is not None:  # all on the host before the first step: one size of the active set
                engine.host.fetch(engine.catalogue.resolve(request.adapter))
        return run(engine, *requests)


def oracle(adapters: Path, request: Request) -> Any:
    """transformers' model with the request's adapter merged."""
    return merged("llama2", None if request.adapter is None else adapters / request.adapter)


def test_a_mixed_batch_gives_what_each_request_gives_alone(model: Model, adapters: Path) -> None:
    events = answers(model, adapters, REQUESTS)
    for request in REQUESTS:
        count = request.sampling.max_tokens
        assert count is not None
        assert tokens(events[request.id]) == greedy(oracle(adapters, request), request.prompt, count), request.adapter
        assert events[request.id][-1].finish == "length"


def test_a_16_bit_base_and_pool(adapters: Path) -> None:
    """Each token is about as likely as transformers says in fp32 of the same answer."""
    half = jora.load_model(hf_base()[1], dtype="bfloat16")
    requests = [replace(each, sampling=replace(each.sampling, logprobs=0)) for each in REQUESTS[:3]]
    events = answers(half, adapters, requests)
    for request in requests:
        answer = tokens(events[request.id])
        ids = torch.tensor([[*request.prompt, *answer]])
        with torch.no_grad():
            scores = oracle(adapters, request)(ids).logits[0, len(request.prompt) - 1 : -1].float()
        expected = torch.log_softmax(scores, -1)[torch.arange(len(answer)), torch.tensor(answer)].numpy()
        found = [each.logprob for event in events[request.id] for each in event.logprobs]
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.15 * float(scores.std()))
