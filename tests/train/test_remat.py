"""Choosing rematerialisation: the fastest policy that fits, by what the compiler says of each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from jora.train.memory import ProgramMemory
from jora.train.remat import choose_remat

NEEDS = {"selective": 500, "full": 100}


def program(policy: str) -> Any:
    """What `memory_analysis` is asked of: the outputs alias all but 10 bytes of the arguments."""
    return SimpleNamespace(
        memory_analysis=lambda: SimpleNamespace(
            argument_size_in_bytes=5000,
            temp_size_in_bytes=NEEDS[policy] - 10,
            output_size_in_bytes=1010,
            alias_size_in_bytes=1000,
        )
    )


@pytest.mark.parametrize(("free", "policy"), [(1000, "selective"), (556, "selective"), (555, "full"), (1, "full")])
def test_the_fastest_policy_that_fits(free: int, policy: str) -> None:
    assert choose_remat(program, free) == policy


def test_memory_is_arguments_temporaries_and_what_is_not_aliased() -> None:
    memory = ProgramMemory.of(program("full"))
    assert (memory.added, memory.total) == (100, 5100)
