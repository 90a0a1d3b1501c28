"""Models with quantised weights: what bitsandbytes and transformers make of them, on every mesh, trained and merged."""

from __future__ import annotations

import copy
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tests.bytewise import bytewise_llama
from tests.tiny import FAMILIES, assert_close, logits, tiny, tokens
from transformers import AutoModelForCausalLM

import jora
from jora import InputError, LoRA, load_model
from jora.data.batches import Shape
from jora.methods.full import Full
from jora.methods.method import Adapter, State
from jora.models.config import LINEARS
from jora.models.families import config_from_hf
from jora.models.saving import save_model
from jora.sharding.layout import single_device
from jora.train import TrainOptions
from jora.train.estimation import abstract_programs
from jora.train.memory import ProgramMemory

# bitsandbytes' CPU library reads rows that are shorter than a block wrongly: these are whole blocks.
WIDE: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, head_dim=16)
KINDS = ("int8", "nf4")
FAST = {"xla_backend_optimization_level": "0"}


def wide(family: str) -> tuple[Any, str]:
    # Heads of four times 16 are a block; Qwen 2 has no head_dim of its own, and derives the same.
    return tiny(family, **{k: v for k, v in WIDE.items() if k != "head_dim" or not family.startswith("qwen2")})


def replaced(family: str, change: Any) -> Any:
    """The transformers model with every linear's weight changed, the head's excepted."""
    model = copy.deepcopy(wide(family)[0])
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(LINEARS):
                module.weight.copy_(change(module.weight))
    return model


def int8(weight: torch.Tensor) -> torch.Tensor:
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight)
    return bnb.int8_vectorwise_dequant(codes, absmax)


QUICK = ("llama3", "qwen25", "gemma3")  # plain; biases and one KV head; every norm
EVERY = [pytest.param(family, marks=() if family in QUICK else pytest.mark.slow) for family in FAMILIES]


@pytest.mark.parametrize("family", EVERY)
def test_transformers_computes_the_same_from_a_saved_nf4_model(family: str, tmp_path: Path) -> None:
    model, ids = load_model(wide(family)[1], quant="nf4"), tokens()
    save_model(model, tmp_path / "nf4")
    # Training mode: in evaluation bitsandbytes rounds to bfloat16 on processors that compute in it.
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path / "nf4"), attn_implementation="eager").train()
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert type(theirs.model.layers[-1].self_attn.o_proj).__name__ == "Linear4bit"
    found = np.asarray(model(ids))
    assert_close(found, logits(theirs, ids))
    assert distance(found, logits(wide(family)[0], ids)) > 0.02  # the weights' error is bounded in tests/quant


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative to the spread of what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected - expected.mean()))


@pytest.mark.parametrize("family", EVERY)
def test_int8_logits(family: str) -> None:
    found, ids = np.asarray(load_model(wide(family)[1], quant="int8")(tokens())), tokens()
    assert_close(found, logits(replaced(family, int8), ids))
    assert distance(found, logits(wide(family)[0], ids)) > 0.002


@cache
def on_one_device(kind: str) -> Any:
    return load_model(tiny("gemma3", num_hidden_layers=2)[1], quant=kind)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_meshes_compute_and_save_the_same(kind: Any, tmp_path: Path) -> None:
    """Widths of 32 and 48: rows are shorter than a block, and the mesh cuts blocks."""
    ids = tokens(batch=4)
    one, many = (
        on_one_device(kind),
        load_model(tiny("gemma3", num_hidden_layers=2)[1], quant=kind, mesh="fsdp=4,tensor=2"),
    )
    assert_close(many(ids), np.asarray(one(ids)))
    for name, model in (("one", one), ("many", many)):
        save_model(model, tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "many")]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_on_a_mesh(family: str, kind: Any) -> None:
    ids = tokens(batch=2, length=9)
    many = load_model(wide(family)[1], quant=kind, mesh="data=2,fsdp=2,tensor=2")
    assert_close(many(ids), np.asarray(load_model(wide(family)[1], quant=kind)(ids)))


@pytest.mark.parametrize("kind", KINDS)
def test_reloaded_is_what_was_saved(kind: Any, tmp_path: Path) -> None:
    model = on_one_device(kind)
    save_model(model, tmp_path / "a")
    again = load_model(tmp_path / "a")
    assert again.quant == kind and again.identity["fingerprint"] == model.identity["fingerprint"]
    for ours, theirs in zip(jax.tree.leaves(model.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    save_model(again, tmp_path / "b", max_shard_bytes=1 << 14)  # parts of a weight may lie in several files
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    np.testing.assert_array_equal(load_model(tmp_path / "b")(tokens()), model(tokens()))
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == json.loads(
        (tmp_path / "b" / "config.json").read_text()
    )


LLAMA = dict(
    model_type="llama",
    vocab_size=64,
    hidden_size=256,
    num_attention_heads=4,
    num_hidden_layers=8,
    intermediate_size=512,
)


def test_layers_are_made_dense_one_at_a_time() -> None:
    """By the compiler's analysis a step takes no more beyond its arguments than on dense weights, plus one layer."""
    config = config_from_hf(LLAMA)
    added, arguments = {}, {}
    for quant in (None, "nf4"):
        programs = abstract_programs(config, single_device(), LoRA(rank=2), TrainOptions(), jnp.float32, quant)  # type: ignore[arg-type]
        program = programs.program._replace(remat="none")
        memory = ProgramMemory.of(programs.compile_train(Shape(1, 16, 4), program))
        added[quant], arguments[quant] = memory.added, memory.arguments
    linears = 4 * (4 * 256 * 256 + 3 * 256 * 512)  # bytes of a layer
    assert arguments[None] - arguments["nf4"] > (1 - 4.3 / 32) * 8 * linears
    assert added["nf4"] < added[None] + linears


@cache
def dense_twin(folder: Path, kind: Any) -> Any:
    """The dense model of a quantised one's very weights: merged with an adapter that changes nothing."""
    model = load_model(wide("llama3")[1], quant=kind)
    jora.merge(model, LoRA(rank=1).init(model, jax.random.key(0))).save(folder)
    return load_model(folder)


def changed(adapter: Adapter) -> Adapter:
    """With random trained leaves: fresh ones change nothing."""
    leaves, structure = jax.tree.flatten(adapter.state.trained)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    drawn = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return Adapter(
        adapter.method,
        State(jax.tree.unflatten(structure, drawn), adapter.state.constant),
        adapter.config,
        adapter.base,
    )


def adapted(method: Any, kind: str = "nf4", mesh: str | None = None, *, slow: bool = True) -> Any:
    return pytest.param(method, kind, mesh, id=f"{method.name}-{kind}", marks=pytest.mark.slow if slow else ())


ADAPTED = [
    adapted(LoRA(rank=2)),
    adapted(jora.DoRA(rank=2), mesh="fsdp=2,tensor=2"),
    adapted(jora.NOLA(rank=2, bases=5)),
    adapted(jora.PerHeadLoRA(rank=2)),
    adapted(jora.VeRA(rank=8)),
    # Methods that ask for more than the base's product, for it alone, and the other kind of weight.
    adapted(jora.FLoRA(rank=2, targets="all-linear"), slow=False),
    adapted(jora.IA3(), slow=False),
    adapted(LoRA(rank=2), "int8", slow=False),
]


@pytest.mark.parametrize(("method", "kind", "mesh"), ADAPTED)
def test_adapters_on_quantised_weights(
    method: Any, kind: Any, mesh: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Logits and gradients are those on the dense weights that the quantised ones stand for."""
    twin = dense_twin(tmp_path_factory.getbasetemp() / f"twin-{kind}", kind)
    model = load_model(wide("llama3")[1], quant=kind, mesh=mesh)
    assert model.quant == kind and twin.quant is None
    adapter = changed(method.init(twin, jax.random.key(0)))
    found, expected = (loss_and_gradient(each, adapter) for each in (model, twin))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(np.abs(theirs).max()))


def loss_and_gradient(model: Any, adapter: Adapter) -> Any:
    """A loss of all logits, and its gradient; computed inside jit with the weights as arguments."""
    weights = np.random.default_rng(1).standard_normal((4, 9, 99)).astype(np.float32)
    axes = adapter.method.axes(model.config)
    state = jax.tree.map(lambda x, a: jax.device_put(x, model.layout.sharding(a, x.shape)), adapter.state, axes)

    def loss(trained: Any, params: Any) -> Any:
        copied = jora.Model(params, model.config, model.layout, {}, "", {})
        return jnp.sum(
            copied(tokens(4, 9), Adapter(adapter.method, State(trained, state.constant), model.config)) * weights
        )

    return jax.jit(jax.value_and_grad(loss), compiler_options=FAST)(state.trained, model.params)


def test_merging_makes_dense_rows(tmp_path: Path) -> None:
    model = load_model(wide("qwen2")[1], quant="nf4")
    adapter = changed(LoRA(rank=2, targets=["v_proj", "down_proj"]).init(model, jax.random.key(0)))
    jora.merge(model, adapter).save(tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), attn_implementation="eager").eval()
    assert type(theirs.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert_close(model(tokens(), adapter), logits(theirs, tokens()))


@pytest.mark.slow
def test_training_on_nf4(tmp_path: Path) -> None:
    """jora.train on one device, on a mesh and on the dense weights that nf4 stands for: the same losses and adapter."""
    path = bytewise_llama(tmp_path / "model")
    options = TrainOptions(
        batch_size=4, max_steps=8, learning_rate=1e-2, max_length=48, schedule="constant", warmup=0.0
    )
    lines = [{"prompt": f"the colour of {n} is", "completion": " blue"} for n in ("sky", "sea", "ink", "ice")]
    model = load_model(path, quant="nf4")
    jora.merge(model, LoRA(rank=1).init(model, jax.random.key(0))).save(tmp_path / "dense")
    bases = (model, load_model(path, quant="nf4", mesh="fsdp=2,tensor=2"), load_model(tmp_path / "dense"))
    results = [
        jora.train(each, LoRA(rank=4), lines, out=tmp_path / f"run {n}", options=options)
        for n, each in enumerate(bases)
    ]
    history = [line["loss"] for line in results[0].history]
    assert history[-1] < history[0] - 0.2  # of a random model, whose head does not train
    files = [load_file(result.directory / "adapter" / "adapter_model.safetensors") for result in results]
    for other in (1, 2):
        assert [line["loss"] for line in results[other].history] == pytest.approx(history, rel=1e-3)
        for name, value in files[0].items():
            assert np.linalg.norm(files[other][name] - value) < 1e-2 * np.linalg.norm(value)
    adapter = jora.load_adapter(results[0].directory / "adapter", model)
    text = jora.generate(model, [line["prompt"] for line in lines], adapter=adapter, max_new_tokens=5)
    assert text == jora.generate(
        model, [line["prompt"] for line in lines], adapter=results[0].adapter, max_new_tokens=5
    )


def test_methods_that_need_the_dense_weights_are_refused(tmp_path: Path) -> None:
    model = on_one_device("nf4")
    with pytest.raises(InputError, match="full needs the base's dense weights: load the model without quant=nf4"):
        jora.train(model, Full(), [], out=tmp_path / "run")
    assert on_one_device("nf4").check_method(LoRA()) is None


def test_other_quantised_directories_are_refused(tmp_path: Path) -> None:
    save_model(on_one_device("nf4"), tmp_path / "nf4")
    with pytest.raises(InputError, match="stored as nf4; quant=int8 needs the unquantised model"):
        load_model(tmp_path / "nf4", quant="int8")
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())

    def load(**changes: Any) -> None:
        text = json.dumps({**config, "quantization_config": {**config["quantization_config"], **changes}})
        (tmp_path / "nf4" / "config.json").write_text(text)
        load_model(tmp_path / "nf4")

    for changes, message in [
        ({"quant_method": "gptq", "bnb_4bit_quant_type": None}, "quantization_config is of gptq"),
        ({"bnb_4bit_quant_type": "fp4"}, "quantization_config is of fp4"),
        ({"bnb_4bit_use_double_quant": False}, "without double quantisation"),
    ]:
        with pytest.raises(InputError, match=message):
            load(**changes)
    path = tmp_path / "nf4" / "model.safetensors"
    stored = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**stored, f"{name}.absmax": stored[f"{name}.absmax"][:-1]}, path)
    with pytest.raises(InputError, match=rf"{name}: cut short"):
        load()
    state = f"{name}.quant_state.bitsandbytes__nf4"
    for broken in (b"{", b'{"shape": 3}', b'{"shape": [32, 48]}'):
        save_file({**stored, state: np.frombuffer(broken, np.uint8)}, path)
        with pytest.raises(InputError, match=rf"{name}\S+: is not bitsandbytes' state of a weight"):
            load()
    dense = load_file(Path(tiny("gemma3", num_hidden_layers=2)[1]) / "model.safetensors")
    save_file({**{n: v for n, v in stored.items() if not n.startswith(name)}, name: dense[name]}, path)
    with pytest.raises(InputError, match=rf"{name} is not quantised"):
        load()
    assert math.prod(dense[name].shape) == 32 * 48
