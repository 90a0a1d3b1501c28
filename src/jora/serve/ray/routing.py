"""Which replica a request goes to: one that has its adapter, unless that one has far more to do than the others.

Loads are bounded as in arXiv 1608.01350 (consistent hashing with bounded loads): no replica gets more than `SPREAD`
times the mean, but below a full batch a replica is free, because decoding one row more costs next to nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

SPREAD = 1.25


def order(adapter: str, loads: Mapping[str, int], holders: Collection[str], batch: int) -> list[str]:
    """The replicas, best first.

    Among those that are not overloaded: the holders of the adapter, then its home (rendezvous hashing, so that a burst
    for an adapter that nobody has goes to one place), then by load.

    Args:
        adapter: "" for the base, which every replica has.
        loads: requests at each replica, by its id.
        holders: replicas that have the adapter.
        batch: sequences that a replica decodes together.
    """
    by_load = sorted(loads, key=lambda replica: (loads[replica], replica))
    if not adapter or not loads:
        return by_load
    limit = max(batch, SPREAD * (sum(loads.values()) + 1) / len(loads))
    home = max(loads, key=lambda replica: hashlib.blake2b(f"{adapter}\0{replica}".encode()).digest())

    def rank(replica: str) -> int:
        if loads[replica] >= limit:
            return 3
        return 0 if replica in holders else 1 if replica == home else 2

    return sorted(by_load, key=rank)


class AdapterRouter(RequestRouter):
    """Ray Serve's router with `order`; it runs where the handle is, in the process that has the HTTP port.

    All requests come this way, so it counts them itself: the queue lengths that Ray caches lag behind a burst.
    """

    def initialize_state(self, *, batch: int) -> None:
        """Called by Ray Serve with `request_router_kwargs`."""
        self._batch = batch
        self._sent: dict[str, str] = {}  # request -> its replica

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Called by Ray Serve: ranks of replicas, each of one."""
        assert pending_request is not None
        pending_request.routing_context.should_backoff = True  # ask again after a while where all are full
        request, adapter = pending_request.metadata.internal_request_id, pending_request.metadata.multiplexed_model_id
        known: dict[str, Any] = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        sent = Counter(self._sent.values())
        holders = {name for name, replica in known.items() if adapter in replica.multiplexed_model_ids}
        best = order(adapter, {name: sent[name] for name in known}, holders, self._batch)
        if best:
            self._sent[request] = best[0]
            pending_request.future.add_done_callback(
                lambda future: future.cancelled() and self._sent.pop(request, None)
            )
        return [[known[name]] for name in best]

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Ray Serve for every request that was sent."""
        self._sent.pop(internal_request_id, None)
