"""The packages that scoring needs, as wheels for a stated Python and platform, with their hashes.

The versions are those of constraints.txt. Dependencies are followed from the wheels' own metadata
with the markers of the machine that will install them, which pip's resolver takes from the machine
it runs on.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from packaging.markers import default_environment
from packaging.metadata import Metadata
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename

from pref_jax.errors import InputError, RunError

PYTHONS = ("3.11", "3.12", "3.13")
ACCELERATORS = ("cpu", "cuda12", "tpu")
REQUIREMENTS = "requirements.txt"
# What scoring imports of the project's requirements. TensorFlow, Orbax, scikit-learn, matplotlib
# and what else trains, reports or annotates stays away.
SCORING = (
    *("absl-py", "flax", "jax", "jaxtyping", "ml-collections", "numpy"),
    *("pyarrow", "safetensors", "tokenizers", "tqdm"),
)
# Named by the metadata of the above, and not imported: flax's own checkpoints, and the hub.
_LEFT_OUT = ("orbax-checkpoint", "tensorstore", "huggingface-hub")
_PLATFORM = re.compile(r"manylinux_2_(\d+)_(x86_64|aarch64)")


@dataclass(frozen=True)
class Target:
    """The machine that installs: ``python`` as "3.11", ``platform`` as "manylinux_2_31_x86_64"."""

    python: str
    platform: str
    accelerator: str

    @property
    def machine(self) -> str:
        return "aarch64" if self.platform.endswith("aarch64") else "x86_64"

    @property
    def platforms(self) -> list[str]:
        """Every platform tag that runs there: those of the same and of older C libraries."""
        match = _PLATFORM.fullmatch(self.platform)
        if match is None:
            raise InputError(
                f"--platform={self.platform}",
                "no such platform is known",
                "give one such as manylinux_2_31_x86_64",
            )
        tags = [f"manylinux_2_{minor}_{match[2]}" for minor in range(int(match[1]), 4, -1)]
        old = {"manylinux2014": 17, "manylinux2010": 12, "manylinux1": 5}
        return tags + [f"{tag}_{match[2]}" for tag, minor in old.items() if minor <= int(match[1])]

    @property
    def environment(self) -> dict[str, str]:
        """For the markers of requirements."""
        own = {name: str(value) for name, value in default_environment().items()}
        return own | {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "platform_python_implementation": "CPython",
            "platform_machine": self.machine,
            "platform_system": "Linux",
            "sys_platform": "linux",
            "os_name": "posix",
        }


def read_requirements(lines: Iterable[str], target: Target) -> list[Requirement]:
    """The requirements that hold on the target, of lines as in constraints.txt."""
    found = []
    for line in lines:
        text = line.split("#")[0].strip()
        if text:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate(
                {**target.environment, "extra": ""}
            ):
                found.append(requirement)
    return found


def collect_wheels(
    folder: Path,
    names: Sequence[str],
    target: Target,
    repository: Path,
    left_out: Sequence[str] = _LEFT_OUT,
) -> Path:
    """Fills ``folder`` with the wheels of ``names``, all they need, and the project's own.

    Args:
      folder: is there and empty.
      names: of packages, as pip takes them.
      target: what they are for.
      repository: the project's folder: constraints.txt and what its own wheel is made from.
      left_out: packages that others name as theirs and that nothing here imports.

    Returns:
      `REQUIREMENTS`, beside the folder: every wheel with its hash, for ``pip install
      --require-hashes``.

    Raises:
      InputError: no such platform, no network, or no wheel for that Python and platform.
      RunError: pip failed otherwise.
    """
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        canonicalize_name(requirement.name): requirement.specifier
        for requirement in read_requirements(lines, target)
    }
    skipped = {canonicalize_name(name) for name in left_out}
    todo = [Requirement(name) for name in names]
    if target.accelerator != "cpu":
        todo.append(Requirement(f"jax[{target.accelerator}]"))
    build_wheel(folder, repository)
    done: dict[str, set[str]] = {}  # name -> extras followed so far
    while todo:
        missing: dict[str, SpecifierSet] = {}
        for requirement in todo:
            name = canonicalize_name(requirement.name)
            if name not in done:
                allowed = pins.get(name, requirement.specifier)
                missing[name] = missing.get(name, SpecifierSet()) & allowed
        if missing:
            _download(folder, [f"{name}{allowed}" for name, allowed in missing.items()], target)
        wheels = {parse_wheel_filename(path.name)[0]: path for path in folder.glob("*.whl")}
        following: list[Requirement] = []
        for requirement in todo:
            name = canonicalize_name(requirement.name)
            extras = {"", *requirement.extras} - done.get(name, set())
            done[name] = done.get(name, set()) | extras
            following += _dependencies(wheels[name], extras, target) if extras else []
        # Not the project itself, which stands in `folder` from the start.
        todo = [part for part in following if canonicalize_name(part.name) not in skipped]
        todo = [part for part in todo if not _is_done(part, done)]
    return write_requirements(folder, target)


def _is_done(requirement: Requirement, done: dict[str, set[str]]) -> bool:
    seen = done.get(canonicalize_name(requirement.name))
    return seen is not None and {"", *requirement.extras} <= seen


def _dependencies(wheel: Path, extras: set[str], target: Target) -> list[Requirement]:
    """What a wheel's metadata names for these extras ("" is none) on the target."""
    metadata = _read_metadata(wheel)
    found = []
    for requirement in metadata.requires_dist or ():
        marker = requirement.marker
        if any(
            marker is None or marker.evaluate({**target.environment, "extra": extra})
            for extra in extras
        ):
            found.append(requirement)
    return found


def _read_metadata(wheel: Path) -> Metadata:
    try:
        with ZipFile(wheel) as archive:
            name = next(
                name
                for name in archive.namelist()
                if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)
            )
            return Metadata.from_email(archive.read(name), validate=False)
    except (BadZipFile, StopIteration, InvalidRequirement) as error:
        raise RunError(str(wheel), f"is not a whole wheel ({error})", "type it again") from error


def write_requirements(folder: Path, target: Target) -> Path:
    """Writes `REQUIREMENTS` beside a folder of wheels.

    Raises:
      RunError: a wheel is not for the target.
    """
    lines = [f"# For Python {target.python} on {target.platform} ({target.accelerator})."]
    tag = f"cp{target.python.replace('.', '')}"
    for path in sorted(folder.glob("*.whl")):
        name, version, _, tags = parse_wheel_filename(path.name)
        if not any(
            part.interpreter in (tag, f"py{target.python.replace('.', '')}", "py3", "py2.py3")
            or part.abi == "abi3"
            for part in tags
        ):
            raise RunError(str(path), f"is no wheel for Python {target.python}", "type it again")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{name}=={version} --hash=sha256:{digest}")
    path = folder.parent / REQUIREMENTS
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def build_wheel(folder: Path, repository: Path) -> None:
    """Puts the project's own wheel into ``folder``; the repository stays as it is.

    Raises:
      InputError: the project's files or the tools to build it are not there.
      RunError: building it failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
            if not (repository / name).is_file():
                raise InputError(
                    str(repository / name), "is missing", "type the command in the repository"
                )
            shutil.copyfile(repository / name, copy / name)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(repository / "pref_jax", copy / "pref_jax", ignore=ignored)
        _pip("wheel", "--no-deps", f"--wheel-dir={folder}", str(copy))


def _download(folder: Path, requirements: Sequence[str], target: Target) -> None:
    _pip(
        *("download", "--no-deps", "--only-binary=:all:", f"--dest={folder}"),
        *("--implementation=cp", f"--python-version={target.python}"),
        *(f"--abi={abi}" for abi in (f"cp{target.python.replace('.', '')}", "abi3", "none")),
        *(f"--platform={platform}" for platform in target.platforms),
        *requirements,
    )


def _pip(*arguments: str) -> None:
    command = [*_find_pip(), *arguments, "--disable-pip-version-check", "--quiet", "--retries=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    said = [line for line in done.stderr.splitlines() if line.strip()]
    reason = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "?")
    if "No matching distribution" in done.stderr and "NewConnectionError" not in done.stderr:
        wanted = next(line for line in said if "No matching distribution" in line)
        raise InputError(
            "--python, --platform",
            wanted.removeprefix("ERROR: "),
            "name a Python and a platform that constraints.txt has wheels for",
        )
    raise RunError(
        f"pip {arguments[0]}",
        f"the wheels cannot be had ({reason.removeprefix('ERROR: ')})",
        "check the network and type it again",
    )


def _find_pip() -> list[str]:
    """The environment's own pip; where uv made it without one, uv's."""
    probe = [sys.executable, "-m", "pip", "--version"]
    if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
        return probe[:-1]
    if (uv := shutil.which("uv")) is not None:
        return [uv, "run", "--quiet", "--no-project", "--with=pip", "python", "-m", "pip"]
    raise InputError(
        "pip", "this environment has none to fetch wheels with", f"{sys.executable} -m ensurepip"
    )
