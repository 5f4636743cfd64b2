"""The real TPU compiler without a TPU: the `libtpu` wheel compiles for a chip that is only described."""

import contextlib
import dataclasses
import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import jax

from lychee_jax.errors import UserError
from lychee_jax.parallel.layouts import Layout
from lychee_jax.parallel.mesh import EVERYWHERE, mesh_of
from lychee_jax.tpu_environment import has_tpu, without_tpu


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU as one JAX device sees it.

    Attributes:
        topology: the smallest slice that libtpu describes.
        clock_ghz: assumed, inferred from the peak rates that are published.
        bandwidth: bytes per second of one TensorCore, as `pltpu.get_tpu_info_for_chip` states.
        cores: TensorCores of one device.
        memory: bytes that a program may use, what the runtime keeps left out.
    """

    name: str
    topology: str
    clock_ghz: float
    bandwidth: float
    cores: int
    memory: int


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "v5e:2x2", 1.50, 820e9, 1, int(15.75 * 2**30)),
        Chip("v5p", "v5p:2x2x1", 1.75, 1230e9, 2, int(95.0 * 2**30)),
        Chip("v6e", "v6e:2x2", 1.75, 1640e9, 1, int(31.2 * 2**30)),
    )
}


def installed() -> bool:
    """Whether the compiler is there; it is never initialised as a backend."""
    return importlib.util.find_spec("libtpu") is not None


@functools.cache
def slice_mesh(topology: str, devices: int) -> jax.sharding.Mesh:
    """The first devices of a slice such as "v5e:2x4", along which one model is divided.

    Raises:
        UserError: libtpu is not installed.
    """
    from jax.experimental import topologies

    if not installed():
        raise UserError("the TPU compiler is not installed; pip install libtpu brings it")
    if not has_tpu():
        without_tpu()
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return mesh_of(described.devices[:devices])


def sharding(chip: Chip) -> jax.sharding.NamedSharding:
    """Of an array on one device of `chip`.

    Raises:
        UserError: libtpu is not installed.
    """
    return jax.sharding.NamedSharding(slice_mesh(chip.topology, 1), EVERYWHERE)


@contextlib.contextmanager
def described(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Inside the block kernels are traced for the chips of `mesh`.

    JAX's persistent cache is off meanwhile: it writes what was compiled for a described chip, and cannot read it back.
    """
    from jax.experimental.compilation_cache import compilation_cache

    cached = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # whether it is in use is remembered
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
        compilation_cache.reset_cache()


def compile_for(chip: Chip, program: Any, *args: Any, layout: Layout | None = None) -> jax.stages.Compiled:
    """Compile a jitted function for `chip`, or for all chips of a layout.

    Arrays among `args` are given by anything with a shape and a dtype, and go where they say, or else to one device,
    with a layout to each, in the default layout.
    """
    mesh = slice_mesh(chip.topology, 1) if layout is None else layout.mesh
    assert isinstance(mesh, jax.sharding.Mesh)
    own = jax.sharding.NamedSharding(mesh, EVERYWHERE)

    def place(leaf: Any) -> Any:
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype") or getattr(leaf, "sharding", None) is not None:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own)

    with described(mesh):
        return program.lower(*jax.tree.map(place, args)).compile()
