"""trainable_token_indices, as PEFT has it: single words of the vocabulary whose rows train, and nothing else of it.

The rows stand in place of the base's; the base's table gets no gradient. In a model whose output layer is tied to
the embedding both uses read them, unless lm_head has words of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jora.errors import InputError
from jora.kernels.widen import widen
from jora.methods.extras.modules import PREFIX
from jora.methods.method import ModuleSite, RowsMerger
from jora.methods.targets import EMBED, HEAD, Frozen
from jora.models.adapted import Bound, Dense, Rows, Site
from jora.models.config import ModelConfig
from jora.models.params import Params

TIED = "tied"  # rows that both uses of one table read
Option = Sequence[int] | Mapping[str, Sequence[int]] | None  # as in PEFT: of embed_tokens, or by module


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenRows:
    """Trained rows of a table, for the embedding (`embed`) and for the output layer (`apply`)."""

    rows: Float[Array, "n d"]
    words: Int[Array, " n"]

    def embed(self, tokens: Int[Array, "b s"], vectors: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        order = jnp.argsort(self.words)
        words = self.words[order]
        place = jnp.minimum(jnp.searchsorted(words, tokens), len(words) - 1)
        own = self.rows[order[place]].astype(vectors.dtype)
        return jnp.where((words[place] == tokens)[..., None], own, vectors)

    def apply(self, x: Array, dense: Dense, site: Site, rows: Rows) -> Array:
        logits = dense(x)
        own = jnp.einsum("bsd,nd->bsn", *widen(x, self.rows.astype(x.dtype)), preferred_element_type=jnp.float32)
        own = dense.layout.constrain(own.astype(logits.dtype), "batch_gathered", None, None)
        return logits.at[..., self.words].set(own)


def canonical(option: Option) -> Any:
    """The option as a value that can be hashed."""
    if isinstance(option, Mapping):
        return Frozen({name: tuple(words) for name, words in option.items()})
    return None if option is None else tuple(option)


def token_words(config: ModelConfig, option: Option) -> dict[str, tuple[int, ...]]:
    """{use: its words}: uses are "embed_tokens" and "lm_head", or "tied". Raises InputError for what is no word."""
    if not option:
        return {}
    named = option if isinstance(option, Mapping) else {EMBED: option}
    uses: dict[str, tuple[int, ...]] = {}
    for module, words in named.items():
        use = module.rpartition(".")[2]
        if use not in (EMBED, HEAD):
            raise InputError(f"trainable_token_indices: {module!r} is no table of words; name {EMBED} or {HEAD}")
        _check_words(words, config)
        uses[use] = tuple(words)
    if config.tied_embeddings and EMBED in uses and uses.get(HEAD, uses[EMBED]) == uses[EMBED]:
        return {TIED: uses[EMBED]}
    return uses


def _check_words(words: Sequence[int], config: ModelConfig) -> None:
    for word in words:
        if not isinstance(word, int) or isinstance(word, bool) or not 0 <= word < config.vocab_size:
            raise InputError(f"trainable_token_indices: {word!r} is no word of a vocabulary of {config.vocab_size}")
    if not words or len(set(words)) < len(words):
        raise InputError(f"trainable_token_indices: {list(words)} must name at least one word, and each once")


def tables(uses: Mapping[str, Any]) -> set[str]:
    """The modules whose rows are replaced."""
    return {EMBED, HEAD} if TIED in uses else set(uses)


def first_rows(params: Params, uses: Mapping[str, Sequence[int]]) -> dict[str, Float[Array, "n d"]]:
    """The base's own rows in fp32. `params` may be shapes, inside a trace."""
    if isinstance(params.embed, jax.ShapeDtypeStruct):  # an estimate: shapes in place of weights
        return {use: jnp.zeros((len(words), params.embed.shape[1])) for use, words in uses.items()}
    heads = params.embed if params.head is None else params.head
    return {u: (heads if u == HEAD else params.embed)[np.array(w)].astype(jnp.float32) for u, w in uses.items()}


def bound_to(bound: Bound, trained: Mapping[str, Array], words: Mapping[str, Array]) -> Bound:
    """`bound` with the rows at the tables' places."""
    found = {use: TokenRows(rows, words[use]) for use, rows in trained.items()}
    both = found.get(TIED)
    embed, head = found.get(EMBED, both) or bound.embed, found.get(HEAD, both) or bound.head
    return dataclasses.replace(bound, embed=embed, head=head)


def mergers(uses: Mapping[str, Sequence[int]], trained: Mapping[str, Array]) -> dict[ModuleSite, RowsMerger]:
    """The trained rows put into the tables. Of a tied table both uses have the *same* merger: it stays tied."""
    found: dict[ModuleSite, RowsMerger] = {}
    for use, words in uses.items():
        merger = partial(_put, np.asarray(trained[use]), np.array(words))
        found.update({(table, None): merger for table in tables({use: words})})
    return found


def _put(values: np.ndarray, words: np.ndarray, block: np.ndarray, rows: slice) -> np.ndarray:
    inside = (words >= rows.start) & (words < rows.stop)
    changed = block.copy()
    changed[words[inside] - rows.start] = values[inside]
    return changed


def file_name(use: str) -> str:
    """The tensor of a use in a PEFT file."""
    module = HEAD if use == HEAD else f"model.{EMBED}"
    return f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"
