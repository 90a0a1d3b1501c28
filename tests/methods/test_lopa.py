"""LoPA and IDPG: the published counts, the maths against numpy, and what training changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tests.inference.characters import talking
from tests.tiny import assert_close, logits, tiny, tokens
from tests.train.conftest import OPTIONS, examples

import jora
from jora.data.batches import Tokenised, prompt_of
from jora.data.chat import Template, tokenise_example
from jora.data.formats import parse_example
from jora.errors import InputError
from jora.inference.evaluate import evaluate
from jora.inference.tokens import generate_tokens
from jora.methods.lopa import IDPG, InstancePrompt, LoPA
from jora.methods.method import Adapter, State
from jora.methods.prompt_tuning import PromptTuning
from jora.models.adapted import Rows
from jora.models.model import Model
from jora.models.params import abstract_params

SMALL: dict[str, Any] = dict(prompt_tokens=6, rank=2, hidden=7)
VECTORS = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> Model:
    return jora.load_model(tiny("llama2")[1], dtype="float32")


def trained(model: Model, method: InstancePrompt, seed: int = 0) -> Adapter:
    """Random values in place of the first ones, so that no factor is nearly nothing."""
    shapes = jax.eval_shape(lambda key: method.init(model, key).state, jax.random.key(seed))
    draw = np.random.default_rng(seed)
    state = jax.tree.map(lambda x: jnp.asarray(0.6 * draw.standard_normal(x.shape), jnp.float32), shapes)
    return Adapter(method.identified(model.config), state, model.config)


def prefix_of(adapter: Adapter, vectors: np.ndarray = VECTORS) -> np.ndarray:
    bound = jax.jit(lambda state, e: adapter.method.bind(state, Rows(instance=e)))(adapter.state, vectors)
    return np.asarray(bound.prefix)


def head(weights: Any, e: np.ndarray) -> np.ndarray:
    """A head in numpy: W2 tanh(W1 e + c1) + c2."""
    w1, c1, w2, c2 = (np.asarray(weights[name], np.float64) for name in ("w1", "c1", "w2", "c2"))
    return np.tensordot(np.tanh(e @ w1 + c1), w2, axes=1) + c2


def factors(adapter: Adapter) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    state = adapter.state.trained
    return np.asarray(state["prompt"], np.float64), head(state["rows"], VECTORS), head(state["columns"], VECTORS)


# --- parameter counts, as the authors give them ---

COUNTS = [  # d, h, M, r: millions
    *((1024, 1024, 256, r, count) for r, count in ((1, 0.801), (2, 1.067), (4, 1.598))),  # RoBERTa-large
    *((2048, 1024, 1024, r, count) for r, count in ((1, 4.229), (2, 6.339), (4, 10.557))),  # DeepSeek, CodeSage
    *((2560, 1024, 1024, r, count) for r, count in ((1, 4.759), (2, 7.393), (4, 12.662))),  # phi-2, CodeSage
    *((2048, 768, 768, r, count) for r, count in ((1, 2.784), (2, 4.367), (4, 7.532))),  # DeepSeek, CodeBERT
    *((4096, 1024, 1024, r, count) for r, count in ((1, 6.349), (2, 10.557), (4, 18.975))),  # Llama 3 8B, CodeSage
]


def count(model: Model, width: int, method: Any) -> int:
    """Trained elements for a base of another width: shapes alone."""
    config = dataclasses.replace(model.config, embed=width)
    other = Model(abstract_params(config, model.layout), config, model.layout, {}, "", {})
    state = jax.eval_shape(lambda key: method.init(other, key).state, jax.random.key(0))
    assert jax.tree.structure(state) == jax.tree.structure(method.axes(config), is_leaf=lambda x: type(x) is tuple)
    return sum(leaf.size for leaf in jax.tree.leaves(state.trained))


@pytest.mark.parametrize(("d", "h", "hidden", "rank", "millions"), COUNTS)
def test_published_counts(model: Model, d: int, h: int, hidden: int, rank: int, millions: float) -> None:
    found = count(model, d, LoPA(rank=rank, encoder="not opened", encoder_width=h, hidden=hidden))
    assert round(found / 1e6, 3) == millions


def test_exact_counts(model: Model) -> None:
    heads: dict[str, Any] = dict(encoder="not opened", encoder_width=1024, hidden=256)
    assert count(model, 1024, LoPA(rank=1, **heads)) == 800_778
    assert count(model, 1024, IDPG(**heads)) == 2_894_080
    assert count(model, 1024, PromptTuning()) == 10 * 1024


# --- the soft prompt ---


@pytest.mark.parametrize("fusion", ["multiply", "concat", "add", "max"])
def test_the_prompt_is_the_papers(model: Model, fusion: Any) -> None:
    adapter = trained(model, LoPA(**SMALL, fusion=fusion))
    shared, u, v = factors(adapter)
    own = np.stack([a @ b.T for a, b in zip(u, v, strict=True)])
    expected = {
        "multiply": shared / (1 + np.exp(-own)),
        "concat": np.concatenate([np.broadcast_to(shared, own.shape), own], axis=1),
        "add": shared + own,
        "max": np.maximum(shared, own),
    }[fusion]
    found = prefix_of(adapter)
    assert found.shape[1] == adapter.method.prompt_slots == (12 if fusion == "concat" else 6)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_idpg_is_one_head(model: Model) -> None:
    adapter = trained(model, IDPG(prompt_tokens=3, hidden=7))
    np.testing.assert_allclose(prefix_of(adapter), head(adapter.state.trained["prompt"], VECTORS), rtol=0, atol=1e-5)


def test_the_gates_logit_has_low_rank_and_depends_on_the_input(model: Model) -> None:
    adapter = trained(model, LoPA(**SMALL))
    shared, *_ = factors(adapter)
    twins = np.concatenate([VECTORS, VECTORS[:1]])
    gate = prefix_of(adapter, twins).astype(np.float64) / shared
    singular = np.linalg.svd(np.log(gate / (1 - gate)), compute_uv=False)
    assert (singular[:, 2] < 1e-3 * singular[:, 0]).all() and (singular[:, 1] > 1e-2 * singular[:, 0]).all()
    assert np.abs(gate[0] - gate[1]).max() > 0.1
    np.testing.assert_array_equal(gate[0], gate[4])


def test_heads_of_zeros_halve_the_prompt_whatever_the_input(model: Model) -> None:
    adapter = trained(model, LoPA(**SMALL))
    zeros = jax.tree.map(jnp.zeros_like, adapter.state.trained) | {"prompt": adapter.state.trained["prompt"]}
    found = prefix_of(dataclasses.replace(adapter, state=State(zeros, {})))
    np.testing.assert_array_equal(found, np.broadcast_to(0.5 * np.asarray(zeros["prompt"]), found.shape))


def test_an_open_gate_is_prompt_tuning(model: Model) -> None:
    adapter = trained(model, LoPA(**SMALL))
    state = jax.tree.map(jnp.zeros_like, adapter.state.trained) | {"prompt": adapter.state.trained["prompt"]}
    for name in ("rows", "columns"):
        state[name]["c2"] += 100.0
    opened = dataclasses.replace(adapter, state=State(state, {}))
    tuned = Adapter(PromptTuning(prompt_tokens=6), State({"prompt": state["prompt"]}, {}), model.config)
    ids = tokens(batch=4, length=9)
    np.testing.assert_array_equal(model(ids, opened, instance=VECTORS), model(ids, tuned))


def test_gradients_are_the_notes(model: Model) -> None:
    """dZ_S = sum_b g ∘ dZ; dZ_I = dZ ∘ Z_S ∘ g (1 - g); dU = dZ_I V; dV = dZ_I^T U, which reach the biases as sums."""
    adapter = trained(model, LoPA(**SMALL))
    shared, u, v = factors(adapter)
    d_z = np.random.default_rng(5).standard_normal((4, *shared.shape))

    def loss(trained: Any) -> Any:
        return jnp.sum(adapter.method.bind(State(trained, {}), Rows(instance=VECTORS)).prefix * d_z)

    found = jax.jit(jax.grad(loss))(adapter.state.trained)
    gate = 1 / (1 + np.exp(-np.einsum("bmr,bdr->bmd", u, v)))
    d_own = d_z * shared * gate * (1 - gate)
    np.testing.assert_allclose(found["prompt"], (gate * d_z).sum(0), rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["rows"]["c2"], (d_own @ v).sum(0), rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["columns"]["c2"], (d_own.swapaxes(1, 2) @ u).sum(0), rtol=0, atol=1e-4)


def test_first_values(model: Model) -> None:
    """Head weights N(0, 0.02): the gate begins at one half, the prompt at half of real embeddings."""
    adapter = LoPA(prompt_tokens=10, rank=2, hidden=200).init(model, jax.random.key(0))
    for weights in (adapter.state.trained["rows"], adapter.state.trained["columns"]):
        assert float(weights["w1"].std()) == pytest.approx(0.02, rel=0.1)
        assert float(weights["w2"].std()) == pytest.approx(0.02, rel=0.1)
        assert 0.9 < float(jnp.abs(weights["c1"]).max()) * 32**0.5 <= 1 and not weights["c2"].any()
    half = prefix_of(adapter) / np.asarray(adapter.state.trained["prompt"])
    np.testing.assert_allclose(half, 0.5, atol=0.02)


def test_dropout_is_a_rows_own(model: Model) -> None:
    adapter = trained(model, LoPA(**SMALL, dropout=0.5))

    def prefix(seeds: Any) -> np.ndarray:
        vectors = np.broadcast_to(VECTORS[:1], (3, 32))
        return np.asarray(adapter.method.bind(adapter.state, Rows(seeds, instance=jnp.asarray(vectors))).prefix)

    one = prefix(jnp.array([1, 2, 1], jnp.uint32))
    assert np.abs(one[0] - one[1]).max() > 1e-3
    np.testing.assert_allclose(one[0], one[2], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(prefix(None)[0], prefix_of(adapter)[0], rtol=1e-6, atol=1e-6)
    assert np.abs(one[0] - prefix(None)[0]).max() > 1e-3


# --- in the model ---


def test_a_row_does_not_depend_on_its_batch(model: Model) -> None:
    """Prompts of different lengths together, each alone in transformers behind its own soft prompt, and three times."""
    hf = tiny("llama2")[0]
    adapter = trained(model, LoPA(**SMALL))
    prompts = [np.random.default_rng(n).integers(3, 99, n).tolist() for n in (4, 13, 9)]
    vectors = adapter.method.instances(model, prompts)
    together = generate_tokens(model, [*prompts, prompts[0], prompts[0]], adapter, max_new_tokens=6)
    for prompt, vector, new in zip(prompts, vectors, together, strict=False):
        with torch.no_grad():
            words = hf.get_input_embeddings()(torch.tensor([prompt + new]))
            prefix = torch.tensor(prefix_of(adapter, vector[None]))
            scores = hf(inputs_embeds=torch.cat([prefix, words], dim=1)).logits[0, 5 + len(prompt) :]
        assert scores.argmax(-1).tolist()[: len(new)] == new
    assert together[3] == together[4] == together[0]


def test_the_loss_of_a_conversation_is_behind_the_prompt_of_training(tmp_path: Path) -> None:
    """Training makes the soft prompt of what stands before the first answer, generation of all before the last."""
    hf, model = talking("llama2", tmp_path)
    adapter = trained(model, LoPA(**SMALL))
    turns = [{"role": role, "content": f"{role} says {n}"} for n in "12" for role in ("user", "assistant")]
    for messages in (turns, turns[:2]):
        example = parse_example({"messages": messages})
        ((ids, loss),) = tokenise_example(example, Template(model.tokenizer))
        vector = adapter.method.instances(model, [prompt_of(Tokenised(ids, loss)).tolist()])
        with torch.no_grad():
            words = hf.get_input_embeddings()(torch.tensor(ids[None].astype(np.int64)))
            scores = hf(inputs_embeds=torch.cat([torch.tensor(prefix_of(adapter, vector)), words], dim=1)).logits[0, 6:]
        targets = np.flatnonzero(loss)
        expected = torch.nn.functional.cross_entropy(scores[targets - 1], torch.tensor(ids[targets].astype(np.int64)))
        found = evaluate(model, [example], adapter, max_new_tokens=2)
        assert found.loss == pytest.approx(float(expected), rel=1e-4)


def test_logits_equal_transformers_behind_the_prompt(model: Model) -> None:
    hf = tiny("llama2")[0]
    adapter = trained(model, IDPG(prompt_tokens=3, hidden=7))
    ids = tokens(batch=4, length=9)
    with torch.no_grad():
        words = hf.get_input_embeddings()(torch.tensor(ids.astype(np.int64)))
        whole = torch.cat([torch.tensor(prefix_of(adapter)), words], dim=1)
        expected = hf(inputs_embeds=whole).logits[:, 3:].numpy()
    assert_close(model(ids, adapter, instance=VECTORS), expected)
    assert np.abs(expected - logits(hf, ids)).max() > 0.1


def test_the_bases_own_vectors(model: Model) -> None:
    """The mean of a prompt's embeddings over its root mean square, whatever else is asked for."""
    prompts = [np.random.default_rng(n).integers(3, 99, n).tolist() for n in (*range(1, 12), 40)]
    table = np.asarray(model.params.embed, np.float64)
    means = np.stack([table[p].mean(axis=0) for p in prompts])
    expected = means / np.sqrt((means**2).mean(axis=1, keepdims=True))
    np.testing.assert_allclose(LoPA().instances(model, prompts), expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def one_device(model: Model, tmp_path_factory: Any) -> tuple[dict[str, np.ndarray], list[float]]:
    return run(model, tmp_path_factory.mktemp("one") / "run")


def run(model: Model, out: Path) -> tuple[dict[str, np.ndarray], list[float]]:
    options = dataclasses.replace(OPTIONS, max_steps=3, learning_rate=1e-2, accumulation=2, batch_size=2)
    result = jora.train(model, LoPA(**SMALL, dropout=0.1), examples(8), out=out, options=options)
    leaves = jax.tree.leaves_with_path(result.adapter.state.trained)
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves}, [line["loss"] for line in result.history]


@pytest.mark.parametrize("mesh", ["fsdp=2,tensor=2"])  # rows cut, and the sequence
def test_a_mesh_equals_one_device(mesh: str, one_device: Any, tmp_path: Path) -> None:
    found, losses = run(jora.load_model(tiny("llama2")[1], dtype="float32", mesh=mesh), tmp_path / "run")
    assert losses == pytest.approx(one_device[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[-1], rel=1e-3)
    for name, value in one_device[0].items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)


# --- bad input ---


@pytest.mark.parametrize(
    "wrong",
    [dict(rank=11), dict(rank=0), dict(fusion="product"), dict(start="text"), dict(hidden=0), dict(dropout=1.0)],
)
def test_bad_options(wrong: Any) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        LoPA(**wrong)


def test_a_row_without_its_vector_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match="instance"):
        model(tokens(), LoPA().init(model, jax.random.key(0)))


def test_vectors_of_another_width_are_refused(model: Model) -> None:
    adapter = trained(model, LoPA(**SMALL))
    with pytest.raises(InputError, match="16 elements, the heads take 32"):
        model(tokens(), adapter, instance=np.zeros((2, 16), np.float32))
