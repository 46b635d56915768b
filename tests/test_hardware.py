"""Slices by every name people give them, and none that does not exist."""

import pytest

from pref_jax.errors import InputError
from pref_jax.hardware import find_chip, parse_topology


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("v5e:2x4", "v5e:2x4"),
        ("v5e-8", "v5e:2x4"),
        ("v5litepod-8", "v5e:2x4"),
        ("V5E:2x4", "v5e:2x4"),
        (" v5e-256 ", "v5e:16x16"),
        ("v3-8", "v3:2x2"),  # counts cores
        ("v3:2x2", "v3:2x2"),
        ("v5p-8", "v5p:2x2x1"),
        ("v6e-8", "v6e:2x4"),
        ("v2-8", "v2:2x2"),
    ],
)
def test_a_slice_has_several_names(text: str, name: str) -> None:
    assert parse_topology(text).name == name


@pytest.mark.parametrize(
    ("text", "listed"),
    [
        ("v5e:3x3", "v5e:2x4 (v5e-8)"),
        ("v5e:2x8", "v5e:4x4 (v5e-16)"),
        ("v5e-7", "v5e:2x4 (v5e-8)"),
        ("v3-4", "v3:2x2 (v3-8)"),
        ("v9:2x2", "v5e, v5p, v6e"),
        ("", "v5e, v5p, v6e"),
        ("v5e", "v5e, v5p, v6e"),
        ("v5e:²x4", "v5e, v5p, v6e"),
        ("v5e:2x4x1", "v5e:2x4 (v5e-8)"),
    ],
)
def test_others_are_refused_with_a_list(text: str, listed: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_topology(text)
    assert caught.value.where == f"--topology={text}" and listed in str(caught.value)


def test_devices_are_known_by_their_kind() -> None:
    lite, full = find_chip("TPU v5 lite"), find_chip("TPU v5")
    assert lite is not None and full is not None and full.peak_flops > 2 * lite.peak_flops
    assert find_chip("NVIDIA H100 80GB HBM3") == find_chip("H100")
    assert find_chip("TFRT_CPU") is None
