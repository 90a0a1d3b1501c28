"""GaLore on a mesh: the same trajectory, state that is cut like the weights, one factorisation for all devices."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.methods.test_full import assert_equal
from tests.tiny import tiny
from tests.train.test_layerwise import batch

from jora.methods.full import Full
from jora.models.families import config_from_hf
from jora.models.model import load_model
from jora.models.params import abstract_params
from jora.optim import projection
from jora.optim.model import ModelOptimizer
from jora.optim.stacked import init_stacked
from jora.sharding import parse_mesh
from jora.train import TrainOptions
from jora.train.estimation import simulated_layout
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
    epsilon=1e-2,  # a large one: else Adam makes whole steps of gradients that are all rounding
)


def run(mesh: str | None, **changes: Any) -> tuple[Any, Any]:
    """(state after two steps, its abstract form)."""
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
    return now, abstract


@pytest.fixture(scope="module")
def single() -> Any:
    return run(None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_mesh_gives_the_same_weights_and_cuts_the_state(single: Any, layerwise: bool) -> None:
    now, abstract = run("fsdp=2,tensor=2", layerwise=layerwise)
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
    assert np.isfinite(float(jnp.sum(layers.inner.nu.norms["input"])))


def test_each_matrix_is_factorised_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven matrices a layer on four devices, counted where they run; none at a step at which none is due."""
    ran: list[int] = []

    def counted(matrix: Any, rank: int, *_: Any) -> Any:
        jax.debug.callback(lambda device: ran.append(int(device)), jax.lax.axis_index(layout.mesh.axis_names))
        return matrix[:, :rank]  # in place of the vectors, which take time to compile

    monkeypatch.setattr(projection, "leading_vectors", counted)
    config = config_from_hf(json.loads(Path(tiny("llama2")[1], "config.json").read_text()))
    layout = simulated_layout(parse_mesh("fsdp=2,tensor=2"), config)
    shapes = abstract_params(config, layout, jnp.float32)
    options = TrainOptions(**OPTIONS, galore_stagger=False)
    optimizer = optimizer_for(METHOD, options, 10, config, layout, shapes)
    assert isinstance(optimizer, ModelOptimizer)
    draw = np.random.default_rng(0)

    def drawn(x: Any) -> Any:
        return jax.device_put(draw.standard_normal(x.shape).astype(np.float32), x.sharding)

    layers = jax.tree.map(drawn, shapes.layers)

    @jax.jit
    def refreshed(state: Any) -> Any:
        return jax.lax.scan(lambda _, layer: (None, optimizer.layer.refresh(*layer)), None, (layers, state))[1]

    state = jax.jit(partial(init_stacked, optimizer.layer))(layers)
    for due in (True, False, True):  # every second step
        state = jax.block_until_ready(refreshed(state))
        jax.effects_barrier()
        expected = [place % 4 for place in range(7)] * config.layers if due else []
        assert sorted(ran) == sorted(expected)
        ran.clear()
        state = state._replace(step=state.step + 1)
