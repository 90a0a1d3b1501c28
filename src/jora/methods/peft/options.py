"""What the adapter_config.json of every PEFT method has in common, both ways."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jora.errors import InputError
from jora.methods.targets import module_names, select
from jora.models.config import ModelConfig
from jora.models.tensors import layer_prefix

REMEDY = "merge it in PEFT (merge_and_unload) and use the merged model"

# Say nothing about what an adapter computes: provenance, the device, other libraries.
_HARMLESS = frozenset(
    {
        "peft_type",
        "base_model_name_or_path",
        "auto_mapping",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
        "runtime_config",
    }
)


# What the options that are no plain numbers may be, and what their lists hold.
_FORMS: dict[str, tuple[tuple[type, ...], type]] = {
    **dict.fromkeys(("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern"), ((str, list), str)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ((dict,), str)),
    "modules_to_save": ((list,), str),
    "layers_to_transform": ((int, list), int),
    "trainable_token_indices": ((list, dict), object),
}


def refuse_unknown(peft: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise InputError, by name, for an option that is set and neither known nor harmless, or of another form."""
    for option in sorted(peft.keys() - _HARMLESS - set(known) - {"bias", "layers_pattern"}):
        if peft[option]:
            raise InputError(f"{where}: {option} is set, which Jora does not have; {REMEDY}")
    for option, (forms, items) in _FORMS.items():
        value = peft.get(option)
        listed = value if isinstance(value, list | dict) else ()
        if value is not None and not (isinstance(value, forms) and all(isinstance(item, items) for item in listed)):
            raise InputError(f"{where}: {option} is {value!r}, which PEFT does not write")
    if peft.get("bias", "none") != "none":
        raise InputError(f"{where}: bias {peft['bias']!r} is set, which Jora does not have; {REMEDY}")
    patterns = peft.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    sample = layer_prefix(0) + "self_attn"
    if patterns and not any(re.match(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.", sample) for p in patterns):
        raise InputError(f"{where}: layers_pattern {patterns} matches no layers here; they are called 'layers'")


def check_numbers(where: str, values: Mapping[str, Any], kinds: Any) -> None:
    """Raise InputError for a value that is not of `kinds` (a type or several)."""
    for name, value in values.items():
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InputError(f"{where}: {name} is {value!r}, which is no number that it can be")


def read_targets(peft: Mapping[str, Any], config: ModelConfig, where: str) -> str | list[str]:
    """target_modules as `targets.select` understands them."""
    targets = peft.get("target_modules")
    if not targets:
        raise InputError(f"{where}: target_modules names no module")
    if isinstance(targets, str):
        return "all-linear" if targets.lower() == "all-linear" else targets
    # PEFT's lists may name modules that this architecture does not have.
    known = [t for t in targets if any(n == t or n.endswith(f".{t}") for n in module_names(config))]
    if not known:
        raise InputError(f"{where}: none of target_modules ({', '.join(targets)}) is in a {config.family} model")
    return sorted(known)  # PEFT writes a set in any order; equal methods share compiled programs


def written_targets(config: ModelConfig, chosen: Mapping[str, tuple[str, int | None]]) -> list[str]:
    """A list of target_modules that makes PEFT adapt just the modules `chosen` (what `select` returned)."""
    short: Sequence[str] = sorted({target for target, _ in chosen.values()})
    return list(short) if select(config, short).keys() == chosen.keys() else sorted(chosen)
