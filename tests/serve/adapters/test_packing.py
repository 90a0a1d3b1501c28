"""The stream of an adapter: every device's own part to the bit, its size, and what pages of it waste."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jora.errors import InputError
from jora.methods.lora import site_shape
from jora.methods.served import LowRank, Products, Served
from jora.models.config import ATTENTION_LINEARS, LINEARS, ModelConfig
from jora.models.families import config_from_hf
from jora.serve.adapters.packing import Spec, TargetSpec, elements, pack, parts, spec_of
from jora.serve.pages.layout import PoolLayout
from jora.sharding import parse_mesh, single_device
from jora.train.estimation import simulated_layout


def config(model_type: str, heads: tuple[int, int, int], embed: int, mlp: int, layers: int, **more: Any) -> ModelConfig:
    sizes = dict(num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=heads[2])
    sizes |= dict(hidden_size=embed, intermediate_size=mlp, num_hidden_layers=layers, vocab_size=1024)
    return config_from_hf({"model_type": model_type, "hidden_act": "silu", **sizes, **more})


SMALL = config("llama", (8, 2, 5), 36, 48, 3)
MODELS = {
    "llama 7b": config("llama", (32, 32, 128), 4096, 11008, 32),
    "llama 3 8b": config("llama", (32, 8, 128), 4096, 14336, 32),
    "gemma 3 270m": config(
        "gemma3_text",
        (4, 1, 256),
        640,
        2048,
        18,
        sliding_window=512,
        query_pre_attn_scalar=256,
        hidden_activation="gelu_pytorch_tanh",
        layer_types=[("full" if i % 6 == 5 else "sliding") + "_attention" for i in range(18)],
    ),
    "qwen 2.5 7b": config("qwen2", (28, 4, 128), 3584, 18944, 28),
    "qwen 3 8b": config("qwen3", (32, 8, 128), 4096, 12288, 36),
}


def served(seed: int = 0) -> Served:
    """Ranks and products that differ by target; every number another."""
    draw = np.random.default_rng(seed)

    def pair(target: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        site = site_shape(SMALL, target)
        sizes = ((SMALL.layers, count, *site.in_shape), (SMALL.layers, count, *site.out_shape))
        a, b = (draw.standard_normal(size).astype(np.float32) for size in sizes)
        return a, b

    low_rank = {t: LowRank(*pair(t, r)) for t, r in (("down_proj", 3), ("q_proj", 5), ("k_proj", 2))}
    products = {t: Products(*pair(t, j)) for t, j in (("o_proj", 2), ("k_proj", 1))}
    return Served(low_rank, products)


def test_order_on_one_device() -> None:
    adapter = served()
    assert spec_of(adapter) == Spec(
        (
            TargetSpec("q_proj", 5, 0),
            TargetSpec("k_proj", 2, 1),
            TargetSpec("o_proj", 0, 2),
            TargetSpec("down_proj", 3, 0),
        )
    )
    low, more = adapter.low_rank, adapter.products
    arrays = [*low["q_proj"], *low["k_proj"], *more["k_proj"], *more["o_proj"], *low["down_proj"]]
    expected = np.concatenate([array.reshape(-1) for array in arrays])
    np.testing.assert_array_equal(pack(adapter, SMALL, single_device(), "float32"), expected[None])
    half = pack(adapter, SMALL, single_device(), "bfloat16")
    np.testing.assert_array_equal(half, expected.astype(jnp.bfloat16)[None])


@pytest.mark.parametrize("mesh", ["tensor=2", "tensor=4"])
def test_every_device_has_its_part(mesh: str) -> None:
    """Two KV heads: on four devices each of them is on two, and the query heads of its group are divided."""
    layout, adapter = simulated_layout(parse_mesh(mesh), SMALL), served()
    stream = pack(adapter, SMALL, layout, "float32")
    kv, rep = (layout.mesh.shape[axis] for axis in ("tensor_kv", "tensor_rep"))
    assert stream.shape == (kv * rep, elements(spec_of(adapter), SMALL, layout))
    heads, group, mlp = 2 // kv, 4 // rep, 48 // (kv * rep)
    for shard in range(kv * rep):
        own = slice(shard // rep * heads, (shard // rep + 1) * heads)
        ours = slice(shard % rep * group, (shard % rep + 1) * group)
        low, more = adapter.low_rank, adapter.products
        arrays = [
            low["q_proj"].a,
            low["q_proj"].b[:, :, own, ours],
            low["k_proj"].a,
            low["k_proj"].b[:, :, own],
            more["k_proj"].u,
            more["k_proj"].v[:, :, own],
            more["o_proj"].u[:, :, own, ours],
            more["o_proj"].v,
            low["down_proj"].a[:, :, shard * mlp : (shard + 1) * mlp],
            low["down_proj"].b,
        ]
        np.testing.assert_array_equal(stream[shard], np.concatenate([array.reshape(-1) for array in arrays]))


def test_counts() -> None:
    """Llama-2-7B, rank 8 on q, k, v, o: 32 layers x 4 x 8 x (4096 + 4096)."""
    spec = Spec(tuple(TargetSpec(target, 8, 0) for target in ATTENTION_LINEARS))
    assert elements(spec, MODELS["llama 7b"], single_device()) == 8_388_608
    assert [part.name for part in parts(spec, MODELS["llama 7b"])] == ["a", "b"] * 4


@pytest.mark.parametrize("mesh", ["tensor=1", "tensor=2", "tensor=4"])
@pytest.mark.parametrize("name", MODELS)
def test_pages_waste_little(name: str, mesh: str) -> None:
    """At most 5 % of an adapter of rank 8 on all linears, over all devices and against what it is on one."""
    model = MODELS[name]
    layout = simulated_layout(parse_mesh(mesh), model)
    spec = Spec(tuple(TargetSpec(target, 8, 0) for target in LINEARS))
    pool = PoolLayout.of(model, layout, "bfloat16", 16)
    own = elements(spec, model, layout)
    assert own <= pool.adapter_pages(own) * pool.elements <= 1.05 * own


def test_what_does_not_fit_is_refused() -> None:
    adapter = served()
    adapter.low_rank["q_proj"].a[1, 2, 3] = 1e6
    assert np.isfinite(pack(adapter, SMALL, single_device(), "bfloat16").astype(np.float32)).all()
    with pytest.raises(InputError, match="mine: its factors are beyond what float16 holds"):
        pack(adapter, SMALL, single_device(), "float16", "mine")
    spec = spec_of(adapter)
    with pytest.raises(InputError, match="mine changes k_proj, but the server was started for q_proj, o_proj, down"):
        spec.check("mine", ("q_proj", "o_proj", "down_proj"), 5, 2)
    with pytest.raises(InputError, match="rank 5 is above 4, the largest of rank_buckets"):
        spec.check("mine", LINEARS, 4, 2)
    with pytest.raises(InputError, match="its 2 base products are above 1, the largest of product_buckets"):
        spec.check("mine", LINEARS, 5, 1)
    with pytest.raises(InputError, match="low-rank factors beside 2 base products"):
        spec.check("mine", LINEARS, 5, 2)
