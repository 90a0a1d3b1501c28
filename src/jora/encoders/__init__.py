"""Frozen text encoders: a vector for a text, for methods that depend on what is asked (LoPA, IDPG)."""

from jora.encoders.encoder import Encoder, open_encoder

__all__ = ["Encoder", "open_encoder"]
