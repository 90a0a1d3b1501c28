"""LoftQ (arXiv 2310.08659): first factors that make up for what quantisation took from a weight.

s A B is the best approximation of rank r of W - Q(W): the first step then computes what the unquantised model computes,
more closely than the quantised base does. This is one iteration of the paper's algorithm, as PEFT's
`replace_lora_weights_loftq` runs it: further ones would quantise W - s A B anew, another base for every adapter.
PEFT leaves the scale s out; here the factors are divided by its root each, so that the product is right for any alpha.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jora.errors import InputError
from jora.methods.method import State
from jora.methods.targets import EMBED, HEAD
from jora.models.bitsandbytes import QuantisedSource
from jora.models.model import Model, open_model
from jora.models.saving import device_tensors

if TYPE_CHECKING:
    from jora.methods.factors import Factors, FactorSite
    from jora.methods.lora import LoRA


def loftq_state(method: LoRA, model: Model) -> State:
    """A and B from the singular values of W - Q(W), a module at a time; W is read again from where the model lies.

    Raises InputError for a base that is not quantised, or of which only the quantised weights are there, and for a
    rank above a matrix's.
    """
    from jora.methods.factors import Factors, device_state, factor_sites
    from jora.methods.lora import check_rank

    if model.quant is None:
        raise InputError("init_lora_weights loftq makes up for quantisation: load the model with quant=nf4 or int8")
    if ends := sorted({EMBED, HEAD} & method.sites(model.config).keys()):
        raise InputError(f"init_lora_weights loftq: {ends[0]} is not quantised; leave it out of the targets")
    for site in factor_sites(method, model.config):
        check_rank("init_lora_weights loftq", model.config, site.target, site.rank)
    source = open_model(Path(model.path))[0]
    tensors = {tensor.site: tensor for tensor in device_tensors(model.params, model.config)}
    if isinstance(source, QuantisedSource):
        raise InputError(f"{model.path}: loftq needs the weights before quantisation, and has only the quantised ones")

    def read(site: FactorSite) -> Factors:
        tensor = tensors[site.target, site.layer]
        rows, columns = tensor.spec.hf_shape
        dense = source.read(tensor.spec.name, (slice(0, rows), slice(0, columns))).astype(np.float32)
        lost = dense - np.concatenate(list(tensor.blocks()))
        b, a = _best(lost, site.rank)
        root = np.float32(site.scale) ** -0.5
        return Factors(root * np.asarray(a), root * np.asarray(b))

    return device_state(method, model.config, model.layout, read)


@partial(jax.jit, static_argnums=1)
def _best(w: Float[Array, "o i"], rank: int) -> tuple[Float[Array, "o r"], Float[Array, "r i"]]:
    """The best approximation of `w` by a product of this rank, its singular values shared out by their roots."""
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * v[:rank]
