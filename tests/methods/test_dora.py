"""DoRA against PEFT: files both ways, gradients with and without dropout, merging; and its norm on meshes."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.numpy import load_file
from tests.methods.gradients import (
    assert_same,
    by_name,
    loss_and_gradients,
    moved,
    named,
    peft_gradients,
    shaken,
)
from tests.methods.peft_oracle import LINEARS, base, peft_loaded, peft_made
from tests.sharding.collectives import Probe
from tests.sharding.test_collectives import CONFIG, LAYERS, RANK, exchanged, show
from tests.tiny import assert_close, logits, tiny, tokens
from transformers import AutoModelForCausalLM

import jora
from jora.data.batches import Shape
from jora.methods import dora
from jora.methods.dora import DoRA
from jora.methods.storage import load_adapter, save_adapter
from jora.models import decoder
from jora.models.adapted import Dense
from jora.models.families import config_from_hf
from jora.models.model import Model
from jora.models.params import abstract_params
from jora.models.tensors import linear_shape
from jora.sharding import single_device
from jora.train import TrainOptions
from jora.train.estimation import abstract_programs
from jora.train.flops import matmul_flops

OPTIONS: dict[str, Any] = dict(targets=[*LINEARS, "lm_head"], rank=3, alpha=5, rank_pattern={"down_proj": 2})
# Biases (qwen2) are not scaled; layers and ranks that differ leave padding.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("llama3", OPTIONS),
    "biases, rslora": ("qwen2", dict(targets=LINEARS, rank=4, alpha=2, use_rslora=True)),
    "one layer": ("llama3", dict(targets=["q_proj", "o_proj"], rank=2, alpha=4, layers_to_transform=[1])),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_ways(variant: str, tmp_path: Path) -> None:
    family, options = VARIANTS[variant]
    model, ids = base(family), tokens()
    peft = peft_made(family, tmp_path / "theirs", use_dora=True, **options)
    adapter = load_adapter(tmp_path / "theirs", model)
    assert isinstance(adapter.method, DoRA)
    expected = logits(peft, ids)
    assert_close(model(ids, adapter), expected)
    save_adapter(adapter, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["use_dora"] is True
    assert_close(logits(peft_loaded(family, tmp_path / "ours"), ids), expected)
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert ours.keys() == {name for name in theirs if "base_layer" not in name}
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])


def test_the_first_step_is_the_base(tmp_path: Path) -> None:
    model, ids = base("qwen2"), tokens()
    adapter = DoRA(targets=["up_proj", "k_proj", "lm_head"], rank=4, layers_to_transform=[0]).init(
        model, jax.random.key(0)
    )
    assert_close(model(ids, adapter), np.asarray(model(ids)), 1e-5)
    weight = tiny("qwen2")[0].model.layers[0].mlp.up_proj.weight.detach().numpy()
    np.testing.assert_allclose(adapter.state.trained["up_proj"]["magnitude"][0], np.linalg.norm(weight, axis=1), 1e-5)
    assert not np.asarray(adapter.state.trained["up_proj"]["magnitude"][1]).any()  # not adapted
    save_adapter(adapter, tmp_path / "a")
    assert_close(logits(peft_loaded("qwen2", tmp_path / "a"), ids), logits(tiny("qwen2")[0], ids))


def test_magnitudes_are_counted_without_weights() -> None:
    config = config_from_hf(json.loads((Path(tiny("llama3")[1]) / "config.json").read_text()))
    layout = single_device()
    model = Model(abstract_params(config, layout), config, layout, {}, "", {})
    abstract = jax.eval_shape(lambda key: DoRA(**OPTIONS).init(model, key).state, jax.random.key(0))
    real = DoRA(**OPTIONS).init(base("llama3"), jax.random.key(0)).state
    assert jax.tree.map(lambda x: x.shape, abstract) == jax.tree.map(lambda x: x.shape, real)


class Fixed(torch.nn.Module):
    """Drops every third feature; stands for torch's dropout on PEFT's side."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.from_numpy(mask(x.shape[-1]))


def mask(size: int) -> np.ndarray:
    return np.where(np.arange(size) % 3 == 0, 0, 1.5).astype(np.float32)


def fixed(x: jax.Array, rate: float, *_: Any) -> jax.Array:
    return x * mask(int(np.prod(x.shape[2:]))).reshape(x.shape[2:]) if rate else x


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_gradients_equal_peft(rate: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout the scaled base term reads the dropped input too, and the plain one does not."""
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj"]
    peft = peft_made("qwen2", tmp_path, use_dora=True, targets=targets, rank=3, alpha=5, dropout=rate).train()
    if rate:
        monkeypatch.setattr(dora, "dropped", fixed)
        for module in peft.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = Fixed()
    model = base("qwen2")
    adapter = load_adapter(tmp_path, model)
    _, found = loss_and_gradients(model, adapter, tokens())
    assert_same(by_name(adapter, found), peft_gradients(peft, tokens()))


def test_merged_in_transformers(tmp_path: Path) -> None:
    model, ids = base("qwen2"), tokens()
    peft = peft_made("qwen2", tmp_path / "a", use_dora=True, **OPTIONS)
    jora.merge(model, load_adapter(tmp_path / "a", model)).save(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), attn_implementation="eager").eval().float()
    assert_close(logits(merged, ids), logits(peft, ids))
    theirs = copy.deepcopy(peft).merge_and_unload().state_dict()
    for name, value in load_file(tmp_path / "merged" / "model.safetensors").items():
        np.testing.assert_allclose(value, theirs[name].numpy(), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=2", "fsdp=2"])
def test_meshes_equal_one_device(mesh: str) -> None:
    ids, options = tokens(), dict(targets=["q_proj", "o_proj", "down_proj", "lm_head"], rank=2)
    single, sharded = base("llama3"), base("llama3", mesh)
    adapter = shaken(DoRA(**options).init(single, jax.random.key(0)))
    loss, gradients = loss_and_gradients(single, adapter, ids)
    there_loss, there = loss_and_gradients(sharded, moved(adapter, sharded), ids)
    assert there_loss == pytest.approx(loss, rel=1e-5)
    assert_same(named(there), named(gradients), 1e-5)
    fresh = DoRA(**options).init(sharded, jax.random.key(0))
    expected = DoRA(**options).init(single, jax.random.key(0))
    assert_same(named(fresh.state.trained["o_proj"]["magnitude"]), named(expected.state.trained["o_proj"]["magnitude"]))
    for found, wanted in zip(jax.tree.leaves(fresh.state), jax.tree.leaves(moved(adapter, sharded).state), strict=True):
        assert found.sharding.is_equivalent_to(wanted.sharding, found.ndim)


def test_the_norm_moves_only_its_sums() -> None:
    """[in, out] of a weight that is cut along both stays where it is."""
    layout = base("llama3", "fsdp=2,tensor=2").layout
    into, out, rank = 64, 48, 4
    axes = (("embed",), ("mlp",))

    def norm(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return Dense(w, None, *axes, layout).column_norm(a, b)

    draw = np.random.default_rng(0)
    w, a, b = (draw.standard_normal(s).astype(np.float32) for s in ((into, out), (into, rank), (rank, out)))
    placed = [
        jax.device_put(x, layout.sharding(at, x.shape))
        for x, at in ((w, ("embed", "mlp")), (a, (None, None)), (b, (None, "mlp")))
    ]
    compiled = jax.jit(norm).lower(*placed).compile()
    np.testing.assert_allclose(compiled(*placed), np.linalg.norm(w + a @ b, axis=0), rtol=1e-5)
    text = compiled.as_text()
    moves = re.findall(r"= (\S+) (?:all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce)\(", text)
    assert moves, "nothing was summed"
    for shape in moves:
        assert shape.startswith(f"f32[{out // 2}]"), shape


def test_fsdp_collects_norms_alone() -> None:
    """[width] of each norm over the model width, once a stage; the factors are whole and stay so."""
    method = DoRA(rank=RANK, targets=["o_proj", "gate_proj"])
    extra = exchanged("fsdp=4", method) - exchanged("fsdp=4", Probe())
    gathered = Counter({item: n for item, n in extra.items() if item.kind != "all-reduce"})
    assert {(item.kind, item.shape) for item in gathered} == {("all-gather", (CONFIG.embed,))}, show(gathered)
    assert gathered.total() <= LAYERS * 2, show(gathered)


def test_magnitudes_of_a_quantised_base() -> None:
    """They are of the weights that nf4 stands for (by bitsandbytes), which no device has whole."""
    model = jora.load_model(tiny("llama3")[1], quant="nf4", mesh="fsdp=2")
    adapter = DoRA(rank=2, targets=["q_proj", "down_proj"]).init(model, jax.random.key(0))
    layer = tiny("llama3")[0].model.layers[1]
    for name, module in (("q_proj", layer.self_attn.q_proj), ("down_proj", layer.mlp.down_proj)):
        # In one row: on a CPU bitsandbytes is wrong where a row is shorter than a block.
        flat = module.weight.detach().reshape(1, -1)
        stored = quantize_4bit(flat, blocksize=64, quant_type="nf4", compress_statistics=True)
        expected = np.linalg.norm(dequantize_4bit(*stored).numpy().reshape(module.weight.shape), axis=1)
        found = np.asarray(adapter.state.trained[name]["magnitude"][1]).ravel()
        np.testing.assert_allclose(found, expected, rtol=1e-3)
        assert np.abs(expected - np.linalg.norm(module.weight.detach().numpy(), axis=1)).max() > 1e-3
    assert_close(model(tokens(), adapter), np.asarray(model(tokens())), 1e-4)


def test_the_norm_in_16_bits_is_as_good_as_the_weight() -> None:
    draw = np.random.default_rng(0)
    w, a, b = (draw.standard_normal(s).astype(np.float32) for s in ((64, 48), (64, 4), (4, 48)))
    half = jnp.asarray(w, jnp.bfloat16)
    found = Dense(half, None, (None,), (None,), single_device()).column_norm(jnp.asarray(a), jnp.asarray(b))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.linalg.norm(np.asarray(half, np.float32) + a @ b, axis=0), rtol=1e-3)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = base("llama3")
    with pytest.raises(jora.InputError, match="embed_tokens cannot be adapted"):
        DoRA(targets=["embed_tokens", "q_proj"]).init(model, jax.random.key(0))
    with pytest.raises(jora.InputError, match="alpha must not be 0"):
        DoRA(alpha_pattern={"q_proj": 0})
    adapter = DoRA(rank=2, targets=["q_proj"]).init(model, jax.random.key(0))
    with pytest.raises(jora.InputError, match=r"dora.*not of low rank"):
        adapter.method.to_lora(adapter)
    peft_made("llama3", tmp_path, targets=["q_proj"], rank=2)  # a LoRA's file that says it is DoRA's
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    with pytest.raises(jora.InputError, match="lora_magnitude_vector"):
        load_adapter(tmp_path, model)


def test_the_backward_pass_does_not_take_norms_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeping them by name spares A^T W of every weight, and A^T A B."""

    def flops() -> int:
        jax.clear_caches()
        programs = abstract_programs(CONFIG, single_device(), DoRA(rank=RANK), TrainOptions(), jnp.float32)
        program = programs.program._replace(remat="selective")
        return matmul_flops(programs.trace_train(Shape(1, 8, 8), program).jaxpr)

    kept = flops()
    monkeypatch.setattr(decoder, "SAVED", tuple(name for name in decoder.SAVED if name != "column_norm"))
    shapes = [linear_shape(CONFIG, target) for target in LINEARS]
    products = 2 * RANK * CONFIG.layers * sum(s.in_size * s.out_size for s in shapes)
    grams = 2 * RANK**2 * CONFIG.layers * sum(s.in_size + s.out_size for s in shapes)
    assert flops() - kept == products + grams
