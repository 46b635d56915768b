"""Which cards the devices are, what they can do, and why a card that is there is not used.

Sources: JAX's installation page (CUDA 12 needs driver 525, CUDA 13 driver 580 and cards from
compute capability 7.5); NVIDIA's support matrix of cuDNN (9.10 is the last that lists cards below
7.5); the machine code in the CUDA 12 plugin of JAX 0.10.2, which begins at capability 5.0.
"""

import functools
import importlib.metadata
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from pref_jax.errors import InputError

logger = logging.getLogger(__name__)

Capability = tuple[int, int]

BFLOAT16_FROM: Capability = (8, 0)  # Ampere
TENSOR_CORES_FROM: Capability = (7, 0)  # Volta; below, 16 bits are no faster on most cards
_CUDNN_FROM: Capability = (7, 5)  # for what follows cuDNN 9.10
_CARDS_FROM: dict[int, Capability] = {12: (5, 0), 13: (7, 5)}  # by CUDA's major version
_DRIVER_FROM = {12: 525, 13: 580}


class Installed(NamedTuple):
    """What pip has installed.

    Attributes:
      jax: version.
      cuda: CUDA's major version; None for a JAX without CUDA.
      cudnn: major and minor version; None where it is not installed by pip.
    """

    jax: str
    cuda: int | None = None
    cudnn: tuple[int, int] | None = None


class Machine(NamedTuple):
    """What the kernel knows of NVIDIA cards.

    Attributes:
      cards: their names.
      driver: its version, such as "535.104.05"; None: unknown.
    """

    cards: tuple[str, ...] = ()
    driver: str | None = None


def find_installed() -> Installed:
    """Looks into the environment."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    # JAX prefers the newer one where both are installed.
    cuda = next((major for major in (13, 12) if version(f"jax-cuda{major}-plugin")), None)
    found = re.match(r"(\d+)\.(\d+)", version(f"nvidia-cudnn-cu{cuda}") or "")
    cudnn = (int(found[1]), int(found[2])) if found else None
    return Installed(jax.__version__, cuda, cudnn)


def find_machine(root: Path = Path("/")) -> Machine:
    """Looks into ``/proc`` and ``/dev``, which needs no library of NVIDIA's."""
    cards = []
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        named = re.search(r"^Model:\s*(.+?)\s*$", _read(path), re.MULTILINE)
        cards.append(named[1] if named else "an NVIDIA card")
    if not cards and (root / "dev/nvidia0").exists():
        cards = ["an NVIDIA card"]
    driver = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", _read(root / "proc/driver/nvidia/version"))
    return Machine(tuple(cards), driver[0] if driver else None)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def compute_capability(device: jax.Device) -> Capability | None:
    """Of an NVIDIA card, such as (7, 5) for a T4; None for any other device."""
    text = str(getattr(device, "compute_capability", ""))
    found = re.fullmatch(r"(\d+)\.(\d+)", text) if device.platform == "gpu" else None
    return (int(found[1]), int(found[2])) if found else None


def find_weakest(devices: Sequence[jax.Device]) -> jax.Device:
    """The device that decides what all of them compute in."""
    return min(devices, key=lambda device: compute_capability(device) or (math.inf, 0))


def list_devices() -> list[jax.Device]:
    """All devices of this process's world; says once what is not as it could be.

    Raises:
      InputError: JAX has none of the kind that JAX_PLATFORMS asks for, or a card is too old for
        what is installed.
    """
    try:
        devices = jax.devices()
    except RuntimeError as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error).split("(you may")[0].split("(set JAX_PLATFORMS")[0]
        remedy = explain_cpu(find_machine(), find_installed(), {}) or "mend it, or use a CPU"
        raise InputError(
            f"JAX_PLATFORMS={asked}", " ".join(reason.split())[:300], f"{remedy}; JAX_PLATFORMS=cpu"
        ) from error
    _look_once(tuple(devices))
    return devices


@functools.cache
def _look_once(devices: tuple[jax.Device, ...]) -> None:
    if devices[0].platform == "cpu":
        line = explain_cpu(find_machine(), find_installed(), os.environ)
    elif devices[0].platform == "gpu":
        installed = find_installed()
        refuse_old_cards(devices, installed)
        line = warn_of_cudnn(devices, installed)
    else:
        line = None
    if line is not None:
        logger.warning("%s", line)


def explain_cpu(
    machine: Machine, installed: Installed, environment: Mapping[str, str]
) -> str | None:
    """Why the CPU is used though there is a card, and what to type; None where it was asked for.

    JAX says so itself, among warnings that nobody sees here.
    """
    asked = environment.get("JAX_PLATFORMS", "")
    if not machine.cards or (asked and not {"cuda", "gpu"} & set(asked.split(","))):
        return None
    what = f"{', '.join(machine.cards)} {'is' if len(machine.cards) == 1 else 'are'} here"
    what += ", and the CPU is used"
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not re.match(r"\d|GPU-|MIG-|all", hidden.strip()):
        return f"{what}: CUDA_VISIBLE_DEVICES={hidden!r} hides it; unset it to use the card"
    driver = int(machine.driver.split(".")[0]) if machine.driver else None
    needed = _DRIVER_FROM[installed.cuda or 12]
    if driver is not None and driver < needed:
        return (
            f"{what}: its driver {machine.driver} is older than {needed}, which CUDA "
            f"{installed.cuda or 12} needs; update the driver"
        )
    if installed.cuda is None:
        return (
            f"{what}: this JAX was installed without CUDA; type: "
            f'pip install "jax[cuda12]=={installed.jax}"'
        )
    return (
        f"{what}: JAX with CUDA {installed.cuda} does not take it; to read why, type: "
        'JAX_PLATFORMS=cuda python -c "import jax; jax.devices()"'
    )


def refuse_old_cards(devices: Sequence[jax.Device], installed: Installed) -> None:
    """Raises: InputError: the installed CUDA has no machine code for one of the cards."""
    weakest = find_weakest(devices)
    capability = compute_capability(weakest)
    if capability is None or installed.cuda is None:
        return
    least = _CARDS_FROM[installed.cuda]
    if capability >= least:
        return
    remedy = "use another card, or the CPU with JAX_PLATFORMS=cpu"
    if capability >= _CARDS_FROM[12]:
        remedy = (
            f'type: pip uninstall jax-cuda13-plugin jax-cuda13-pjrt, and pip install "jax[cuda12]=='
            f'{installed.jax}" "nvidia-cudnn-cu12<9.11"; or {remedy}'
        )
    raise InputError(
        _name(weakest),
        f"CUDA {installed.cuda} takes cards from compute capability {_show(least)} on",
        remedy,
    )


def warn_of_cudnn(devices: Sequence[jax.Device], installed: Installed) -> str | None:
    """The line for cards that the installed cuDNN no longer lists: it may still start on them."""
    weakest = find_weakest(devices)
    capability = compute_capability(weakest)
    if capability is None or capability >= _CUDNN_FROM or (installed.cudnn or (9, 0)) < (9, 11):
        return None
    assert installed.cudnn is not None
    return (
        f"{_name(weakest)}: cuDNN {_show(installed.cudnn)} no longer lists cards below "
        f"{_show(_CUDNN_FROM)}; if it fails to start, type: "
        f'pip install "nvidia-cudnn-cu{installed.cuda}<9.11"'
    )


def describe_mixture(devices: Sequence[jax.Device], dtype: str) -> str | None:
    """The line for cards of different kinds; None where all are of one."""
    kinds: dict[str, int] = {}
    for device in devices:
        kinds[_name(device)] = kinds.get(_name(device), 0) + 1
    if len(kinds) < 2:
        return None
    listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return (
        f"different devices: {listed}; all compute in {dtype}, as the weakest one can, and wait "
        "for the slowest; CUDA_VISIBLE_DEVICES chooses among them"
    )


def _name(device: jax.Device) -> str:
    capability = compute_capability(device)
    shown = "" if capability is None else f" (compute capability {_show(capability)})"
    return f"{device.device_kind}{shown}"


def _show(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
