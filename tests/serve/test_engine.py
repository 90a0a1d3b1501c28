"""The engine as a whole, against each request run alone on a model that PEFT or numpy merged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.serve.bases import VOCAB, base, greedy, merged, randomised
from tests.serve.engines import compilations, prompt, step, tokens

import jora
from jora.methods.method import Method
from jora.serve.engine import Engine
from jora.serve.options import EngineOptions
from jora.serve.requests import Event, Request, SamplingOptions

QV, MLP = ("q_proj", "v_proj"), ("gate_proj", "down_proj")
METHODS: dict[str, Method] = {
    "r1": jora.LoRA(rank=1, targets=QV),
    "r3": jora.LoRA(rank=3, targets="all-linear", use_rslora=True),
    "r8": jora.LoRA(rank=8, targets=MLP),
    "r16": jora.LoRA(rank=16, targets="all-linear", rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 7}),
    "r32": jora.LoRA(rank=32, targets=("o_proj",)),
    "r64": jora.LoRA(rank=64, alpha=16, targets=(*QV, "up_proj")),
    "layer1": jora.LoRA(rank=4, layers_to_transform=1),
    "dora": jora.DoRA(rank=4, targets=(*QV, "down_proj")),
    "flora": jora.FLoRA(rank=3, targets=(*QV, "up_proj")),
    "nola": jora.NOLA(rank=4, bases=16),
    "ia3": jora.IA3(),
    "vera": jora.VeRA(rank=8),
}
OPTIONS = EngineOptions(
    pool_bytes=4 << 20,
    page_tokens=8,
    max_batch=6,
    chunk=32,
    rank_buckets=(128,),
    product_buckets=(8,),
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    max_length=640,
)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters")
    for seed, (name, method) in enumerate(METHODS.items()):
        spread = 0.05 if name in ("nola", "vera") else 0.3
        jora.save_adapter(randomised(method, base(), seed, spread), directory / name)
    return directory


@pytest.fixture(scope="module")
def engine(adapters: Path) -> Iterator[Engine]:
    engine = Engine(base(), OPTIONS, adapters)
    engine.warm_up()
    yield engine
    engine.close()


def run_arriving(engine: Engine, requests: list[Request]) -> dict[str, list[Event]]:
    """Every event of each request, two of which arrive at each step."""
    events: dict[str, list[Event]] = {request.id: [] for request in requests}
    waiting = list(requests)
    while waiting or engine.has_work:
        for request in waiting[:2]:
            engine.submit(request)
        del waiting[:2]
        for event in step(engine):
            events[event.request].append(event)
    return events


@pytest.mark.slow  # most of it is the warm-up of many sizes
def test_a_mixed_batch_gives_what_each_request_gives_alone(engine: Engine, adapters: Path) -> None:
    """Twelve adapters of ranks 1 to 64 on differing targets and of six methods, and the base; lengths 1 to 500."""
    lengths = [1, 500, 7, 8, 9, 33, 64, 100, 257, 31, 2, 40, 300, 5]
    names = [*METHODS, None, "r3"]
    requests = [
        Request(f"{i}", prompt(i, length), SamplingOptions(max_tokens=12, temperature=0.0, ignore_eos=True), name)
        for i, (name, length) in enumerate(zip(names, lengths, strict=True))
    ]
    with compilations() as compiled:
        events = run_arriving(engine, requests)
    assert not compiled
    for request in requests:
        model = merged("llama2", None if request.adapter is None else adapters / request.adapter)
        assert tokens(events[request.id]) == greedy(model, request.prompt, 12), request.adapter
        assert events[request.id][-1].finish == "length"
        assert events[request.id][-1].usage[:3] == (len(request.prompt), 0, 12)
    assert engine.stats().running == 0
    assert max(max(tokens(each)) for each in events.values()) < VOCAB
