"""Gradients of sum(logits * weights) with respect to an adapter: ours, and PEFT's by autograd, under PEFT's names."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jora.methods.factors import factor_sites, host_factors
from jora.methods.method import Adapter
from jora.methods.method import State as MethodState
from jora.models import decoder, head
from jora.models.adapted import Rows
from jora.models.model import Model

# Compiling is what takes time here; the partitioning among devices stays the same.
FAST = {"xla_backend_optimization_level": "0"}


def weights(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def loss_and_gradients(model: Model, adapter: Adapter, ids: np.ndarray, rows: Rows | None = None) -> tuple[float, Any]:
    """Ours: the loss, and the gradient of the trained leaves as they lie on the devices."""
    method, rows = adapter.method, rows or Rows()

    def loss(trained: Any, constant: Any, params: Any) -> jax.Array:
        bound = method.bind(MethodState(trained, constant), rows)
        params = method.base(MethodState(trained, constant), params)
        hidden, _ = decoder.forward(params, model.config, model.layout, jnp.asarray(ids), bound=bound, rows=rows)
        logits = head.logits(params, model.config, model.layout, hidden, bound, rows)
        return jnp.sum(logits * weights(logits.shape))

    inputs = (adapter.state.trained, adapter.state.constant, model.params)
    value, found = jax.jit(jax.value_and_grad(loss)).lower(*inputs).compile(FAST)(*inputs)
    return float(value), found


def by_name(adapter: Adapter, trained: Any) -> dict[str, np.ndarray]:
    """Leaves like the trained ones, as tensors under PEFT's names."""
    like = Adapter(adapter.method, MethodState(trained, adapter.state.constant), adapter.config)
    sites = factor_sites(adapter.method, adapter.config)
    return {n: a for site in sites for n, a in zip(site.names, host_factors(like, site), strict=False) if a is not None}


def peft_gradients(model: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """PEFT's, of a model in whichever mode it is in."""
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    logits = model(torch.from_numpy(ids.astype(np.int64))).logits
    (logits * torch.from_numpy(weights(tuple(logits.shape)))).sum().backward()
    return {
        name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector"): p.grad.numpy()
        for name, p in model.named_parameters()
        if "lora_" in name
    }


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-4) -> None:
    """Equal to `tolerance` of each array's norm."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = np.linalg.norm(found[name] - value) / np.linalg.norm(value)
        assert error <= tolerance, f"{name}: {error:.1e}"


def named(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def moved(adapter: Adapter, model: Model) -> Adapter:
    """The adapter laid out on the devices of another mesh's model."""
    axes = adapter.method.axes(model.config)
    state = jax.tree.map(
        lambda leaf, a: jax.device_put(np.asarray(leaf), model.layout.sharding(a, leaf.shape)), adapter.state, axes
    )
    return Adapter(adapter.method, state, model.config, model.identity)


def shaken(adapter: Adapter, size: float = 0.1, seed: int = 0, keep_zeros: bool = False) -> Adapter:
    """Random numbers added to what trains (a fresh B is zero); keep_zeros: not to zeros, which pad ranks."""
    draw = np.random.default_rng(seed)

    def shake(x: jax.Array) -> jax.Array:
        noise = size * draw.standard_normal(x.shape).astype(np.float32)
        return jax.device_put(np.asarray(x) + noise * ((np.asarray(x) != 0) | (not keep_zeros)), x.sharding)

    trained = jax.tree.map(shake, adapter.state.trained)
    return Adapter(adapter.method, MethodState(trained, adapter.state.constant), adapter.config, adapter.base)
