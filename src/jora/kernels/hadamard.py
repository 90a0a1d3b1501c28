"""The product of x with W * sum_j in_j out_j^T (element by element), which never makes that matrix.

    y = sum_j out_j * ((in_j * x) W)

One matrix product with r times the rows, between two element-wise ones. Each row of the batch may bring its own
vectors, at no further cost. Over several devices a cut input is summed last, after the r terms: devices exchange
what one product by W exchanges, whatever r is; the same holds for the gradient of x.

Shape legend: *in, *out dimensions of the site, b rows, s tokens, r components, n = b, or 1 where all rows share.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jora.kernels.on_shards import Axes, on_shards
from jora.kernels.widen import product
from jora.sharding import Layout
from jora.sharding.layout import mesh_axes


def hadamard_product(
    x: Float[Array, "b s *in"],
    weight: Float[Array, "*in *out"],
    inputs: Float[Array, "n r *in"],
    outputs: Float[Array, "n r *out"],
    in_axes: Axes,
    out_axes: Axes,
    layout: Layout,
) -> Float[Array, "b s *out"]:
    """x (W * sum_j inputs_j outputs_j^T), in x's dtype with fp32 sums.

    in_axes, out_axes: logical axes of the site's activations, by which x, W and the vectors are cut.
    """
    rows = "batch" if inputs.shape[0] > 1 else None
    own = len(in_axes)
    over = mesh_axes(layout.spec((*in_axes, *out_axes), weight.shape)[:own])
    axes = (
        ("batch", None, *in_axes),
        (*in_axes, *out_axes),
        (rows, None, *in_axes),
        (rows, None, *out_axes),
    )
    out_shape = (*x.shape[:2], *weight.shape[own:])
    local = partial(_local, over=over if layout.devices > 1 else ())
    return on_shards(local, layout, (x, weight, inputs, outputs), axes, ("batch", None, *out_axes), out_shape)


def _local(x: Array, weight: Array, inputs: Array, outputs: Array, over: tuple[str, ...]) -> Array:
    """One device's part; `over`: mesh axes that cut the input."""
    own = x.ndim - 2
    scaled = (x[:, None].astype(jnp.float32) * inputs[:, :, None]).astype(x.dtype)  # [b, r, s, *in]
    contract = (tuple(range(3, 3 + own)), tuple(range(own)))
    terms = product(scaled, weight, contract, x.dtype).astype(jnp.float32)
    # Not jnp.sum: the CPU compiler of jax 0.10 fuses that with the product and may return what it never wrote.
    y = terms[:, 0] * outputs[:, 0, None]
    for j in range(1, inputs.shape[1]):
        y += terms[:, j] * outputs[:, j, None]
    y = y.astype(x.dtype)
    return jax.lax.psum(y, over) if over else y
