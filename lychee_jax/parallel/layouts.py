"""How one model lies on several devices: tensor parallel.

Every device has an equal share of the KV heads with their queries, of the MLP's width and of the vocabulary, and runs
a decoder of that size; sums over devices join the halves of each block. What does not divide is padded with zeros: a
KV head of zeros has no role, reads nothing and adds nothing, and nothing of the cache lies on two devices.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float32, Int, Shaped

from lychee_jax.config import ModelConfig
from lychee_jax.parallel import axes
from lychee_jax.parallel.balance import balanced
from lychee_jax.parallel.mesh import EVERYWHERE, MODEL, model_mesh

# Finite, so that a share in which there is nothing else does not become NaN.
_NO_TOKEN = -1e30
_DIVIDED = (axes.QKV, axes.HEADS, axes.GATE_UP, axes.MLP, axes.VOCAB)

POOLS = PartitionSpec(None, MODEL)
"""Of the cache: pages, then KV heads, whatever follows."""
PICKS = PartitionSpec(None, None, MODEL)
"""Of pages that layers hand up: layers, rows, KV heads."""

type Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model's place on the `model` axis of a mesh.

    Attributes:
        mesh: of the axes data, context and model; an abstract one says how large shares are.
        places: the KV head at every place, device after device; −1: zeros.
    """

    mesh: Mesh | AbstractMesh
    places: tuple[int, ...]

    @classmethod
    def of(
        cls, config: ModelConfig, mesh: Mesh | AbstractMesh, roles: Bool[np.ndarray, "L K"] | None = None
    ) -> "Layout":
        """The layout over `mesh` that shares out the heads which retrieve in `roles` as evenly as it can."""
        return cls(mesh, balanced(config.num_kv_heads, mesh.shape[MODEL], roles))

    @property
    def size(self) -> int:
        """How many devices there are."""
        return self.mesh.shape[MODEL]

    @property
    def devices(self) -> list[Any]:
        """In their order."""
        assert isinstance(self.mesh, Mesh), "an abstract one has none"
        return list(self.mesh.devices.flat)

    def share(self, config: ModelConfig) -> ModelConfig:
        """What one device has of a model, as a config of its own."""
        count = len(self.places) // self.size
        return dataclasses.replace(
            config, num_heads=count * config.groups, num_kv_heads=count,
            intermediate_size=-(-config.intermediate_size // self.size), vocab_size=-(-config.vocab_size // self.size),
        )  # fmt: skip

    def whole(self, config: ModelConfig) -> ModelConfig:
        """The model with heads of zeros for places that have none: what the pools of all devices together hold."""
        return dataclasses.replace(config, num_heads=len(self.places) * config.groups, num_kv_heads=len(self.places))

    def heads_here(self, heads: Collection[int]) -> Shaped[Array | np.ndarray, " R"]:
        """Those of the KV heads `heads` that the running device has, by their numbers there, padded with −1.

        A NumPy array where all devices have the same.
        """
        lists = self.heads_by_device(heads)
        table = np.full((self.size, max(map(len, lists))), -1, np.int32)
        for row, own in zip(table, lists, strict=True):
            row[: len(own)] = own
        return table[0] if (table == table[0]).all() else jnp.asarray(table)[jax.lax.axis_index(MODEL)]

    def heads_by_device(self, heads: Collection[int]) -> list[list[int]]:
        """For every device its numbers of those of the KV heads `heads` that it has."""
        count = len(self.places) // self.size
        return [
            [number for number in range(count) if self.places[first + number] in heads]
            for first in range(0, len(self.places), count)
        ]

    @staticmethod
    def divides(axis: str) -> bool:
        """Whether every device has a share of this logical axis."""
        return axis in _DIVIDED

    def sharding(self, parts: PartitionSpec) -> NamedSharding:
        """On this mesh."""
        return NamedSharding(self.mesh, parts)

    def parts(self, logical: Axes) -> PartitionSpec:
        """How an array with these logical axes is divided."""
        if not any(map(self.divides, logical)):
            return EVERYWHERE
        return PartitionSpec(*(MODEL if self.divides(axis) else None for axis in logical))

    def shape(self, logical: Axes, share: Any) -> jax.ShapeDtypeStruct:
        """The array of which every device has such a `share`, as a shape."""
        shape = tuple(
            size * (self.size if axis in _DIVIDED else 1)
            for size, axis in zip(share.shape, logical or (axes.EMBED,) * len(share.shape), strict=True)
        )
        return jax.ShapeDtypeStruct(shape, share.dtype, sharding=self.sharding(self.parts(logical)))

    def shape_of(self, leaf: Any) -> jax.ShapeDtypeStruct:
        """An array's shape, and where it lies: where it says, or else on every device."""
        own = getattr(leaf, "sharding", None)
        placed = isinstance(own, NamedSharding) and own.mesh == self.mesh
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own if placed else self.sharding(EVERYWHERE))

    def shapes(self, tree: Any, parts: PartitionSpec) -> Any:
        """The shapes of a tree of arrays, all of which are divided like this."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.sharding(parts)), tree
        )

    def make(self, make: Callable[[], Any], parts: PartitionSpec) -> Any:
        """What `make` returns, made where it is to lie."""
        return jax.jit(make, out_shardings=self.sharding(parts))()

    def run(self, program: Callable[..., Any], given: Any, results: Any, args: tuple[Any, ...]) -> Any:
        """Let every device run a program on its parts of `args`; `given` and `results` say how these are divided."""
        return jax.shard_map(program, mesh=self.mesh, in_specs=given, out_specs=results, check_vma=False)(*args)

    def place(self, logical: Axes, array: Shaped[np.ndarray, "..."], config: ModelConfig) -> jax.Array:
        """A weight of the model on its devices, sent share by share; the host holds no more than one share besides."""
        divided = self._divided(logical, config)
        if divided is None:
            return jax.device_put(array, self.sharding(EVERYWHERE)).block_until_ready()
        axis, rows = divided
        shares = []
        for device, own in zip(self.devices, rows, strict=True):
            share = np.take(array, np.maximum(own, 0), axis)
            np.moveaxis(share, axis, 0)[own < 0] = np.zeros((), array.dtype)
            # Waited for, so that no queue of copies keeps shares in the host's memory.
            shares.append(jax.device_put(share, device).block_until_ready())
        shape = self.shape(logical, shares[0]).shape
        return jax.make_array_from_single_device_arrays(shape, self.sharding(self.parts(logical)), shares)

    def restore(self, logical: Axes, array: jax.Array, config: ModelConfig) -> Shaped[np.ndarray, "..."]:
        """A weight as the checkpoint has it, in the host's memory: what `place` was given."""
        divided = self._divided(logical, config)
        if divided is None:
            return np.asarray(array.addressable_data(0))
        axis, rows = divided
        order = rows.reshape(-1)
        shape = list(array.shape)
        shape[axis] = order.max() + 1
        result = np.empty(shape, array.dtype)
        target = np.moveaxis(result, axis, 0)
        count = rows.shape[1]
        for shard in array.addressable_shards:
            first = shard.index[axis].start or 0
            own = order[first : first + count]
            target[own[own >= 0]] = np.moveaxis(np.asarray(shard.data), axis, 0)[own >= 0]
        return result

    def _divided(self, logical: Axes, config: ModelConfig) -> tuple[int, Int[np.ndarray, "devices share"]] | None:
        """The axis that is divided, and which of its entries every device has, −1 for zeros; None: none is."""
        for number, axis in enumerate(logical):
            if axis in _DIVIDED:
                return number, self._entries(axis, config)
        return None

    def _entries(self, axis: str, config: ModelConfig) -> Int[np.ndarray, "devices share"]:
        if axis in (axes.QKV, axes.HEADS):
            return self._head_entries(axis, config)
        whole = config.vocab_size if axis == axes.VOCAB else config.intermediate_size
        share = -(-whole // self.size)
        rows = np.arange(self.size * share).reshape(self.size, share)
        rows = np.where(rows < whole, rows, -1)
        if axis == axes.GATE_UP:
            rows = np.concatenate([rows, np.where(rows < 0, -1, rows + whole)], axis=1)
        return rows

    def _head_entries(self, axis: str, config: ModelConfig) -> Int[np.ndarray, "devices share"]:
        width = config.head_dim
        heads = np.asarray(self.places).reshape(self.size, -1, 1)

        def entries(first: int, size: int) -> np.ndarray:
            """Of `size` entries a head, which begin at `first`."""
            rows = np.where(heads < 0, -1, first + heads * size + np.arange(size))
            return rows.reshape(self.size, -1)

        queries = entries(0, config.groups * width)
        if axis == axes.HEADS:
            return queries
        keys, count = config.num_heads * width, config.num_kv_heads * width
        return np.concatenate([queries, entries(keys, width), entries(keys + count, width)], axis=1)


def layout_for(
    config: ModelConfig, tensor_parallel: int, roles: Bool[np.ndarray, "L K"] | None = None
) -> Layout | None:
    """The layout over so many devices; None: one is enough.

    Raises:
        UserError: there are not so many.
    """
    mesh = model_mesh(tensor_parallel)
    return None if tensor_parallel == 1 else Layout.of(config, mesh, roles)


def share_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape that an array, or what stands for one, has on one of its devices."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return jax.ShapeDtypeStruct(shape, leaf.dtype)


def bytes_on_a_device(leaf: Any) -> int:
    """What an array takes on one of its devices."""
    share = share_of(leaf)
    return share.size * share.dtype.itemsize


def heads_here(layout: Layout | None, heads: Collection[int]) -> Shaped[Array | np.ndarray, " R"]:
    """See `Layout.heads_here`; on one device the heads themselves, ascending."""
    return np.asarray(sorted(heads), np.int32) if layout is None else layout.heads_here(heads)


def sum_over_devices(x: Any) -> Any:
    """The sum of what all devices of a layout have."""
    return jax.lax.psum(x, MODEL)


def gather_vocabulary(logits: Float32[Array, "*lead share"], vocab_size: int) -> Float32[Array, "*lead V"]:
    """The logits of the whole vocabulary, from every device's share of them."""
    return jax.lax.all_gather(logits, MODEL, axis=logits.ndim - 1, tiled=True)[..., :vocab_size]


def mask_padding(logits: Float32[Array, "*lead share"], vocab_size: int, devices: int) -> Float32[Array, "*lead share"]:
    """A device's share of the logits, those of the rows of zeros that fill the last one up out of every choice."""
    share = logits.shape[-1]
    if share * devices == vocab_size:
        return logits
    ids = first_token_here(share) + jnp.arange(share, dtype=jnp.int32)
    return jnp.where(ids < vocab_size, logits, _NO_TOKEN)


def gather(x: Shaped[Array, "n B"]) -> Shaped[Array, "devices n B"]:
    """What all devices of a layout have."""
    return jax.lax.all_gather(x, MODEL)


def first_token_here(share: int) -> Int[Array, ""]:
    """The first id of the running device's `share` of the vocabulary."""
    return share * jax.lax.axis_index(MODEL)
