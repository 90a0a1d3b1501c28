"""Floor 0: the device mesh, and the table that maps logical axes onto it."""

from jora.sharding.layout import RULES, Layout, single_device
from jora.sharding.mesh import MeshSpec, build_layout, host_device, parse_mesh, start_devices

__all__ = [
    "RULES",
    "Layout",
    "MeshSpec",
    "build_layout",
    "host_device",
    "parse_mesh",
    "single_device",
    "start_devices",
]
