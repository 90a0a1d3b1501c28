"""What an adapter of the LoRA kind may train beside its factors: whole modules, and single rows of the vocabulary.

Both stand in the method's state under keys that no target has, and only where the options ask for them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jora.errors import InputError
from jora.methods.extras import modules, tokens
from jora.methods.method import Adapter, ModuleSite, RowsMerger, State
from jora.methods.storage import AdapterFile, place, whole
from jora.models.adapted import Bound
from jora.models.config import ModelConfig
from jora.models.model import Model
from jora.models.params import Params
from jora.models.safetensors_file import Entry
from jora.sharding import Layout

MODULES, TOKENS = "modules_to_save", "trainable_token_indices"


class HasExtras(Protocol):
    """A method with the two options."""

    @property
    def modules_to_save(self) -> Sequence[str]: ...
    @property
    def trainable_token_indices(self) -> tokens.Option: ...


def without_extras(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The targets' part of a state's dictionary."""
    return {key: value for key, value in tree.items() if key not in (MODULES, TOKENS)}


def with_extras(adapter: Adapter, model: Model) -> Adapter:
    """A fresh adapter with the first values of what else trains: the base's own weights."""
    method, config, layout = adapter.method, model.config, model.layout
    saved, uses = _chosen(method, config)
    trained: dict[str, Any] = {}
    if saved:
        trained[MODULES] = modules.copies(model.params, saved, config, layout)
    if uses:
        rows = tokens.first_rows(model.params, uses)
        trained[TOKENS] = {use: jax.device_put(value, layout.sharding((None, None))) for use, value in rows.items()}
    return Adapter(method, _joined(adapter.state, trained, method, config, layout), config, adapter.base)


def _chosen(method: HasExtras, config: ModelConfig) -> tuple[dict[str, modules.Saved], dict[str, tuple[int, ...]]]:
    saved = modules.saved_modules(config, method.modules_to_save) if method.modules_to_save else {}
    return saved, tokens.token_words(config, method.trainable_token_indices)


def _joined(state: State, trained: Mapping[str, Any], method: HasExtras, config: ModelConfig, layout: Layout) -> State:
    """`state` with what else trains, and the constants that belong to it: layer numbers and words."""
    saved, uses = _chosen(method, config)
    constant: dict[str, Any] = {}
    if saved:
        constant[MODULES] = modules.layer_numbers(saved)
    if uses:
        constant[TOKENS] = {use: np.array(words, np.int32) for use, words in uses.items()}
    constant = jax.tree.map(lambda x: jax.device_put(jnp.asarray(x), layout.sharding((None,))), constant)
    return State({**state.trained, **trained}, {**state.constant, **constant})


def extra_axes(method: HasExtras, config: ModelConfig) -> State:
    """Logical axes of what else trains, to be joined with those of the factors."""
    saved, uses = _chosen(method, config)
    trained: dict[str, Any] = {}
    constant: dict[str, Any] = {}
    if saved:
        trained[MODULES] = {path: one.axes for path, one in saved.items()}
        constant[MODULES] = {path: (None,) for path in modules.layer_numbers(saved)}
    if uses:
        trained[TOKENS] = dict.fromkeys(uses, (None, None))
        constant[TOKENS] = dict.fromkeys(uses, (None,))
    return State(trained, constant)


def bind_extras(state: State, bound: Bound) -> Bound:
    """`bound` with the trained rows of the vocabulary in it."""
    if TOKENS not in state.trained:
        return bound
    return tokens.bound_to(bound, state.trained[TOKENS], state.constant[TOKENS])


def base_with_extras(state: State, params: Params) -> Params:
    """`params` with the modules that train in place of the base's."""
    if MODULES not in state.trained:
        return params
    return modules.replaced(params, state.trained[MODULES], state.constant[MODULES])


def is_saved(method: HasExtras, module: str) -> bool:
    """Whether a target is left to modules_to_save: PEFT does not adapt what it names whole."""
    return any(f".{module}".endswith(f".{name}") for name in method.modules_to_save)


def check_extras(method: HasExtras, config: ModelConfig, sites: Collection[ModuleSite]) -> None:
    """Raise InputError where a module would be trained in two ways."""
    saved, uses = _chosen(method, config)
    copied = {site for one in saved.values() for site in one.sites}
    rows: set[ModuleSite] = {(table, None) for table in tokens.tables(uses)}
    for (one, first), (other, second) in (
        (("the adapter", set(sites)), (MODULES, copied)),
        (("the adapter", set(sites)), (TOKENS, rows)),
        ((MODULES, copied), (TOKENS, rows)),
    ):
        if both := sorted(first & second, key=str):
            where = both[0][0] if both[0][1] is None else f"{both[0][0]} of layer {both[0][1]}"
            raise InputError(f"{where} is trained by {one} and by {other} (a tied table counts for both); choose one")


def extra_mergers(adapter: Adapter) -> dict[ModuleSite, RowsMerger]:
    """How to put what else was trained into the base."""
    saved, uses = _chosen(adapter.method, adapter.config)
    trained = adapter.state.trained
    whole = modules.mergers(saved, trained[MODULES]) if saved else {}
    return whole | (tokens.mergers(uses, trained[TOKENS]) if uses else {})


def extra_entries(adapter: Adapter) -> list[Entry]:
    """What else was trained as tensors of a PEFT file."""
    saved, uses = _chosen(adapter.method, adapter.config)
    trained = adapter.state.trained
    entries = modules.entries(saved, trained[MODULES]) if saved else []
    for use in uses:
        rows = trained[TOKENS][use]
        entries.append(Entry(tokens.file_name(use), rows.shape, partial(whole, rows)))
    return entries


def extra_shapes(method: HasExtras, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a PEFT file that `extra_entries` writes."""
    saved, uses = _chosen(method, config)
    rows = {tokens.file_name(use): (len(words), config.embed) for use, words in uses.items()}
    return modules.file_shapes(saved) | rows


def read_extras(state: State, method: HasExtras, file: AdapterFile, model: Model) -> State:
    """`state`, read from a PEFT file, with what else the file holds."""
    config, layout = model.config, model.layout
    saved, uses = _chosen(method, config)
    trained: dict[str, Any] = {}
    if saved:
        trained[MODULES] = modules.read(file, saved, config, layout)
    if uses:
        rows = {use: np.asarray(file.read(tokens.file_name(use)), np.float32) for use in uses}
        trained[TOKENS] = {use: place(layout, (None, None), value) for use, value in rows.items()}
    return _joined(state, trained, method, config, layout)
