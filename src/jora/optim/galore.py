"""GaLore: any optimiser in a low-rank subspace of each matrix's gradient (arXiv 2403.03507).

Every `refresh` steps P becomes the leading singular vectors of the current gradient; between, the inner
optimiser sees R = P^T G and its direction N goes back as scale P N. Moments are carried over a refresh as
they are, as in the paper and in galore-torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from jora.errors import InputError
from jora.kernels.counter_hash import fold_all
from jora.optim import projection
from jora.optim.adam import path_name
from jora.optim.projection import Factorisation, Precision, Side

# A leaf's path and shape -> number of its input axes where it is a matrix to project, else None.
Matrices = Callable[[str, tuple[int, ...]], int | None]


class GaLoreState(NamedTuple):
    """`number`: which layer of a stack this is; `projectors`: path -> P; `inner`: the optimiser of R."""

    step: Int[Array, ""]
    number: Int[Array, ""]
    projectors: dict[str, Any]
    inner: Any


def matrices_by_rank(path: str, shape: tuple[int, ...]) -> int | None:
    """Every array of two axes, [in, out]."""
    return 1 if len(shape) == 2 else None


@dataclass(frozen=True, eq=False)
class GaLore:
    """The parts of the transformation; `galore` makes an optax one of it.

    A step is refresh, project, apply. Gradients of several micro-batches may be projected by the same P and
    added, since projecting is linear: refresh from the first, project each, apply once.

    inner: sees R in a matrix's place, and other leaves' gradients as they are. rank: of every matrix. scale:
    alpha, of matrices only. refresh: T, steps between refreshes. matrices: see `Matrices`. precision: of P
    between steps. stagger: spread the refreshes of the matrices of all `layers` over the T steps, so that no
    step does all of them (after step 0, which has to); off, all at multiples of T as in galore-torch.
    mesh: with several devices, each matrix is factorised on one of them and P sent to the others.
    """

    inner: optax.GradientTransformation
    rank: int
    scale: float = 0.25
    refresh_every: int = 200
    matrices: Matrices = matrices_by_rank
    precision: Precision = "float32"
    factorisation: Factorisation = "exact"
    stagger: bool = True
    layers: int = 1
    mesh: Mesh | None = None
    seed: int = 0

    def sides(self, params: Any) -> dict[str, Side]:
        """The matrices among the leaves. Raises InputError where the rank exceeds a matrix's smaller side."""
        found = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            name = path_name(path)
            inputs = self.matrices(name, leaf.shape)
            if inputs is None:
                continue
            side = Side(leaf.shape, inputs, self.rank)
            if self.rank > side.smaller:
                raise InputError(
                    f"GaLore: rank {self.rank} is above the smaller side of {name}, {side.smaller}: use a smaller rank"
                )
            found[name] = side
        return found

    def init(self, params: Any) -> GaLoreState:
        """All zeros: step 0 refreshes every P."""
        sides = self.sides(params)
        projectors = {
            name: projection.store(jnp.zeros((*side.side_shape, self.rank), jnp.float32), self.precision)
            for name, side in sides.items()
        }
        zero = jnp.zeros((), jnp.int32)
        return GaLoreState(zero, zero, projectors, self.inner.init(self._projected_params(params, sides)))

    def update(self, gradients: Any, state: GaLoreState, params: Any = None) -> tuple[Any, GaLoreState]:
        """Optax's update: refresh, project, apply. Raises InputError without `params`, whose shapes it needs."""
        if params is None:
            raise InputError("GaLore: give the parameters too: optimizer.update(gradients, state, params)")
        state = self.refresh(gradients, state)
        return self.apply(self.project(gradients, state), state, params)

    def refresh(self, gradients: Any, state: GaLoreState) -> GaLoreState:
        """New projectors from these gradients, for the matrices that are due."""
        sides = self.sides(gradients)
        leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
        due = self._due(state, list(sides))
        if self.mesh is None or self.mesh.size == 1:
            new = {
                name: jax.lax.cond(
                    due[name],
                    lambda old, name=name: self._factorise(leaves[name], sides[name], state, name, old),
                    lambda old: old,
                    state.projectors[name],
                )
                for name in sides
            }
        else:
            new = self._factorise_shared({name: leaves[name] for name in sides}, sides, state, due)
        return state._replace(projectors=new)

    def project(self, gradients: Any, state: GaLoreState) -> Any:
        """R (fp32) for each matrix, the others as they are."""

        def one(path: Any, leaf: Array) -> Array:
            name = path_name(path)
            if name not in state.projectors:
                return leaf
            return self._side(name, leaf.shape).project(projection.read(state.projectors[name]), leaf)

        return jax.tree_util.tree_map_with_path(one, gradients)

    def apply(self, projected: Any, state: GaLoreState, params: Any) -> tuple[Any, GaLoreState]:
        """The directions of all leaves from what `project` gave (or a sum of it)."""
        sides = self.sides(params)
        directions, inner = self.inner.update(projected, state.inner, self._projected_params(params, sides))

        def back(path: Any, leaf: Array) -> Array:
            name = path_name(path)
            if name not in sides:
                return leaf
            return self.scale * sides[name].expand(projection.read(state.projectors[name]), leaf)

        directions = jax.tree_util.tree_map_with_path(back, directions)
        return directions, state._replace(step=state.step + 1, inner=inner)

    def _side(self, name: str, shape: tuple[int, ...]) -> Side:
        inputs = self.matrices(name, shape)
        assert inputs is not None
        return Side(shape, inputs, self.rank)

    def _projected_params(self, params: Any, sides: Mapping[str, Side]) -> Any:
        """What the inner optimiser takes for parameters: zeros in R's place, it must not decay them."""

        def one(path: Any, leaf: Any) -> Any:
            name = path_name(path)
            return jnp.zeros(sides[name].projected_shape, jnp.float32) if name in sides else leaf

        return jax.tree_util.tree_map_with_path(one, params)

    def _due(self, state: GaLoreState, names: list[str]) -> dict[str, Array]:
        every = self.refresh_every
        due = {}
        for place, name in enumerate(names):
            turn = (state.number * len(names) + place) * every // (self.layers * len(names)) if self.stagger else 0
            due[name] = (state.step == 0) | ((state.step + turn) % every == 0)
        return due

    def _factorise(self, gradient: Array, side: Side, state: GaLoreState, name: str, old: Any) -> Any:
        key = fold_all(self.seed, state.step, state.number, sum(map(ord, name)))
        vectors = projection.leading_vectors(side.as_columns(gradient), self.rank, self.factorisation, key)
        new = projection.store(vectors.reshape(*side.side_shape, self.rank), self.precision)
        return jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)

    def _factorise_shared(
        self, leaves: dict[str, Array], sides: Mapping[str, Side], state: GaLoreState, due: dict[str, Array]
    ) -> dict[str, Any]:
        """Each matrix on one device only, different ones on different devices; nothing moves if none is due."""
        assert self.mesh is not None
        axes, devices = self.mesh.axis_names, self.mesh.size

        def on_device(leaves: Any, counters: Any, due: Any) -> Any:
            here = jax.lax.axis_index(axes)
            local = state._replace(step=counters[0], number=counters[1])
            new = {}
            for place, (name, side) in enumerate(sides.items()):
                none = jax.tree.map(lambda o: jnp.zeros(o.shape, o.dtype), state.projectors[name])
                new[name] = jax.lax.cond(
                    due[name] & (here == place % devices),
                    lambda none, name=name, side=side: self._factorise(leaves[name], side, local, name, none),
                    lambda none: none,
                    none,
                )
            # All but the owner hold zeros.
            return jax.tree.map(lambda x: jax.lax.psum(x.astype(jnp.float32), axes).astype(x.dtype), new)

        whole = PartitionSpec()
        shared = jax.shard_map(on_device, mesh=self.mesh, in_specs=whole, out_specs=whole, check_vma=False)

        def refreshed(old: dict[str, Any]) -> dict[str, Any]:
            new = shared(leaves, (state.step, state.number), due)
            return {
                name: jax.tree.map(lambda n, o, name=name: jnp.where(due[name], n, o), new[name], old[name])
                for name in old
            }

        return jax.lax.cond(jnp.any(jnp.stack(list(due.values()))), refreshed, lambda old: old, state.projectors)


def galore(
    inner: optax.GradientTransformation,
    rank: int,
    *,
    scale: float = 0.25,
    refresh: int = 200,
    matrices: Matrices = matrices_by_rank,
    precision: Precision = "float32",
    factorisation: Factorisation = "exact",
    stagger: bool = True,
    layers: int = 1,
    mesh: Mesh | None = None,
    seed: int = 0,
) -> optax.GradientTransformation:
    """GaLore around a base optimiser, as an optax transformation; see `GaLore` for the arguments.

    Decay weights and apply the learning rate after it:
    `optax.chain(galore(scale_by_adam(), 128), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(lr))`.
    For weights stacked [layers, ...] wrap it in `stacked` and say how many `layers`. Raises InputError, in
    `init`, for a rank above a matrix's smaller side.
    """
    parts = GaLore(
        inner,
        rank=rank,
        scale=scale,
        refresh_every=refresh,
        matrices=matrices,
        precision=precision,
        factorisation=factorisation,
        stagger=stagger,
        layers=layers,
        mesh=mesh,
        seed=seed,
    )
    return optax.GradientTransformation(parts.init, parts.update)
