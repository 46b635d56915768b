"""Checkpoints: written in the background, committed in one step, checked before use.

Orbax writes the arrays of a step into a temporary folder. Before it renames that folder to
``STEP``, a callback forces the files to the disk and adds ``manifest.json``: the SHA-256 of
every file, the shapes of the leaves and the caller's ``info``. So a folder with a manifest is a
whole checkpoint, and a flipped bit, which Orbax restores in silence, is found.

Hosts on one disk write their parts into one folder. Hosts that have only a bucket in common have
each a folder of their own: the leader gathers the state, writes it and puts it into the bucket.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from pref_jax import hosts
from pref_jax.errors import InputError, RunError
from pref_jax.files import make_folder, plain, sync, write_durably
from pref_jax.mesh import place
from pref_jax.training.mirror import Mirror

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
# Orbax rewrites these two in the step's folder while it commits, after the manifest.
_UNHASHED = ("_CHECKPOINT_METADATA", "commit_success.txt")
# Seconds. Orbax measures by the wall clock: with its ten minutes, a clock that is set forward while
# a checkpoint is being written would end the run. Lost hosts are noticed elsewhere (`hosts`).
_PATIENCE = 7 * 24 * 3600
_NONE_NEWER = np.iinfo(np.int32).max


class _Damage(Exception):
    """Why a checkpoint cannot be used."""


@dataclass(frozen=True)
class _Manifest:
    step: int
    info: dict[str, Any]
    leaves: dict[str, tuple[tuple[int, ...], str]]  # name -> shape, dtype
    files: dict[str, tuple[int, str]]  # path below the step's folder -> bytes, SHA-256


class Checkpoints:
    """The checkpoints of one run, in ``directory/STEP``.

    A state is any tree of arrays. Its leaves are stored under their paths ("params/head/bias"),
    so that a checkpoint does not depend on the classes that hold them.

    Args:
      directory: is made where it is missing.
      keep: how many of the newest checkpoints stay; the best one stays besides.
      metric: the entry of ``info`` whose lowest value is the best; None or absent: not measured.
      read_only: leaves everything as it is, for reading beside a run that is writing.
      mirror: puts what is written into a bucket; ``directory`` is then this host's own.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int,
        metric: str = "valid_loss",
        read_only: bool = False,
        mirror: Mirror | None = None,
    ) -> None:
        if keep < 1:
            raise InputError("--config.checkpoint.keep", f"is {keep}", "keep at least 1 checkpoint")
        self.directory = Path(directory).absolute()
        self._keep, self._metric, self._read_only = keep, metric, read_only
        self._mirror = mirror
        # Of one shared folder the leader takes care alone.
        self._owner = mirror is not None or jax.process_index() == 0
        self._publisher = ThreadPoolExecutor(1) if mirror is not None else None
        self._publishing: Future[None] | None = None
        self._pending: _Manifest | None = None
        self._infos: dict[int, dict[str, Any]] = {}
        if not read_only:
            hosts.on_leader("clean checkpoints", self._clean)
            if not hosts.is_leader():  # finds what the leader has left
                self._clean()

    # Writing.

    def save(
        self,
        step: int,
        state: Any,
        info: Mapping[str, Any],
        *,
        before: Callable[[], None] | None = None,
    ) -> bool:
        """Starts to write a checkpoint and returns while the disk works.

        The arrays are copied before this returns, so the caller may donate them. Waits for the
        save before, if that is still going on. Where ``step`` is there already, the state is
        taken to be the same and only ``info`` is renewed.

        Args:
          step: updates done.
          state: tree of jax or numpy arrays, with any shardings.
          info: what JSON can hold, and the metric.
          before: called first; what it makes durable (metric lines up to ``step``) is never
            behind a checkpoint.

        Returns:
          whether the state was written.

        Raises:
          RunError: this or the former save failed; the older checkpoints are as they were.
        """
        if before is not None:
            before()
        self.wait()
        described = plain(info)
        if hosts.on_leader("checkpoint", lambda: step in self.steps()):
            self._renew_info(step, described)
            self._start_publishing(step)
            return False
        import orbax.checkpoint as ocp

        leaves = _name_leaves(state)
        if self._mirror is not None and hosts.count() > 1:
            leaves = _gather_leaves(leaves)
            if not hosts.is_leader():
                self._infos[step] = described
                return True
        self._pending = _Manifest(
            step=step,
            info=described,
            leaves={name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in leaves.items()},
            files={},
        )
        self._infos[step] = described
        # Orbax writes no array without elements; there is nothing in it to restore.
        filled = {name: leaf for name, leaf in leaves.items() if leaf.size}
        try:
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(filled)), force=True
            )
        except Exception as error:
            raise self._save_error(step, error) from error
        self._start_publishing(step)
        return True

    def wait(self) -> None:
        """Returns once the save in progress is on the disk, and in the bucket where there is one.

        Raises:
          RunError: it failed.
          InputError: the bucket takes it no more.
        """
        if self._publishing is not None:
            publishing, self._publishing = self._publishing, None
            try:
                publishing.result()
            except (InputError, RunError):
                self._pending = None
                raise
            self._pending = None
        if self._pending is not None:
            self._finish()
            self._pending = None

    def _finish(self) -> None:
        """Returns once Orbax has written what is pending."""
        assert self._pending is not None
        step = self._pending.step
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                sync(self.directory)
        except Exception as error:
            raise self._save_error(step, error) from error

    def _start_publishing(self, step: int) -> None:
        """Puts a checkpoint into the bucket as soon as it is on the disk."""
        if self._mirror is None or not hosts.is_leader():
            return
        mirror = self._mirror

        def publish() -> None:
            if self._pending is not None:
                self._finish()
            mirror.publish(step, self.steps())

        assert self._publisher is not None
        self._publishing = self._publisher.submit(publish)

    def close(self) -> None:
        """Waits, then ends Orbax's threads."""
        try:
            self.wait()
        finally:
            if self._publisher is not None:
                self._publisher.shutdown()
            self._drop_manager()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Reading.

    def steps(self) -> list[int]:
        """The committed checkpoints, in order."""
        if not self.directory.is_dir():
            return []
        names = (entry.name for entry in os.scandir(self.directory) if _is_folder(entry))
        return sorted(int(name) for name in names if name.isascii() and name.isdecimal())

    def infos(self) -> dict[int, dict[str, Any]]:
        """The ``info`` of every checkpoint with a readable manifest, by step; no array is read."""
        found = {}
        for step in self.steps():
            with contextlib.suppress(_Damage):
                found[step] = _read_manifest(self.directory / str(step)).info
        return found

    def best_step(self) -> int | None:
        """The checkpoint with the lowest metric, the earliest of equals; None: none measured."""
        return _find_best(self.infos(), self._metric)

    def restore_latest(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole; None where there is none.

        A damaged one is skipped with a warning and moved to ``damaged/`` beside ``directory``.
        Several hosts agree on the newest step that is whole for all of them.

        Args:
          abstract_state: as for `restore`.

        Returns:
          step, state and info.

        Raises:
          InputError: the checkpoint holds another state than ``abstract_state``, or there are
            some that only a part of the hosts can see.
        """
        self.wait()
        newest = _NONE_NEWER
        while True:
            step = self._newest_whole(newest)
            steps = hosts.gather("newest whole checkpoint", step)
            if min(steps) < 0 <= max(steps):
                blind = [hosts.describe(host) for host, seen in enumerate(steps) if seen < 0]
                raise InputError(
                    str(self.directory),
                    f"{' and '.join(blind)} can see no whole checkpoint, others see {max(steps)}",
                    "give all hosts a --workdir on one shared disk, or gs://BUCKET/PATH",
                )
            newest = min(steps)
            if max(steps) == newest:
                break
        if newest < 0:
            return None
        if not self._read_only and self._owner:
            for later in [step for step in self.steps() if step > newest]:
                self._set_aside(later, "another host does not have it")
        self._drop_manager()  # in every process: making a new one is a meeting point of all
        try:
            state, info = self._read(newest, abstract_state)
        except _Damage as damage:
            # The hashes are right and Orbax cannot read it: its own unhashed file is broken.
            self._skip(newest, damage)
            return self.restore_latest(abstract_state)
        if not self._read_only and jax.process_index() == 0:
            self._remove_surplus()
        return newest, state, info

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """One checkpoint, or a part of it, bit for bit.

        Args:
          abstract_state: tree of `jax.ShapeDtypeStruct`; what it leaves out is not read. A leaf
            with a sharding comes back as a jax array under that sharding, whatever it was saved
            under; one without as numpy.

        Returns:
          state and info.

        Raises:
          InputError: no such checkpoint, a damaged one, or one that holds another state.
        """
        self.wait()
        folder = self.directory / str(step)
        if self._mirror is not None and hosts.count() > 1:
            hosts.barrier("checkpoint in the bucket")
            if not hosts.is_leader():  # what is here may be of before
                shutil.rmtree(folder, ignore_errors=True)
                self._mirror.fetch(step)
        remedy = f"use one of the steps {self.steps()}"
        if not folder.is_dir():
            raise InputError(str(folder), "there is no such checkpoint", remedy)
        try:
            _verify(folder)
            return self._read(step, abstract_state, partial=True)
        except _Damage as damage:
            raise InputError(str(folder), f"the checkpoint is damaged: {damage}", remedy) from None

    # The parts.

    @functools.cached_property
    def _manager(self) -> Any:
        import orbax.checkpoint as ocp

        _quiet_orbax()
        policies = ocp.checkpoint_managers
        alone = {}
        if self._mirror is not None:  # no host waits for another one's disk
            index = jax.process_index()
            alone["multiprocessing_options"] = ocp.options.MultiprocessingOptions(
                primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"host{index}"
            )
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(self._keep), _Best(self._infos, self._metric)]
                ),
                async_options=ocp.options.AsyncOptions(
                    timeout_secs=_PATIENCE, post_finalization_callback=self._seal
                ),
                # Steps are found by their folders alone: a broken metadata file must not keep a
                # run from starting.
                lightweight_initialize=True,
                save_root_metadata=False,
                read_only=self._read_only,
                create=self._mirror is None,
                **alone,
            ),
        )

    def _drop_manager(self) -> None:
        """Ends Orbax's threads; the next use starts from what is on the disk."""
        manager = self.__dict__.pop("_manager", None)
        if manager is not None:
            with contextlib.suppress(Exception):  # what failed in it was raised by wait()
                manager.close()

    def _seal(self) -> None:
        """Adds the manifest to the folder that Orbax is about to rename."""
        pending = self._pending
        if pending is None or jax.process_index() != 0:
            return
        folders = [
            entry
            for entry in self.directory.iterdir()
            if entry.name == str(pending.step) or entry.name.startswith(f"{pending.step}.")
        ]
        if len(folders) != 1:
            raise FileNotFoundError(f"no folder to seal for step {pending.step}")
        (folder,) = folders
        files = {}
        for path in _walk(folder):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                files[path.relative_to(folder).as_posix()] = (file.tell(), digest)
        for below, _, _ in os.walk(folder):
            sync(Path(below))
        manifest = _Manifest(pending.step, pending.info, pending.leaves, files)
        write_durably(folder / _MANIFEST, _encode(manifest))

    def _renew_info(self, step: int, info: dict[str, Any]) -> None:
        self._infos[step] = info
        if jax.process_index() != 0:
            return
        folder = self.directory / str(step)
        try:
            manifest = _read_manifest(folder)
        except _Damage as damage:
            raise RunError(
                str(folder), f"is damaged: {damage}", "run the same command again"
            ) from damage
        if manifest.info != info:
            renewed = _Manifest(step, info, manifest.leaves, manifest.files)
            write_durably(folder / _MANIFEST, _encode(renewed))

    def _save_error(self, step: int, error: Exception) -> RunError:
        """Forgets the failed save, so that what is on the disk is all that is known."""
        self._pending = None
        self._infos.pop(step, None)
        self._drop_manager()
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                self._remove_unfinished()
        hosts.raise_loss()  # where a host is gone, that is why
        remedy = "make room on the disk or mend its permissions, then run the same command again"
        if isinstance(error, TimeoutError):
            remedy = "run the same command again; a clock that is set looks like a long wait"
        return RunError(
            str(self.directory / str(step)),
            f"the checkpoint could not be written ({_reason(error)})",
            remedy,
        )

    def _read(
        self, step: int, abstract_state: Any, *, partial: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """A verified checkpoint's state and info."""
        import orbax.checkpoint as ocp

        folder = self.directory / str(step)
        manifest = _read_manifest(folder)
        wanted = _name_leaves(abstract_state)
        _compare_leaves(folder, manifest.leaves, wanted, partial=partial)
        filled = {name: leaf for name, leaf in wanted.items() if np.prod(leaf.shape)}
        restore_args = {
            name: ocp.RestoreArgs(restore_type=np.ndarray)
            if _sharding(leaf) is None
            else ocp.ArrayRestoreArgs(
                sharding=_sharding(leaf), global_shape=leaf.shape, dtype=leaf.dtype
            )
            for name, leaf in filled.items()
        }
        if step not in self._manager.all_steps():
            self._manager.reload()
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(
                        item=filled, restore_args=restore_args, partial_restore=partial
                    )
                ),
            ).state
        except Exception as error:
            hosts.raise_loss()  # a host that is gone is no damage
            raise _Damage(_reason(error)) from error
        leaves = []
        for name, leaf in wanted.items():
            if name in restored:
                leaves.append(restored[name])
            else:
                empty = np.zeros(leaf.shape, leaf.dtype)
                sharding = _sharding(leaf)
                leaves.append(empty if sharding is None else place(empty, sharding))
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        return state, manifest.info

    def _newest_whole(self, newest: int) -> int:
        """The newest step up to ``newest`` that passes its check; -1: none."""
        for step in reversed([step for step in self.steps() if step <= newest]):
            try:
                _verify(self.directory / str(step))
                return step
            except _Damage as damage:
                self._skip(step, damage)
        return -1

    def _skip(self, step: int, damage: _Damage) -> None:
        if self._read_only:
            logger.warning("checkpoint %d is skipped: %s", step, damage)
        elif self._owner:
            self._set_aside(step, str(damage))

    def _set_aside(self, step: int, reason: str) -> None:
        """Moves a checkpoint away, so that its step can be written again."""
        aside = self.directory.parent / "damaged" / str(step)
        if self._mirror is not None:
            logger.warning("checkpoint %d is skipped: %s", step, reason)
            shutil.rmtree(self.directory / str(step), ignore_errors=True)
            self._infos.pop(step, None)
            return
        logger.warning("checkpoint %d is skipped: %s; moved to %s", step, reason, aside)
        try:
            aside.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(
                str(aside.parent),
                f"can be no folder for damaged checkpoints ({error.strerror})",
                "remove it, then run the same command again",
            ) from error
        try:
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(self.directory / str(step), aside)
        except OSError as error:
            raise RunError(
                str(self.directory / str(step)),
                f"is damaged and cannot be moved away ({error.strerror})",
                "remove it, then run the same command again",
            ) from error
        self._infos.pop(step, None)

    def _clean(self) -> None:
        """Removes what a killed run left half written or half deleted."""
        if self._owner:
            try:
                make_folder(self.directory)
                self._remove_unfinished()
            except OSError as error:
                raise InputError(
                    str(self.directory),
                    f"cannot be written ({error.strerror})",
                    "mend its permissions or give another --workdir",
                ) from error
        whole = 0
        for step in reversed(self.steps()):
            folder = self.directory / str(step)
            try:
                self._infos[step] = _verify_sizes(folder).info
                whole += 1
            except _Damage as damage:
                if not self._owner:
                    continue
                if whole >= self._keep:  # its time was over: a removal was cut short
                    shutil.rmtree(folder, ignore_errors=True)
                else:
                    self._set_aside(step, str(damage))

    def _remove_surplus(self) -> None:
        """What a run that was killed before it removed it would leave for good after its end."""
        steps = self.steps()
        for step in steps[: -self._keep]:
            if step != _find_best(self._infos, self._metric):
                shutil.rmtree(self.directory / str(step), ignore_errors=True)
                self._infos.pop(step, None)

    def _remove_unfinished(self) -> None:
        for entry in self.directory.iterdir():
            if entry.name.partition(".")[0].isdecimal() and "orbax-checkpoint-tmp" in entry.name:
                shutil.rmtree(entry, ignore_errors=True)


@dataclass
class _Best:
    """Orbax preservation policy: the best step stays.

    Its own `BestN` reads the metric from Orbax's files, keeps every checkpoint that was not
    measured, and prefers the latest of equals.
    """

    infos: dict[int, dict[str, Any]]
    metric: str

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        present = {one.step: self.infos.get(one.step, {}) for one in checkpoints}
        best = _find_best(present, self.metric)
        return [one.step == best for one in checkpoints]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere but to itself: damaged, and in the way
        return True


def _find_best(infos: Mapping[int, Mapping[str, Any]], metric: str) -> int | None:
    measured = []
    for step, info in infos.items():
        value = info.get(metric)  # a text where it is no finite number
        if isinstance(value, int | float) and not isinstance(value, bool):
            measured.append((value, step))
    return min(measured)[1] if measured else None


def _encode(manifest: _Manifest) -> bytes:
    """JSON whose last entry is the SHA-256 of the text without it."""
    content = {
        "step": manifest.step,
        "info": manifest.info,
        "leaves": {name: [list(shape), dtype] for name, (shape, dtype) in manifest.leaves.items()},
        "files": {name: list(entry) for name, entry in sorted(manifest.files.items())},
    }
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}).encode() + b"\n"


def _read_manifest(folder: Path) -> _Manifest:
    try:
        content = json.loads((folder / _MANIFEST).read_bytes())
        digest = content.pop("sha256")
        if hashlib.sha256(json.dumps(content).encode()).hexdigest() != digest:
            raise _Damage(f"{_MANIFEST} was changed")
        return _Manifest(
            step=content["step"],
            info=content["info"],
            leaves={
                name: (tuple(shape), dtype) for name, (shape, dtype) in content["leaves"].items()
            },
            files={name: (size, digest) for name, (size, digest) in content["files"].items()},
        )
    except FileNotFoundError:
        raise _Damage(f"{_MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Damage(f"{_MANIFEST} cannot be read ({_reason(error)})") from error


def _verify_sizes(folder: Path) -> _Manifest:
    """Finds missing and truncated files, without reading them."""
    manifest = _read_manifest(folder)
    for name, (size, _) in manifest.files.items():
        try:
            present = (folder / name).stat().st_size
        except OSError:
            raise _Damage(f"{name} is missing") from None
        if present != size:
            raise _Damage(f"{name} has {present} bytes instead of {size}")
    return manifest


def _verify(folder: Path) -> None:
    """Compares every file with the manifest."""
    for name, (_, expected) in _verify_sizes(folder).files.items():
        try:
            with (folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise _Damage(f"{name} cannot be read ({error.strerror})") from error
        if digest != expected:
            raise _Damage(f"{name} was changed")


def _walk(folder: Path) -> Iterator[Path]:
    for below, _, names in os.walk(folder):
        for name in names:
            path = Path(below) / name
            if path.parent != folder or name not in (*_UNHASHED, _MANIFEST):
                yield path


def _name_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, in the tree's order."""
    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "state"
        if name in named:
            raise ValueError(f"two leaves of the state are called {name}")
        named[name] = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return named


def _gather_leaves(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Whole leaves on the leader, one after another; on the other hosts what they have.

    All hosts have to call it: a leaf that is cut over them is put together on all devices.
    """
    gathered = {}
    for name, leaf in leaves.items():
        whole = leaf
        if isinstance(leaf, jax.Array) and not leaf.is_fully_replicated:
            assert isinstance(leaf.sharding, jax.sharding.NamedSharding)
            everywhere = jax.sharding.NamedSharding(leaf.sharding.mesh, P())
            whole = jax.jit(lambda one: one, out_shardings=everywhere)(leaf)
        gathered[name] = np.array(whole) if hosts.is_leader() else leaf
    return gathered


def _sharding(leaf: Any) -> Any:
    return getattr(leaf, "sharding", None)


def _compare_leaves(
    folder: Path,
    saved: Mapping[str, tuple[tuple[int, ...], str]],
    wanted: Mapping[str, Any],
    *,
    partial: bool,
) -> None:
    remedy = "resume with the config that the run was started with, or give another --workdir"
    missing, surplus = wanted.keys() - saved.keys(), saved.keys() - wanted.keys()
    if partial:
        surplus = set()
    for names, what in ((missing, "lacks"), (surplus, "has, and this run does not want,")):
        if names:
            first = sorted(names)[0]
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(str(folder), f"the checkpoint {what} {first}{others}", remedy)
    for name, leaf in wanted.items():
        shape, dtype = saved[name]
        if shape != tuple(leaf.shape) or dtype != str(leaf.dtype):
            raise InputError(
                str(folder),
                f"{name} is {dtype}{list(shape)} and this run wants {leaf.dtype}{list(leaf.shape)}",
                remedy,
            )


def _reason(error: BaseException) -> str:
    """An error's text on one line, short: tensorstore adds whole specs to some."""
    if "No space left on device" in str(error):
        return "the disk is full"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def _quiet_orbax() -> None:
    """Silences Orbax: it logs tracebacks for what is raised here as one line.

    It logs through absl, whose logger passes its filters by, so the level has to do it. After a
    failure tensorstore reports the other writes to an event loop that is closed by then, each with
    a traceback through one of Python's hooks.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if not getattr(sys.excepthook, "drops_late_writes", False):
        sys.excepthook = _without_late_writes(sys.excepthook)
        sys.unraisablehook = _without_late_writes(sys.unraisablehook)


def _without_late_writes(hook: Callable[..., Any]) -> Callable[..., Any]:
    def show(*arguments: Any) -> None:
        error = arguments[1] if len(arguments) > 1 else arguments[0].exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            hook(*arguments)

    show.drops_late_writes = True  # type: ignore[attr-defined]
    return show
