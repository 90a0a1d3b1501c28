"""The two devices that a GPU test compares, and how a model gets from one to the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jora.models.model import Model
from jora.sharding import single_device


def gpu() -> jax.Device:
    """Where `load_model` and everything else puts arrays by default, as the GPU is jax's first choice."""
    device: jax.Device = jax.devices("gpu")[0]
    return device


def cpu() -> jax.Device:
    device: jax.Device = jax.devices("cpu")[0]
    return device


def on_cpu(model: Model) -> Model:
    """The same weights on the CPU, in a layout of their own: nothing in the library loads a model there by name.

    fp32 or quantised bases only: kernels are chosen by jax's default backend, which stays the GPU.
    """
    layout = single_device(cpu())
    return dataclasses.replace(model, params=jax.device_put(model.params, layout.sharding(())), layout=layout)


def on_both(function: Callable[..., Any], *arrays: Any) -> tuple[np.ndarray, np.ndarray]:
    """function(*arrays), compiled and run on the GPU and on the CPU. Constants would be folded by the host."""
    results = []
    for device in (gpu(), cpu()):
        with jax.default_device(device):
            out = jax.jit(function)(*jax.device_put(arrays, device))
        assert out.devices() == {device}
        results.append(np.asarray(out))
    return results[0], results[1]
