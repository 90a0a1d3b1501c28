"""fLoRA: y = sum_j out_j * ((in_j * x) W), per row, merged, on disk, and with what it may cost."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from tests import tiny as tiny_models
from tests.sharding.collectives import Probe, collectives
from tests.tiny import VOCAB, assert_close, tiny

import jora
from jora.data.batches import Shape
from jora.errors import InputError
from jora.kernels.hadamard import hadamard_product
from jora.methods.flora import FLoRA, FLoRAProjection, together
from jora.methods.method import Adapter, State
from jora.models.adapted import Dense, Rows, Site
from jora.models.config import LINEARS
from jora.models.families import config_from_hf
from jora.models.model import Model
from jora.sharding import parse_mesh, single_device
from jora.train.estimation import abstract_programs, simulated_layout
from jora.train.flops import matmul_flops
from jora.train.options import TrainOptions

IDS = np.random.default_rng(0).integers(0, VOCAB, (3, 8)).astype(np.int32)
ALL = FLoRA(rank=2, targets="all-linear")


@pytest.fixture(scope="module")
def model() -> Model:
    """With a bias in q, k, v, which is added after the components."""
    return jora.load_model(tiny("qwen2")[1], dtype="float32")


def random_adapter(method: FLoRA, model: Model, seed: int = 0) -> Adapter:
    adapter = method.init(model, jax.random.key(seed))
    draw = np.random.default_rng(seed)
    trained = jax.tree.map(lambda x: x + 0.3 * draw.standard_normal(x.shape).astype(np.float32), adapter.state.trained)
    return dataclasses.replace(adapter, state=State(trained, adapter.state.constant))


def site(b: int, r: int, dtype: Any = np.float64) -> tuple[np.ndarray, ...]:
    """x, W, and vectors of each row."""
    draw = np.random.default_rng(1)
    shapes = ((b, 5, 3, 4), (3, 4, 6), (b, r, 3, 4), (b, r, 6))
    return tuple(draw.standard_normal(shape).astype(dtype) for shape in shapes)


def product_of(x: Any, w: Any, inputs: Any, outputs: Any) -> Any:
    return hadamard_product(x, w, inputs, outputs, (None, None), (None,), single_device())


def test_each_row_has_a_weight_of_its_own() -> None:
    """x_i (W * sum_j in_ij out_ij^T), and its gradients, against float64."""
    x, w, inputs, outputs = site(4, 3)
    changed = w.reshape(12, 6) * np.einsum("bri,bro->bio", inputs.reshape(4, 3, 12), outputs)
    expected = np.einsum("bsi,bio->bso", x.reshape(4, 5, 12), changed)
    arrays = [jnp.asarray(v, jnp.float32) for v in (x, w, inputs, outputs)]
    found, pull = jax.vjp(product_of, *arrays)
    assert_close(found, expected, 1e-6)
    g = np.random.default_rng(2).standard_normal(expected.shape)
    d_x, _, d_in, d_out = pull(jnp.asarray(g, jnp.float32))
    assert_close(np.reshape(d_x, (4, 5, 12)), np.einsum("bso,bio->bsi", g, changed), 1e-5)
    d_changed = np.einsum("bsi,bso->bio", x.reshape(4, 5, 12), g) * w.reshape(12, 6)
    assert_close(np.reshape(d_in, (4, 3, 12)), np.einsum("bio,bro->bri", d_changed, outputs), 1e-5)
    assert_close(d_out, np.einsum("bio,bri->bro", d_changed, inputs.reshape(4, 3, 12)), 1e-5)
    half = product_of(jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16), *arrays[2:])
    assert half.dtype == jnp.bfloat16
    assert_close(np.asarray(half, np.float32), expected, 0.1)


def test_a_fresh_adapter_is_the_base(model: Model) -> None:
    np.testing.assert_array_equal(np.asarray(model(IDS, ALL.init(model, jax.random.key(0)))), np.asarray(model(IDS)))


ALIKE = Rows()


def apply(vectors: Any, x: Any, weight: Any, rows: Rows = ALIKE, adapted: Any = True) -> Any:
    """One site of a layer."""
    ends = (None,) * (x.ndim - 2), (None,) * (weight.ndim - x.ndim + 2)
    projection = FLoRAProjection(**vectors, adapted=jnp.asarray(adapted))
    return projection.apply(x, Dense(weight, None, *ends, single_device()), Site("q_proj", jnp.int32(0)), rows)


def test_components_part_with_the_first_step(model: Model) -> None:
    """All-ones components would have equal gradients, and stay equal, for ever."""
    first = jax.tree.map(lambda v: v[0], FLoRA(rank=3).init(model, jax.random.key(0)).state.trained["q_proj"])
    draw = np.random.default_rng(0)
    shapes = ((2, 5, *first["inputs"].shape[1:]), first["inputs"].shape[1:] + first["outputs"].shape[1:])
    x, weight = (jnp.asarray(draw.standard_normal(shape), jnp.float32) for shape in shapes)
    gradient = jax.grad(lambda v: jnp.sum(jnp.sin(apply(v, x, weight))))(first)
    out = np.asarray(gradient["outputs"]).reshape(3, -1)
    lengths = np.linalg.norm(out, axis=1)
    assert np.all(lengths > 0)
    assert np.all(np.abs((out @ out.T / np.outer(lengths, lengths))[np.triu_indices(3, 1)]) < 0.9)


def test_merged_and_alone_agree_with_changed_torch_weights(model: Model, tmp_path: Any) -> None:
    method = FLoRA(rank=2, targets="all-linear", layers_to_transform=[1])
    adapter = random_adapter(method, model)
    reference = copy.deepcopy(tiny("qwen2")[0])
    modules = dict(reference.named_modules())
    for target in LINEARS:
        part = "self_attn" if target[0] in "qkvo" else "mlp"
        weight = modules[f"model.layers.1.{part}.{target}"].weight
        inputs, outputs = (
            np.asarray(adapter.state.trained[target][s][1]).reshape(2, -1) for s in ("inputs", "outputs")
        )
        with torch.no_grad():
            weight *= torch.from_numpy(outputs.T @ inputs)
    expected = tiny_models.logits(reference, IDS)
    assert_close(model(IDS, adapter), expected)
    jora.merge(model, adapter).save(tmp_path / "merged")
    assert_close(jora.load_model(tmp_path / "merged", dtype="float32")(IDS), expected)
    assert np.abs(expected - tiny_models.logits(tiny("qwen2")[0], IDS)).max() > 0.01


def test_output_vectors_alone_are_ia3(model: Model) -> None:
    """B = 1, r = 1: IA3 of PEFT on k and v, whose factors also scale the bias, so on a model without one."""
    reference, directory = tiny("llama2")
    plain = jora.load_model(directory, dtype="float32")
    config = peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    wrapped = peft.get_peft_model(copy.deepcopy(reference), config)
    adapter = FLoRA(rank=1, targets=["k_proj", "v_proj"]).init(plain, jax.random.key(0))
    trained = copy.copy(adapter.state.trained)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "ia3" in name:
            with torch.no_grad():
                parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=draw))
            layer, target = int(name.split(".layers.")[1].split(".")[0]), "k_proj" if "k_proj" in name else "v_proj"
            out = trained[target]["outputs"]
            trained[target]["outputs"] = out.at[layer, 0].set(parameter.detach().numpy().reshape(out.shape[2:]))
    found = dataclasses.replace(adapter, state=State(trained, adapter.state.constant))
    assert_close(plain(IDS, found), tiny_models.logits(wrapped, IDS))


def test_file(model: Model, tmp_path: Any) -> None:
    adapter = random_adapter(ALL, model)
    jora.save_adapter(adapter, tmp_path / "adapter")
    again = jora.load_adapter(tmp_path / "adapter", model)
    assert again.method == ALL
    jax.tree.map(np.testing.assert_array_equal, again.state, adapter.state)


LLAMA_2_7B = config_from_hf(
    {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "intermediate_size": 11008,
    }
)


def test_counts() -> None:
    """q + k of Llama-2 7B at rank 1: r (d + k) a matrix, as LoRA has."""
    bare = Model(None, LLAMA_2_7B, single_device(), {}, "", {})  # type: ignore[arg-type]
    state = jax.eval_shape(lambda key: FLoRA().init(bare, key).state, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.trained)) == 524_288
    with pytest.raises(InputError, match=r"rank 5000 is above ._proj, which is 4096 x 4096"):
        FLoRA(rank=5000).init(bare, jax.random.key(0))
    with pytest.raises(InputError, match="lm_head cannot be adapted"):
        FLoRA(targets=["lm_head"]).init(bare, jax.random.key(0))


def test_rows_choose_among_adapters_and_ranks_in_one_program(model: Model) -> None:
    methods = [FLoRA(rank=1), FLoRA(rank=3), FLoRA(rank=2, layers_to_transform=[1])]
    adapters = [random_adapter(m, model, seed) for seed, m in enumerate(methods)]
    mixed = together(adapters)
    assert mixed.method.rank == 3
    draw = np.random.default_rng(0)
    width = model.config.embed
    x = jnp.asarray(draw.standard_normal((3, 5, width)), jnp.float32)
    weight = jnp.asarray(draw.standard_normal((width, 2, 8)), jnp.float32)

    @jax.jit
    def run(jobs: Any, layer: Any) -> Any:
        vectors, adapted = (jax.tree.map(lambda v: v[layer], tree["k_proj"]) for tree in mixed.state)
        return apply(vectors, x, weight, Rows(jobs=jobs), adapted)

    for jobs in ([0, 1, 2], [2, 0, 0], [1, 1, 1]):
        for layer in (0, 1):
            found = run(jnp.array(jobs, jnp.int32), jnp.int32(layer))
            for row, job in enumerate(jobs):
                own = adapters[job].state.trained["k_proj"]
                vectors = {side: np.asarray(v[layer], np.float64) for side, v in own.items()}
                changed = np.einsum("ri,rko->iko", vectors["inputs"], vectors["outputs"]) * np.asarray(weight)
                if job == 2 and layer == 0:
                    changed = np.asarray(weight)  # not adapted
                assert_close(found[row], np.einsum("si,iko->sko", x[row], changed), 1e-5)
    assert run._cache_size() == 1
    with pytest.raises(InputError, match="must have the same targets"):
        together([adapters[0], random_adapter(FLoRA(targets=["q_proj"]), model)])


def test_a_batch_of_several_adapters(model: Model) -> None:
    """Each row of the whole model is that of its own adapter."""
    adapters = [random_adapter(FLoRA(rank=rank), model, rank) for rank in (1, 2)]
    found = model(IDS, together(adapters), jobs=[1, 0, 1])
    expected = [np.asarray(model(IDS, adapter)) for adapter in adapters]
    for row, job in enumerate([1, 0, 1]):
        assert_close(found[row], expected[job][row], 1e-5)


def test_cost_is_a_product_a_component_whatever_the_adapters() -> None:
    b, s, d, k = 4, 7, 24, 40

    def flops(rank: int, jobs: int) -> int:
        dense = Dense(jnp.zeros((d, k)), None, (None,), (None,), single_device())
        projection = FLoRAProjection(jnp.ones((jobs, rank, d)), jnp.ones((jobs, rank, k)), jnp.ones(jobs, bool))
        rows = Rows(jobs=jnp.zeros(b, jnp.int32))
        traced = jax.make_jaxpr(lambda x: projection.apply(x, dense, Site("q_proj", jnp.int32(0)), rows))
        return matmul_flops(traced(jnp.zeros((b, s, d))))

    for rank in (1, 2, 4):
        assert flops(rank, 1) == flops(rank, 4) == rank * 2 * b * s * d * k


CONFIG = config_from_hf(
    {
        "model_type": "llama",
        "vocab_size": 1021,
        "hidden_size": 160,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "num_hidden_layers": 2,
        "intermediate_size": 352,
    }
)


@cache
def exchanged(method: Any) -> Any:
    layout = simulated_layout(parse_mesh("tensor=4"), CONFIG)
    programs = abstract_programs(CONFIG, layout, method, TrainOptions(max_grad_norm=0.0), jnp.float32)
    traced = programs.trace_train(Shape(2, 56, 8), programs.program._replace(remat="full"))
    return collectives(traced.lower().compile({"xla_backend_optimization_level": "0"}).as_text())


def test_tensor_parallel_exchanges_what_the_base_does() -> None:
    """No more of [tokens, width] than the base; the vectors' own gradients, [r, width], once each."""
    extra = exchanged(FLoRA(rank=3, targets="all-linear")) - exchanged(Probe())
    assert not (large := {item: n for item, n in extra.items() if np.prod(item.shape) > 3 * 352}), large
    gradients = {item: n for item, n in extra.items() if 1 < np.prod(item.shape) <= 3 * 352}
    assert sum(gradients.values()) <= CONFIG.layers * 2 * len(LINEARS), gradients


@pytest.mark.parametrize("mesh", ["tensor=8", "data=2,fsdp=2,tensor=2"])
def test_meshes_agree(mesh: str) -> None:
    layout = simulated_layout(parse_mesh(mesh), CONFIG)
    draw = np.random.default_rng(0)
    axes = ((None,), ("kv_heads", "q_group", None))
    x, w = draw.standard_normal((4, 6, 10)), draw.standard_normal((10, 2, 4, 6))
    inputs, outputs = draw.standard_normal((4, 2, 10)), draw.standard_normal((4, 2, 2, 4, 6))

    def run(layout: Any, turned: bool) -> list[np.ndarray]:
        ours = [jnp.asarray(v, jnp.float32) for v in (x, w, inputs, outputs)]
        ends = axes
        if turned:  # the cut side is the input
            ours = [jnp.asarray(np.tanh(draw0), jnp.float32) for draw0 in turned_arrays()]
            ends = (axes[1], axes[0])

        def loss(x: Any, inputs: Any, outputs: Any) -> Any:
            return jnp.sum(jnp.sin(hadamard_product(x, ours[1], inputs, outputs, *ends, layout)))

        return [np.asarray(v) for v in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(ours[0], *ours[2:])]

    def turned_arrays() -> list[np.ndarray]:
        own = np.random.default_rng(3)
        return [own.standard_normal(s) for s in ((4, 6, 2, 4, 6), (2, 4, 6, 10), (4, 2, 2, 4, 6), (4, 2, 10))]

    for turned in (False, True):
        for ours, expected in zip(run(layout, turned), run(single_device(), turned), strict=True):
            assert_close(ours, expected, 1e-5)
