"""Where compiled programs are kept between processes."""

import functools
import hashlib
import logging
import os
import pickle
import platform
import threading
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from pref_jax import cache
from pref_jax.errors import RunError

logger = logging.getLogger(__name__)

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")
# Environment that compilers read.
_COMPILERS_READ = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "NVIDIA_", "CUDA_")
_HIT = "/jax/compilation_cache/cache_hits"
_kept = False


class _Hits(threading.local):
    """How often this thread got a program from JAX's cache."""

    count = 0


_hits = _Hits()


def keep_compiled_programs() -> None:
    """Keeps compiled programs below `cache.cache_dir` from now on.

    Two things are kept: by JAX's persistent compilation cache what was compiled from a program,
    and by `compile_program` what was compiled from a config, which saves tracing it as well.
    `launch/train.py --clear_cache` empties both. Programs that compile in less than a second are
    not worth a file of JAX's.
    """
    global _kept
    if not _kept:
        jax.monitoring.register_event_listener(_count_hit)
    # jax adds its options to this object at run time, unseen by type checkers.
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache.folder("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    _kept = True


def _count_hit(event: str, **_: Any) -> None:
    """Called in the thread that compiles."""
    if event == _HIT:
        _hits.count += 1


def compile_program(function: Any, arguments: Sequence[Any], identity: Sequence[Any]) -> Any:
    """``function.lower(*arguments).compile()``, or what an earlier process got from it.

    To trace and lower a step takes about as long as to load it compiled, so a start that finds the
    program here does neither. Runs of several hosts always trace.

    Args:
      function: of `jax.jit`.
      arguments: shapes and shardings of its arguments.
      identity: everything that the function follows from, but for the code of this package, the
        libraries, JAX's options and the machine, which are looked at here. Compared by `repr`;
        nothing is kept where that is no more than an address.

    Raises:
      InputError: the cache folder cannot be written.
    """
    # What cannot be kept or loaded is no failure: it is compiled.
    name = _name(arguments, identity) if _kept and jax.process_count() == 1 else None
    if name is None:
        return function.lower(*arguments).compile()
    path = cache.find("programs", name)
    found = None if path is None else _load(path, arguments)
    if found is not None:
        return found
    hits = _hits.count
    made = function.lower(*arguments).compile()
    # XLA saves an incomplete program of what it has itself loaded (CPU, jaxlib 0.10.2).
    if _hits.count == hits:
        _keep(name, made)
    return made


def _load(path: Path, arguments: Sequence[Any]) -> Any | None:
    from jax.experimental import serialize_executable

    try:
        program, arguments_tree, results_tree = pickle.loads(path.read_bytes())
        devices = _devices(jax.tree.leaves(tuple(arguments)))
        return serialize_executable.deserialize_and_load(
            program, arguments_tree, results_tree, execution_devices=devices
        )
    except Exception as error:  # whatever a backend or another version raises
        logger.warning("the compiled program %s cannot be loaded (%s)", path, error)
        cache.remove(path)
        return None


def _keep(name: str, made: Any) -> None:
    from jax.experimental import serialize_executable

    try:
        kept = pickle.dumps(serialize_executable.serialize(made))
    except Exception as error:  # a backend that cannot
        logger.info("compiled programs are not kept here (%s)", error)
        return

    def make(path: Path) -> None:
        path.write_bytes(kept)

    try:
        cache.entry("programs", name, make, wait=False)
    except (RunError, OSError) as error:
        logger.warning("the compiled program is not kept: %s", error)


def _name(arguments: Sequence[Any], identity: Sequence[Any]) -> str | None:
    leaves, structure = jax.tree.flatten(tuple(arguments))
    client = jax.local_devices()[0].client
    parts = [
        *map(repr, identity),
        *map(repr, leaves),
        repr(structure),
        [repr((device.id, device.device_kind)) for device in _devices(leaves)],
        repr((client.platform, client.platform_version, _processor())),
        _options(),
        [f"{name} {metadata.version(name)}" for name in _LIBRARIES],
        _source(),
    ]
    if " at 0x" in repr(parts):
        return None
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _devices(leaves: Sequence[Any]) -> list[jax.Device]:
    """Those of the mesh, which all arguments are on."""
    return list(leaves[0].sharding.mesh.devices.flat)


def _options() -> list[str]:
    """What changes how JAX traces and compiles; where its cache lies does not."""
    options = jax.config.values
    found = [f"{name}={value!r}" for name, value in options.items() if "cache" not in name]
    found += [
        f"{name}={value}"
        for name, value in os.environ.items()
        if name.startswith(_COMPILERS_READ) and "CACHE" not in name
    ]
    return sorted(found)


@functools.cache
def _processor() -> str:
    """The processor's instructions: a program for others would not run here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))


@functools.cache
def _source() -> str:
    """Hash of this package's code."""
    total = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()
