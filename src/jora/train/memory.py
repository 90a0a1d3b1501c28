"""What a device can hold, and what a compiled program needs there."""

from __future__ import annotations

import ctypes
import sys
from typing import Any, NamedTuple

import psutil

from jora.errors import InputError
from jora.sharding import Layout
from jora.sharding.memory import own_devices

GIB = 1 << 30


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


def check_fits(compiled: Any, free: int) -> None:
    """Raise InputError where a program, its arguments on the devices already, needs more than `free` bytes a device.

    By the compiler's analysis: better known before the first step than in the middle of a run.
    """
    needed = ProgramMemory.of(compiled).added
    if needed > free:
        raise InputError(
            f"a training step does not fit: it needs {needed / GIB:.1f} GiB a device beside the weights, "
            f"{free / GIB:.1f} GiB are free; try remat=full, a smaller batch_size with more accumulation, a smaller "
            "max_length, or more devices (`jora estimate` tells what fits)"
        )


def return_freed_memory() -> None:
    """Give back what the C library holds of freed memory: after a compilation that is hundreds of MiB.

    On a CPU the weights and activations live in that memory too. Only glibc keeps and can return it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def peak_bytes(layout: Layout) -> int:
    """The most that one device held so far; where the backend does not say (CPU), what the process holds now."""
    stats = [device.memory_stats() or {} for device in own_devices(layout)]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) if peaks else psutil.Process().memory_info().rss
