"""Starting Ray and the replicas, and ending them."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from jora.errors import InputError
from jora.serve.ray.replica import Replica, Started
from jora.serve.scheduling.overload import QUEUES
from jora.sharding import parse_mesh

ACCELERATORS = ("GPU", "TPU")  # Ray's names
OBJECT_STORE_BYTES = 100 << 20  # of a local cluster: events are small and go inline
CONTROL_CALLS = 64  # at a replica beside its requests: statuses, changes, lists
HEALTH_SECONDS = 5.0
KNOCK_SECONDS = 10.0
GONE_SECONDS = 5.0  # for a replica to end, once requests have


@contextmanager
def replicas(
    start: Callable[[], Started], count: int, *, mesh: str | None, batch: int, queue: int
) -> Iterator[DeploymentHandle]:
    """Replicas that run, on this machine or, where RAY_ADDRESS is set, on that cluster.

    Args:
        start: what a replica calls in its process.
        count: of replicas.
        mesh: of each replica; it says how many accelerators one takes, where the cluster has any.
        batch: sequences that a replica decodes together.
        queue: `max_queue` of a replica's engine, which may let in `QUEUES` times as many.

    Raises:
        InputError: the cluster has not enough accelerators, or replicas do not start.
    """
    local = "RAY_ADDRESS" not in os.environ
    _connect(local, count)
    name = f"jora-{uuid.uuid4().hex[:8]}"  # several may run on a cluster
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    try:
        resources = _resources(mesh, count)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled", logging_config=quiet)  # our own HTTP app is the ingress
        deployment = serve.deployment(
            Replica,
            name="Replica",
            num_replicas=count,
            ray_actor_options=resources,
            # The engine refuses what is too much, and shares between clients what waits: it must see it all.
            max_ongoing_requests=batch + QUEUES * queue + CONTROL_CALLS,
            health_check_period_s=HEALTH_SECONDS,
            graceful_shutdown_wait_loop_s=0.2,
            graceful_shutdown_timeout_s=GONE_SECONDS,
            max_constructor_retry_count=1,
            logging_config=quiet,
            request_router_config=RequestRouterConfig(
                request_router_class="jora.serve.ray.routing.AdapterRouter", request_router_kwargs={"batch": batch}
            ),
        )
        try:
            handle = serve.run(deployment.bind(start), name=name, route_prefix=None, logging_config=quiet)
        except RuntimeError as error:
            raise InputError(f"the replicas did not start: {_cause(name) or error}") from error
        yield handle
    finally:
        if local:
            serve.shutdown()
        else:
            serve.delete(name)
        ray.shutdown()


def _connect(local: bool, count: int) -> None:
    quiet = {"logging_level": logging.WARNING, "log_to_driver": True}
    if not local:
        address = os.environ["RAY_ADDRESS"]
        try:
            _knock(address)
            ray.init(**quiet)
        except OSError as error:
            raise InputError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from error
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray listens on all interfaces; from 2.60 on a local cluster asks for the token in ~/.ray by itself.
    ray.init(
        address="local",
        _node_ip_address="127.0.0.1",
        num_cpus=count,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        **quiet,
    )


def _knock(address: str) -> None:
    """Raise OSError where nothing listens: Ray itself tries for minutes before it says so."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():  # not "auto"
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()


def _resources(mesh: str | None, count: int) -> dict[str, object]:
    """What one replica takes of a machine. Raises InputError where there is not enough for all."""
    there = ray.cluster_resources()
    for kind in ACCELERATORS:
        if kind not in there:
            continue
        each = parse_mesh(mesh).devices
        if count * each > there[kind]:
            raise InputError(f"--replicas {count} of {each} {kind}s each: there are {there[kind]:g}; ask for fewer")
        return {"num_cpus": 1, "num_gpus": each} if kind == "GPU" else {"num_cpus": 1, "resources": {kind: each}}
    return {"num_cpus": 1}


def _cause(name: str) -> str | None:
    """What the user gave that a replica could not use, from the traceback that Ray keeps of it."""
    reports = serve.status().applications[name].deployments.values()
    lines = [line.partition(f"{InputError.__name__}: ") for report in reports for line in report.message.splitlines()]
    return next((message for _, found, message in reversed(lines) if found), None)
