"""What the makers publish about accelerators, and how TPU slices are called.

Sources: Google Cloud's TPU system architecture pages; for v2 and v3 Jouppi et al. 2020, "A
domain-specific supercomputer for training deep neural networks"; NVIDIA's data sheets.
"""

import math
import re
from typing import NamedTuple

from pref_jax.errors import InputError


class Chip(NamedTuple):
    """One device as JAX counts them: on TPU v2 and v3 a core, of which a chip has two.

    Attributes:
      peak_flops: dense bfloat16 FLOP/s (float16 on T4 and V100).
      memory: bytes of HBM.
      bandwidth: bytes/s between the device and its memory.
      interconnect: bytes/s to other chips of a slice, all links together; 0 for GPUs, whose links
        differ between machines.
    """

    peak_flops: float
    memory: int
    bandwidth: float
    interconnect: float = 0.0


_GIB = 2**30

# By a part of `device_kind`; the first match counts.
CHIPS = {
    "TPU v2": Chip(23e12, 8 * _GIB, 350e9, 124e9),
    "TPU v3": Chip(61.5e12, 16 * _GIB, 450e9, 164e9),
    "TPU v4": Chip(275e12, 32 * _GIB, 1228e9, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * _GIB, 819e9, 200e9),
    "TPU v5e": Chip(197e12, 16 * _GIB, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95 * _GIB, 2765e9, 600e9),
    "TPU v6": Chip(918e12, 32 * _GIB, 1640e9, 448e9),
    "H200": Chip(989e12, 141 * 10**9, 4800e9),
    "H100": Chip(989e12, 80 * 10**9, 3350e9),
    "A100": Chip(312e12, 80 * 10**9, 2039e9),
    "L4": Chip(121e12, 24 * 10**9, 300e9),
    "T4": Chip(65e12, 16 * 10**9, 320e9),
    "V100": Chip(125e12, 16 * 10**9, 900e9),
}


def find_chip(device_kind: str) -> Chip | None:
    """The row of a device; None for one that nobody has entered."""
    return next((chip for name, chip in CHIPS.items() if name in device_kind), None)


class _Generation(NamedTuple):
    """A TPU generation.

    Attributes:
      name: how libtpu calls it.
      words: how people call it, lower case.
      per_chip: what the number behind a slice's short name counts: cores of v2, v3 and v5p chips
        (2), or chips (1).
      layouts: the slices that can be rented, chips along each dimension.
      host: chips of one host where a slice has several.
      single_host: the largest slice that has one host.
    """

    name: str
    words: tuple[str, ...]
    per_chip: int
    layouts: tuple[tuple[int, ...], ...]
    host: tuple[int, ...]
    single_host: int


_SMALL = ((1, 1), (2, 2), (2, 4))
_SQUARES = ((4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = (
    *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)),
    *((8, 8, 12), (8, 8, 16), (8, 16, 16), (16, 16, 16)),
)
GENERATIONS = (
    _Generation("v2", ("v2",), 2, ((2, 2), *_SQUARES), (2, 2), 4),
    _Generation("v3", ("v3",), 2, ((2, 2), *_SQUARES, (16, 32), (32, 32)), (2, 2), 4),
    _Generation("v5e", ("v5e", "v5litepod", "v5lite"), 1, _SMALL + _SQUARES, (2, 2), 8),
    _Generation("v5p", ("v5p",), 2, _CUBES, (2, 2, 1), 4),
    _Generation("v6e", ("v6e",), 1, _SMALL + _SQUARES, (2, 2), 8),
)


class Topology(NamedTuple):
    """A slice.

    Attributes:
      name: in one spelling, such as "v5e:2x4".
      layout: chips along each dimension.
      host: chips of one host along each dimension.
    """

    name: str
    layout: tuple[int, ...]
    host: tuple[int, ...]


def parse_topology(text: str) -> Topology:
    """Reads a slice by its layout (``v5e:2x4``) or by its size (``v5e-8``, ``v5litepod-8``).

    Raises:
      InputError: no such slice; says which there are.
    """
    where = f"--topology={text}"
    found = re.fullmatch(r"\s*([a-z0-9]+)\s*(?::([\dx]+)|-(\d{1,6}))\s*", text.lower(), re.ASCII)
    generation = next((g for g in GENERATIONS if found and found[1] in g.words), None)
    if found is None or generation is None:
        known = ", ".join(generation.name for generation in GENERATIONS)
        raise InputError(
            where, "no such TPU is known", f"give {known} with a layout or a size: v5e:2x4 or v5e-8"
        )
    for layout in generation.layouts:
        chips = math.prod(layout)
        written = "x".join(str(size) for size in layout)
        if written == found[2] or (found[3] and int(found[3]) == chips * generation.per_chip):
            alone = chips <= generation.single_host
            host = layout if alone else generation.host
            return Topology(f"{generation.name}:{written}", layout, host)
    known = ", ".join(
        f"{generation.name}:{'x'.join(map(str, layout))} "
        f"({generation.name}-{math.prod(layout) * generation.per_chip})"
        for layout in generation.layouts
    )
    raise InputError(where, "there is no such slice", f"choose one of {known}")
