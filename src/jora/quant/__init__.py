"""Quantised frozen weights: int8 a channel, and nf4 in blocks with quantised scales.

A kind has two sides: a `HostTensor`, one weight in the file's canonical form (that of bitsandbytes), and a
`QuantisedWeight`, the stack of all layers as the devices hold it, in the pieces of any mesh.
"""

from jora.quant.host import HostTensor, host_type
from jora.quant.pieces import Pieces
from jora.quant.weight import Kind, QuantisedWeight

__all__ = ["HostTensor", "Kind", "Pieces", "QuantisedWeight", "host_type"]
