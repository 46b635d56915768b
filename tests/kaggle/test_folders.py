"""Only what an earlier call wrote is replaced; what is refused takes one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rig import REPOSITORY, call

from pref_jax import command
from pref_jax.errors import InputError
from pref_jax.kaggle import bundle, training
from pref_jax.kaggle.folders import replaced_folder
from pref_jax.kaggle.manifest import read_manifest, write_manifest

MODEL = {"name": "a", "cost": 1.0, "symmetric": False}
ABOUT = {"models": [MODEL], "swap_average": False, "max_hours": 8.5}


def make_bundle(folder: Path) -> Path:
    (folder / "models" / "a").mkdir(parents=True)
    (folder / "models" / "a" / "config.json").write_text("{}")
    write_manifest(folder, ABOUT)
    return folder


def make_training(folder: Path) -> Path:
    (folder / "wheels").mkdir(parents=True)
    (folder / "wheels" / "one.whl").write_text("")
    (folder / training.FILE).write_text(json.dumps({"files": ["wheels/one.whl"]}))
    return folder


@pytest.mark.parametrize(
    ("make", "list_ours"),
    [(make_bundle, bundle._list_ours), (make_training, training._list_ours)],
)
def test_only_what_is_ours_is_replaced(
    tmp_path: Path, make: Callable[[Path], Path], list_ours: Callable[[Path], list[str]]
) -> None:
    folder = make(tmp_path / "bundle")
    (folder / "dataset-metadata.json").write_text("mine")
    with replaced_folder(str(folder), list_ours) as made:
        (made / "new.txt").write_text("new")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "new.txt": "new",
        "dataset-metadata.json": "mine",
    }

    for name, add in (
        ("notes.txt", lambda path: path.write_text("mine")),
        ("mine", lambda path: path.mkdir()),
        ("link", lambda path: path.symlink_to("gone")),
    ):
        folder = make(tmp_path / f"with {name}")
        add(folder / name)
        before = sorted(folder.rglob("*"))
        with (
            pytest.raises(InputError, match=f"it holds {name}, which is of no bundle"),
            replaced_folder(str(folder), list_ours),
        ):
            pass
        assert sorted(folder.rglob("*")) == before


def test_the_training_bundle_lists_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_wheel(folder: Path, repository: Path) -> None:
        (folder / "pref_jax-1-py3-none-any.whl").write_text("")

    monkeypatch.setattr(training, "build_wheel", build_wheel)
    output = tmp_path / "training"

    def build() -> Path:
        return training.build_training(
            *(str(output), REPOSITORY),
            accelerator="gpu",
            python="3.11",
            platform="manylinux_2_31_x86_64",
            wheels=False,
        )

    assert build() == build() == output  # replaces itself
    (output / "project" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"it holds project/mine\.txt"):
        build()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"models": []}, "models: there is none"),
        ({"models": None}, "models: it is not a list"),
        ({"models": ["a"]}, r"models\[0\].name: it is not a text"),
        ({"models": [{"name": "a", "symmetric": False}]}, r"models\[0\].cost: it is not a number"),
        ({"models": [MODEL, MODEL]}, "models: a name is there twice"),
        ({"models": [MODEL, MODEL | {"cost": "x"}]}, r"models\[1\].cost: it is not a number"),
        ({"models": [MODEL | {"cost": 10**400}]}, r"models\[0\].cost: it is not a number"),
        ({"models": [MODEL | {"base": 1}]}, r"models\[0\].base: it is not a text"),
        ({"max_hours": "abc"}, "max_hours: it is not a number"),
        ({"max_hours": float("nan")}, "max_hours: it is not a number"),
        ({"swap_average": 1}, "swap_average: it is not true or false"),
        ({"files": []}, "files: it is not an object"),
    ],
)
def test_an_edited_manifest_is_one_line(
    tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    folder = make_bundle(tmp_path / "bundle")
    path = folder / "manifest.json"
    assert read_manifest(folder)["models"] == [MODEL]
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=f"manifest.json: {expected}"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--workdir=", "--output=new"), "--workdir: a name is empty"),
        (("--workdir=runs/a,", "--output=new"), "--workdir: a name is empty"),
        (("--workdir=runs/a", "--output=new", "--max_hours=inf"), "--max_hours=inf: "),
        (("--workdir=runs/a", "--output=new", "--max_hours=nan"), "--max_hours=nan: "),
        (("--workdir=runs/a", "--output=gs://b/x"), "--output: only the runs of launch/train.py"),
        (("--train=gpu", "--output=gs://b/x"), "--output: only the runs of launch/train.py"),
        (("--train=gpu", "--workdir=runs/a", "--output=new"), "--workdir: it is of no use beside"),
        (("--train=gpu", "--max_hours=3", "--output=new"), "--max_hours: it is of no use beside"),
    ],
)
def test_bad_flags_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call("kaggle", *arguments)
    assert outcome.code == 2 and outcome.stderr.startswith(f"error: {expected}"), outcome
    assert outcome.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--started=nan", "--started=inf", "--max_hours=inf"])
def test_the_time_is_a_number(tmp_path: Path, flag: str) -> None:
    folder = make_bundle(tmp_path / "bundle")
    outcome = command.call(
        REPOSITORY / "pref_jax" / "kaggle" / "__main__.py",
        (f"--bundle={folder}", "--data=none.csv", f"--output={tmp_path}/out.csv", flag),
    )
    assert outcome.code == 2 and outcome.stderr.startswith(f"error: {flag}: "), outcome
    assert outcome.stderr.count("\n") == 1
