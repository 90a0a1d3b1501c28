"""PEFT's adapter_config.json from a LoRA method, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jora.errors import InputError
from jora.methods.lora import LoRA
from jora.methods.targets import EMBED, HEAD, module_names, select
from jora.models.config import LINEARS, ModelConfig
from jora.models.tensors import layer_prefix

REMEDY = "merge it in PEFT (merge_and_unload) and use the merged model"

_READ = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "init_lora_weights",
        "base_model_name_or_path",
    }
)
# Say nothing about what the adapter computes: provenance, other libraries, settings of an initialisation.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    }
)
# Initialisations of the factors alone. The others (pissa, olora, corda, loftq, lora_ga) change the base's weights.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def to_peft(method: LoRA, config: ModelConfig, base: str) -> dict[str, Any]:
    """The options as PEFT reads them; PEFT then selects the same modules with the same ranks and scales."""
    names, exclude, layers = _targets(method, config)
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": method.rank,
        "lora_alpha": _whole(method.alpha),
        "lora_dropout": method.dropout,
        "use_rslora": method.use_rslora,
        "target_modules": names,
        "layers_to_transform": layers,
        "rank_pattern": dict(method.rank_pattern),
        "alpha_pattern": {pattern: _whole(alpha) for pattern, alpha in method.alpha_pattern.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    # Younger than the rest of the format: an older PEFT warns of a key that it does not know.
    return {**peft, "exclude_modules": exclude} if exclude else peft


def _targets(method: LoRA, config: ModelConfig) -> tuple[list[str], Any, list[int] | None]:
    """target_modules, exclude_modules and layers_to_transform as PEFT understands them."""
    targets, layers = method.targets, method.layers_to_transform
    if isinstance(targets, str):
        if targets == "all-linear":
            # Under PEFT the word means other modules in a multimodal class, and allows no layers_to_transform.
            targets = LINEARS
        elif targets in (*LINEARS, EMBED, HEAD):
            targets = (targets,)
        else:
            # PEFT matches a regular expression against modules that Jora does not count (norms, containers).
            return sorted(select(config, targets, method.exclude_modules, layers)), None, None
    exclude = method.exclude_modules
    return (
        sorted(targets),
        exclude if isinstance(exclude, str) else sorted(exclude),
        [layers] if isinstance(layers, int) else sorted(layers or ()) or None,
    )


def _whole(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha


def from_peft(peft: Mapping[str, Any], config: ModelConfig, where: str) -> LoRA:
    """A method from a parsed adapter_config.json. Raises InputError, by name, for what Jora cannot represent."""
    _refuse_unknown(peft, where)
    targets = peft.get("target_modules")
    if not targets:
        raise InputError(f"{where}: target_modules names no module")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = "all-linear"
    if not isinstance(targets, str):
        # PEFT's lists may name modules that this architecture does not have.
        known = [t for t in targets if any(n == t or n.endswith(f".{t}") for n in module_names(config))]
        if not known:
            raise InputError(f"{where}: none of target_modules ({', '.join(targets)}) is in a {config.family} model")
        targets = sorted(known)  # PEFT writes a set in any order; equal methods share compiled programs
    layers = peft.get("layers_to_transform")
    ranks, alphas = peft.get("rank_pattern") or {}, peft.get("alpha_pattern") or {}
    _check_numbers(where, {"r": peft.get("r", 8), **ranks}, int)
    _check_numbers(where, {"lora_alpha": peft.get("lora_alpha", 8), **alphas}, (int, float))
    return LoRA(
        rank=peft.get("r", 8),
        alpha=peft.get("lora_alpha", 8),
        targets=targets,
        dropout=peft.get("lora_dropout") or 0.0,
        use_rslora=bool(peft.get("use_rslora")),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        layers_to_transform=None if layers == [] else layers,
        exclude_modules=peft.get("exclude_modules") or (),
    )


def _check_numbers(where: str, values: Mapping[str, Any], kinds: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InputError(f"{where}: {name} is {value!r}, which is no number that it can be")


def _refuse_unknown(peft: Mapping[str, Any], where: str) -> None:
    if peft.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type {peft.get('peft_type')!r} is not supported; supported is LORA")
    for option in sorted(peft.keys() - _READ - _HARMLESS):
        if peft[option]:
            raise InputError(f"{where}: {option} is set, which Jora does not have; {REMEDY}")
    if peft.get("bias", "none") != "none":
        raise InputError(f"{where}: bias {peft['bias']!r} is set, which Jora does not have; {REMEDY}")
    init = peft.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise InputError(
            f"{where}: init_lora_weights {init!r} changed the base's weights; save the adapter again in PEFT with"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    patterns = peft.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    sample = layer_prefix(0) + "self_attn"
    if patterns and not any(re.match(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.", sample) for p in patterns):
        raise InputError(f"{where}: layers_pattern {patterns} matches no layers here; they are called 'layers'")
