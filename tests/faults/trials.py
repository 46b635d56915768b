"""The commands that are harmed, and chains of processes that each die at another point."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from faults.launcher import Fault, lose_unsynced
from rig import REPOSITORY, UNSTEADY, read_arrays, read_lines, start

from pref_jax.cache import _digest

TRAIN = (
    f"--config={REPOSITORY}/configs/quickstart.py",
    "--config.model.pretrained=none",
    "--config.model.config.num_layers=1",
    "--config.model.config.hidden_size=16",
    "--config.model.config.num_heads=2",
    "--config.model.config.intermediate_size=32",
    "--config.input.max_length=32",
    "--config.input.layout=single",
    "--config.train.batch_size=8",
    "--config.train.microbatch_size=4",
    "--config.train.epochs=5",
    "--config.train.learning_rate=1e-3",
    "--config.train.max_steps=4",
    "--config.eval.every_steps=2",
    "--config.eval.calibrate=true",
    "--config.checkpoint.every_steps=2",
    "--config.checkpoint.keep=1",
    "--config.data.fold=0",
    "--config.logging.tensorboard=false",
)
STUDY = (
    "--scale=minilm",
    "--rows=60,20",
    "--set=*:model.pretrained=none",
    "--set=*:model.config.num_layers=3",
    "--set=*:model.config.hidden_size=8",
    "--set=*:model.config.num_heads=2",
    "--set=*:model.config.intermediate_size=16",
    "--set=*:input.max_length=32",
    "--set=*:input.tokenizer=tokenizers",
    "--set=*:train.max_steps=4",
    "--set=*:train.warmup_steps=1",
    "--set=*:train.batch_size=8",
    "--set=*:checkpoint.every_steps=2",
    "--set=*:eval.every_steps=2",
)
_SECONDS = 300.0  # after which a process hangs


@dataclasses.dataclass(frozen=True)
class Trial:
    """A command, the folder whose writes count, and what it comes to.

    Attributes:
      script: its name.
      arguments: given the folder.
      read: what the folder holds at the end, without what the clock decides.
      variables: of the environment, given the folder.
      ignored: pattern of points that do not count, see `Fault`.
      kept: of a folder, what may never go back: a number that grows with what is safe.
    """

    script: str
    arguments: Callable[[Path], Sequence[object]]
    read: Callable[[Path], Mapping[str, Any]]
    variables: Callable[[Path], Mapping[str, str]] = lambda folder: {}
    ignored: str | None = None
    kept: Callable[[Path], int] = lambda folder: 0


class Process:
    """One start of a trial's command, with a fault in it or none."""

    def __init__(self, trial: Trial, folder: Path, fault: Fault | None = None, **more: Any) -> None:
        self.log = folder.with_name(f"{folder.name}.log")
        self.log.write_text("")
        self.started = start(
            self.log,
            trial.script,
            *trial.arguments(folder),
            variables=trial.variables(folder),
            before=None if fault is None else fault.install,
            **more,
        )

    def end(self) -> int:
        """Waits; returns the exit code, negative for a signal."""
        self.started.join(_SECONDS)
        if self.started.exitcode is None:
            self.started.kill()
            raise AssertionError(f"it hangs: {self.said()}")
        return self.started.exitcode

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def check_one_line(self, *codes: int) -> str:
        """The one line it ended with, checked to be one, with one of the exit codes."""
        code, said = self.end(), self.said()
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code in codes, (code, said)
        assert len(errors) == 1 and "Traceback" not in said, said
        assert said.splitlines()[-1] == errors[0], said
        where, _, rest = errors[0].removeprefix("error: ").partition(": ")
        assert where and ";" in rest, said
        return errors[0]


def run_straight(trial: Trial, folder: Path, **more: Any) -> Mapping[str, Any]:
    """Runs, or goes on with, a trial without a fault."""
    folder.mkdir(exist_ok=True)
    process = Process(trial, folder, **more)
    assert process.end() == 0, process.said()
    assert "Traceback" not in process.said(), process.said()
    return trial.read(folder)


def list_points(trial: Trial, folder: Path) -> list[str]:
    """Every point of a straight run, in the order of their first time."""
    folder.mkdir()
    note = folder.with_name(f"{folder.name}.note")
    fault = Fault((str(folder),), str(note), only=frozenset(), ignored=trial.ignored)
    process = Process(trial, folder, fault)
    assert process.end() == 0, process.said()
    return list(dict.fromkeys(note.read_text().splitlines()))


def chain(
    trial: Trial,
    folder: Path,
    action: str = "kill",
    only: Iterable[str] | None = None,
    done: Iterable[str] = (),
) -> list[str]:
    """Starts the command again and again, each process struck at the next new point.

    Args:
      action: see `Fault`.
      only: the points to strike; all where not given.
      done: points not to strike.

    Returns:
      The points at which one was struck, before one process came to its end.
    """
    folder.mkdir()
    note = folder.with_name(f"{folder.name}.note")
    already = list(done)
    struck: list[str] = []
    wanted = None if only is None else frozenset(only)
    while True:
        before = trial.kept(folder)
        passing = frozenset((*already, *struck))
        fault = Fault((str(folder),), str(note), action, passing, wanted, trial.ignored)
        process = Process(trial, folder, fault)
        code = process.end()
        if code == 0:
            assert "Traceback" not in process.said(), process.said()
            return struck
        passed = note.read_text().splitlines()
        if action in ("kill", "cut"):
            assert code == -signal.SIGKILL, process.said()
            assert passed[-1] not in passing, passed[-1]
            struck.append(passed[-1])
        else:
            process.check_one_line(1, 2)
            struck.append(_first_new(passed, passing, wanted))
        if action == "cut":
            lose_unsynced(note)
        assert trial.kept(folder) >= max(before, _count_promised(passed)), (struck[-1], passed)


def _first_new(passed: list[str], passing: frozenset[str], wanted: frozenset[str] | None) -> str:
    for point in passed:
        if (
            point.startswith("before")
            and point not in passing
            and (wanted is None or point in wanted)
        ):
            return point
    raise AssertionError("it failed and nothing had struck")


def _count_promised(passed: Iterable[str]) -> int:
    """The newest checkpoint that was renamed and whose folder was synced after that."""
    renamed = promised = 0
    for point in passed:
        if found := re.fullmatch(r"after (?:rename|replace) .*checkpoints/(\d+)", point):
            renamed = int(found[1])
        elif re.fullmatch(r"after fsync .*checkpoints", point):
            promised = renamed
    return promised


def newest_checkpoint(folder: Path) -> int:
    """The newest step that lies whole in a run; 0: none."""
    steps = [
        int(path.parent.name)
        for path in folder.glob("run/checkpoints/*/manifest.json")
        if path.parent.name.isdecimal()
    ]
    return max(steps, default=0)


def read_run(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves: lines, arrays, result and answers."""
    run = folder / "run"
    result = json.loads((run / "result.json").read_text())
    steps = sorted(int(name) for name in os.listdir(run / "checkpoints"))
    found: dict[str, Any] = {
        "metrics": read_lines(run),
        "checkpoints": steps,
        "result": {name: value for name, value in result.items() if name not in UNSTEADY},
        "names": sorted(name for name in os.listdir(run) if name != "damaged"),
    }
    assert [row["step"] for row in found["metrics"]] == sorted(
        row["step"] for row in found["metrics"]
    )
    for step in steps:
        arrays = read_arrays(run, step)
        found[f"arrays {step}"] = {name: array.tobytes() for name, array in arrays.items()}
    for path in sorted(run.iterdir()):
        if path.suffix == ".csv" or path.name in ("baselines.json", "calibration.json"):
            found[path.name] = path.read_bytes()
    for path in sorted((run / "tokenizer").iterdir()):
        found[f"tokenizer/{path.name}"] = path.read_bytes()
    return found


def make_train(arena: Path) -> Trial:
    """Trains four updates with two checkpoints."""
    return Trial(
        "train",
        lambda folder: (
            *TRAIN,
            f"--config.data.train={arena}/train.csv",
            f"--workdir={folder}/run",
        ),
        read_run,
        ignored=r"\.lock$",
        kept=newest_checkpoint,
    )


def make_cache(arena: Path, straight: Path) -> Trial:
    """The same by an own cache, whose entries are what counts; the run lies beside it."""

    def read(folder: Path) -> dict[str, Any]:
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        # A compiler writes no program twice with the same bytes: it has to be the whole one.
        for name in [name for name in files if re.fullmatch(r"programs/[0-9a-f]{64}", name)]:
            folder_name, key = name.split("/")
            total = files.pop(f"{folder_name}/.{key}.sha256", b"")
            files[name] = str(total == _digest(folder / name).encode()).encode()
        return files

    return Trial(
        "predict",
        lambda folder: (
            f"--workdir={straight}/run",
            f"--data={arena}/test.csv",
            f"--output={folder}/out.csv",
        ),
        read,
        variables=lambda folder: {"PREF_JAX_CACHE": str(folder)},
    )


def make_annotate(arena: Path, url: str) -> Trial:
    """Rates 24 responses, four at a time."""

    def read(folder: Path) -> dict[str, Any]:
        failed = [
            {name: value for name, value in json.loads(line).items() if name not in _SPENT}
            for line in (folder / "A.jsonl.failures").read_text().splitlines()
        ]
        return {
            "ratings": (folder / "A.jsonl").read_bytes(),
            "failures": failed,
            "names": sorted(os.listdir(folder)),
        }

    return Trial(
        "annotate",
        lambda folder: (
            f"--data={arena}/test.csv",
            f"--output={folder}/A.jsonl",
            f"--base_url={url}",
            "--model=judge-1",
            "--concurrency=4",
            "--attempts=1",
        ),
        read,
    )


_SPENT = ("attempts", "tokens", "cost", "check")  # of a failure, over all calls


def make_study() -> Trial:
    """The study of four models of one backbone, narrow ones."""

    def read(folder: Path) -> dict[str, Any]:
        study = folder / "study"
        found: dict[str, Any] = {
            f"report/{path.name}": path.read_bytes().replace(str(folder).encode(), b"FOLDER")
            for path in sorted((study / "report").iterdir())
        }
        for path in sorted(study.glob("test/*/*/*")):
            found[str(path.relative_to(study))] = path.read_bytes()
        for path in sorted(study.glob("data/*")):
            found[str(path.relative_to(study))] = path.read_bytes()
        for path in sorted(study.glob("seed0/*/metrics.jsonl")):
            found[str(path.relative_to(study))] = read_lines(path.parent)
        return found

    # What a run does inside its folder is the same code as in `make_train`.
    ignored = r"study/seed0/\w+/|\.lock$"
    return Trial(
        "reproduce", lambda folder: (*STUDY, f"--workdir={folder}/study"), read, ignored=ignored
    )
