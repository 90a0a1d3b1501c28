"""A directory of adapters for one tiny model, and what loads them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tests.serve.bases import randomised
from tests.tiny import tiny

import jora
from jora.errors import InputError
from jora.methods.method import Method
from jora.methods.served import Served
from jora.models.config import LINEARS
from jora.models.model import Model
from jora.serve.adapters.active_set import ActiveSet
from jora.serve.adapters.catalogue import Catalogue
from jora.serve.adapters.host_store import HostStore
from jora.serve.adapters.loading import Limits, Loaded, Loader
from jora.serve.adapters.packing import Spec, TargetSpec
from jora.serve.adapters.resident import Resident
from jora.serve.pages.allocator import Pages
from jora.serve.pages.layout import PoolLayout
from jora.serve.scheduling.sequence import AdapterVersion

LIMITS = Limits(LINEARS, rank=16, products=3, soft_tokens=8, pages=200)


@functools.cache
def base(mesh: str | None = None) -> Model:
    return jora.load_model(tiny("llama2")[1], mesh=mesh)


def pool_layout(model: Model) -> PoolLayout:
    return PoolLayout.of(model.config, model.layout, model.dtype, page_tokens=4)


def save(directory: Path, method: Method | None = None, seed: int = 0) -> None:
    """A random adapter, by default LoRA of rank 2 on q_proj."""
    jora.save_adapter(randomised(method or jora.LoRA(rank=2, targets=["q_proj"]), base(), seed), directory)


class Shelf(NamedTuple):
    catalogue: Catalogue
    loader: Loader
    host: HostStore
    pages: Pages
    resident: Resident
    retired: list[AdapterVersion]
    active: ActiveSet


@contextmanager
def shelf(directory: Path, pages: int = 200, host_bytes: int = 1 << 30, ranks: int = 16) -> Iterator[Shelf]:
    """Everything from the directory to the pool's pages."""
    model = base()
    catalogue = Catalogue(directory, model.config, model.identity)
    loader = Loader(catalogue, model, pool_layout(model), LIMITS)
    host = HostStore(loader, host_bytes)
    books, retired = Pages(pages), list[AdapterVersion]()
    active = ActiveSet((ranks,), (3,))
    resident = Resident(catalogue, loader, host, books, active, retired.append, active.remove)
    try:
        yield Shelf(catalogue, loader, host, books, resident, retired, active)
    finally:
        host.close()


class Slow:
    """A source of made-up adapters of `nbytes` each, whose loads wait for `gate` and are counted."""

    def __init__(self, nbytes: int = 1000, gate: Callable[[AdapterVersion], object] = lambda loaded: None):
        self.nbytes, self.gate, self.loads = nbytes, gate, list[AdapterVersion]()
        self.error: BaseException | None = None

    def load(self, version: AdapterVersion) -> Loaded:
        self.loads.append(version)
        self.gate(version)
        if self.error is not None:
            raise self.error
        blocks = np.zeros((self.nbytes // 100, 1, 100), np.uint8)
        return Loaded(Spec((TargetSpec("q_proj", 2, 0),)), len(blocks), jora.LoRA(), Served(), blocks)

    def expand(self, loaded: Loaded, version: AdapterVersion) -> Loaded:
        return loaded


def load_named(parts: Shelf, name: str, path: str) -> AdapterVersion:
    """As the engine does when it is told to load an adapter."""
    entry = parts.catalogue.candidate(name, path)
    try:
        parts.host.fetch(entry.version)
    except InputError:
        parts.host.drop(entry.version)
        parts.catalogue.forget(entry.version)
        raise
    return parts.catalogue.commit(entry)
