"""Speed and memory of everything between a data file and the training step.

The stages are those of ``launch/train.py`` in its order, each called as it calls them; only the
step itself is left out.
"""

import csv
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pref_jax import cache
from pref_jax.config import training_data
from pref_jax.errors import InputError

_PROCESSES = Path("/proc")
_SECONDS_BETWEEN_LOOKS = 0.02
_SUBJECTS = ("code", "bread", "music", "the moon", "a garden", "money", "history", "trains")
_WORDS = (
    *(
        "the",
        "of",
        "to",
        "is",
        "you",
        "can",
        "use",
        "this",
        "that",
        "first",
        "then",
        "with",
        "good",
    ),
    *("clear", "simple", "water", "time", "work", "people", "house", "small", "large", "number"),
    *("line", "book", "light", "answer", "question", "reason", "often", "always", "because"),
)


def benchmark_data(
    config: ConfigDict, *, rows: int | None, simulated_rows: int | None = None
) -> dict[str, Any]:
    """Reads, splits, tokenises, plans and serves one epoch to a step that does nothing.

    Works in a new cache, which is deleted at the end, so that every stage really runs.

    Args:
      config: as for training; nothing is written.
      rows: rows of the epoch to serve; None: all training rows.
      simulated_rows: use that many rows of short texts instead of the config's file.

    Returns:
      The fields of ``launch/benchmark.py --mode=data``'s JSON.

    Raises:
      InputError: this system does not say how much memory a process has.
    """
    if not _status(os.getpid()):
        raise InputError("--mode=data", "memory is read from Linux' /proc", "run it on Linux")
    outer = os.environ.get(cache.VARIABLE)
    with tempfile.TemporaryDirectory(dir=cache.cache_dir(), prefix="benchmark.") as folder:
        os.environ[cache.VARIABLE] = str(Path(folder) / "cache")
        try:
            if simulated_rows is not None:
                config = config.copy_and_resolve_references()
                config.data.train = str(Path(folder) / "rows.csv")
                write_short_rows(Path(config.data.train), simulated_rows)
            return _Pipeline(config).run(rows)
        finally:
            if outer is None:
                del os.environ[cache.VARIABLE]
            else:
                os.environ[cache.VARIABLE] = outer


def write_short_rows(path: Path, rows: int, seed: int = 0) -> None:
    """Writes labelled comparisons of about 64 tokens each; a tenth of the prompts repeats."""
    generator = random.Random(seed)

    def text(words: int) -> str:
        return " ".join(generator.choices(_WORDS, k=words))

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        names = ("id", "prompt", "response_a", "response_b")
        writer.writerow([*names, "winner_model_a", "winner_model_b", "winner_tie"])
        for row in range(rows):
            number = row - row % 10 if row % 10 == 1 else row
            subject = _SUBJECTS[number % len(_SUBJECTS)]
            prompt = f"Question {number}: tell me of {subject}, please."
            texts = (prompt, text(generator.randint(4, 36)), text(generator.randint(4, 36)))
            label = generator.randrange(3)
            flags = [int(label == other) for other in range(3)]
            writer.writerow([row, *(json.dumps([each]) for each in texts), *flags])


class _Pipeline:
    """The stages of a run before its step, measured one by one."""

    def __init__(self, config: ConfigDict) -> None:
        self._config = config
        self._stages: dict[str, dict[str, float]] = {}

    def run(self, rows: int | None) -> dict[str, Any]:
        import jax

        from pref_jax.data.arena import read_comparisons
        from pref_jax.data.features import make_tokens
        from pref_jax.experiment import Experiment, find_backbone
        from pref_jax.training.goals import TrainingData, make_goal
        from pref_jax.training.loop import read_ahead
        from pref_jax.training.run import make_plan

        config = self._config
        _ = jax.devices()  # what the backend takes belongs to no stage
        at_rest = read_memory()
        labelled = None if config.input.layout == "response" else True
        with self._stage("read"):
            total = len(read_comparisons(training_data(config), labelled=labelled))
        with self._stage("split"):
            data = TrainingData(config, labelled=labelled)  # the file's hash again, then the split
        with self._stage("model"):
            experiment = Experiment(config, find_backbone(config, data.train))
            goal = make_goal(experiment, data)
            _ = experiment.tokenizer
        with self._stage("tokenise"):
            make_tokens(data.train, experiment.tokenizer)
        with self._stage("features"):
            samples, _ = goal.make_samples()
        numbers = goal.train_numbers[:rows]
        with self._stage("baselines"), tempfile.TemporaryDirectory() as folder:
            goal.fit_baselines(Path(folder))
        with self._stage("first_batch"):
            plan = make_plan(experiment, samples, numbers)
            updates = read_ahead(plan, 0, plan.steps_per_epoch)
            served = _count_rows(next(updates))
        first_batch = sum(stage["seconds"] for stage in self._stages.values())
        with self._stage("serve"):
            for update in updates:
                served += _count_rows(update)
        for name, stage in self._stages.items():
            stage["rows_per_second"] = (served if name == "serve" else total) / max(
                stage["seconds"], 1e-9
            )
        seconds = sum(stage["seconds"] for stage in self._stages.values())
        peak = max(stage["peak_anonymous_bytes"] for stage in self._stages.values())
        return {
            "mode": "data",
            "rows": total,
            "served_rows": served,
            "tokens_per_row": float(samples.lengths.sum() / len(samples.labels)),
            "stages": self._stages,
            "seconds": seconds,
            "rows_per_second": total / seconds,
            "first_batch_seconds": first_batch,
            "anonymous_bytes_at_rest": at_rest,
            "peak_anonymous_bytes": peak,
            "file_bytes": os.path.getsize(training_data(config)),
            "cache_bytes": {
                path.name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                for path in sorted(cache.cache_dir().iterdir())
            },
        }

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        with _MemoryWatch() as watch:
            started, worked = time.perf_counter(), time.process_time()
            yield
            seconds, cpu = time.perf_counter() - started, time.process_time() - worked
        self._stages[name] = {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "anonymous_bytes_before": watch.before,
            "peak_anonymous_bytes": watch.peak,
        }


def _count_rows(update: Any) -> int:
    return sum(int((packed.samples >= 0).sum()) for packed in update.buckets)


class _MemoryWatch:
    """The most anonymous memory of this process and its children while it is entered.

    Pages of memory-mapped files do not count: the system takes them back when it needs them.
    """

    def __enter__(self) -> "_MemoryWatch":
        self.before = self.peak = read_memory()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(_SECONDS_BETWEEN_LOOKS):
            self.peak = max(self.peak, read_memory())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.peak = max(self.peak, read_memory())


def read_memory() -> int:
    """Bytes of anonymous memory of this process and all its children."""
    total, waiting = 0, [os.getpid()]
    while waiting:
        process = waiting.pop()
        total += _status(process).get("RssAnon", 0)
        for children in (_PROCESSES / str(process) / "task").glob("*/children"):
            try:
                waiting += map(int, children.read_text().split())
            except OSError:  # the thread has ended
                continue
    return total


def _status(process: int) -> dict[str, int]:
    """Bytes by name of a process's memory; empty where it has ended or there is no /proc."""
    try:
        lines = (_PROCESSES / str(process) / "status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}
