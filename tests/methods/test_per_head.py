"""JORA's per-head factors: their counts, what they contain, what they are exported as, and meshes."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.methods.gradients import assert_same, loss_and_gradients, moved, named, shaken
from tests.methods.peft_oracle import base, peft_loaded
from tests.sharding.collectives import Probe
from tests.sharding.test_collectives import CONFIG, LAYERS, RANK, exchanged, layout_of, ranked, show
from tests.tiny import assert_close, logits, tokens

import jora
from jora import LoRA, PerHeadLoRA
from jora.kernels.counter_hash import fold_all
from jora.methods.lora import site_shape
from jora.methods.method import Adapter, State
from jora.methods.storage import load_adapter, save_adapter
from jora.models.adapted import Rows
from jora.models.config import ModelConfig
from jora.models.families import config_from_hf
from jora.models.model import Model
from jora.models.params import abstract_params
from jora.sharding import single_device

LLAMA2 = {
    "7B": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "13B": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
    "70B": dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    ),
}
# What JORA, and LoRA of q and v, train at r = 16; LoRA of every linear at r = 1 (shared/systems: the published tables).
COUNTS = {
    "7B": (138_412_032, 8_388_608, 2_498_560),
    "13B": (268_697_600, 13_107_200, 3_911_680),
    "70B": (766_771_200, 32_768_000, 12_943_360),
}


def llama2(size: str) -> ModelConfig:
    return config_from_hf(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 32000,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            **LLAMA2[size],
        }
    )


def trained_count(method: Any, config: ModelConfig) -> int:
    layout = single_device()
    model = Model(abstract_params(config, layout), config, layout, {}, "", {})
    state = jax.eval_shape(lambda key: method.init(model, key).state, jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.trained))


@pytest.mark.parametrize("size", LLAMA2)
def test_published_counts(size: str) -> None:
    methods = (PerHeadLoRA(rank=16), LoRA(rank=16, targets=["q_proj", "v_proj"]), LoRA(rank=1))
    assert tuple(trained_count(method, llama2(size)) for method in methods) == COUNTS[size]


def test_the_first_step() -> None:
    """B = 0: exactly the base; the gradient of A is zero and that of B is not."""
    model = base("llama3")
    adapter = PerHeadLoRA(rank=2).init(model, jax.random.key(0))
    np.testing.assert_array_equal(model(tokens(), adapter), model(tokens()))
    _, gradients = loss_and_gradients(model, adapter, tokens())
    for target in ("q_proj", "v_proj"):
        assert not np.any(gradients[target]["a"])
        assert np.any(gradients[target]["b"])
        a = np.asarray(adapter.state.trained[target]["a"])
        assert a.std() == pytest.approx(1 / math.sqrt(3 * 32), rel=0.1)  # uniform within 1/sqrt(in)


def test_tied_factors_are_ordinary_lora() -> None:
    model = base("llama3")
    plain = LoRA(rank=3, alpha=5, targets=["q_proj", "v_proj"])
    lora = shaken(plain.init(model, jax.random.key(0)))
    tied = {}
    for target, heads in (("q_proj", (2, 2)), ("v_proj", (2,))):
        a, b = lora.state.trained[target]["a"], lora.state.trained[target]["b"]
        ones = (slice(None), slice(None), *(None,) * len(heads))
        tied[target] = {
            "a": jnp.broadcast_to(a[ones], (*a.shape[:2], *heads, a.shape[-1])),
            "b": jnp.moveaxis(b, 1, -2),
        }
    per_head = Adapter(PerHeadLoRA(rank=3, alpha=5), State(tied, lora.state.constant), model.config)
    assert_close(model(tokens(), per_head), np.asarray(model(tokens(), lora)), 1e-5)
    _, of_tied = loss_and_gradients(model, per_head, tokens())
    _, of_lora = loss_and_gradients(model, lora, tokens())
    summed = {t: {"a": jnp.sum(g["a"], axis=tuple(range(2, g["a"].ndim - 1)))} for t, g in of_tied.items()}
    assert_same(named(summed), {n: a for n, a in named(of_lora).items() if n.endswith("['a']")}, 1e-5)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": dict(rank=2, alpha=3),
    "rslora, k too": dict(rank=4, alpha=2, use_rslora=True, targets=["q_proj", "k_proj", "v_proj"]),
    "ranks differ": dict(rank=3, alpha=3, rank_pattern={"layers.1.self_attn.q_proj": 2}, layers_to_transform=[0, 1]),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_exported_as_rank_heads_times_r(options: str, tmp_path: Path) -> None:
    """In PEFT the function is the same."""
    model, method = base("llama3"), PerHeadLoRA(**OPTIONS[options])
    adapter = method.init(model, jax.random.key(0))
    trained = {}
    for target, pair in adapter.state.trained.items():
        true = np.asarray(pair["a"] != 0).any(axis=1)[..., None]  # [L, *heads, r, 1]
        draw = np.random.default_rng(1).standard_normal(pair["b"].shape)
        trained[target] = {"a": pair["a"], "b": jnp.asarray(0.2 * draw * true, jnp.float32)}
    adapter = Adapter(method, State(trained, adapter.state.constant), model.config, model.identity)
    save_adapter(adapter, tmp_path / "a")
    expected = np.asarray(model(tokens(), adapter))
    assert np.abs(expected - np.asarray(model(tokens()))).max() > 0.1 * expected.std()
    assert_close(logits(peft_loaded("llama3", tmp_path / "a"), tokens()), expected)
    assert_close(model(tokens(), load_adapter(tmp_path / "a", model)), expected)
    patterns = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["rank_pattern"]
    assert patterns["model.layers.0.self_attn.q_proj"] == 4 * method.rank
    assert patterns["model.layers.0.self_attn.v_proj"] == 2 * method.rank


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=2", "fsdp=2"])
def test_meshes_equal_one_device(mesh: str) -> None:
    single, sharded = base("llama3"), base("llama3", mesh)
    rows = Rows(fold_all(7, 0, np.arange(len(tokens()))))
    adapter = shaken(PerHeadLoRA(rank=2, dropout=0.3).init(single, jax.random.key(0)))
    loss, gradients = loss_and_gradients(single, adapter, tokens(), rows)
    assert loss != pytest.approx(loss_and_gradients(single, adapter, tokens())[0], rel=1e-5)
    there_loss, there = loss_and_gradients(sharded, moved(adapter, sharded), tokens(), rows)
    assert there_loss == pytest.approx(loss, rel=1e-5)
    assert_same(named(there), named(gradients), 1e-5)
    fresh = PerHeadLoRA(rank=2).init(sharded, jax.random.key(0))
    for found, wanted in zip(jax.tree.leaves(fresh.state), jax.tree.leaves(moved(adapter, sharded).state), strict=True):
        assert found.sharding.is_equivalent_to(wanted.sharding, found.ndim)


@pytest.mark.parametrize("mesh", ["tensor=4", "data=2,fsdp=2,tensor=2"])
def test_devices_exchange_the_factors_gradients_alone(mesh: str) -> None:
    """Once each; the gradient of x, [tokens, width], comes with the base's own."""
    method = PerHeadLoRA(rank=RANK, targets=["q_proj", "k_proj", "v_proj"], dropout=0.1)
    extra = exchanged(mesh, method) - exchanged(mesh, Probe())
    layout, factors = layout_of(mesh), set()
    for target in ("q_proj", "v_proj"):
        site = site_shape(CONFIG, target)
        *heads, width = layout.sharding(site.out_axes, site.out_shape).shard_shape(site.out_shape)
        factors |= {ranked((CONFIG.embed, *heads, RANK)), ranked((*heads, RANK, width))}
    gradients = Counter({item: n for item, n in extra.items() if ranked(item.shape) in factors})
    scalars = Counter({item: n for item, n in extra.items() if item.shape == ()})
    assert not (other := extra - gradients - scalars), show(other)
    assert gradients.total() == (LAYERS * 3 * 2 if layout.batch_shards > 1 else 0), show(gradients)


def test_what_has_no_heads_is_refused() -> None:
    with pytest.raises(jora.InputError, match=r"o_proj has no heads .* q_proj, k_proj, v_proj"):
        PerHeadLoRA(targets=["q_proj", "o_proj"]).init(base("llama3"), jax.random.key(0))
    with pytest.raises(jora.InputError, match="per-head: init_lora_weights 'orthogonal'"):
        PerHeadLoRA(init_lora_weights="orthogonal")
