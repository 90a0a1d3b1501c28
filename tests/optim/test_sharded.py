"""GaLore on a mesh: the same trajectory, state that is cut like the weights, one factorisation for all devices."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.methods.test_full import assert_equal
from tests.tiny import tiny
from tests.train.test_layerwise import batch

from jora.methods.full import Full
from jora.models.model import load_model
from jora.train import TrainOptions
from jora.train.optimizer import optimizer_for
from jora.train.state import abstract_adapter, abstract_train_state, first_train_state, placement
from jora.train.step import Program, train_step

METHOD = Full()
OPTIONS: dict[str, Any] = dict(
    optimizer="galore",
    galore_rank=8,
    galore_refresh=2,
    galore_svd="exact",
    learning_rate=0.05,
    warmup=0.0,
    epsilon=1e-3,
)


def run(mesh: str | None, **changes: Any) -> tuple[Any, Any, Any]:
    """(state after two steps, its abstract form, the compiled step)."""
    model = load_model(tiny("llama2")[1], dtype="float32", mesh=mesh)
    adapter = METHOD.init(model, jax.random.key(0))
    options = TrainOptions(**{**OPTIONS, **changes})
    state = abstract_adapter(METHOD, adapter.state, model.config, model.layout)
    optimizer = optimizer_for(METHOD, options, 10, model.config, model.layout, state.trained)
    abstract = abstract_train_state(state.trained, optimizer, model.layout)
    now = first_train_state(adapter, abstract, optimizer)
    program = Program(model.config, model.layout, METHOD, optimizer, "none", placement(abstract, model.layout))
    rest = METHOD.rest(model.params)
    seed = jax.device_put(jnp.uint32(0), model.layout.sharding(()))

    def placed(step: int) -> Any:
        cut = lambda x: jax.device_put(x, model.layout.sharding((None, "batch"), x.shape))  # noqa: E731
        return jax.tree.map(cut, batch(1, step))

    compiled = train_step.lower(now, {}, rest, placed(0), seed, program=program).compile()
    for step in range(2):
        now, _ = compiled(now, {}, rest, placed(step), seed)
    return now, abstract, compiled


@pytest.fixture(scope="module")
def single() -> Any:
    return run(None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_mesh_gives_the_same_weights_and_cuts_the_state(single: Any, layerwise: bool) -> None:
    now, abstract, compiled = run("fsdp=2,tensor=2", layerwise=layerwise)
    assert_equal(now.trained, single.trained, 2e-5)
    for leaf, expected in zip(jax.tree.leaves(now), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)

    def share(tree: Any) -> float:
        """The part of the state that one device holds."""
        leaves = jax.tree.leaves(tree)
        own = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
        return own / sum(leaf.size for leaf in leaves)

    layers = now.optimizer.layers
    assert share(layers.projectors) == 0.25
    assert share(layers.inner.mu.weights) == 0.25
    # Seven matrices a layer, each with its own factorisation, which one device in four runs: it is inside a
    # conditional on the device's number.
    assert compiled.as_text().count("partition-id") > 0
    assert np.isfinite(float(jnp.sum(layers.inner.nu.norms["input"])))
