"""Google Cloud Storage: files and folders named ``gs://BUCKET/PATH``, read and written whole.

The credentials are the machine's own: a TPU VM's service account, or what ``gcloud auth
application-default login`` left. A request that fails in a way that may pass is repeated for at
most so many seconds; all else is one line.

This module imports nothing heavy: Google's library is loaded where a place is in a bucket.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from pref_jax import cache
from pref_jax.errors import InputError, RunError, show_as

SCHEME = "gs://"
PATIENCE = 30.0  # seconds that a request is tried again
_REQUEST = (5.0, 30.0)  # seconds to connect, and between two bytes of an answer
_THREADS = 8  # files in flight
_MOST_OBJECTS = 10_000  # of a folder; a run or a model has a few dozen


class Conflict(Exception):
    """An object is not, or no longer, of the generation that the writer has seen."""


@dataclass(frozen=True)
class Entry:
    """What a bucket knows of one object.

    Attributes:
      md5: hex digest of its bytes.
      generation: another number after each write.
      updated: time of the last write, by the bucket's clock.
    """

    size: int
    md5: str
    generation: int
    updated: datetime


def is_url(place: object) -> bool:
    """Whether a place lies in a bucket."""
    return str(place).startswith(SCHEME)


class Folder:
    """What lies below one URL.

    Args:
      url: ``gs://BUCKET/PATH``; of a single file, the folder that holds it.

    Attributes:
      patience: seconds that a request is tried again.

    Raises:
      InputError: the URL names no bucket, Google's library is not installed, or there are no
        credentials.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.patience = PATIENCE
        name, _, path = self.url.removeprefix(SCHEME).partition("/")
        if not name or "//" in path:
            raise InputError(url, "is no place in a bucket", "the form is gs://BUCKET/PATH")
        self._prefix = f"{path}/" if path else ""
        with self._explained(""):
            self._client = _connect(url)
            self._bucket = self._client.bucket(name)

    def locate(self, name: str) -> str:
        """The URL of a name below this folder."""
        return f"{self.url}/{name}" if name else self.url

    def entries(self) -> dict[str, Entry]:
        """All objects below, by their names from here on.

        Raises:
          InputError: there are far more than a run or a model has.
        """
        found: dict[str, Entry] = {}
        with self._explained(""):
            for blob in self._client.list_blobs(
                self._bucket, prefix=self._prefix, retry=self._retry(), timeout=_REQUEST
            ):
                name = blob.name.removeprefix(self._prefix)
                if name and not name.endswith("/"):  # consoles mark folders by such objects
                    found[name] = _describe(blob)
                if len(found) > _MOST_OBJECTS:
                    raise InputError(
                        self.url, f"holds more than {_MOST_OBJECTS:,} objects", "name one folder"
                    )
        return found

    def find(self, name: str) -> Entry | None:
        """One object; None where there is none."""
        with self._explained(name):
            blob = self._bucket.get_blob(self._prefix + name, retry=self._retry(), timeout=_REQUEST)
        if blob is None:
            return None
        return _describe(blob)

    def read(self, name: str) -> bytes:
        """The bytes of an object, compared with their hash."""
        with self._explained(name):
            return self._blob(name).download_as_bytes(
                retry=self._retry(), timeout=_REQUEST, checksum="md5"
            )

    def fetch(self, name: str, entry: Entry, target: Path) -> None:
        """Writes the bytes of one generation of an object to a file, compared with their hash."""
        with self._explained(name):
            self._blob(name, entry.generation).download_to_filename(
                str(target), retry=self._retry(), timeout=_REQUEST, checksum="md5"
            )

    def fetch_all(self, entries: Mapping[str, Entry], folder: Path) -> None:
        """Writes objects to the files of the same names below ``folder``, several at a time."""

        for name in entries:
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise InputError(self.locate(name), "leads out of its folder", "rename it")

        def fetch(name: str) -> None:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self.fetch(name, entries[name], target)

        _together(fetch, entries)

    def write(
        self,
        name: str,
        content: bytes | Path,
        *,
        generation: int | None = None,
    ) -> Entry:
        """Replaces an object in one step.

        Args:
          content: its bytes, or the file that holds them.
          generation: what the object has to be at this moment, 0 where it must not be there; None:
            whatever it is.

        Raises:
          Conflict: the object is of another generation.
        """
        from google.api_core.exceptions import PreconditionFailed

        blob = self._blob(name)
        common = {
            "if_generation_match": generation,
            "retry": self._retry(),
            "timeout": _REQUEST,
            "checksum": "md5",
        }
        with self._explained(name):
            try:
                if isinstance(content, Path):
                    blob.upload_from_filename(str(content), **common)
                else:
                    blob.upload_from_string(content, "application/octet-stream", **common)
                return _describe(blob)
            except PreconditionFailed:
                # Perhaps the first attempt was taken and its answer lost.
                present = self.find(name)
                if present is not None and present.md5 == hash_content(content):
                    return present
                raise Conflict(self.locate(name)) from None

    def write_all(self, files: Mapping[str, Path]) -> dict[str, Entry]:
        """`write` of several files, several at a time."""
        return dict(
            zip(files, _together(lambda name: self.write(name, files[name]), files), strict=True)
        )

    def remove(self, names: Iterable[str], *, generation: int | None = None) -> None:
        """Deletes objects, also such that are not there.

        Raises:
          Conflict: an object is of another generation.
        """
        from google.api_core.exceptions import NotFound, PreconditionFailed

        def remove(name: str) -> None:
            with self._explained(name), contextlib.suppress(NotFound):
                try:
                    self._blob(name).delete(
                        if_generation_match=generation, retry=self._retry(), timeout=_REQUEST
                    )
                except PreconditionFailed:
                    raise Conflict(self.locate(name)) from None

        _together(remove, names)

    def _blob(self, name: str, generation: int | None = None) -> Any:
        return self._bucket.blob(self._prefix + name, generation=generation)

    def _retry(self) -> Any:
        from google.cloud.storage.retry import DEFAULT_RETRY

        return DEFAULT_RETRY.with_delay(initial=0.25, maximum=4.0).with_timeout(self.patience)

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except (InputError, RunError, Conflict):
            raise
        except Exception as error:
            line = _explain(self.locate(name), error, self.patience)
            if line is None:
                raise
            raise line from error


def fetch_file(place: str | os.PathLike[str]) -> str:
    """The local path of a file: itself, or the copy of one that lies in a bucket.

    The copy is kept in the cache under the object's generation, so it is fetched once; messages
    name the object.

    Raises:
      InputError: it is not there, or may not be read.
      RunError: the bucket cannot be reached.
    """
    place = os.fspath(place)
    if not is_url(place):
        return place
    parent, _, name = place.rpartition("/")
    if not parent.removeprefix("gs:").strip("/") or not name:
        raise InputError(place, "is a bucket or a folder", "name one file in it")
    folder = Folder(parent)
    entry = folder.find(name)
    if entry is None:
        raise InputError(place, "there is no such bucket or object", "check how it is written")
    return str(_copy(folder, {name: entry}) / name)


def fetch_folder(place: str, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """The local copy of a folder in a bucket, as it is now; `fetch_file` says more.

    Args:
      wanted: says of a name below the folder whether it is needed.

    Raises:
      InputError: nothing wanted is there.
    """
    folder = Folder(place)
    entries = {name: entry for name, entry in folder.entries().items() if wanted(name)}
    if not entries:
        raise InputError(place, "there is no such folder", "check how it is written")
    return copy_entries(folder, entries)


def copy_entries(folder: Folder, entries: Mapping[str, Entry]) -> Path:
    """A local folder that holds exactly these objects of ``folder``, and has its name."""
    return _copy(folder, entries, PurePosixPath(folder.url).name)


def _copy(folder: Folder, entries: Mapping[str, Entry], below: str = "") -> Path:
    lines = [folder.url, *sorted(f"{name} {one.generation}" for name, one in entries.items())]
    key = hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def make(path: Path) -> None:
        show_as(path / below, folder.url)
        (path / below).mkdir(parents=True)
        folder.fetch_all(entries, path / below)

    path = cache.entry("bucket", key, make) / below
    show_as(path, folder.url)
    return path


def hash_content(content: bytes | Path) -> str:
    """MD5, the hash that a bucket keeps of an object."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _together(work: Callable[[str], Any], names: Iterable[str]) -> list[Any]:
    """``work`` of each name, several at a time; a failure is raised after all have ended."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, names))


def _describe(blob: Any) -> Entry:
    # Objects put together from parts on the server have no MD5; none of ours is.
    md5 = base64.b64decode(blob.md5_hash).hex() if blob.md5_hash else f"none-{uuid.uuid4().hex}"
    return Entry(int(blob.size), md5, int(blob.generation), blob.updated)


def _connect(url: str) -> Any:
    try:
        from google.cloud import storage
    except ImportError:
        raise InputError(
            url,
            "reading buckets needs a package that is not installed",
            "type .venv/bin/pip install google-cloud-storage -c constraints.txt",
        ) from None
    # Else it asks for the bucket's own description, in a thread and for traces that nobody reads.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    # A project is asked for and plays no part in reading and writing objects.
    return storage.Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT", "none"))


def _explain(url: str, error: Exception, patience: float) -> InputError | RunError | None:
    """The one line of what Google's library raises; None for anything else."""
    import requests
    from google.api_core import exceptions as api
    from google.auth import exceptions as auth
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    if isinstance(error, auth.DefaultCredentialsError | auth.RefreshError):
        return InputError(
            url,
            "no credentials for Google Cloud were found here",
            "type gcloud auth application-default login, or give the VM a service account",
        )
    code = getattr(error, "code", None)
    if isinstance(error, InvalidResponse):
        code = error.response.status_code
    if isinstance(error, ValueError):  # a name that no bucket can have
        return InputError(url, f"is no place in a bucket ({error})", "check how it is written")
    reason = _shorten_reason(error)
    if code in (401, 403):
        return InputError(
            url,
            f"no permission ({reason})",
            "give the account the role Storage Object User on the bucket",
        )
    if code == 404:
        return InputError(url, "there is no such bucket or object", "check how it is written")
    if code in (400, 416):
        return InputError(url, f"was refused ({reason})", "check how it is written")
    passing: tuple[type[Exception], ...] = (
        api.RetryError,
        api.GoogleAPICallError,
        auth.TransportError,
        requests.RequestException,
        InvalidResponse,
        DataCorruption,
        ConnectionError,
    )
    if isinstance(error, passing):
        cause = error.__cause__ or error
        reason = type(cause).__name__ if isinstance(error, api.RetryError) else reason
        return RunError(
            url,
            f"the bucket could not be reached for {patience:g} s ({reason})",
            "look at the network, then type the same command again",
        )
    return None


def _shorten_reason(error: Exception) -> str:
    """What the server says, without the request that the library puts before it."""
    text = " ".join(str(getattr(error, "message", None) or error).split())
    said = re.search(r'"message": "(.+?)"', text) or re.search(r"https?://\S+: (.+)", text)
    text = said[1] if said else text
    return text if len(text) <= 200 else f"{text[:200]}..."
