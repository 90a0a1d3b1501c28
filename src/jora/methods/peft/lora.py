"""LoRA adapters as PEFT stores them: adapter_config.json and the tensors, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from jora.errors import InputError
from jora.methods.dora import DoRA
from jora.methods.extras.both import extra_entries, extra_shapes, read_extras
from jora.methods.extras.modules import names_saved
from jora.methods.factors import Factors, FactorSite, device_state, factor_sites, host_factors
from jora.methods.lora import LoRA
from jora.methods.method import Adapter, State
from jora.methods.peft.options import REMEDY, check_numbers, read_targets, refuse_unknown
from jora.methods.storage import AdapterFile, PeftFiles
from jora.methods.targets import as_names, select
from jora.models.config import LINEARS, ModelConfig
from jora.models.model import Model
from jora.models.safetensors_file import Entry
from jora.models.saving import BLOCK, DeviceTensor, device_tensors

_KNOWN = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "init_lora_weights",
        "modules_to_save",
        "trainable_token_indices",
        # Other libraries, and settings of an initialisation: nothing about what the adapter computes.
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


def write_peft(adapter: Adapter) -> PeftFiles:
    """What a PEFT directory of this adapter holds. Tensors are fp32 and have their true ranks."""
    entries = []
    for site in factor_sites(adapter.method, adapter.config):
        for part in range(len(site.names)):
            entries.append(Entry(site.names[part], site.shapes[part], partial(_factor, adapter, site, part)))
    return PeftFiles(to_peft(adapter.method, adapter.config), entries + extra_entries(adapter))


def _factor(adapter: Adapter, site: FactorSite, part: int) -> tuple[np.ndarray, ...]:
    """One factor, fetched from the devices when it is written."""
    factor = host_factors(adapter, site)[part]
    assert factor is not None  # only DoRA's sites name a third
    return (factor,)


def read_peft(peft: Mapping[str, Any], file: AdapterFile, model: Model, where: str) -> tuple[LoRA, State]:
    """The method and its state from a directory of peft_type LORA (`storage.PeftReader`)."""
    method = from_peft(peft, model.config, where)
    sites = factor_sites(method, model.config)
    expected = {name: shape for site in sites for name, shape in zip(site.names, site.shapes, strict=True)}
    expected |= extra_shapes(method, model.config)
    bases = base_tensors(model)
    file.check(expected, bases)
    for name in sorted(file.names() & bases.keys() - expected.keys()):
        check_base(file, name, bases[name])

    def factors(site: FactorSite) -> Factors:
        return Factors(*(np.asarray(file.read(name), np.float32) for name in site.names))

    return method, read_extras(device_state(method, model.config, model.layout, factors), method, file, model)


def base_tensors(model: Model) -> dict[str, DeviceTensor]:
    """Names under which PEFT stores the embeddings' own weights, beside an adapter of them."""
    tables = {t.site[0]: t for t in device_tensors(model.params, model.config) if t.site and t.site[1] is None}
    embed = tables["embed_tokens"]
    named = {"model.embed_tokens": embed, "lm_head": tables.get("lm_head", embed)}
    return {
        f"base_model.model.{module}.{suffix}": tensor
        for module, tensor in named.items()
        for suffix in ("weight", "base_layer.weight")
    }


def check_base(file: AdapterFile, name: str, tensor: DeviceTensor) -> None:
    """PEFT adds the embeddings' own weights where it adapts them; they must be this model's."""
    rows = file.rows(name)
    stored, here = tuple(rows.get_shape()), tensor.spec.hf_shape
    if stored != here:
        raise InputError(f"{file.path}: {name} has shape {stored}, the base's is {here}; {REMEDY}")
    step = max(1, BLOCK // (4 * here[1]))
    for start in range(0, here[0], step):
        stop = min(start + step, here[0])
        ours = tensor.read(start, stop)
        if not np.array_equal(rows[start:stop].astype(ours.dtype), ours):
            raise InputError(f"{file.path}: {name} differs from the base's own weight; {REMEDY}")


def to_peft(method: LoRA, config: ModelConfig) -> dict[str, Any]:
    """The options as PEFT reads them; PEFT then selects the same modules with the same ranks and scales."""
    names, exclude, layers = _targets(method, config)
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
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
        "modules_to_save": list(method.modules_to_save) or None,
    }
    # Younger than the rest of the format: an older PEFT warns of a key that it does not know.
    words = method.trainable_token_indices
    words = {table: list(each) for table, each in words.items()} if isinstance(words, Mapping) else list(words or ())
    younger = {"exclude_modules": exclude, "use_dora": method.magnitudes, "trainable_token_indices": words}
    return peft | {name: value for name, value in younger.items() if value}


def _targets(method: LoRA, config: ModelConfig) -> tuple[list[str], Any, list[int] | None]:
    """target_modules, exclude_modules and layers_to_transform as PEFT understands them."""
    targets, layers = method.targets, method.layers_to_transform
    if isinstance(targets, str):
        if targets == "all-linear":
            # Under PEFT the word means other modules in a multimodal class, and allows no layers_to_transform.
            targets = LINEARS
        elif isinstance(as_names(targets), str):
            # PEFT matches a regular expression against modules that Jora does not count (norms, containers).
            return sorted(select(config, targets, method.exclude_modules, layers)), None, None
    exclude = as_names(method.exclude_modules)
    return (
        sorted(as_names(targets)),
        exclude if isinstance(exclude, str) else sorted(exclude),
        [layers] if isinstance(layers, int) else sorted(layers or ()) or None,
    )


def _whole(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha


def from_peft(peft: Mapping[str, Any], config: ModelConfig, where: str) -> LoRA:
    """A method from a parsed adapter_config.json. Raises InputError, by name, for what Jora cannot represent."""
    refuse_unknown(peft, _KNOWN, where)
    _check_initialisation(peft, where)
    layers = peft.get("layers_to_transform")
    ranks, alphas = peft.get("rank_pattern") or {}, peft.get("alpha_pattern") or {}
    check_numbers(where, {"r": peft.get("r", 8), **ranks}, int)
    dropout = peft.get("lora_dropout") or 0.0
    check_numbers(where, {"lora_alpha": peft.get("lora_alpha", 8), "lora_dropout": dropout, **alphas}, (int, float))
    return (DoRA if peft.get("use_dora") else LoRA)(
        rank=peft.get("r", 8),
        alpha=peft.get("lora_alpha", 8),
        targets=read_targets(peft, config, where),
        dropout=dropout,
        use_rslora=bool(peft.get("use_rslora")),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        layers_to_transform=None if layers == [] else layers,
        exclude_modules=peft.get("exclude_modules") or (),
        modules_to_save=names_saved(config, peft.get("modules_to_save") or ()),
        trainable_token_indices=peft.get("trainable_token_indices"),
    )


def _check_initialisation(peft: Mapping[str, Any], where: str) -> None:
    init = peft.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise InputError(
            f"{where}: init_lora_weights {init!r} changed the base's weights; save the adapter again in PEFT with"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
