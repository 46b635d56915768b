"""Files in a bucket, beside a stand-in of Google Cloud Storage that also fails."""

from __future__ import annotations

import builtins
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rig import TEXTS, make_rows, write_csv

pytest.importorskip("google.cloud.storage", reason="needs pip install pref_jax[gcs]")

from storage import Storage, standing_in

from pref_jax import bucket, cache
from pref_jax.annotation.properties import DEFAULT_FILE, load_properties
from pref_jax.annotation.ratings import read_ratings
from pref_jax.bucket import Conflict, Folder, fetch_file, fetch_folder
from pref_jax.data.arena import read_comparisons
from pref_jax.errors import InputError, RunError
from pref_jax.weights.sources import resolve_source


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(bucket, "PATIENCE", 2.0)
    with standing_in(monkeypatch) as storage:
        yield storage


def fails_twice(storage: Storage, fault: int | str) -> None:
    left = itertools.count()
    storage.fault = lambda method, name: fault if next(left) < 2 else None


def test_a_file_is_fetched_once_for_each_generation(storage: Storage) -> None:
    storage.put("gs://b/d/x.csv", b"one")
    path = fetch_file("gs://b/d/x.csv")
    assert path.endswith("/x.csv") and Path(path).read_bytes() == b"one"
    assert fetch_file("gs://b/d/x.csv") == path
    downloads = [name for method, name in storage.requests if method == "GET"]
    assert len(downloads) == 3  # found, read, found
    storage.put("gs://b/d/x.csv", b"two")
    assert Path(fetch_file("gs://b/d/x.csv")).read_bytes() == b"two"
    assert fetch_file("d/x.csv") == "d/x.csv"


def test_a_folder_is_fetched_with_what_is_wanted(storage: Storage) -> None:
    names = [f"part-{number:02}.txt" for number in range(20)]  # lists have several pages
    for name in (*names, "deep/config.json", "model.bin"):
        storage.put(f"gs://b/m/{name}", name.encode())
    folder = fetch_folder("gs://b/m/", lambda name: name != "model.bin")
    found = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.*")}
    assert found == {name: name for name in (*names, "deep/config.json")}


@pytest.mark.parametrize("fault", [503, 429, "cut", "lost"])
def test_what_passes_is_tried_again(storage: Storage, tmp_path: Path, fault: int | str) -> None:
    """Also the write whose answer was lost: it succeeded, and does not conflict with itself."""
    folder = Folder("gs://b/f")
    large = tmp_path / "large"
    large.write_bytes(os.urandom(9 << 20))  # more than goes into one request
    attempts: list[Callable[[], Any]] = [
        lambda: folder.write("large", large, generation=0),
        lambda: folder.fetch("large", folder.entries()["large"], tmp_path / "again"),
        lambda: folder.write("small", b"x", generation=0),
        lambda: folder.entries(),
        lambda: folder.remove(["small"]),
    ]
    for attempt in attempts:
        fails_twice(storage, fault)
        attempt()
    assert (tmp_path / "again").read_bytes() == large.read_bytes()
    assert storage.names("gs://b/f") == ["large"]


@pytest.mark.parametrize("fault", [503, "cut", "lost", "off"])
def test_a_bucket_out_of_reach_is_one_line(storage: Storage, tmp_path: Path, fault: Any) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(9 << 20))
    storage.put("gs://b/f/x", b"some content")
    folder = Folder("gs://b/f")
    if fault == "off":
        storage.close()
    storage.fault = lambda method, name: fault
    for attempt in (
        lambda: folder.read("x"),
        lambda: folder.write("large", large),
        lambda: folder.entries(),
    ):
        with pytest.raises(RunError, match=r"^gs://b/f.* could not be reached for 2 s"):
            attempt()


def test_no_permission_is_one_line(storage: Storage) -> None:
    storage.fault = lambda method, name: 403
    folder = Folder("gs://b/f")
    for attempt in (
        lambda: folder.read("x"),
        lambda: folder.write("x", b""),
        lambda: folder.entries(),
        lambda: fetch_file("gs://b/f/x"),
    ):
        with pytest.raises(InputError, match=r"no permission \(no access for stand-in@exa"):
            attempt()
    assert len(storage.requests) == 4  # nothing of it was tried again


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("gs://b/none.csv", "gs://b/none.csv: there is no such bucket or object"),
        ("gs://nobody/x.csv", "gs://nobody/x.csv: there is no such bucket or object"),
        ("gs://b", "is a bucket or a folder"),
        ("gs://b/folder/", "is a bucket or a folder"),
        ("gs://-b-/x.csv", "is no place in a bucket"),
        ("gs://", "is a bucket or a folder"),
    ],
)
def test_wrong_places_are_one_line(storage: Storage, url: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_comparisons(url)
    assert said in str(caught.value)


def test_a_wrong_row_is_named_by_its_url(storage: Storage, tmp_path: Path) -> None:
    rows = write_csv(tmp_path / "x.csv", make_rows(r3={"prompt": "[1]"}), labels=True)
    storage.put("gs://b/x.csv", rows.read_bytes())
    with pytest.raises(InputError, match=r"^gs://b/x.csv:4: "):
        read_comparisons("gs://b/x.csv")
    good = write_csv(tmp_path / "x.csv", make_rows(), labels=True)
    storage.put("gs://b/x.csv", good.read_bytes())
    comparisons = read_comparisons("gs://b/x.csv")
    assert comparisons.path == "gs://b/x.csv" and len(comparisons) == 6
    assert comparisons.digest == read_comparisons(good).digest
    assert set(comparisons.table.column_names) >= {"id", *TEXTS}


def test_a_write_sees_that_another_was_before(storage: Storage) -> None:
    folder = Folder("gs://b")
    first = folder.write("x", b"1", generation=0)
    with pytest.raises(Conflict):
        folder.write("x", b"2", generation=0)
    second = folder.write("x", b"2", generation=first.generation)
    with pytest.raises(Conflict):
        folder.remove(["x"], generation=first.generation)
    assert storage.get("gs://b/x") == b"2"
    folder.remove(["x"], generation=second.generation)
    assert folder.find("x") is None


def test_names_do_not_lead_out_of_the_folder(storage: Storage, tmp_path: Path) -> None:
    storage.put("gs://b/m/../../evil", b"x")
    with pytest.raises(InputError, match="leads out of its folder"):
        fetch_folder("gs://b/m")


def test_without_the_library_it_says_what_to_type(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def fail(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("google.cloud"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(InputError, match=r"pip install google-cloud-storage -c constraints"):
        fetch_file("gs://b/x.csv")


def test_weights_and_ratings_come_from_a_bucket_too(storage: Storage) -> None:
    for name in ("config.json", "model.safetensors", "vocab.txt", "pytorch_model.bin", "run.py"):
        storage.put(f"gs://b/weights/{name}", name.encode())
    storage.put("gs://b/small.gguf", b"GGUF")
    folder = resolve_source("gs://b/weights")
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "vocab.txt"]
    assert resolve_source("gs://b/small.gguf").read_bytes() == b"GGUF"
    storage.put("gs://b/set.toml", DEFAULT_FILE.read_bytes())
    properties = load_properties("gs://b/set.toml")
    assert properties == load_properties()
    storage.put("gs://b/r.jsonl", b'{"id": "1", "side": "c", "ratings": {}}\n')
    with pytest.raises(InputError, match=r"^gs://b/r.jsonl:1: its side is 'c'"):
        read_ratings("gs://b/r.jsonl", properties)
