"""The pool's layout: which layers share pages, and how large a page is."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jora.errors import InputError
from jora.models.families import config_from_hf
from jora.models.tensors import linear_shape
from jora.serve.pages.layout import PoolLayout, adapter_elements
from jora.sharding.layout import make_layout, single_device

GEMMA_270M = config_from_hf(
    {
        "model_type": "gemma3_text",
        "vocab_size": 262_144,
        "hidden_size": 640,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "num_hidden_layers": 18,
        "intermediate_size": 2048,
        "sliding_window": 512,
    }
)
LLAMA_8B = config_from_hf(
    {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "intermediate_size": 14_336,
    }
)


def gemma3(layers: int):
    hf = {"model_type": "gemma3_text", "num_hidden_layers": layers, "num_key_value_heads": 2, "head_dim": 16}
    sizes = {"hidden_size": 64, "intermediate_size": 4096, "num_attention_heads": 4, "vocab_size": 99}
    return config_from_hf(hf | sizes | {"sliding_window": 8})


def test_gemma_270m_by_hand() -> None:
    """15 sliding and 3 full layers: G = 3, so five groups and one."""
    layout = PoolLayout.of(GEMMA_270M, single_device(), "float32", 16)
    assert [(g.kind, g.layers, g.window) for g in layout.groups] == [
        ("sliding", (0, 1, 2), 512),
        ("sliding", (3, 4, 6), 512),
        ("sliding", (7, 8, 9), 512),
        ("sliding", (10, 12, 13), 512),
        ("sliding", (14, 15, 16), 512),
        ("full", (5, 11, 17), None),
    ]
    assert layout.elements == 3 * 2 * 16 * 1 * 256
    assert layout.page_bytes == 4 * layout.elements
    assert (layout.layer_group[6], layout.layer_slot[6]) == (1, 2)
    assert (layout.layer_group[17], layout.layer_slot[17]) == (5, 2)
    assert hash(layout) == hash(PoolLayout.of(GEMMA_270M, single_device(), "float32", 16))


def test_adapter_elements_are_those_of_rank_8_factors() -> None:
    sites = [linear_shape(LLAMA_8B, t) for t in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")]
    sizes = [s.in_size + s.out_size for s in sites]
    assert adapter_elements(LLAMA_8B, single_device(), 8) == 32 * 8 * (sum(sizes) + 4096 + 14_336)


@pytest.mark.parametrize("config", [GEMMA_270M, LLAMA_8B, gemma3(8), gemma3(12)], ids=lambda c: f"{c.family}{c.layers}")
@pytest.mark.parametrize("page_tokens", [1, 16, 50])
def test_a_page_is_small_beside_an_adapter_and_the_largest_such(config, page_tokens: int) -> None:
    layout = PoolLayout.of(config, single_device(), "bfloat16", page_tokens)
    most = adapter_elements(config, single_device(), 8) / 40
    common = math.gcd(*(config.layer_kinds.count(kind) for kind in config.kinds))
    one = layout.elements // layout.group_layers
    assert one == 2 * page_tokens * config.kv_heads * config.head_dim
    allowed = [n for n in range(1, common + 1) if common % n == 0 and n * one <= most]
    assert layout.group_layers == max(allowed, default=1)
    # Every layer has exactly one place, in a group of its kind, in order.
    assert sorted(layer for group in layout.groups for layer in group.layers) == list(range(config.layers))
    for number, group in enumerate(layout.groups):
        assert len(group.layers) == layout.group_layers
        assert {config.layer_kinds[layer] for layer in group.layers} == {group.kind}
        assert group.window == (config.window if group.kind == "sliding" else None)
        for slot, layer in enumerate(group.layers):
            assert (layout.layer_group[layer], layout.layer_slot[layer]) == (number, slot)


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(1, 40))
def test_first_block_holds_the_first_key_in_the_window(position: int, page_tokens: int) -> None:
    layout = PoolLayout.of(gemma3(8), single_device(), "float32", page_tokens)
    for number, group in enumerate(layout.groups):
        seen = [key for key in range(position + 1) if group.window is None or position - key < group.window]
        assert layout.first_block(number, position) == seen[0] // page_tokens
    assert layout.blocks(position) == len({token // page_tokens for token in range(position)})


@settings(deadline=None)
@given(st.integers(1, 10**6))
def test_adapter_pages_hold_the_stream_and_no_more(elements: int) -> None:
    layout = PoolLayout.of(GEMMA_270M, single_device(), "float32", 16)
    pages = layout.adapter_pages(elements)
    assert (pages - 1) * layout.elements < elements <= pages * layout.elements


@pytest.mark.parametrize(("kv", "rep"), [(2, 1), (2, 2), (1, 2)])
def test_the_pool_is_cut_over_tensor_devices(cpu_devices: list[jax.Device], kv: int, rep: int) -> None:
    """Devices along tensor_rep hold the same KV heads: their parts are as large as without them."""
    mesh = make_layout(1, 1, kv, rep, cpu_devices)
    layout = PoolLayout.of(gemma3(8), mesh, "float32", 4)
    assert layout.shards == kv * rep
    assert layout.elements == layout.group_layers * 2 * 4 * (2 // kv) * 16
    assert layout.page_bytes == 4 * layout.elements * kv * rep
    pool = layout.new_pool(5, mesh)
    assert pool.shape == (5, kv * rep, layout.elements)
    assert {shard.data.shape for shard in pool.addressable_shards} == {(5, 1, layout.elements)}
    assert len({str(shard.index) for shard in pool.addressable_shards}) == kv * rep
    assert not np.asarray(pool).any()


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_a_mesh_that_cuts_more_than_heads_is_refused(cpu_devices: list[jax.Device], sizes: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="tensor"):
        PoolLayout.of(gemma3(8), make_layout(*sizes, 1, 1, cpu_devices), "float32", 4)
