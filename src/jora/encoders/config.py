"""What a BERT-class encoder is made of, from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jora.errors import InputError

BERT, ROBERTA = ("bert",), ("roberta", "xlm-roberta", "camembert")
Activation = Literal["gelu", "gelu_new", "relu"]
ACTIVATIONS: tuple[Activation, ...] = ("gelu", "gelu_new", "relu")


@dataclass(frozen=True)
class EncoderConfig:
    """A transformer encoder with learned positions and norms after each block (arXiv 1810.04805, 1907.11692)."""

    width: int
    layers: int
    heads: int
    activation: Activation
    norm_eps: float
    pad_id: int
    first_position: int  # RoBERTa's positions begin behind the padding word's number
    max_tokens: int


def config_from_hf(hf: Mapping[str, Any], where: str) -> EncoderConfig:
    """Raises InputError, by name, for an architecture or an option that is not computed here."""
    kind = hf.get("model_type")
    if kind not in BERT + ROBERTA:
        raise InputError(
            f"{where}: model_type {kind!r} is no encoder that Jora computes ({', '.join(BERT + ROBERTA)}); take one of "
            "these, or a sentence-transformers directory (with modules.json)"
        )
    activation = hf.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise InputError(f"{where}: hidden_act {activation!r} is not known; known: {', '.join(ACTIVATIONS)}")
    if (position := hf.get("position_embedding_type", "absolute")) != "absolute":
        raise InputError(f"{where}: position_embedding_type {position!r} is not known; only 'absolute' is")
    if hf.get("is_decoder") or hf.get("add_cross_attention"):
        raise InputError(f"{where}: is_decoder or add_cross_attention is set; an encoder has neither")
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        if not isinstance(hf.get(name), int):
            raise InputError(f"{where}: {name} is {hf.get(name)!r}, no whole number: not a whole config.json")
    pad = int(hf.get("pad_token_id") or 0) if kind in BERT else int(hf.get("pad_token_id", 1))
    first = 0 if kind in BERT else pad + 1
    return EncoderConfig(
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        activation=activation,
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        pad_id=pad,
        first_position=first,
        max_tokens=hf["max_position_embeddings"] - first,
    )
