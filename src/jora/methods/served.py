"""What the serving engine knows of an adapter: a few forms into which every method that can be served is lowered.

    y = sum_j v_j * ((u_j * x) W) + (x A^T) B + bias

Arrays are fp32 on the host. Shape legend: L layers, r rank, j base products, *in and *out dimensions of a linear,
m soft tokens, d model width, h width of a prompt's vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from jora.errors import InputError
from jora.models.config import LINEARS, ModelConfig

if TYPE_CHECKING:
    from jora.methods.method import Adapter

Prefix = Callable[[Float32[np.ndarray, " h"] | None], Float32[np.ndarray, "m d"]]


class LowRank(NamedTuple):
    """What is added to one target's products; the scale is in b. r is the largest true rank over the layers."""

    a: Float32[np.ndarray, "L r *in"]
    b: Float32[np.ndarray, "L r *out"]


class Products(NamedTuple):
    """Base products of one target, in place of the single one with u = v = 1; the bias stays outside the sum."""

    u: Float32[np.ndarray, "L j *in"]
    v: Float32[np.ndarray, "L j *out"]


@dataclass(frozen=True)
class Served:
    """An adapter as the engine serves it, by target ("q_proj" ... "down_proj").

    scales_bias: v scales the bias too (IA3; one product a target). prefix: the soft tokens, from the vector of the
    prompt that `Method.instances` makes, or from None where the method has no such vectors.
    """

    low_rank: Mapping[str, LowRank] = field(default_factory=dict)
    products: Mapping[str, Products] = field(default_factory=dict)
    scales_bias: bool = False
    prefix_slots: int = 0
    prefix: Prefix | None = None


def refused(method: str, what: str) -> InputError:
    """What is raised for an adapter, or a part of it, that the engine has no form for."""
    return InputError(f"{method}: {what} cannot be served; merge the adapter into its base (jora merge) and serve that")


def check_targets(method: str, trained: Mapping[str, Any]) -> None:
    """Raise InputError where anything else than linears of the layers was trained."""
    if others := [target for target in trained if target not in LINEARS]:
        raise refused(method, f"an adapter that changes {others[0]}")


def lower_lora(adapter: Adapter, name: str) -> Served:
    """A LoRA adapter's factors; `name`: the method that it came from, for errors."""
    trained, scales = adapter.state
    check_targets(name, trained)
    pairs = {t: low_rank_of(name, t, pair["a"], pair["b"], scales[t]) for t, pair in trained.items()}
    return Served({target: pair for target, pair in pairs.items() if pair.a.shape[1]})


def low_rank_of(method: str, target: str, a: jax.Array, b: jax.Array, scale: jax.Array) -> LowRank:
    """a [L, *in, r], b [L, r, *out] and scale [L] as training has them."""
    factors = np.asarray(b, np.float32)
    folded = factors * np.asarray(scale, np.float32).reshape(-1, *(1,) * (factors.ndim - 1))
    turned = np.ascontiguousarray(np.moveaxis(np.asarray(a, np.float32), -1, 1))
    return LowRank(finite(method, target, turned), finite(method, target, folded))


def finite(method: str, target: str, array: np.ndarray) -> np.ndarray:
    """`array`. Raises InputError where a number is none: it would spoil the other rows of its batch."""
    if not np.isfinite(array).all():
        raise InputError(f"{method}: the factors of {target} hold numbers that are not finite; train the adapter again")
    return array


def ones(config: ModelConfig, shape: tuple[int, ...]) -> Float32[np.ndarray, "L 1 *features"]:
    """Factors of a product that scales nothing on its input or output side."""
    return np.ones((config.layers, 1, *shape), np.float32)
