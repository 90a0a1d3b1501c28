"""What an adapter is, from its config alone: no weights are read."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jora.errors import InputError
from jora.methods import registry
from jora.methods.flora import FLoRA
from jora.methods.lopa import BASE
from jora.methods.lora import LoRA
from jora.methods.nola import NOLA
from jora.methods.peft.lora import from_peft
from jora.methods.peft.options import read_targets
from jora.methods.served import refused
from jora.methods.storage import OWN_CONFIG, PEFT_CONFIG
from jora.methods.targets import select
from jora.models.config import LINEARS, ModelConfig
from jora.serve.adapters.packing import Spec, TargetSpec
from jora.serve.adapters.validation import Fingerprint, check_base, read_config
from jora.serve.scheduling.sequence import AdapterVersion


@dataclass(frozen=True)
class Entry:
    """A version of an adapter on disk: its directory (real, confined) and its files as they were."""

    version: AdapterVersion
    path: Path
    files: Fingerprint

    @property
    def where(self) -> str:
        """For errors, which clients may see: no path of the server."""
        return f"adapter {self.version.name!r}"


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter that is served. method: Jora's name of it. spec: its ranks and base products by target.

    prefix_slots: soft tokens in front of a prompt. base: the name that it records. warning: a line, where that is
    another name than the served base's.
    """

    version: AdapterVersion
    path: Path
    method: str
    spec: Spec
    prefix_slots: int
    base: str
    warning: str | None = None

    @property
    def name(self) -> str:
        return self.version.name

    @property
    def rank(self) -> int | None:
        """The largest rank; None where it has none."""
        return self.spec.rank or None

    @property
    def targets(self) -> tuple[str, ...]:
        """The linears that it changes."""
        return tuple(each.target for each in self.spec.targets)


def describe(
    entry: Entry, config: ModelConfig, identity: Mapping[str, str], encoders: Collection[str] = ()
) -> AdapterInfo:
    """Read an adapter's config. encoders: what it may name as the encoder of its prompts, beside the base.

    Raises InputError for one that is broken, hostile, or for another base.
    """
    present = {file.name for file in entry.files}
    own, peft = (
        read_config(entry.path / name, f"{entry.where}: {name}") if name in present else {}
        for name in (OWN_CONFIG, PEFT_CONFIG)
    )
    recorded = own.get("base") or {}
    named = (recorded.get("name") if isinstance(recorded, dict) else None) or peft.get("base_model_name_or_path") or ""
    if not isinstance(recorded, dict) or not isinstance(named, str):
        raise InputError(f"{entry.where}: the base that it records is no name and fingerprint")
    warning = check_base(recorded, named, identity, entry.where)
    try:
        kind, spec, slots = _own(own, config, encoders) if "method" in own else _peft(_plain(peft), config)
    except InputError as error:
        raise InputError(f"{entry.where}: {error}") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:  # a list for a number, and so on
        raise InputError(f"{entry.where}: an option of its config is of a kind that nobody writes ({error})") from None
    return AdapterInfo(entry.version, entry.path, kind, spec, slots, named, warning)


Parts = tuple[str, Spec, int]  # method, sizes, soft tokens


def _plain(peft: Mapping[str, Any]) -> str:
    """The same text for configs that mean the same: PEFT writes sets in any order."""
    targets = peft.get("target_modules")
    if isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        peft = {**peft, "target_modules": sorted(targets)}
    return json.dumps({option: peft[option] for option in sorted(peft) if option != "base_model_name_or_path"})


@lru_cache(maxsize=64)  # thousands of adapters have few different options
def _peft(text: str, config: ModelConfig) -> Parts:
    peft = json.loads(text)
    kind = str(peft.get("peft_type"))
    if kind == "LORA":
        method = from_peft(peft, config, PEFT_CONFIG)
        if method.modules_to_save or method.trainable_token_indices:
            raise refused(method.name, "an adapter that trained whole modules or tokens")
        return method.name, _spec(method.name, _ranks(method, config), int(method.magnitudes)), 0
    if kind == "PROMPT_TUNING":
        count = peft.get("num_virtual_tokens")
        if type(count) is not int or count < 1:
            raise InputError(f"{PEFT_CONFIG}: num_virtual_tokens is {count!r}, which is no number that it can be")
        return "prompt-tuning", Spec(), count
    if kind not in ("VERA", "IA3"):
        known = ", ".join(registry.PEFT_READERS)
        raise InputError(f"{PEFT_CONFIG}: peft_type {kind!r} is not supported; supported: {known}")
    chosen = select(config, read_targets(peft, config, PEFT_CONFIG), peft.get("exclude_modules") or ())
    targets = {target for target, _ in chosen.values()}
    if kind == "IA3":
        return "ia3", _spec("ia3", dict.fromkeys(targets, 0), 1, scales_bias=True), 0
    rank = peft.get("r", 256)
    if type(rank) is not int or rank < 1:
        raise InputError(f"{PEFT_CONFIG}: r is {rank!r}, which is no rank")
    return "vera", _spec("vera", dict.fromkeys(targets, rank), 0), 0


def _own(own: Mapping[str, Any], config: ModelConfig, encoders: Collection[str]) -> Parts:
    name = str(own["method"])
    if name not in registry.names():
        raise InputError(f"{OWN_CONFIG}: method {name!r} is not known; import the module that registers it first")
    try:
        method = registry.method_class(name)(**own.get("options", {}))
    except TypeError as error:
        raise InputError(f"{OWN_CONFIG}: options of another version of {name}: {error}") from None
    if isinstance(method, LoRA | NOLA):
        return name, _spec(name, _ranks(method, config), 0), 0
    if isinstance(method, FLoRA):
        return name, _spec(name, dict.fromkeys(method.masks(config), 0), method.rank), 0
    # It would be opened, and perhaps fetched: a path or hub id that an adapter's maker chose.
    encoder = getattr(method, "encoder", BASE)
    if encoder != BASE and encoder not in encoders:
        raise InputError(f"its encoder {str(encoder)[:100]!r} is none that this server was started with (--encoders)")
    return name, Spec(), method.prompt_slots


def _ranks(method: LoRA | NOLA, config: ModelConfig) -> dict[str, int]:
    """The largest rank of each target."""
    return {target: max(rank for rank, _ in by_layer.values()) for target, by_layer in method.sites(config).items()}


def _spec(method: str, ranks: Mapping[str, int], products: int, scales_bias: bool = False) -> Spec:
    if others := sorted(ranks.keys() - set(LINEARS)):
        raise refused(method, f"an adapter that changes {others[0]}")
    found = (TargetSpec(target, ranks[target], products) for target in LINEARS if target in ranks)
    return Spec(tuple(found), scales_bias)
