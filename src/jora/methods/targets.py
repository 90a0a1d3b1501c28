"""Choosing what to adapt, as PEFT does: by name, list, regular expression or "all-linear"."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Generic, TypeVar

from jora.errors import InputError
from jora.models.config import LINEARS, ModelConfig
from jora.models.tensors import layer_prefix, module_path

EMBED, HEAD = "embed_tokens", "lm_head"
K = TypeVar("K")
V = TypeVar("V")


class Frozen(dict[K, V], Generic[K, V]):
    """A dict that can be hashed, so that a method's options can be a static argument of jit."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def as_names(value: str | Sequence[str]) -> str | Sequence[str]:
    """A list of one, where `value` is the name of a target: as a regular expression it matches no layer's module."""
    return (value,) if isinstance(value, str) and value in (*LINEARS, EMBED, HEAD) else value


def checked_choice(option: str, value: Any) -> Any:
    """One of a method's choices of modules or layers, its lists as tuples, so that the method can be hashed.

    Raises InputError for what is no name of a module (`layers_to_transform`: no layer's number).
    """
    several = isinstance(value, list | tuple | set | frozenset)
    kind, what = (Integral, "the number of a layer") if option == "layers_to_transform" else (str, "a module's name")
    for item in value if several else () if value is None else (value,):
        if not isinstance(item, kind) or isinstance(item, bool):
            raise InputError(f"{option}: {item!r} is not {what}")
    if not several:
        return value
    return tuple(sorted(value) if isinstance(value, set | frozenset) else value)


def module_names(config: ModelConfig) -> dict[str, tuple[str, int | None]]:
    """Every adaptable module of the Hugging Face model -> (target, layer)."""
    names: dict[str, tuple[str, int | None]] = {"model.embed_tokens": (EMBED, None)}
    for layer in range(config.layers):
        for target in LINEARS:
            names[layer_prefix(layer) + module_path(target)] = (target, layer)
    names["lm_head"] = (HEAD, None)
    return names


def select(
    config: ModelConfig,
    targets: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    layers: int | Sequence[int] | None = None,
) -> dict[str, tuple[str, int | None]]:
    """The modules that `targets` names, as {module name: (target, layer)}.

    targets: "all-linear" (every linear of every layer, without embeddings and lm_head), one name, a list of
    name endings, or a regular expression that must match the whole module name (PEFT's rules); exclude: one of the
    last three. `layers` limits to these layer numbers. Raises InputError for a target that matches nothing.
    """
    modules = module_names(config)
    if isinstance(layers, int):
        layers = (layers,)
    layers = layers or None  # PEFT takes an empty list as no limit
    for number in layers or ():
        if not 0 <= number < config.layers:
            raise InputError(f"layers_to_transform: layer {number} does not exist; the model has {config.layers}")
    wanted, exclude = as_names(targets), as_names(exclude)
    chosen: dict[str, tuple[str, int | None]] = {}
    for name, (target, layer) in modules.items():
        if not _included(name, target, wanted) or _matches(name, exclude):
            continue
        # A list entry that is a module's whole name stands whatever the layer (so PEFT adapts lm_head).
        by_name = not isinstance(wanted, str) and name in wanted
        if layers is not None and layer not in layers and not by_name:
            continue
        chosen[name] = (target, layer)
    if not isinstance(wanted, str):
        for entry in wanted:
            if not any(_ends_with(name, entry) for name in modules):
                raise InputError(f"target {entry!r} names no module; known are {', '.join((*LINEARS, EMBED, HEAD))}")
    if not chosen:
        known = ", ".join((*LINEARS, EMBED, HEAD))
        chosen_by = f"targets {targets!r} (excluding {exclude!r}, layers {layers})"
        raise InputError(f"{chosen_by} select no module; a list of names, a regular expression or all-linear: {known}")
    return chosen


def check_options_match(method: Any, config: ModelConfig) -> None:
    """Raise InputError where an option of a method about to be trained fits nothing: a slip.

    It names no module, and would do nothing; or a rank is above what a matrix can have (`Method.check_ranks`).
    Not for adapters that are loaded: PEFT lets such options pass, and they do no harm there.
    """
    _check_named(method, config)
    method.check_ranks(config)


def _check_named(method: Any, config: ModelConfig) -> None:
    targets, layers = getattr(method, "targets", None), getattr(method, "layers_to_transform", None)
    if targets is None:
        return
    named, excluded = select(config, targets, (), layers), as_names(getattr(method, "exclude_modules", ()))
    for entry in (excluded,) if isinstance(excluded, str) else [(entry,) for entry in excluded]:
        if entry and not any(_matches(name, entry) for name in named):
            shown = entry if isinstance(entry, str) else entry[0]
            raise InputError(f"exclude_modules: {shown!r} is none of the modules that targets {targets!r} select")
    adapted = select(config, targets, excluded, layers)
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(method, option, ()):
            if not any(_pattern_matches(pattern, name) for name in adapted):
                known = "a name such as q_proj, or a regular expression of how module names end"
                raise InputError(f"{option}: {pattern!r} matches no adapted module; give {known}")


def _included(name: str, target: str, targets: str | Sequence[str]) -> bool:
    if targets == "all-linear":
        return target in LINEARS
    return _matches(name, targets)


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    if isinstance(patterns, str):
        return full_match(patterns, name)
    return any(_ends_with(name, entry) for entry in patterns)


def _ends_with(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches a module name, by PEFT's `(.*\\.)?(key)$`."""
    for pattern, value in patterns.items():
        if _pattern_matches(pattern, name):
            return value
    return default


def _pattern_matches(pattern: str, name: str) -> bool:
    return full_match(rf"(.*\.)?({pattern})", name)


def full_match(pattern: str, name: str) -> bool:
    """Whether a user's regular expression matches all of a module's name. Raises InputError where it is none."""
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise InputError(f"{pattern!r} is not a regular expression: {error}") from error
