"""The wheels of a bundle: all that is needed on the machine that installs them, and no more."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pref_jax.errors import InputError, RunError
from pref_jax.kaggle import wheels
from pref_jax.kaggle.training import read_packages
from pref_jax.kaggle.wheels import Target

INDEX = {
    "one": ['two>=1; python_version >= "3.12"', 'three[fast]; sys_platform == "linux"', "hub"],
    "two": [],
    "three": ['four; extra == "fast"', 'five; extra == "slow"', 'one; platform_system == "Linux"'],
    "four": ['six; sys_platform == "win32"'],
    "five": [],
    "hub": [],
}
PINS = 'one==1.0\ntwo==1.0; python_version == "3.11"\ntwo==2.0; python_version == "3.12"\n'


def write_wheel(folder: Path, name: str, version: str, needs: list[str], tag: str) -> None:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {part}" for part in needs] + ["Provides-Extra: fast"]
    with ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")


@pytest.fixture
def made_up_index(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An index of wheels that nobody has to download; what was asked for."""
    asked: list[str] = []

    def download(folder: Path, requirements: list[str], target: Target) -> None:
        for text in requirements:
            requirement = Requirement(text)
            asked.append(text)
            version = re.sub("[^0-9.]", "", str(requirement.specifier)) or "7.0"
            write_wheel(folder, requirement.name, version, INDEX[requirement.name], "py3-none-any")

    monkeypatch.setattr(wheels, "_download", download)
    monkeypatch.setattr(wheels, "build_wheel", lambda folder, repository: None)
    return asked


@pytest.mark.parametrize(
    ("python", "expected"),
    [
        ("3.11", {"one==1.0", "three==7.0", "four==7.0"}),
        ("3.12", {"one==1.0", "two==2.0", "three==7.0", "four==7.0"}),
    ],
)
def test_follows_dependencies_of_the_target(
    made_up_index: list[str], tmp_path: Path, python: str, expected: set[str]
) -> None:
    (tmp_path / "constraints.txt").write_text(PINS)
    folder = tmp_path / "bundle" / "wheels"
    folder.mkdir(parents=True)
    target = Target(python, "manylinux_2_31_x86_64", "cpu")
    path = wheels.collect_wheels(folder, ["one"], target, tmp_path, ["hub"])
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert {line.split()[0] for line in lines} == expected
    for line in lines:
        name, digest = line.split(" --hash=sha256:")
        wheel = next(folder.glob(f"{name.split('==')[0]}-*"))
        assert hashlib.sha256(wheel.read_bytes()).hexdigest() == digest
    assert len(made_up_index) == len(expected)  # none twice


def test_a_wheel_for_another_python_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    write_wheel(tmp_path / "wheels", "one", "1.0", [], "cp312-cp312-manylinux_2_17_x86_64")
    wheels.write_requirements(tmp_path / "wheels", Target("3.12", "manylinux_2_31_x86_64", "cpu"))
    with pytest.raises(RunError, match=r"no wheel for Python 3\.11"):
        wheels.write_requirements(
            tmp_path / "wheels", Target("3.11", "manylinux_2_31_x86_64", "cpu")
        )


def test_platforms_are_those_of_older_libraries() -> None:
    tags = Target("3.11", "manylinux_2_28_x86_64", "cpu").platforms
    assert "manylinux_2_28_x86_64" in tags and "manylinux2014_x86_64" in tags
    assert "manylinux_2_29_x86_64" not in tags
    with pytest.raises(InputError, match="platform"):
        _ = Target("3.11", "win_amd64", "cpu").platforms


def test_scoring_takes_packages_of_the_project(repository: Path) -> None:
    required = {canonicalize_name(Requirement(line).name) for line in read_packages(repository)}
    assert {*wheels.SCORING, "gguf", "packaging"} <= required


def test_without_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises((RunError, InputError)) as caught:
        wheels._download(
            tmp_path, ["absl-py==2.5.1"], Target("3.11", "manylinux_2_31_x86_64", "cpu")
        )
    assert "network" in str(caught.value) and "\n" not in str(caught.value)
