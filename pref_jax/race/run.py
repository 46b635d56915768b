"""A race: ours against Hugging Face's Trainer, in turn, each turn a process of its own.

This process imports neither framework, so that it takes no memory and no core from the turns.
"""

import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import pref_jax
from pref_jax.config import training_data
from pref_jax.errors import InputError, RunError
from pref_jax.files import plain, read_json, write_durably, write_json
from pref_jax.race import turn

logger = logging.getLogger(__name__)

# Names of the contestants, in the order of the first round.
CONTESTANTS = ("ours", "trainer", "grouped")
_PACKAGES = ("torch", "transformers", "accelerate")
# What the other side has no counterpart of, and the value that leaves it out.
_UNSUPPORTED: dict[str, Any] = {
    "data.swap": "none",
    "data.soft_labels": None,
    "model.frozen_layers": 0,
    "model.quantization": "none",
    "model.symmetric": False,
    "model.length_features": False,
    "train.layer_decay": 1.0,
    "train.ema": 0.0,
}


def check(config: ConfigDict, peer_batch_size: int) -> None:
    """Refuses what cannot be raced, before any work.

    Raises:
      InputError: a field that the other side has no counterpart of, or a batch that cannot be cut.
      RunError: the other side is not installed.
    """
    training_data(config)
    if config.input.layout == "response":
        raise InputError(
            "--config.input.layout",
            "a model of ratings has no counterpart",
            "choose another preset",
        )
    for field, value in _UNSUPPORTED.items():
        section, name = field.split(".")
        if config[section][name] != value:
            raise InputError(
                f"--config.{field}",
                f"{config[section][name]!r} has no counterpart in Trainer",
                f"race with --config.{field}={str(value).lower()}",
            )
    if config.train.head_learning_rate not in (None, config.train.learning_rate):
        raise InputError(
            "--config.train.head_learning_rate",
            "Trainer has one rate for all",
            f"race with --config.train.head_learning_rate={config.train.learning_rate}",
        )
    if config.train.batch_size % peer_batch_size:
        raise InputError(
            "--peer_batch_size",
            f"{peer_batch_size} does not divide the update of {config.train.batch_size} rows",
            "give a divisor",
        )
    packages = (*_PACKAGES, *(("peft",) if config.model.lora.rank else ()))
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(
            ", ".join(missing), "not installed", "install the other side: pip install -e '.[race]'"
        )


def race(
    config: ConfigDict,
    *,
    rows: int,
    rounds: int,
    seconds: float,
    peer_batch_size: int | None,
    output: Path | None,
) -> dict[str, Any]:
    """Runs the race and returns what ``launch/race.py`` writes as JSON.

    After each turn ``output`` holds the turns so far; the same race goes on from there.

    Args:
      config: checked config.
      rows: the most rows of a turn; whole updates of them are taken.
      rounds: turns of each contestant.
      seconds: no turn goes on beyond this time, no round begins that would not end within it.
      peer_batch_size: rows of a forward pass of the other side; None: 16, or what of it divides
        an update.
      output: JSON file; None: nothing is kept.

    Raises:
      InputError: anything about config, data or weights, or ``output`` is that of another race.
      RunError: a turn failed, or no round was done in time.
    """
    begun = time.monotonic()
    peer_batch_size = peer_batch_size or math.gcd(16, config.train.batch_size)
    check(config, peer_batch_size)
    settings = {
        "config": plain(config),
        "rows": rows,
        "peer_batch_size": peer_batch_size,
        "machine": {"platform": sys.platform, "cores": len(os.sched_getaffinity(0))}
        if hasattr(os, "sched_getaffinity")
        else {"platform": sys.platform, "cores": os.cpu_count()},
        "versions": _versions(),
    }
    settings = json.loads(json.dumps(settings))
    turns = _read_turns(output, settings)

    with tempfile.TemporaryDirectory(prefix="pref_jax_race.", ignore_cleanup_errors=True) as name:
        runner = _Runner(Path(name), begun + seconds)
        write_json(runner.folder / "config.json", config.to_dict())
        write_json(runner.folder / turn.JOB, {"rows": rows})
        logger.info("preparing rows, token ids and initial weights")
        try:
            job = runner.run("prepare", "prepare", -1)
        except subprocess.TimeoutExpired:
            raise _too_slow(seconds) from None
        environment = job.pop("environment") | {"command": list(sys.argv)}
        write_json(runner.folder / turn.JOB, job | {"peer_batch_size": peer_batch_size})
        # The first to import a framework would wait for the disk.
        runner.check_imports(config.model.lora.rank > 0)

        def summarise() -> dict[str, Any]:
            versions = environment["versions"] | settings["versions"]
            return {
                "settings": settings,
                "work": job,
                "environment": environment | {"versions": versions},
                "turns": turns,
            }

        longest = 0.0
        for number in range(rounds):
            left = begun + seconds - time.monotonic()
            missing = [
                name
                for name in CONTESTANTS[number % 3 :] + CONTESTANTS[: number % 3]
                if not any(t["round"] == number and t["contestant"] == name for t in turns)
            ]
            if missing and longest * len(missing) > left:
                logger.info("%.0f s are left, too few for another round", left)
                break
            for name in missing:
                mark = time.monotonic()
                entry = runner.turn(name, number)
                if entry is None:
                    break
                longest = max(longest, time.monotonic() - mark)
                turns.append(entry)
                logger.info(
                    "round %d, %s: training %.2f rows/s, prediction %.2f rows/s",
                    number + 1,
                    name,
                    entry["training_rows_per_second"],
                    entry["prediction_rows_per_second"],
                )
                if output is not None:
                    write_json(output, summarise())
            else:
                continue
            logger.info("the time is up in round %d", number + 1)
            break
    from pref_jax.race.report import compare, refuse_other_work

    result = summarise()
    complete = [
        number
        for number in range(rounds)
        if sum(entry["round"] == number for entry in turns) == len(CONTESTANTS)
    ]
    if not complete:
        raise _too_slow(seconds)
    comparison = compare(turns, complete)
    refuse_other_work(turns, comparison, job["precision"])
    return result | {"comparison": comparison}


def finish(result: dict[str, Any], output: Path | None) -> str:
    """Writes JSON, table (``.md``) and figure (``.png``) and returns the table."""
    from pref_jax.race.report import draw, write_table

    table = write_table(result)
    if output is not None:
        write_json(output, result)
        write_durably(output.with_suffix(".md"), table.encode())
        write_durably(output.with_suffix(".png"), draw(result))
    return table


def _too_slow(seconds: float) -> RunError:
    return RunError(
        "--seconds", f"{seconds:.0f} s were too few for one round", "give more, or fewer --rows"
    )


def _versions() -> dict[str, str]:
    names = ("pref_jax", "jax", *_PACKAGES, "peft", "tokenizers")
    return {
        name: importlib.metadata.version(name)
        for name in names
        if importlib.util.find_spec(name) is not None
    }


def _read_turns(output: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of a race that was cut off."""
    if output is None or not output.exists():
        return []
    remedy = "name another file with --output, or remove it"
    content = read_json(output, remedy)
    if content.get("settings") != settings:
        raise InputError(str(output), "it holds something else than this race", remedy)
    turns = content.get("turns")
    if not isinstance(turns, list):
        raise InputError(str(output), "it holds no turns", remedy)
    if turns:
        logger.info("%s holds %d turns; going on from there", output, len(turns))
    return turns


class _Runner:
    """Starts the processes of a race."""

    def __init__(self, folder: Path, deadline: float) -> None:
        self.folder, self._deadline = folder, deadline

    def turn(self, contestant: str, number: int) -> dict[str, Any] | None:
        """One turn; None where the time was up before its end."""
        cold = contestant == "ours" and not (self.folder / "cache_ours").exists()
        module = "ours" if contestant == "ours" else "peer"
        try:
            content = self.run(module, contestant, number)
        except subprocess.TimeoutExpired:
            return None
        return {"contestant": contestant, "round": number, "cold": cold} | content

    def run(self, module: str, contestant: str, number: int) -> dict[str, Any]:
        result = self.folder / f"{contestant}.{number}.json"
        log = self.folder / f"{contestant}.{number}.log"
        left = self._deadline - time.monotonic()
        command = [sys.executable, "-m", f"pref_jax.race.{module}", str(self.folder), str(result)]
        with log.open("wb") as stream:
            if left <= 0:
                raise subprocess.TimeoutExpired(command, 0)
            code = subprocess.run(
                [*command, repr(time.time()), f"contestant={contestant}"],
                env=self._environment(module),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                timeout=None if math.isinf(left) else left,
                check=False,
            ).returncode
        if code or not result.exists():
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RunError(
                f"turn of {contestant}",
                f"it ended with code {code}: {lines[-1] if lines else 'no message'}",
                "give fewer --rows if memory ran out, or a smaller --peer_batch_size",
            )
        content: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        if "error" in content:
            kind, where, what, remedy = content["error"]
            raise (InputError if kind == "input" else RunError)(where, what, remedy)
        return content

    def check_imports(self, adapters: bool) -> None:
        names = ", ".join((*_PACKAGES, *(("peft",) if adapters else ())))
        done = subprocess.run(
            [sys.executable, "-c", f"import {names}; from transformers import Trainer"],
            env=self._environment("peer"),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RunError(names, reason, "install the other side: pip install -e '.[race]'")

    def _environment(self, module: str) -> dict[str, str]:
        environment = dict(os.environ)
        package = str(Path(pref_jax.__file__).parents[1])
        paths = [package, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        # Weights and token ids are local; nothing is asked of a hub in the middle of a turn.
        environment |= {"HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        if module == "ours":  # cold in the first turn, warm after it, and nobody else's
            environment["PREF_JAX_CACHE"] = str(self.folder / "cache_ours")
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        elif module == "prepare":
            environment.pop("HF_HUB_OFFLINE")
            environment["PREF_JAX_CACHE"] = str(self.folder / "cache_prepare")
        return environment
