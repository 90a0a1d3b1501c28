"""Choosing what the backward pass computes again: the least that fits the device's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jora.models.decoder import Remat
from jora.sharding.memory import USABLE
from jora.train.memory import ProgramMemory

# From the fastest to the smallest. "none" is not among them: measured, it is larger than "selective" and no
# faster, because JAX then keeps copies of what a matrix product can read in place.
POLICIES: tuple[Remat, ...] = ("selective", "full")


def choose_remat(compile_with: Callable[[Remat], Any], free: int) -> Remat:
    """The first of selective, full whose program fits into `free` bytes a device; full if none does.

    compile_with: compiles the train step of the largest batch under a policy, with its arguments
    (weights, optimiser state) already on the devices and so not part of `free`. What fits is the
    compiler's word: temporaries + outputs - aliases, kept below 90 % of what is free.
    """
    for policy in POLICIES[:-1]:
        if ProgramMemory.of(compile_with(policy)).added <= USABLE * free:
            return policy
    return POLICIES[-1]
