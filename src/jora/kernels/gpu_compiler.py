"""What XLA has to be told about a GPU, so that it reads each layer's weights where they lie.

The weights of all layers are stacks, and a loop over layers slices them. A cuBLAS call takes the address of a slice;
XLA's own (Triton) products get a copy of it, and so do two products that were made one over joined weights: a decode
step of Llama 2 7B then writes and reads 15 GB more than the 13 GB of its weights. docs/log.md has the compiler's
output, before and after.
"""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array

# For `jax.jit(compiler_options=...)` of every program that runs the decoder. Other platforms' compilers read past them.
OPTIONS: dict[str, Any] = {
    "xla_gpu_enable_dynamic_slice_fusion": True,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_dot_merger_threshold_mb": 1,
}


def kept(product: Array) -> Array:
    """A product that the backward pass may want, made once.

    Where a loop stacks what it keeps, XLA lets cuBLAS write into the stack too: by multiplying a second time if anybody
    else reads the product, from a copy of the weight. Behind a barrier it does not see that one could be the other.
    """
    return jax.lax.optimization_barrier(product) if jax.default_backend() == "gpu" else product
