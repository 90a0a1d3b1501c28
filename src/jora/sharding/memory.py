"""What the devices of a mesh can still hold."""

from __future__ import annotations

import jax
import psutil

from jora.sharding.layout import Layout

# Allocators fragment, and other programs on the device may need a little.
USABLE = 0.9


def own_devices(layout: Layout) -> list[jax.Device]:
    """The mesh's devices that belong to this process."""
    return [device for device in layout.mesh.devices.flat if device.process_index == jax.process_index()]


def free_bytes(layout: Layout) -> int:
    """Bytes that each device of the mesh can still give out; simulated devices share the host's memory."""
    devices = own_devices(layout)
    stats = [device.memory_stats() for device in devices]
    if all(s and "bytes_limit" in s for s in stats):
        return min(s["bytes_limit"] - s["bytes_in_use"] for s in stats if s)
    return psutil.virtual_memory().available // len(devices)
