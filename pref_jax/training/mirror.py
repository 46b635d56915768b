"""A run in a bucket: trained in a folder of this machine, and kept whole in the bucket.

The folder is a workdir as any other. Everything of it is put into the bucket as whole objects, in
an order that keeps what a workdir promises: first the small files (so metric lines up to a
checkpoint's step are never behind it), then the files of the checkpoint, and its ``manifest.json``
last. A step without a manifest is none, and a manifest tells by its hashes whether the rest is
whole.

What is in the folder and not in the bucket is of no weight: a start makes the folder what the
bucket has.
"""

import contextlib
import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

from pref_jax import cache, hosts
from pref_jax.bucket import Conflict, Entry, Folder, copy_entries, hash_content, is_url
from pref_jax.errors import InputError, RunError, show_as
from pref_jax.training.lease import Lease

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_STEP = re.compile(r"checkpoints/(\d+)/(.+)", re.ASCII)
_NOT_KEPT = ("checkpoints", "damaged")  # folders that are no small files
_ATTEMPTS = 3  # to read a run that is being written
# Seconds that a run which is going on waits for its bucket, in the background; nobody may take a
# silent run over within them (`lease.STALE`).
PATIENCE = 100.0


class Mirror:
    """A run in a bucket and its folder here, for the hosts that train it.

    Args:
      url: ``gs://BUCKET/PATH`` of the run.

    Attributes:
      path: the folder; of each host its own.
    """

    def __init__(self, url: str) -> None:
        self._remote = Folder(url)
        self._lease = Lease(self._remote)
        self._objects: dict[str, Entry] = {}
        self.url = self._remote.url
        key = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        # Apart for each host: homes may lie on one disk.
        self.path = cache.cache_dir() / "workdirs" / f"{key}-{hosts.index()}"
        show_as(self.path, self.url)

    def take(self, check: Callable[[Iterable[str]], None]) -> None:
        """Becomes the only writer, then makes the folder what the bucket has.

        Args:
          check: gets the names at the run's top and refuses what is no run, before it is fetched.

        Raises:
          InputError: another process is writing there, or ``check`` refused.
        """
        names = _top(self._remote.entries())
        check(names)
        self._lease.take()
        try:
            self.pull()
        except BaseException:
            self._lease.release()
            raise

    def pull(self) -> None:
        """Makes the folder what the bucket has."""
        self._objects = {
            name: entry for name, entry in self._remote.entries().items() if _is_kept(name)
        }
        steps = {_step(name) for name in self._objects if name.endswith(f"/{_MANIFEST}")}
        wanted = {
            name: entry
            for name, entry in self._objects.items()
            if (step := _step(name)) is None or step in steps
        }
        self.path.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.path.rglob("*"), reverse=True):
            name = path.relative_to(self.path).as_posix()
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()
            elif name in wanted and hash_content(path) == wanted[name].md5:
                del wanted[name]
            else:
                path.unlink()
        self._remote.fetch_all(wanted, self.path)
        self._remote.patience = PATIENCE

    def fetch(self, step: int) -> None:
        """Brings a checkpoint here that another host has put into the bucket."""
        name = f"checkpoints/{step}"
        folder = Folder(self._remote.locate(name))
        folder.fetch_all(folder.entries(), self.path / name)

    def publish(self, step: int, kept: Sequence[int]) -> None:
        """Puts a checkpoint of the folder into the bucket, and what goes before it.

        Args:
          step: the checkpoint.
          kept: the steps that stay; all others are removed.

        Raises:
          RunError: the bucket cannot be reached, or another run has taken it.
          InputError: no permission.
        """
        self._lease.check()
        self._publish_files()
        prefix = f"checkpoints/{step}/"
        manifest = prefix + _MANIFEST
        files = {
            prefix + path.relative_to(self.path / prefix).as_posix(): path
            for path in (self.path / prefix).rglob("*")
            if path.is_file()
        }
        seal = files.pop(manifest)
        changed = {
            name: path for name, path in files.items() if not self._has(name, hash_content(path))
        }
        surplus = self._below(prefix) - files.keys() - {manifest}
        if changed or surplus:
            self._remove([manifest] if manifest in self._objects else [])
            self._remove(surplus)
            self._objects |= self._remote.write_all(changed)
        if not self._has(manifest, hash_content(seal)):
            self._lease.check()
            known = self._objects.get(manifest)
            try:
                self._objects[manifest] = self._remote.write(
                    manifest, seal, generation=known.generation if known else 0
                )
            except Conflict as error:
                raise RunError(
                    self._remote.locate(manifest), "was written by another program", "end it"
                ) from error
        for other in {_step(name) for name in self._objects} - {None, *kept}:
            self._remove(self._below(f"checkpoints/{other}/{_MANIFEST}"))  # first it is no step
            self._remove(self._below(f"checkpoints/{other}/"))

    def close(self, *, failed: bool) -> None:
        """Puts the small files into the bucket and lets others write there.

        Args:
          failed: whether the run ends with an error, beside which none of these is raised.
        """
        try:
            if hosts.is_leader():
                self._lease.check()
                self._publish_files()
        except (InputError, RunError) as error:
            if not failed:
                raise
            logger.warning("the last metrics are not in the bucket: %s", error)
        finally:
            self._lease.release()
        if not failed:
            shutil.rmtree(self.path, ignore_errors=True)

    def _publish_files(self) -> None:
        """Small files that have changed: ``config.json`` first, ``result.json`` last."""
        names = [
            path.relative_to(self.path).as_posix()
            for path in self.path.rglob("*")
            if path.is_file()
        ]
        kept = [name for name in names if _is_kept(name) and _step(name) is None]
        for name in sorted(kept, key=lambda n: (n != "config.json", n == "result.json", n)):
            content = (self.path / name).read_bytes()
            if name.endswith(".jsonl"):  # a line may be on its way
                content = content[: content.rfind(b"\n") + 1]
            if not self._has(name, hash_content(content)):
                self._objects[name] = self._remote.write(name, content)

    def _has(self, name: str, md5: str) -> bool:
        return name in self._objects and self._objects[name].md5 == md5

    def _below(self, prefix: str) -> set[str]:
        return {name for name in self._objects if name.startswith(prefix)}

    def _remove(self, names: Iterable[str]) -> None:
        names = list(names)
        self._remote.remove(names)
        for name in names:
            del self._objects[name]


def local_run(workdir: str | Path, *, checkpoint: bool = True) -> Path:
    """The folder of a run, for reading: itself, or a copy of one that lies in a bucket.

    Args:
      workdir: a run's folder, or its ``gs://BUCKET/PATH``.
      checkpoint: whether its best checkpoint is needed, the only one in the copy.

    Raises:
      InputError: there is nothing, or it may not be read.
      RunError: the bucket cannot be reached.
    """
    if not is_url(workdir):
        return Path(workdir)
    folder = Folder(str(workdir))
    for attempt in range(_ATTEMPTS):
        entries = {name: one for name, one in folder.entries().items() if _is_kept(name)}
        if not {"config.json", "metrics.jsonl", "result.json"} & entries.keys():
            raise InputError(folder.url, "there is no run", "give the --workdir of a run")
        try:
            best = _find_best(folder, entries) if checkpoint else None
            wanted = {n: one for n, one in entries.items() if _step(n) in (None, best)}
            return copy_entries(folder, wanted)
        except InputError:  # the run has removed a checkpoint meanwhile
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError


def _find_best(folder: Folder, entries: dict[str, Entry]) -> int | None:
    from pref_jax.training.checkpoints import Checkpoints

    manifests = {
        name: one
        for name, one in entries.items()
        if _step(name) is not None and name == f"checkpoints/{_step(name)}/{_MANIFEST}"
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder.fetch_all(manifests, Path(scratch))
        return Checkpoints(f"{scratch}/checkpoints", keep=1, read_only=True).best_step()


def _step(name: str) -> int | None:
    """The step whose checkpoint an object belongs to."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def _is_kept(name: str) -> bool:
    parts = PurePosixPath(name).parts
    if any(part.startswith(".") for part in parts):
        return False
    return parts[0] not in _NOT_KEPT or _step(name) is not None


def _top(names: Iterable[str]) -> list[str]:
    return sorted({name.partition("/")[0] for name in names})
