"""What is chosen for a card and said about it, with stand-ins for the cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from pref_jax import accelerators
from pref_jax.accelerators import (
    Installed,
    Machine,
    compute_capability,
    describe_mixture,
    explain_cpu,
    find_machine,
    find_weakest,
    list_devices,
    refuse_old_cards,
    warn_of_cudnn,
)
from pref_jax.errors import InputError
from pref_jax.models.causal_attention import choose_causal_implementation
from pref_jax.training.precision import choose_precision


class Card(NamedTuple):
    """What is asked of a `jax.Device`."""

    device_kind: str
    compute_capability: str
    platform: str = "gpu"


P100, V100 = Card("Tesla P100-PCIE-16GB", "6.0"), Card("Tesla V100-SXM2-16GB", "7.0")
T4, A100 = Card("Tesla T4", "7.5"), Card("NVIDIA A100-SXM4-80GB", "8.0")
H100, B200 = Card("NVIDIA H100 80GB HBM3", "9.0"), Card("NVIDIA B200", "10.0")
MI300 = Card("AMD Instinct MI300X", "gfx942")
CUDA12 = Installed("0.10.2", 12, (9, 10))
DRIVER = "535.104.05"


@pytest.mark.parametrize(
    ("card", "dtype", "scaled"),
    [
        (P100, "float32", False),
        (V100, "float16", True),
        (T4, "float16", True),
        (A100, "bfloat16", False),
        (B200, "bfloat16", False),  # 10.0 is more than 8.0, and "10.0" sorts before "8.0"
        (MI300, "bfloat16", False),
        (Card("TPU v3", "", "tpu"), "bfloat16", False),
        (Card("cpu", "", "cpu"), "float32", False),
    ],
)
def test_precision_follows_the_card(card: Any, dtype: str, scaled: bool) -> None:
    precision = choose_precision("auto", card)
    assert (precision.compute, precision.loss_scaling) == (jnp.dtype(dtype), scaled)
    assert choose_precision("float16", card).loss_scaling


def test_the_weakest_card_decides() -> None:
    mixed: list[Any] = [A100, T4, B200]
    assert find_weakest(mixed) is T4
    assert choose_precision("auto", find_weakest(mixed)).compute == jnp.float16
    line = describe_mixture([*mixed, A100], "float16")
    assert line is not None and "2 x NVIDIA A100-SXM4-80GB (compute capability 8.0)" in line
    assert "1 x Tesla T4 (compute capability 7.5)" in line and "float16" in line
    assert describe_mixture([T4, T4], "float16") is None  # type: ignore[list-item]


@pytest.mark.parametrize(("card", "chosen"), [(T4, "xla"), (A100, "cudnn"), (MI300, "xla")])
def test_flash_attention_from_ampere(card: Any, chosen: str) -> None:
    found = choose_causal_implementation(
        card, one_cpu=False, head_dim=64, length=128, dtype=jnp.dtype("float16"), packing="auto"
    )
    assert found == chosen


def test_only_cards_have_a_capability() -> None:
    assert compute_capability(B200) == (10, 0)  # type: ignore[arg-type]
    assert compute_capability(MI300) is None and compute_capability(jax.devices()[0]) is None


@pytest.mark.parametrize(
    ("installed", "card", "remedy"),
    [
        (Installed("0.10.2", 13, (9, 12)), V100, '"jax[cuda12]==0.10.2" "nvidia-cudnn-cu12<9.11"'),
        (Installed("0.10.2", 13), P100, "jax[cuda12]"),
        (CUDA12, Card("Tesla K80", "3.7"), "use another card, or the CPU with JAX_PLATFORMS=cpu"),
    ],
)
def test_a_card_that_the_installed_cuda_has_dropped(
    installed: Installed, card: Any, remedy: str
) -> None:
    with pytest.raises(InputError) as caught:
        refuse_old_cards([A100, card], installed)  # type: ignore[list-item]
    assert card.device_kind in caught.value.where and remedy in caught.value.remedy
    assert f"CUDA {installed.cuda}" in caught.value.what


def test_cards_that_are_taken() -> None:
    refuse_old_cards([P100, V100, T4, H100], CUDA12)  # type: ignore[list-item]
    refuse_old_cards([T4, B200], Installed("0.10.2", 13))  # type: ignore[list-item]
    refuse_old_cards([V100], Installed("0.10.2"))  # type: ignore[list-item]
    refuse_old_cards([MI300], CUDA12)  # type: ignore[list-item]


def test_a_cudnn_that_no_longer_lists_a_card_is_named() -> None:
    new = Installed("0.10.2", 12, (9, 14))
    line = warn_of_cudnn([A100, V100], new)  # type: ignore[list-item]
    assert line is not None and "cuDNN 9.14" in line and '"nvidia-cudnn-cu12<9.11"' in line
    assert warn_of_cudnn([T4], new) is None  # type: ignore[list-item]
    assert warn_of_cudnn([V100], CUDA12) is None  # type: ignore[list-item]
    assert warn_of_cudnn([V100], Installed("0.10.2", 12)) is None  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("driver", "installed", "environment", "expected"),
    [
        (DRIVER, Installed("0.10.2"), {}, 'type: pip install "jax[cuda12]==0.10.2"'),
        ("470.82.01", Installed("0.10.2"), {}, "470.82.01 is older than 525, which CUDA 12 needs"),
        (DRIVER, Installed("0.10.2", 13), {}, "older than 580, which CUDA 13 needs"),
        (DRIVER, CUDA12, {}, "JAX_PLATFORMS=cuda python -c"),
        (None, CUDA12, {"JAX_PLATFORMS": "cuda,cpu"}, "JAX_PLATFORMS=cuda python -c"),
        (DRIVER, CUDA12, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES='' hides it"),
        (DRIVER, CUDA12, {"CUDA_VISIBLE_DEVICES": "-1"}, "CUDA_VISIBLE_DEVICES='-1' hides it"),
        (DRIVER, Installed("0.10.2"), {"CUDA_VISIBLE_DEVICES": "0,1"}, "jax[cuda12]"),
    ],
)
def test_a_card_that_is_not_used_is_said_with_what_to_type(
    driver: str | None, installed: Installed, environment: dict[str, str], expected: str
) -> None:
    line = explain_cpu(Machine(("Tesla T4",), driver), installed, environment)
    assert line is not None and line.startswith("Tesla T4 is here, and the CPU is used: ")
    assert expected in line and "\n" not in line


def test_nothing_is_said_of_a_cpu_that_was_asked_for() -> None:
    card = Machine(("Tesla T4",), DRIVER)
    assert explain_cpu(card, Installed("0.10.2"), {"JAX_PLATFORMS": "cpu"}) is None
    assert explain_cpu(Machine(), Installed("0.10.2"), {}) is None


def test_cards_and_driver_are_read_from_the_kernel(tmp_path: Path) -> None:
    assert find_machine(tmp_path) == Machine()
    for bus in ("0000:04:00.0", "0000:05:00.0"):
        folder = tmp_path / "proc/driver/nvidia/gpus" / bus
        folder.mkdir(parents=True)
        (folder / "information").write_text("Model: \t\t Tesla T4\nIRQ:   \t\t 33\n")
    (tmp_path / "proc/driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
        "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
    )
    assert find_machine(tmp_path) == Machine(("Tesla T4", "Tesla T4"), "570.86.15")


def test_the_line_is_said_once_where_devices_are_first_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(accelerators, "find_machine", lambda: Machine(("Tesla T4",), DRIVER))
    monkeypatch.setattr(accelerators, "find_installed", lambda: Installed("0.10.2"))
    accelerators._look_once.cache_clear()
    with caplog.at_level("WARNING"):
        assert list_devices() == jax.devices() == list_devices()
    accelerators._look_once.cache_clear()
    assert [record.getMessage()[:20] for record in caplog.records] == ["Tesla T4 is here, an"]


def test_a_platform_that_jax_does_not_have_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices() -> None:
        raise RuntimeError(
            "Unable to initialize backend 'cuda': no supported devices found for platform CUDA. "
            "(set JAX_PLATFORMS='' to automatically choose an available backend)"
        )

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(accelerators, "find_machine", lambda: Machine(("Tesla T4",), "470.82.01"))
    with pytest.raises(InputError) as caught:
        list_devices()
    assert caught.value.where == "JAX_PLATFORMS=cuda"
    assert "no supported devices found" in caught.value.what
    assert "470.82.01 is older than 525" in caught.value.remedy
