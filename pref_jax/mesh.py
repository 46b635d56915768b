"""The device mesh, and which axis of which array goes where.

Every parameter names its axes (`pref_jax.models.layers`); the table below maps the names to mesh
axes. It is the only place that knows both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pref_jax.accelerators import list_devices
from pref_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis. Batches are cut over "data" and "fsdp" (`BATCH_AXES`).
RULES: dict[str, str | None] = {
    "embed": "fsdp",  # width of hidden states
    "heads": "tensor",  # query, key and value channels
    "mlp": "tensor",  # width of the feed-forward layer
    "vocab": None,
    "lora": None,  # rank of adapters
    "layers": None,  # a decoder's layers, stacked
    "norm": None,  # scales and biases of layer norms are small
    # Blocks of the nf4 code along these axes.
    "embed_blocks": "fsdp",
    "heads_blocks": "tensor",
    "mlp_blocks": "tensor",
}
# Cut where the mesh divides them, else whole on every device: they are small.
_OPTIONAL = frozenset({"embed_blocks", "heads_blocks", "mlp_blocks"})

BATCH_AXES = ("data", "fsdp")


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Makes the mesh `data` x `fsdp` x `tensor`; one size may be -1 and takes what is left.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = list_devices() if devices is None else list(devices)
    sizes = [data, fsdp, tensor]
    if -1 in sizes:
        known = int(np.prod([size for size in sizes if size != -1]))
        if len(devices) % known:
            raise InputError(
                "--config.mesh",
                f"{_describe(sizes)} does not divide {len(devices)} devices",
                "choose sizes whose product divides the number of devices",
            )
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise InputError(
            "--config.mesh",
            f"{_describe(sizes)} is {int(np.prod(sizes))} devices, and there are {len(devices)}",
            "set one of the sizes to -1",
        )
    types = (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError as error:  # only for slices of some TPU generations
        raise InputError(
            "--config.mesh",
            f"{_describe(sizes)} does not fit the slice's links",
            "choose sizes that are products of the sides of the slice: 16 x 16 for v6e-256",
        ) from error


def _describe(sizes: Sequence[int]) -> str:
    return " x ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))


def is_one_cpu(mesh: Mesh) -> bool:
    """Whether the mesh is a single device, a CPU with all of its cores."""
    return mesh.devices.size == 1 and mesh.devices.flat[0].platform == "cpu"


def batch_shards(mesh: Mesh) -> int:
    """How many parts a batch is cut into."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int) -> NamedSharding:
    """Sharding of an array whose axis number ``axis`` counts packed units."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, BATCH_AXES))


def held(mesh: Mesh, shapes: Sequence[tuple[int, int]]) -> list[frozenset[int]] | None:
    """Per bucket of ``shapes`` ``(K, B)`` the columns of B on this host's devices; None: all."""
    if not mesh.is_multi_process:
        return None

    def columns(units: int) -> frozenset[int]:
        parts = batch_sharding(mesh, 0).addressable_devices_indices_map((units,)).values()
        return frozenset(n for part in parts if part for n in range(*part[0].indices(units)))

    return [columns(units) for _, units in shapes]


def partition_spec(
    axes: Sequence[str | None], rules: Mapping[str, str | None] = RULES
) -> PartitionSpec:
    """Maps an array's logical axes to mesh axes.

    Raises:
      ValueError: an axis that no rule names, or two axes of one array on the same mesh axis.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in rules]
    if unknown:
        raise ValueError(f"no sharding rule names the axis {unknown[0]!r}; known: {list(rules)}")
    mapped = [None if axis is None else rules[axis] for axis in axes]
    used = [axis for axis in mapped if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"the axes {tuple(axes)} share a mesh axis: {mapped}")
    return PartitionSpec(*mapped)


def abstract_parameters(boxed: Any, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of parameters that still carry their axis names.

    Args:
      boxed: what `jax.eval_shape` of a Linen ``init`` returns.
      mesh: the mesh of `make_mesh`.

    Returns:
      The same tree of `jax.ShapeDtypeStruct`, without the boxes.

    Raises:
      InputError: a mesh size that does not divide the array axis it cuts.
    """

    def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        names = leaf.names if isinstance(leaf, nn.Partitioned) else ()
        value = leaf.value if isinstance(leaf, nn.Partitioned) else leaf
        fitting = [
            None if name in _OPTIONAL and size % mesh.shape[RULES[name]] else name
            for name, size in zip(names, value.shape, strict=False)
        ]
        spec = partition_spec(fitting)
        for size, axis in zip(value.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                where = "/".join(str(key.key) for key in path if hasattr(key, "key"))
                raise InputError(
                    f"--config.mesh.{axis}",
                    f"{mesh.shape[axis]} does not divide the {size} of {where}",
                    "choose a divisor",
                )
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(
        place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    )


def constrain_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Pins activations ``[B, ...]`` to the batch axes; as they are without a mesh."""
    if mesh is None or x.shape[0] % batch_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh, 0))


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Puts a host array onto the mesh; each host hands over only the parts its devices hold."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
