"""What a method is to the serving engine: its forms against the merged weights, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tests.methods.peft_oracle import base, random_adapter
from tests.serve.adapters.kit import FAMILY, OWN, PEFT, case

import jora
from jora.errors import InputError
from jora.methods.full import Full
from jora.methods.lopa import FUSIONS, IDPG, LoPA
from jora.methods.lora import LoRA
from jora.methods.method import Adapter, Method, State
from jora.methods.pissa import PiSSA
from jora.methods.prompt_tuning import PromptTuning
from jora.methods.served import Served
from jora.models.adapted import Rows
from jora.models.config import LINEARS
from jora.models.model import Model
from jora.models.tensors import linear_shape


@pytest.fixture(scope="module")
def model() -> Model:
    return base(FAMILY)


def weight_of(served: Served, target: str, layer: int, weight: np.ndarray) -> np.ndarray:
    """sum_j v_j u_j^T * W + A^T B of one site, [in, out], in float64."""
    changed = weight.astype(np.float64)
    if target in served.products:
        u, v = (x[layer].reshape(x.shape[1], -1).astype(np.float64) for x in served.products[target])
        changed = changed * (u.T @ v)
    if target in served.low_rank:
        a, b = (x[layer].reshape(x.shape[1], -1).astype(np.float64) for x in served.low_rank[target])
        changed = changed + a.T @ b
    return changed


def assert_is_merged(adapter: Adapter, model: Model) -> None:
    """The served form of every linear is the weight that `jora.merge` writes, which PEFT is the oracle of."""
    served, mergers = adapter.method.lower(adapter, model), adapter.method.mergers(adapter)
    for target in LINEARS:
        site = linear_shape(model.config, target)
        for layer in range(model.config.layers):
            stack = np.asarray(model.params.layers.weights[target][layer])
            weight = stack.reshape(site.in_size, site.out_size)
            merger = mergers.get((target, layer))
            expected = weight if merger is None else merger(weight.T.copy(), slice(None)).T
            np.testing.assert_allclose(weight_of(served, target, layer, weight), expected, atol=2e-5)


@pytest.mark.parametrize("name", [*PEFT, *OWN])
def test_is_what_merging_makes(name: str, model: Model, tmp_path: Path) -> None:
    adapter = case(name, model, tmp_path).adapter
    assert_is_merged(adapter, model)
    served = adapter.method.lower(adapter, model)
    assert served.prefix_slots == 0 and served.scales_bias == (name == "ia3")


def test_pissa_is_its_change_of_the_base(model: Model) -> None:
    fresh = PiSSA(rank=2, targets=["q_proj", "up_proj"]).init(model, jax.random.key(0))
    trained = jax.tree.map(lambda x: x * 1.5, fresh.state.trained)
    adapter = dataclasses.replace(fresh, state=State(trained, fresh.state.constant))
    assert adapter.method.lower(adapter, model).low_rank["q_proj"].a.shape[1] == 4
    assert_is_merged(adapter, model)


def test_ranks_are_the_largest_of_a_targets_layers(model: Model) -> None:
    options = dict(rank=3, targets=["q_proj", "v_proj"], rank_pattern={"layers.1.self_attn.q_proj": 5})
    served = LoRA(**options).lower(random_adapter(model, **options), model)  # type: ignore[arg-type]
    assert {target: pair.a.shape[:2] for target, pair in served.low_rank.items()} == {
        "q_proj": (model.config.layers, 5),
        "v_proj": (model.config.layers, 3),
    }
    assert not served.products and all(x.dtype == np.float32 for pair in served.low_rank.values() for x in pair)


def moved(method: Any, model: Model) -> Adapter:
    fresh = method.init(model, jax.random.key(0))
    draw = np.random.default_rng(0)
    # So small that a soft prompt is of the size of embeddings: of products of thousands fp32 keeps no 1e-4.
    trained = jax.tree.map(lambda x: x + 0.2 * draw.standard_normal(x.shape).astype(np.float32), fresh.state.trained)
    return dataclasses.replace(fresh, state=State(trained, fresh.state.constant))


@pytest.mark.parametrize(
    "method", [IDPG(prompt_tokens=5), *(LoPA(prompt_tokens=5, rank=2, fusion=f) for f in FUSIONS)], ids=str
)
def test_prompts_of_instances(method: Any, model: Model) -> None:
    """In numpy what training computes, of the vector that the method makes of a prompt."""
    adapter = moved(method, model)
    served = adapter.method.lower(adapter, model)
    vector = adapter.method.instances(model, [[5, 6, 7, 8]])
    expected = adapter.method.bind(adapter.state, Rows(instance=vector)).prefix
    assert served.prefix is not None and served.prefix_slots == expected.shape[1]
    found = served.prefix(vector[0])
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="give each row's vector"):
        served.prefix(None)


def test_prompt_tuning_is_the_same_for_all(model: Model) -> None:
    adapter = moved(PromptTuning(prompt_tokens=4), model)
    served = adapter.method.lower(adapter, model)
    assert served.prefix is not None and served.prefix_slots == 4
    np.testing.assert_array_equal(served.prefix(None), adapter.state.trained["prompt"])


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("lora", dict(targets=["q_proj", "embed_tokens"]), "embed_tokens"),
        ("lora", dict(targets=["q_proj", "lm_head"]), "lm_head"),
        ("dora", dict(targets=["q_proj", "lm_head"]), "lm_head"),
        ("dora", dict(targets=["q_proj"], modules_to_save=["norm"]), "modules_to_save"),
        ("lora", dict(targets=["q_proj"], trainable_token_indices=[3, 4]), "trainable_token_indices"),
    ],
)
def test_more_than_linears_is_refused(name: str, options: dict[str, Any], what: str, model: Model) -> None:
    adapter = {"lora": LoRA, "dora": jora.DoRA}[name](rank=2, **options).init(model, jax.random.key(0))
    with pytest.raises(InputError, match=rf"{name}: an adapter that changes {what} cannot be served; merge .*jora me"):
        adapter.method.lower(adapter, model)


def test_full_fine_tuning_is_a_model(model: Model) -> None:
    with pytest.raises(InputError, match=r"full: there is no adapter to serve; a run's model/"):
        Full().lower(Full().init(model, jax.random.key(0)), model)


def test_a_method_without_a_form_is_refused(model: Model) -> None:
    class Odd(LoRA):
        name = "odd"
        to_lora = Method.to_lora

    with pytest.raises(InputError, match="odd: what is not of low rank cannot be served; merge the adapter"):
        Odd().lower(LoRA().init(model, jax.random.key(0)), model)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused(value: float, model: Model) -> None:
    for method in (LoRA(rank=2, targets=["q_proj"]), jora.IA3(), OWN["flora"], PromptTuning(prompt_tokens=3)):
        fresh = method.init(model, jax.random.key(0))
        spoilt = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(value), fresh.state.trained)
        adapter = dataclasses.replace(fresh, state=State(spoilt, fresh.state.constant))
        with pytest.raises(InputError, match=rf"{method.name}: the factors of .* not finite; train the adapter again"):
            method.lower(adapter, model)
