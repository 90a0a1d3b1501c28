"""How much memory this process holds, on the host and on its devices."""

from __future__ import annotations

import sys

import psutil

from jora.ui.facts import size


def memory() -> str:
    """`1.4 GiB`, or `1.4 GiB, devices 9.2 GiB` where the backend reports its own (the CPU's does not)."""
    text = size(psutil.Process().memory_info().rss)
    devices = _device_bytes()
    return f"{text}, devices {size(devices)}" if devices else text


def _device_bytes() -> int:
    # Work that never touched jax (building a data set) must not start its backend for a figure.
    jax = sys.modules.get("jax")
    if jax is None:
        return 0
    return sum((device.memory_stats() or {}).get("bytes_in_use", 0) for device in jax.local_devices())
