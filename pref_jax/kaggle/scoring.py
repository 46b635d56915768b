"""Scores a test file with the models of a bundle, within a time, never leaving a row out."""

import logging
import math
import os
import platform
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pref_jax import compilation
from pref_jax.data.arena import Comparisons, read_comparisons
from pref_jax.errors import InputError, RunError
from pref_jax.evaluation.baselines import Baselines, count_words
from pref_jax.evaluation.predict import to_probabilities
from pref_jax.evaluation.submission import read_submission, write_submission
from pref_jax.files import check_output_file, read_json, write_json
from pref_jax.kaggle.manifest import read_manifest
from pref_jax.kaggle.schedule import Schedule
from pref_jax.weights.export import DESCRIPTION
from pref_jax.weights.exported import load_exported

if TYPE_CHECKING:
    from pref_jax.data.batches import Samples
    from pref_jax.evaluation.predict import Predictor
    from pref_jax.experiment import Run

logger = logging.getLogger(__name__)

RESULT = "scoring.json"
FALLBACK = "fallback.json"
MODELS, BASES = "models", "bases"
# Probabilities of the export's own rows may differ by this much: float16 and other kernels stay
# below a tenth of it. A base in fewer bits than it was trained on is let through, and said.
_LARGEST_DIFFERENCE = 0.1
# Of the time, what is kept to write the answer: seconds, at least and at most, and the share.
_RESERVE = 8.0, 300.0, 0.02


class BundledModel:
    """A model of a bundle over one test file; see `schedule.Model`."""

    def __init__(self, bundle: Path, entry: dict[str, Any], comparisons: Comparisons) -> None:
        self.name, self.cost = str(entry["name"]), float(entry["cost"])
        self.symmetric = bool(entry["symmetric"])
        self._folder = bundle / MODELS / self.name
        self._entry, self._comparisons = entry, comparisons
        base = entry.get("base")
        self._base = None if base is None else bundle / base
        self._run: Run | None = None
        self._predictor: Predictor | None = None
        self._samples: Samples | None = None

    def open(self) -> None:
        from pref_jax.experiment import log_parts

        self._run = load_exported(self._folder, self._base)
        log_parts(self._run.experiment)
        self._predictor = self._run.experiment.make_predictor()
        self._check()

    def prepare(self, order: int) -> np.ndarray:
        from pref_jax.experiment import exchange_responses

        assert self._run is not None
        rows = exchange_responses(self._comparisons) if order else self._comparisons
        self._samples = self._run.experiment.make_samples(rows)
        return self._samples.lengths.sum(axis=1)

    def score(self, order: int, rows: np.ndarray) -> np.ndarray:
        assert self._samples is not None
        return self._score(self._samples, rows)

    def close(self) -> None:
        self._run = self._predictor = self._samples = None

    def _score(self, samples: "Samples", rows: np.ndarray) -> np.ndarray:
        assert self._run is not None and self._predictor is not None
        logits = self._predictor.logits(self._run.params, samples, rows, finite=False)
        return to_probabilities(logits, temperature=self._run.temperature)

    def _read_examples(self) -> tuple[list[Any], np.ndarray]:
        """Token ids and probabilities [n, 3] of the rows that the export carries.

        Raises:
          InputError: they are not there, or damaged.
        """
        path, remedy = self._folder / DESCRIPTION, "build the bundle again, or upload it again"
        about = read_json(path, remedy)
        try:
            examples = about["examples"]
            ids = [example["input_ids"] for example in examples]
            there = np.array([example["probabilities"] for example in examples], float)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(str(path), "its examples are missing or damaged", remedy) from error
        if not ids or there.shape != (len(ids), 3):
            raise InputError(str(path), "its examples are missing or damaged", remedy)
        return ids, there

    def _check(self) -> None:
        """Compares the rows that the export carries with what is computed here.

        Raises:
          RunError: other token ids, or other probabilities.
        """
        import tempfile

        from pref_jax.weights.examples import describe_rows, write_rows

        assert self._run is not None
        wanted, there = self._read_examples()
        experiment = self._run.experiment
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder) / "rows.csv")
            rows = read_comparisons(Path(folder) / "rows.csv", labelled=False)
            samples = experiment.make_samples(rows)
            found = self._score(samples, np.arange(len(rows)))
        if wanted != [mine["input_ids"] for mine in describe_rows(samples, found)]:
            raise RunError(
                self.name, "its tokenizer gives other ids here", "build the bundle again"
            )
        difference = float(np.abs(found - there).max())
        logger.info(
            "%s: %d rows of its export: probabilities differ by %.5f at most",
            self.name,
            len(there),
            difference,
        )
        if not difference <= _LARGEST_DIFFERENCE and not self._entry.get("requantised"):
            raise RunError(
                self.name,
                f"probabilities of its own examples differ by {difference:.2f} here",
                "build the bundle again, or leave the model out",
            )


def check_hours(hours: float) -> None:
    """Refuses a ``--max_hours`` that is no time to work in.

    Raises:
      InputError: it is not above 0, or not finite.
    """
    if not 0 < hours < math.inf:
        raise InputError(
            f"--max_hours={hours:g}", "it is no number above 0", "give hours, such as 8.5"
        )


def score_file(
    bundle: str,
    data: str,
    output: str,
    *,
    max_hours: float | None = None,
    started: float | None = None,
) -> dict[str, Any]:
    """Writes the submission for ``data``, and `RESULT` beside it; returns what that holds.

    Args:
      bundle: folder that launch/kaggle.py wrote.
      data: the test file.
      output: the submission.
      max_hours: in which the process has to end; the bundle's own when nothing is said.
      started: `time.time` from which they count; now when nothing is said.

    Raises:
      InputError: anything about bundle, data or output.
      RunError: every model failed; each row has the length baseline's answer then.
    """
    begun = time.time() if started is None else started
    if not math.isfinite(begun):
        raise InputError(f"--started={begun:g}", "it is no time", "give seconds since 1970")
    folder = Path(bundle)
    manifest = read_manifest(folder)
    hours = float(manifest["max_hours"] if max_hours is None else max_hours)
    check_hours(hours)
    target = check_output_file(output, inputs=(data,))
    ends = time.monotonic() + 3600 * hours - (time.time() - begun)
    least, most, share = _RESERVE
    reserve = min(max(3600 * hours * share, least), most)
    comparisons = read_comparisons(data, labelled=False)
    fallback = Baselines.load(folder / FALLBACK).predict("length", count_words(comparisons))
    result: dict[str, Any] = {}

    def save(schedule: Schedule) -> None:
        with schedule.lock:
            answers, unknown = schedule.answers()
            write_submission(target, comparisons.ids, answers)
            result.update(
                rows=len(answers),
                fallback_rows=int(unknown.sum()),
                max_hours=hours,
                seconds=round(time.time() - begun, 1),
                parts=[part.describe() for part in schedule.parts],
            )
            write_json(target.parent / RESULT, result)

    models = [BundledModel(folder, entry, comparisons) for entry in manifest["models"]]
    schedule = Schedule(
        models,
        fallback,
        both_orders=bool(manifest["swap_average"]),
        deadline=ends - reserve,
        save=save,
    )
    save(schedule)
    logger.info(
        "%d rows, %d parts, %.0f of %.0f s left; %s holds every row from now on",
        len(comparisons),
        len(schedule.parts),
        max(0.0, ends - time.monotonic()),
        3600 * hours,
        target,
    )
    result["environment"] = _describe_environment()
    # A compilation or a slow disk is not interrupted by looking at the clock.
    finished = threading.Event()
    watchdog = threading.Thread(
        target=_end_in_time, args=(schedule, finished, ends - reserve / 2, result), daemon=True
    )
    watchdog.start()
    compilation.keep_compiled_programs()
    schedule.run()
    finished.set()
    watchdog.join()
    _report(result)
    reasons = {part.model.name: part.reason for part in schedule.parts if part.status == "failed"}
    used = any(part.status in ("finished", "partial") for part in schedule.parts)
    if len(reasons) == len(models) and not used:
        raise RunError(
            str(folder),
            f"no model could be used ({next(iter(reasons.values()))})",
            f"{target} holds the length baseline's answers; mend the bundle",
        )
    return result


def check_submission(data: str, output: str) -> int:
    """Compares ids and order, and looks at each row's numbers; returns how many rows there are.

    Raises:
      InputError: the test file or the submission cannot be read.
      RunError: the submission is not that of the test file.
    """
    ids, values = read_submission(output)
    if ids != read_comparisons(data, labelled=False).ids:
        raise RunError(output, f"rows of {data} are missing or in another order", "score it again")
    if not ((values > 0).all() and (abs(values.sum(axis=1) - 1) < 1e-6).all()):
        raise RunError(output, "a row is 0 somewhere or does not sum to 1", "score it again")
    return len(ids)


def _end_in_time(
    schedule: Schedule, finished: threading.Event, ends: float, result: dict[str, Any]
) -> None:
    """Ends the process with what there is, should the schedule still be at work by then."""
    if finished.wait(max(0.0, ends - time.monotonic())):
        return
    with schedule.lock:
        if finished.is_set():
            return
        schedule.stop()
        _report(result)
        sys.stdout.flush()
        os._exit(0)


def _report(result: dict[str, Any]) -> None:
    """The last lines: what every row's answer is made of, and what is not in it."""
    print(f"{result['rows']} rows after {result['seconds']:.0f} s of {result['max_hours']:g} h")
    for part in result["parts"]:
        reason = f" ({part['reason']})" if part["reason"] else ""
        print(f"  {part['status']:<9} {part['model']}, responses {part['order']}{reason}")
    if result["fallback_rows"]:
        print(f"  {result['fallback_rows']} rows have the length baseline's answer")


def _describe_environment() -> dict[str, Any]:
    import jax

    from pref_jax import __version__

    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "pref_jax": __version__,
        "devices": [device.device_kind for device in jax.devices()],
    }
