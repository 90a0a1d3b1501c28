"""From an adapter's directory to the pages that go into the pool, on the host.

An adapter is loaded by `jora.load_adapter`, with all its checks, for a model that is laid out on one CPU device: no
memory of the accelerator is taken and, on a CPU, nothing is copied. Whether it can be served is checked before its
weights are read where its config tells, and again after.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import numpy as np
from jaxtyping import Float32, Shaped

from jora.errors import InputError
from jora.methods import registry
from jora.methods.method import Adapter, Method
from jora.methods.nola import NOLA
from jora.methods.served import Served
from jora.methods.storage import OWN_CONFIG, WEIGHTS, load_adapter
from jora.models.model import Model
from jora.serve.adapters.catalogue import Catalogue
from jora.serve.adapters.describe import AdapterInfo, Entry
from jora.serve.adapters.packing import Spec, elements, pack, spec_of
from jora.serve.adapters.validation import MAX_HEADER_BYTES, check_weights, read_config, readable
from jora.serve.pages.layout import PoolLayout
from jora.serve.scheduling.sequence import AdapterVersion
from jora.sharding import host_device, single_device

Blocks = Shaped[np.ndarray, "pages shards elements"]
_WIDEST = 8  # bytes of a number in a file
_DENSEST = 2  # numbers in a byte of a file


@dataclass(frozen=True)
class Limits:
    """What an adapter may need: linears that may be changed, ranks, base products, soft tokens, pages of the pool."""

    targets: tuple[str, ...]
    rank: int
    products: int
    soft_tokens: int
    pages: int


@dataclass(frozen=True)
class Loaded:
    """An adapter in host memory. served: without its factors (what is left are soft tokens).

    blocks: its pages, in the pool's dtype; None for one that is kept compact (`compact`: NOLA's seed and coefficients)
    until it is wanted (`Loader.expand`).
    """

    spec: Spec
    pages: int
    method: Method
    served: Served
    blocks: Blocks | None
    compact: Adapter | None = None
    other_bytes: int = 0  # of `compact`, and of what soft tokens are made of

    @property
    def nbytes(self) -> int:
        """Host memory that it takes."""
        return self.other_bytes + (0 if self.blocks is None else self.blocks.nbytes)

    def prefix(self, instance: Float32[np.ndarray, " h"] | None) -> Float32[np.ndarray, "m d"]:
        """The soft tokens of a method that has such, for a prompt of this vector."""
        assert self.served.prefix is not None
        return self.served.prefix(instance)


class Loader:
    """Reads, validates and packs adapters for one engine; safe to use from several threads."""

    def __init__(self, catalogue: Catalogue, model: Model, pool: PoolLayout, limits: Limits):
        self._catalogue, self._model, self._pool, self._limits = catalogue, model, pool, limits
        self._cpu = host_device()
        self._layout = single_device(self._cpu)
        self._pages_of: dict[Spec, int] = {}
        most = _WIDEST * limits.pages * pool.shards * pool.elements
        self._most_bytes = most + MAX_HEADER_BYTES

    def described(self, version: AdapterVersion) -> AdapterInfo:
        """What the adapter is. Raises InputError where its config already says that it cannot be served."""
        info = self._catalogue.info(version)
        self._check(info.spec, version)
        if info.prefix_slots > self._limits.soft_tokens:
            raise InputError(
                f"adapter {version.name!r}: {info.prefix_slots} soft tokens, but the server was started for"
                f" {self._limits.soft_tokens}; raise soft_tokens"
            )
        return info

    def pages(self, spec: Spec) -> int:
        """Pages of the pool that an adapter of these sizes takes."""
        if spec not in self._pages_of:  # the scheduler asks in every step
            self._pages_of[spec] = self._pool.adapter_pages(elements(spec, self._model.config, self._model.layout))
        return self._pages_of[spec]

    def _check(self, spec: Spec, version: AdapterVersion) -> None:
        spec.check(repr(version.name), self._limits.targets, self._limits.rank, self._limits.products)
        if (needed := self.pages(spec)) > self._limits.pages:
            raise InputError(f"adapter {version.name!r}: takes {needed} pages, the pool has {self._limits.pages}")

    def load(self, version: AdapterVersion) -> Loaded:
        """Read one from disk. Raises InputError for whatever is wrong with it."""
        entry, info = self._catalogue.entry(version), self.described(version)
        self._check_unchanged(entry)
        check_weights(entry.path / WEIGHTS, self._most_bytes, f"{entry.where}: {WEIGHTS}")
        # The base was checked by `described`: load_adapter would only warn, and warnings are not for threads.
        here = replace(self._model, layout=self._layout, identity={"name": info.base})
        try:
            # Numbers beyond fp32 are found where they are, by `lower` and `pack`.
            with readable(entry.where), jax.default_device(self._cpu), np.errstate(over="ignore", invalid="ignore"):
                self._check_size(entry, here)
                adapter = load_adapter(entry.path, here)
                self._check_unchanged(entry)
                return self._packed(adapter, version)
        except InputError as error:
            # Clients see this: the server's paths are not for them.
            told = str(error).replace(str(entry.path), entry.where)
            raise InputError(told if entry.where in told else f"{entry.where}: {told}") from error

    def _check_size(self, entry: Entry, here: Model) -> None:
        """Jora's own format makes a fresh adapter first: its options must not ask for more than its file holds."""
        own = read_config(entry.path / OWN_CONFIG, entry.where) if (entry.path / OWN_CONFIG).exists() else {}
        if "method" not in own:
            return
        method = registry.method_class(own["method"])(**own.get("options", {}))
        state = jax.eval_shape(lambda key: method.init(here.abstract(), key).state, jax.random.key(0))
        trained, constant = (sum(leaf.size for leaf in jax.tree.leaves(part)) for part in state)
        held = (entry.path / WEIGHTS).stat().st_size
        if trained > held * _DENSEST or constant > self._most_bytes:
            raise InputError(f"{entry.where}: its options ask for {trained} numbers, its file has {held} bytes")

    def _check_unchanged(self, entry: Entry) -> None:
        """A version is what its files were when it was made: cached prefixes and answers are of those."""
        if self._catalogue.files(entry) != entry.files:
            raise InputError(f"{entry.where}: its files were changed while it was in use; send the request again")

    def _packed(self, adapter: Adapter, version: AdapterVersion) -> Loaded:
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(adapter.state))
        if isinstance(adapter.method, NOLA):
            spec = self.described(version).spec
            return Loaded(spec, self.pages(spec), adapter.method, Served(), None, adapter, held)
        # On the host, so that it meets the base's weights wherever they are.
        served = adapter.method.lower(replace(adapter, state=jax.tree.map(np.asarray, adapter.state)), self._model)
        return self._lowered(served, adapter.method, version, held if served.prefix is not None else 0)

    def expand(self, loaded: Loaded, version: AdapterVersion) -> Loaded:
        """With the blocks that a compact adapter lacks."""
        if loaded.blocks is not None or loaded.compact is None:
            return loaded
        with jax.default_device(self._cpu), np.errstate(over="ignore", invalid="ignore"):
            served = loaded.compact.method.lower(loaded.compact, self._model)
        expanded = self._lowered(served, loaded.method, version, loaded.other_bytes)
        return replace(expanded, compact=loaded.compact)

    def _lowered(self, served: Served, method: Method, version: AdapterVersion, other_bytes: int) -> Loaded:
        spec = spec_of(served)
        self._check(spec, version)
        blocks = self._blocks(served, version.name)
        return Loaded(spec, len(blocks), method, replace(served, low_rank={}, products={}), blocks, None, other_bytes)

    def _blocks(self, served: Served, name: str) -> Blocks:
        """The stream of every device, cut into pages; the last one is filled up with zeros."""
        pool = self._pool
        stream = pack(served, self._model.config, self._model.layout, pool.dtype, f"adapter {name!r}")
        count = pool.adapter_pages(stream.shape[1])
        padded = np.zeros((pool.shards, count * pool.elements), stream.dtype)
        padded[:, : stream.shape[1]] = stream
        return np.ascontiguousarray(padded.reshape(pool.shards, count, pool.elements).swapaxes(0, 1))
