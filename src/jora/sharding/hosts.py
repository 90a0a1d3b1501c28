"""Several hosts: a process on each, all running the same program over one mesh.

Every process reads the same files and builds the same batches; it loads the weights of its own devices and gives each
program its part. What is written is written by the first, into a directory that all see (a checkpoint by all: each its
own shards). With one process everything here does nothing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jora.errors import InputError
from jora.files import atomic_directory, beside
from jora.sharding.mesh import MeshSpec

PATIENCE = 300.0  # s to wait for the first host


class Hosts(NamedTuple):
    """Where the processes meet, which of them this is, and how many there are; None: the cluster's manager knows."""

    coordinator: str | None = None
    process: int | None = None
    processes: int | None = None


def parse_hosts(text: str) -> Hosts:
    """From `auto` or `HOST:PORT,INDEX,COUNT`. Raises InputError."""
    if text == "auto":
        return Hosts()
    parts = text.split(",")
    port = parts[0].rpartition(":")[2]
    if len(parts) != 3 or ":" not in parts[0] or not all(number.isdigit() for number in (port, *parts[1:])):
        raise InputError(f"hosts {text!r}: write auto, or HOST:PORT,INDEX,COUNT like 10.0.0.1:8476,0,2")
    index, count = int(parts[1]), int(parts[2])
    if index >= count:
        raise InputError(f"hosts {text!r}: INDEX counts from 0, so of {count} hosts it is at most {count - 1}")
    return Hosts(parts[0], index, count)


def start_hosts(hosts: Hosts, mesh: MeshSpec) -> None:
    """Meet the other processes; call it before anything else uses jax's devices.

    Where the only platform is the CPU each process simulates its share of the mesh's devices. Raises InputError for a
    mesh that the processes do not divide, where no cluster says how they meet, where jax is in use already, and where
    the first cannot be reached within `PATIENCE`. Where it is the others that do not come, jax ends the process itself
    after five minutes, with messages of its own.
    """
    if hosts.processes is not None:
        if mesh.devices % hosts.processes:
            raise InputError(f"mesh {mesh}: its {mesh.devices} devices cannot be shared by {hosts.processes} hosts")
        jax.config.update("jax_num_cpu_devices", mesh.devices // hosts.processes)
    if hosts.coordinator is not None and hosts.process:
        _reach(hosts.coordinator)
    try:
        jax.distributed.initialize(hosts.coordinator, hosts.processes, hosts.process)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"the hosts cannot meet ({reason}): start the same command on each, with the address of the first, its"
            " own index and their number"
        ) from error


def _reach(address: str) -> None:
    """Wait until the first process listens: jax would end this one without a word about the address."""
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"hosts: nobody answers at {address} ({error.strerror or error}): start the same command on the"
                    " first host, with INDEX 0, and see that this port of it can be reached from here"
                ) from error
        time.sleep(0.2)


def several() -> bool:
    """Whether there is more than this process."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def barrier(what: str) -> None:
    """Wait for the other processes."""
    if several():
        _multihost().sync_global_devices(what)


def any_of(flag: bool) -> bool:
    """Whether it is so in any process; all get the same answer."""
    return any(_of_all(flag)) if several() else flag


def least(number: int) -> int:
    """The smallest of all processes' 64-bit integers; all get the same answer."""
    return min(_of_all(number)) if several() else number


def put(value: Any, sharding: Sharding) -> jax.Array:
    """An array that every process has, on the devices of all of them; or one that is there already."""
    elsewhere = isinstance(value, jax.Array) and not value.is_fully_addressable
    if elsewhere or sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    local = np.asarray(value)
    return jax.make_array_from_callback(local.shape, sharding, lambda index: np.asarray(local[index]))


def whole(tree: Any) -> Any:
    """A tree of arrays of which every process can read all: each device then holds all of them."""
    if not several():
        return tree

    def gather(x: jax.Array) -> jax.Array:
        assert isinstance(x.sharding, NamedSharding)
        return jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))

    return jax.tree.map(lambda x: x if x.is_fully_addressable else gather(x), tree)


@contextmanager
def atomic_directory_of_all(path: Path) -> Iterator[Path]:
    """`atomic_directory` whose temporary directory is the same for all processes; the first makes and renames it."""
    if not several():
        with atomic_directory(path) as temporary:
            yield temporary
        return
    process = int(_multihost().broadcast_one_to_all(np.int32(os.getpid())))  # the first one's, which names it
    if first():
        with atomic_directory(path) as temporary:
            barrier(f"made {path.name}")
            yield temporary
            barrier(f"written {path.name}")
    else:
        barrier(f"made {path.name}")
        yield beside(path.resolve(), "tmp", process)
        barrier(f"written {path.name}")
    barrier(f"renamed {path.name}")


def _of_all(number: int) -> list[int]:
    """Every process's number. It travels as bytes: jax would make 32 bits of it, and a device's bytes need more."""
    own = np.frombuffer(np.int64(number).tobytes(), np.uint8)
    return np.asarray(_multihost().process_allgather(own)).reshape(-1, 8).view(np.int64).ravel().tolist()


def _multihost() -> Any:
    from jax.experimental import multihost_utils

    return multihost_utils
