"""The engine on a mesh and on quantised bases: the tokens of one device, and those of `jora.generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tests.serve.bases import base, greedy, hf_base, merged, randomised
from tests.serve.engines import ask, prompt, run, tokens

import jora
from jora.inference.tokens import generate_tokens
from jora.methods.method import Method
from jora.models.config import LINEARS
from jora.models.model import Model
from jora.quant import Kind
from jora.serve.engine import Engine
from jora.serve.options import EngineOptions

# Column-parallel and row-parallel linears, low ranks and products beside each other.
METHODS: dict[str, Method] = {
    "all": jora.LoRA(rank=3, targets="all-linear"),
    "rows": jora.LoRA(rank=5, targets=("o_proj", "down_proj")),
    "columns": jora.LoRA(rank=2, targets=("q_proj", "v_proj", "up_proj")),
    "dora": jora.DoRA(rank=2, targets=("v_proj", "o_proj")),
    "flora": jora.FLoRA(rank=3, targets=("k_proj", "down_proj")),
}
OPTIONS = EngineOptions(
    pool_bytes=1 << 20,
    page_tokens=4,
    max_batch=6,
    chunk=16,
    rank_buckets=(16,),
    product_buckets=(8,),
    targets=LINEARS,
    max_length=96,
)


def shelf(directory: Path, family: str, names: Sequence[str]) -> None:
    for seed, name in enumerate(names):
        jora.save_adapter(randomised(METHODS[name], base(family), seed, 0.3), directory / name)


@contextmanager
def serving(model: Model, directory: Path, options: EngineOptions) -> Iterator[Engine]:
    engine = Engine(model, options, directory)
    try:
        yield engine
    finally:
        engine.host.close()


def check_mesh(directory: Path, family: str, mesh: str, names: Sequence[str], options: EngineOptions) -> None:
    """These adapters and the base in one batch, in prefill and decode; no device has another one's part of the pool."""
    shelf(directory, family, names)
    requests = [ask(f"{i}", prompt(i, 5 + 9 * i), name) for i, name in enumerate([None, *names])]
    with serving(base(family, mesh), directory, options) as engine:
        shards = engine.executor.pool.addressable_shards
        assert len(shards) == engine.pool_layout.shards == int(mesh[-1])
        assert {shard.data.shape[1] for shard in shards} == {1}
        events = run(engine, *requests)
    for request in requests:
        model = merged(family, None if request.adapter is None else directory / request.adapter)
        assert tokens(events[request.id]) == greedy(model, request.prompt, 8), request.adapter
    assert len({tuple(tokens(each)) for each in events.values()}) == len(requests)


def test_two_devices_give_the_tokens_of_each_request_alone(tmp_path: Path) -> None:
    check_mesh(tmp_path, "llama2", "tensor=2", ("all", "rows"), replace(OPTIONS, product_buckets=()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        ("llama3", "tensor=4"),  # two KV heads, each of which two devices hold
        ("gemma3", "tensor=2"),  # windows beside full layers, one KV head
    ],
)
def test_a_mesh_gives_the_tokens_of_each_request_alone(tmp_path: Path, family: str, mesh: str) -> None:
    check_mesh(tmp_path, family, mesh, ("rows", "dora", "flora"), OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mesh"), [("int8", None), ("int8", "tensor=2"), ("nf4", None)])
def test_a_quantised_base_gives_the_tokens_of_generate(tmp_path: Path, kind: Kind, mesh: str | None) -> None:
    shelf(tmp_path, "llama2", ("all", "rows"))
    model = jora.load_model(hf_base()[1], quant=kind, mesh=mesh)
    requests = [ask(f"{i}", prompt(i, 9 + 3 * i), name, max_tokens=16) for i, name in enumerate([None, "all", "rows"])]
    with serving(model, tmp_path, replace(OPTIONS, product_buckets=())) as engine:
        events = run(engine, *requests)
    for request in requests:
        adapter = None if request.adapter is None else jora.load_adapter(tmp_path / request.adapter, model)
        [expected] = generate_tokens(model, [request.prompt], adapter, max_new_tokens=16, ends=())
        assert tokens(events[request.id]) == expected, request.adapter
    if kind == "nf4":
        assert tokens(events["0"]) != greedy(hf_base()[0], requests[0].prompt, 16)
