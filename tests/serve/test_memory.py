"""Where memory goes: the numbers are those of the arrays that will be made."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from tests.bytewise import bytewise_llama
from tests.encoders.tiny_encoders import tiny_encoder

import jora
from jora.encoders import open_encoder
from jora.errors import InputError
from jora.serve import memory
from jora.serve.adapters.active import new_active
from jora.serve.options import EngineOptions

GIB = 1 << 30


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return bytewise_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(path):
    return jora.load_model(path)


@pytest.mark.parametrize("mesh", [None, "tensor=2", "fsdp=2,tensor=2"])
def test_weights_are_what_a_device_holds(path, mesh):
    model = jora.load_model(path, mesh=mesh)
    device = model.layout.mesh.devices.flat[0]
    held = sum(s.data.nbytes for a in jax.tree.leaves(model.params) for s in a.addressable_shards if s.device == device)
    assert memory.weight_bytes(model) == held


def test_active_set_is_its_arrays(model):
    c, layout, targets = model.config, model.layout, ("q_proj", "down_proj")
    options = EngineOptions(rank_buckets=(4, 32), product_buckets=(3,), targets=targets)
    active = new_active(c, layout, targets, ranks=32, products=3, dtype=np.float32)
    made = sum(x.nbytes for x in jax.tree.leaves((active.a, active.b, active.u, active.v)))
    assert memory.active_bytes(c, layout, options, 4) == made
    everything = memory.active_bytes(c, layout, EngineOptions(rank_buckets=(4, 32), product_buckets=(3,)), 4)
    assert everything > 2 * memory.active_bytes(c, layout, options, 4)


def test_the_model_width_is_whole_and_heads_are_cut(path):
    model = jora.load_model(path, mesh="tensor=2")
    c, options = model.config, EngineOptions(rank_buckets=(8,), targets=("q_proj",))
    assert memory.active_bytes(c, model.layout, options, 4) == 4 * c.layers * 8 * (c.embed + c.heads * c.head_dim // 2)


def test_a_host_gives_half_and_at_most_eight_gib(model, monkeypatch):
    options = EngineOptions()
    for free, expected in ((4 * GIB, 0.5), (100 * GIB, None)):
        monkeypatch.setattr(memory, "free_bytes", lambda layout, free=free: free)
        planned = memory.plan(model, options)
        room = 0.9 * free - planned.active - planned.steps
        assert planned.pool == (8 * GIB if expected is None else int(expected * int(room)))
        assert planned.pool + planned.active + planned.steps + planned.rest == free
    assert memory.with_pool(model, options).pool_bytes == 8 * GIB


def test_an_accelerator_gives_all_that_is_left(model, monkeypatch):
    monkeypatch.setattr(memory, "_on_host", lambda layout: False)
    monkeypatch.setattr(memory, "free_bytes", lambda layout: 70 * GIB)
    planned = memory.plan(model, EngineOptions())
    assert planned.pool == int(0.9 * 70 * GIB) - planned.active - planned.steps


def test_a_pool_of_ones_own(model, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda layout: 4 * GIB)
    options = EngineOptions(pool_bytes=GIB)
    assert memory.plan(model, options).pool == GIB
    assert memory.with_pool(model, options) is options
    with pytest.raises(InputError, match="no room for the page pool"):
        memory.plan(model, EngineOptions(pool_bytes=5 * GIB))
    with pytest.raises(InputError, match="no room"):
        memory.plan(model, EngineOptions(max_batch=10**7))


def test_encoders_have_a_line_of_their_own(model, monkeypatch):
    path = tiny_encoder("bert")[1]
    monkeypatch.setattr(memory, "free_bytes", lambda layout: 4 * GIB)
    options = EngineOptions(soft_tokens=4, encoders=(path, path))
    with_them, without = (memory.plan(model, each) for each in (options, replace(options, encoders=())))
    encoder = open_encoder(path, keep=True)
    held = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(encoder._load()))
    assert held <= with_them.encoders < 1.2 * held and with_them.parts()["encoders"] == with_them.encoders
    assert without.pool - with_them.pool == pytest.approx(with_them.encoders / 2, abs=1)
    used = with_them.pool + with_them.active + with_them.steps + with_them.encoders
    assert used + with_them.rest == 4 * GIB
    assert "encoders" not in without.parts() and not memory.plan(model, replace(options, soft_tokens=0)).encoders
    with pytest.raises(InputError, match=r"of them for active adapters.*for encoders"):
        memory.plan(model, replace(options, pool_bytes=5 * GIB))
    with pytest.raises(InputError, match="no-encoder"):
        memory.plan(model, replace(options, encoders=("./no-encoder",)))


def test_sampling_is_counted(model):
    c, layout = model.config, model.layout
    few, many = (memory.steps_bytes(c, layout, EngineOptions(max_batch=n), 4) for n in (1, 101))
    assert many - few >= 100 * c.padded_vocab * np.dtype(np.float32).itemsize


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 0},
        {"pool_bytes": 0},
        {"soft_tokens": -1},
        {"host_adapters_bytes": -1},
        {"cluster": -1},
        {"slo": 0.0},
        {"rank_buckets": (8, 4)},
    ],
)
def test_sizes_that_are_none_are_refused_by_name(options):
    with pytest.raises(InputError, match=next(iter(options))):
        EngineOptions(**options)
