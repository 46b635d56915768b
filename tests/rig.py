"""The commands on a model small enough to train in seconds, and rows to try them on."""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib
import io
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from pref_jax import command
from pref_jax.training.records import read_metrics

REPOSITORY = Path(__file__).resolve().parent.parent
# What depends on the clock or on how often a run was started.
UNSTEADY = {"rows_per_second", "train_seconds", "compilations"}
TEXTS = ["id", "prompt", "response_a", "response_b"]
UPDATES = 48  # of the run that all tests share
LABELS = ["winner_model_a", "winner_model_b", "winner_tie"]
TINY = (
    f"--config={REPOSITORY}/configs/quickstart.py",
    "--config.model.pretrained=none",
    "--config.model.config.num_layers=2",
    "--config.model.config.hidden_size=32",
    "--config.model.config.num_heads=2",
    "--config.model.config.intermediate_size=64",
    "--config.input.max_length=48",
    "--config.train.batch_size=8",
    "--config.train.microbatch_size=4",
    "--config.logging.tensorboard=false",
)

_PROMPTS = [
    *("Name a river.", "Add 2 and 3.", "Write a haiku about rain.", "Why is the sky blue?"),
    *("Translate 'good night' to French.", "List three birds."),
]
_FIRST = [
    *("The Danube.", "5"),
    "Grey roof, soft drumming, / a gutter finds its old song, / tea cools by the glass.",
    *("Short waves scatter most.", "Bonne nuit.", "Wren, rook, swift."),
]
_SECOND = [
    *("A river is water that flows.", "2 + 3 = 6", "Rain."),
    "Because of the sea, and " + "so on, " * 40,
    *("Good night.", "Birds: many; see a book."),
]
_WINNERS = [(1, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0), (0, 0, 1)]


def make_rows(**changes: Mapping[str, object]) -> list[dict[str, Any]]:
    """Six labelled rows; ``r3={"id": "x"}`` changes cells of row 3, counted from 0."""
    rows: list[dict[str, Any]] = []
    for number in range(6):
        texts = (side[number] for side in (_PROMPTS, _FIRST, _SECOND))
        cells = [101 + number, *(json.dumps([text]) for text in texts), *_WINNERS[number]]
        rows.append(dict(zip(TEXTS + LABELS, cells, strict=True)))
    for name, cells in changes.items():
        rows[int(name[1:])].update(cells)
    return rows


def write_csv(
    path: Path,
    rows: Iterable[Mapping[str, object]],
    *,
    labels: bool = False,
    more: Iterable[str] = (),
    eol: str = "\n",
    encoding: str = "utf-8",
) -> Path:
    """Writes rows in the competition's form."""
    columns = TEXTS + (LABELS if labels else []) + list(more)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator=eol, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def call(name: str, *arguments: object) -> command.Outcome:
    """A script of ``launch/`` inside this process."""
    return command.call(REPOSITORY / "launch" / f"{name}.py", arguments)


def simulate(folder: Path, rows: int, test_rows: int) -> Path:
    """Writes an arena into ``folder``: rows to train on, and rows to answer."""
    numbers = f"--rows={rows}", f"--test_rows={test_rows}", "--seed=7"
    outcome = call("simulate", *numbers, f"--output={folder}")
    assert outcome.code == 0, outcome
    return folder


@contextlib.contextmanager
def nothing_of_the_users(cache: Path) -> Iterator[None]:
    """Caches in ``cache``, and no key but the one that a test sets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREF_JAX_CACHE", str(cache))
        patch.delenv("OPENAI_API_KEY", raising=False)
        yield


def train(workdir: Path, *arguments: object) -> command.Outcome:
    """Trains the tiny model; fails where the command does."""
    outcome = call("train", *TINY, f"--workdir={workdir}", *arguments)
    assert outcome.code == 0, outcome
    return outcome


def predict(run: Path, data: Path, *arguments: object) -> list[list[str]]:
    """The rows of a submission as strings, checked for what holds of every submission."""
    output = data.parent / f"{data.name}.out"
    output.unlink(missing_ok=True)
    outcome = call(
        "predict", f"--workdir={run}", f"--data={data}", f"--output={output}", *arguments
    )
    assert outcome.code == 0, outcome
    with output.open(encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header == ["id", *LABELS]
    for row in rows:
        values = [float(cell) for cell in row[1:]]
        assert all(0 < value < 1 for value in values) and abs(sum(values) - 1) < 1e-7, row
    return rows


def refuse(run: Path, data: Path, *words: str) -> None:
    """``predict`` names ``words`` in one line, and leaves nothing behind."""
    output = data.parent / "refused.csv"
    before = sorted(data.parent.rglob("*"))
    outcome = call("predict", f"--workdir={run}", f"--data={data}", f"--output={output}")
    assert outcome.code == 2, outcome
    assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1, outcome.stderr
    for word in words:
        assert word in outcome.stderr
    assert sorted(data.parent.rglob("*")) == before


def start(
    log: Path,
    name: str,
    *arguments: object,
    devices: int = 1,
    xla_flags: str = "",
    variables: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> ForkServerProcess:
    """Starts a script in a process of its own, which can be killed; ``log`` gets what it says.

    Args:
      variables: of the process's environment.
      before: is called in the process before the script.
    """
    lines = [str(argument) for argument in arguments]
    return _fork(
        _run_script, str(log), devices, name, lines, before, xla_flags=xla_flags, more=variables
    )


def call_apart(
    folder: Path, commands: Mapping[str, Iterable[object]], *, devices: int = 1
) -> dict[str, command.Outcome]:
    """Runs scripts one after another in one other process, on so many devices.

    Args:
      folder: where the process keeps its notes.
      commands: by name of the case, the script's name and its arguments.
    """
    lines = {case: [str(part) for part in parts] for case, parts in commands.items()}
    process = _fork(_call_scripts, str(folder / "log"), devices, str(folder / "outcomes"), lines)
    finish(process, folder / "log")
    outcomes = json.loads((folder / "outcomes").read_text())
    return {case: command.Outcome(*parts) for case, parts in outcomes.items()}


def _fork(
    target: Callable[..., None],
    log: str,
    devices: int,
    *rest: Any,
    xla_flags: str = "",
    more: Mapping[str, str] | None = None,
) -> ForkServerProcess:
    """A process forked from a server that has imported the libraries, which saves seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    environment = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {xla_flags}".strip(),
        "PREF_JAX_CACHE": os.environ["PREF_JAX_CACHE"],
        "STORAGE_EMULATOR_HOST": os.environ.get("STORAGE_EMULATOR_HOST", ""),
        **(more or {}),
    }
    process = context.Process(target=target, args=(log, environment, *rest), daemon=True)
    process.start()
    return process


_PRELOADED = [
    *("jax", "flax.linen", "optax", "grain", "orbax.checkpoint", "sklearn.linear_model"),
    *("pref_jax.training.run", "pref_jax.data.features", "tokenizers"),
]


def _settle_in(log: str, environment: dict[str, str]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    # JAX reads these when it makes its first array, not when it is imported.
    os.environ.update(environment)
    import jax

    jax.config.update("jax_disable_most_optimizations", True)  # see tests/end_to_end/conftest.py


def _run_script(
    log: str,
    environment: dict[str, str],
    name: str,
    arguments: list[str],
    before: Callable[[], None] | None,
) -> None:
    _settle_in(log, environment)
    if before is not None:
        before()
    path = REPOSITORY / "launch" / f"{name}.py"
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def _call_scripts(
    log: str, environment: dict[str, str], notes: str, commands: dict[str, list[str]]
) -> None:
    _settle_in(log, environment)
    outcomes = {case: call(*parts) for case, parts in commands.items()}
    Path(notes).write_text(json.dumps(outcomes))


def stop_at(place: str, number: int, name: str = "SIGTERM") -> None:
    """For `start`'s ``before``: the process gets a signal in its ``number``-th call of a function.

    Args:
      place: ``module:function``, or ``module:Class.method``.
    """
    module, path = place.split(":")
    *owners, attribute = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    function, calls = getattr(owner, attribute), itertools.count(1)

    def call(*arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), getattr(signal, name))
        return function(*arguments, **named)

    setattr(owner, attribute, call)


def finish(process: ForkServerProcess, log: Path, code: int = 0, seconds: float = 300) -> str:
    """Waits for a process of `start`; returns what it has said."""
    process.join(timeout=seconds)
    said = log.read_text(encoding="utf-8", errors="replace")
    assert process.exitcode == code, said
    return said


def wait_for(
    condition: Callable[[], bool], process: ForkServerProcess, log: Path, seconds: float = 120
) -> None:
    """Returns once ``condition`` holds; fails where the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        alive = process.is_alive()
        if not alive and condition():
            return
        assert alive and time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.002)


def count_updates(workdir: Path) -> int:
    """Updates that a run has written down so far."""
    with contextlib.suppress(FileNotFoundError):
        return sum(row["split"] == "train" for row in read_metrics(workdir / "metrics.jsonl"))
    return 0


def read_lines(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without what the clock decides."""
    return [
        {name: value for name, value in row.items() if name not in UNSTEADY}
        for row in read_metrics(workdir / "metrics.jsonl")
    ]


def read_arrays(workdir: Path, step: int) -> dict[str, Any]:
    """All arrays of a checkpoint: parameters, both moments, counters."""
    import jax

    from pref_jax.training.checkpoints import Checkpoints

    manifest = json.loads((workdir / "checkpoints" / str(step) / "manifest.json").read_text())
    shapes = {
        name: jax.ShapeDtypeStruct(tuple(shape), dtype)
        for name, (shape, dtype) in manifest["leaves"].items()
    }
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1, read_only=True)
    return checkpoints.restore(step, shapes)[0]
