"""What a device can hold, and what a compiled program needs there."""

from __future__ import annotations

import ctypes
import sys
from typing import Any, NamedTuple

import jax
import psutil

from jora.sharding import Layout

# Allocators fragment, and other programs on the device may need a little.
USABLE = 0.9


class ProgramMemory(NamedTuple):
    """Bytes per device by the compiler's own analysis. `aliased`: outputs that take donated arguments' place."""

    arguments: int
    temporaries: int
    outputs: int
    aliased: int

    @classmethod
    def of(cls, compiled: Any) -> ProgramMemory:
        """The analysis of a `jax.stages.Compiled`."""
        m = compiled.memory_analysis()
        return cls(m.argument_size_in_bytes, m.temp_size_in_bytes, m.output_size_in_bytes, m.alias_size_in_bytes)

    @property
    def added(self) -> int:
        """What running it takes beyond its arguments."""
        return self.temporaries + self.outputs - self.aliased

    @property
    def total(self) -> int:
        """Arguments + temporaries + outputs - aliases."""
        return self.arguments + self.added


def _devices(layout: Layout) -> list[jax.Device]:
    return [device for device in layout.mesh.devices.flat if device.process_index == jax.process_index()]


def free_bytes(layout: Layout) -> int:
    """Bytes that each device of the mesh can still give out; simulated devices share the host's memory."""
    devices = _devices(layout)
    stats = [device.memory_stats() for device in devices]
    if all(s and "bytes_limit" in s for s in stats):
        return min(s["bytes_limit"] - s["bytes_in_use"] for s in stats if s)
    return psutil.virtual_memory().available // len(devices)


def return_freed_memory() -> None:
    """Give back what the C library holds of freed memory: after a compilation that is hundreds of MiB.

    On a CPU the weights and activations live in that memory too. Only glibc keeps and can return it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def peak_bytes(layout: Layout) -> int:
    """The most that one device held so far; where the backend does not say (CPU), what the process holds now."""
    stats = [device.memory_stats() or {} for device in _devices(layout)]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) if peaks else psutil.Process().memory_info().rss
