"""How much memory is used, and what to do where it is not enough."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pref_jax.errors import RunError

if TYPE_CHECKING:
    import jax

    from pref_jax.experiment import Experiment

_GIB = 2**30
# XLA's status, and what its CUDA and TPU parts write where the status is another one.
_SHORTAGE = re.compile(
    r"RESOURCE_EXHAUSTED|CUDA_ERROR_OUT_OF_MEMORY|(ran )?out of memory|failed to allocate",
    re.IGNORECASE,
)


def peak_bytes(device: jax.Device) -> int:
    """Most bytes in use on the device so far; on CPU the process's resident memory."""
    statistics = _statistics(device)
    if "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    return resident_peak()


def resident_peak() -> int:
    """Most bytes this process has held in memory so far."""
    # `getrusage` would count what the parent held when it forked.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def describe_use(device: jax.Device, environment: Mapping[str, str] = os.environ) -> str:
    """The line that reports use, and on a GPU why ``nvidia-smi`` shows another number."""
    if device.platform == "cpu":
        return f"memory: at most {_gib(peak_bytes(device))} of this process so far"
    statistics = _statistics(device)
    if "peak_bytes_in_use" not in statistics:
        shown = "; nvidia-smi shows its use" if device.platform == "gpu" else ""
        return f"memory: {device.device_kind} keeps no count{shown}"
    limit = statistics.get("bytes_limit")
    line = (
        f"memory of a device: {_gib(statistics['bytes_in_use'])} in use, at most "
        f"{_gib(statistics['peak_bytes_in_use'])} so far"
    )
    if limit:
        line += f", {_gib(limit)} for JAX to use"
    if device.platform != "gpu":
        return line
    if environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in ("false", "0"):
        return f"{line}; it is taken as needed (XLA_PYTHON_CLIENT_PREALLOCATE=false)"
    fraction = _memory_fraction(environment)
    return (
        f"{line}: {fraction} of the card, taken at the start, which nvidia-smi shows as used; "
        "XLA_CLIENT_MEM_FRACTION sets the share, XLA_PYTHON_CLIENT_PREALLOCATE=false takes "
        "memory as needed"
    )


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or in the process."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return True
        if isinstance(cause, RuntimeError) and _SHORTAGE.search(str(cause)):
            return True
        cause = cause.__cause__
    return False


@contextlib.contextmanager
def shortage_explained(experiment: Experiment, command: str) -> Iterator[None]:
    """Turns running out of memory into one line that names what would help.

    Args:
      experiment: what ran.
      command: "train" or "benchmark", whose config can be changed, or "predict".

    Raises:
      RunError: memory ran out; everything else goes through.
    """
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        device = experiment.mesh.local_devices[0]
        kept = "; the last checkpoint is kept" if command == "train" else ""
        raise RunError(
            f"{experiment.mesh.devices.size} x {device.device_kind}",
            f"out of memory ({_shorten(error)})",
            list_relief(experiment, command, memory_of(device)) + kept,
        ) from error


def list_relief(experiment: Experiment, command: str, limit: int | None) -> str:
    """What to change, of what has not been changed yet; the first is the cheapest.

    Args:
      experiment, command: see `shortage_explained`.
      limit: bytes of a device, if known; where weights and optimizer state alone take more,
        smaller batches do not help and are not named.
    """
    config, mesh = experiment.config, experiment.mesh
    trains = command != "predict"
    held = experiment.bytes_per_device(training=trains)
    fits = limit is None or held < limit
    size = experiment.microbatch_size
    smaller = max(1, size // 2)
    options = []
    if fits and size > 1:
        options.append(
            f"--config.train.microbatch_size={smaller}"
            if trains
            else f"--microbatch_size={smaller}"
        )
    if trains and fits and config.train.remat != "full":
        options.append("--config.train.remat=full")
    if trains and experiment.is_decoder and config.model.quantization != "nf4":
        adapters = "" if config.model.lora.rank else "--config.model.lora.rank=4 with "
        options.append(f"{adapters}--config.model.quantization=nf4 in a new workdir")
    if trains and mesh.devices.size > mesh.shape["fsdp"] * mesh.shape["tensor"]:
        parts = mesh.devices.size // mesh.shape["tensor"]
        options.append(f"--config.mesh.fsdp={parts} --config.mesh.data=1")
    if trains and fits:
        options.append("a lower --config.input.max_length in a new workdir")
    if mesh.local_devices[0].platform == "gpu" and not _sets_fraction(os.environ):
        options.append("XLA_CLIENT_MEM_FRACTION=0.95 in the environment")
    options.append("a device with more memory")
    kinds = "weights, gradients and optimizer state" if trains else "weights"
    return f"{kinds} take {_gib(held)} of a device; set {_join(options)}"


def _join(options: list[str]) -> str:
    return f"{', '.join(options[:-1])}, or use {options[-1]}" if options[1:] else options[0]


def _shorten(error: BaseException) -> str:
    """The first line of XLA's pages on who holds which buffer."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines or [type(error).__name__])[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")
    return text if len(text) <= 160 else f"{text[:157]}..."


def memory_of(device: jax.Device) -> int | None:
    """Bytes that a device has for JAX; CPU devices of one process share the machine's."""
    if device.platform != "cpu":
        limit = _statistics(device).get("bytes_limit")
        return None if limit is None else int(limit)
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    return whole // device.client.local_device_count()


def _statistics(device: jax.Device) -> dict[str, Any]:
    """What the allocator counts; nothing on a CPU, and nothing under some allocators."""
    if device.platform == "cpu":
        return {}
    try:
        return dict(device.memory_stats() or {})
    except (RuntimeError, NotImplementedError):
        return {}


def _sets_fraction(environment: Mapping[str, str]) -> bool:
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    return any(environment.get(name) for name in names)


def _memory_fraction(environment: Mapping[str, str]) -> str:
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        with contextlib.suppress(ValueError):
            return f"{float(environment.get(name, '')):.0%}"
    return "75%"


def _gib(count: int) -> str:
    return f"{count / _GIB:.1f} GiB"
