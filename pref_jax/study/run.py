"""``launch/reproduce.py``: makes the parts of the study that are not there yet, then its report."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pref_jax import locks
from pref_jax.errors import InputError, RunError, Stopped
from pref_jax.files import make_folder, make_output_folder, read_json, write_json
from pref_jax.study.plan import (
    DATA,
    EVALUATION,
    PREDICTIONS,
    SCALES,
    SIMULATED_ROWS,
    Part,
    Sources,
    fingerprint,
    make_models,
    make_parts,
)

logger = logging.getLogger(__name__)

_STUDY_FILE = "study.json"
ABLATION = "ablation"  # what the note of an ablation's folder calls itself
_BUSY = "wait for it, or give another --workdir"


def refuse_busy(workdir: str) -> None:
    """Refuses a study that another process works on; reads and imports nothing for it.

    Raises:
      InputError: names that process.
    """
    locks.refuse_held(Path(workdir) / ".lock", workdir, _BUSY)


def find_sources(
    scale: str,
    train: str | None,
    test: str | None,
    annotations: str | None,
    properties: str | None,
    rows: tuple[int, int] | None,
) -> Sources:
    """Rows and ratings of a study; simulated where no file is named.

    Raises:
      InputError: some are named and others are missing, or one cannot be read.
    """
    from pref_jax.annotation.properties import load_properties
    from pref_jax.annotation.ratings import read_ratings
    from pref_jax.data.arena import read_comparisons

    named = {"--data": train, "--test": test, "--annotations": annotations}
    if not any(named.values()):
        if properties is not None:
            raise InputError("--properties", "there are no ratings of them", "give --annotations")
        return Sources(rows=rows or SIMULATED_ROWS[scale])
    if rows is not None:
        raise InputError("--rows", "rows are simulated only where no data is named", "leave it out")
    for flag, value in named.items():
        if value is None:
            remedy = "give --data, --test and --annotations together, or none of them to simulate"
            if flag == "--annotations":
                remedy += "; launch/annotate.py makes annotations"
            raise InputError(flag, "it is missing", remedy)
    assert train is not None and test is not None and annotations is not None
    known = load_properties(properties)
    ratings = read_ratings(annotations, known)
    compared = read_comparisons(train, labelled=True)
    labels = ratings.align(compared.ids)
    if not (labels >= 0).any():
        raise InputError(annotations, f"it rates none of {train}", "give ratings of its ids")
    digests = {
        "train": compared.digest,
        "test": read_comparisons(test, labelled=True).digest,
        "annotations": hashlib.sha256(labels.tobytes()).hexdigest(),
        "properties": known.digest,
    }
    return Sources(
        train=os.path.abspath(train),
        test=os.path.abspath(test),
        annotations=os.path.abspath(annotations),
        properties=None if properties is None else os.path.abspath(properties),
        digests=digests,
    )


def reproduce(
    scale: str, workdir: str, sources: Sources, *, seeds: int, changes: Sequence[str] = ()
) -> Path:
    """Runs the study, or what of it is missing.

    Each part has its folder below ``workdir``, and a note of what it was made from. A part whose
    note is of the present settings and says that it is finished is left alone, one that is not
    finished goes on, one that was made from something else is made again.

    Args:
      scale: "tiny", "minilm" or "paper".
      workdir: folder of the study.
      sources: rows and ratings.
      seeds: how often everything is trained.
      changes: see `make_parts`.

    Returns:
      The report's page.

    Raises:
      InputError: wrong input, or a folder that holds something else.
      RunError: a part failed, or was stopped.
    """
    from pref_jax import compilation
    from pref_jax.study.report import make_study_report

    parts = make_parts(scale, sources, seeds, changes)
    folder = make_output_folder(workdir, "--workdir")

    def make(part: Part) -> None:
        _refuse_changed(part, sources)
        _make(part, folder, sources)

    with held(folder, scale):
        compilation.keep_compiled_programs()
        for _ in make_missing(folder, parts, make):
            pass
        return make_study_report(folder, make_models(scale), seeds)


def make_missing(
    folder: Path,
    parts: Mapping[str, Part],
    make: Callable[[Part], None],
    known: Mapping[str, Part] | None = None,
) -> Iterator[Part]:
    """Makes the parts that are not finished, in order; yields each once it is.

    Args:
      folder: of the study.
      parts: by name, each behind what it needs.
      make: makes one part in its folder, or goes on with what is there.
      known: these and whatever else they need, directly or not; None: they need nothing else.
    """
    known = known or parts
    for number, part in enumerate(parts.values(), start=1):
        if is_finished(folder, part, known):
            continue
        logger.info("part %d of %d: %s", number, len(parts), part.name)
        wanted, note = fingerprint(part, known), _note(folder, part)
        if _read_note(note).get("made_from") != wanted:
            shutil.rmtree(folder / part.name, ignore_errors=True)
            make_folder(note.parent)
            write_json(note, {"made_from": wanted, "finished": False})
        make(part)
        write_json(note, {"made_from": wanted, "finished": True})
        yield part


def is_finished(folder: Path, part: Part, parts: Mapping[str, Part]) -> bool:
    """Whether a part is there and was made from the present settings."""
    found = _read_note(_note(folder, part))
    if not found.get("finished") or not (folder / part.name).is_dir():
        return False
    return found.get("made_from") == fingerprint(part, parts)


def _note(folder: Path, part: Part) -> Path:
    return folder / "notes" / f"{part.name}.json"


def _read_note(path: Path) -> dict[str, Any]:
    """What a part was made from; nothing where the note is missing or damaged."""
    with contextlib.suppress(InputError):
        return read_json(path, "")
    return {}


@contextlib.contextmanager
def held(folder: Path, scale: str) -> Iterator[None]:
    """Takes the study's folder for this process; ``scale`` is one of `SCALES` or `ABLATION`.

    Raises:
      InputError: another process has it, or it holds something else.
    """
    mine = folder / _STUDY_FILE
    if not mine.exists():
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise InputError(
                str(folder), "holds something that is not a study", "give an empty folder"
            )
    elif (before := read_json(mine, "give another folder").get("scale")) not in (*SCALES, ABLATION):
        raise InputError(str(mine), "is not the note of a study", "give another folder")
    elif before != scale:
        other = "" if ABLATION in (before, scale) else f"--scale={before} or "
        raise InputError(
            str(folder), f"is a study of scale {before}", f"give {other}another folder"
        )
    lock = locks.take(folder / ".lock", str(folder), _BUSY)
    try:
        locks.sign(lock)
        if not mine.exists():
            write_json(mine, {"scale": scale})
        yield
    finally:
        os.close(lock)


def _make(part: Part, folder: Path, sources: Sources) -> None:
    if part.kind == "data":
        _make_data(folder / part.name, sources)
    elif part.kind == "test":
        _test(folder, part, sources)
    else:
        _train(folder, part, sources)


def _refuse_changed(part: Part, sources: Sources) -> None:
    """A study is of one content: files that change while it runs would mix two.

    Raises:
      InputError: a file that the part reads is not the one any more that the study began with.
    """
    from pref_jax.data.arena import read_comparisons

    if part.kind == "data" or sources.train is None or sources.test is None:
        return
    name, path = ("test", sources.test) if part.kind == "test" else ("train", sources.train)
    if read_comparisons(path, labelled=True).digest != sources.digests[name]:
        raise InputError(
            path, "has changed since the study began", "type the same command again to go on"
        )


def data_files(folder: Path, sources: Sources) -> dict[str, str]:
    """Paths of the study's rows and ratings."""
    if sources.train is not None:
        assert sources.test is not None and sources.annotations is not None
        return {
            "train": sources.train,
            "test": sources.test,
            "annotations": sources.annotations,
        }
    made = folder / DATA
    return {
        "train": str(made / "train.csv"),
        "test": str(made / "test_labelled.csv"),
        "annotations": str(made / "annotations.jsonl"),
    }


def _make_data(folder: Path, sources: Sources) -> None:
    """Simulates where no file was named; else notes which ones were."""
    if sources.train is not None:
        make_folder(folder)
        files = {**data_files(folder.parent, sources), "properties": sources.properties}
        write_json(folder / "sources.json", {"files": files, "content": sources.digests})
        return
    from pref_jax.data.simulate import simulate, write_labelled_test

    simulate(*sources.rows, 0, folder)
    write_labelled_test(folder)


def _train(folder: Path, part: Part, sources: Sources) -> None:
    assert part.config is not None
    config, files = part.config.copy_and_resolve_references(), data_files(folder, sources)
    with config.unlocked():
        config.data.train = files["train"]
        if part.kind == "rate":
            config.data.annotations = files["annotations"]
            config.data.properties = sources.properties
        for name in part.needs:
            config.model.init_from = str(folder / name)
    train_whole(config, folder / part.name)


def train_whole(config: ConfigDict, workdir: Path) -> None:
    """Trains a part's run, or goes on with it, to its end.

    Raises:
      RunError: it was asked to stop before.
    """
    from pref_jax.training.progress import StopSignals
    from pref_jax.training.run import train
    from pref_jax.training.workdir import Workdir

    remedy = "type the same command again to go on"
    try:
        with StopSignals() as signals, Workdir(workdir) as run:
            result = train(config, run, time.monotonic(), signals)
    except Stopped as stop:
        raise RunError(str(workdir), f"stopped by {stop.signal}", remedy) from None
    if "valid" not in result:
        what = f"stopped by {result['stopped']} at update {result['steps']}"
        raise RunError(str(workdir), what, remedy)


def _test(folder: Path, part: Part, sources: Sources) -> None:
    """The best checkpoint's answers on the test rows."""
    from pref_jax.data.arena import read_comparisons
    from pref_jax.evaluation.baselines import FILE, Baselines
    from pref_jax.evaluation.commands import score
    from pref_jax.evaluation.predictions import Predictions
    from pref_jax.experiment import load_run

    run = load_run(folder / part.needs[0])
    comparisons = read_comparisons(data_files(folder, sources)["test"], labelled=True)
    predictions = Predictions.collect(comparisons, score(run, comparisons))
    output = folder / part.name
    make_folder(output)
    predictions.write(output / PREDICTIONS)
    result = predictions.evaluate(Baselines.load(run.workdir / FILE))
    write_json(output / EVALUATION, {**result, "parameters": run.experiment.count_parameters()})


def parse_rows(words: Sequence[str] | None) -> tuple[int, int] | None:
    """Rows to simulate, as typed: to train on and to test.

    Raises:
      InputError: not two whole numbers above 0.
    """
    if words is None:
        return None
    if len(words) != 2 or not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise InputError(
            "--rows", f"{','.join(words)!r} is not two numbers above 0", "type --rows=640,400"
        )
    return int(words[0]), int(words[1])


def describe_plan(parts: Mapping[str, Part], sources: Sources) -> str:
    """The parts of a study, and how long they take at most on hardware that is often at hand."""
    from pref_jax.data.arena import read_comparisons
    from pref_jax.study.cost import HARDWARE, estimate_hours

    rows = sources.rows[0]
    if sources.train is not None:
        rows = len(read_comparisons(sources.train, labelled=True))

    lines = [f"{len(parts)} parts; training hours on, at most:"]
    names = list(HARDWARE)
    lines.append(f"  {'':<34}" + "".join(f"{name:>12}" for name in names))
    totals = dict.fromkeys(names, 0.0)
    for part in parts.values():
        if part.config is None:
            lines.append(f"  {part.name}")
            continue
        hours = estimate_hours(part.config, rows)
        for name in names:
            totals[name] += hours[name]
        lines.append(f"  {part.name:<34}" + "".join(f"{hours[name]:12.2f}" for name in names))
    lines.append(f"  {'all of it':<34}" + "".join(f"{totals[name]:12.1f}" for name in names))
    lines.append(
        f"Counted: {rows:,} training rows at full length, 40 % of the published peak. Packed rows "
        "are shorter, so it is less. A model that does not fit needs more devices."
    )
    return "\n".join(lines)


def print_summary(folder: Path) -> None:
    """The table of losses and the verdicts on the terminal."""
    content = json.loads((folder / "study.json").read_text())
    print(f"{'model':<32}{'test log loss':>14}  {'95 % interval':<18}{'parameters':>14}")
    for line in content["models"]:
        low, high = line["log_loss_ci95"]
        print(
            f"{line['title']:<32}{line['log_loss']:14.4f}  {f'{low:.4f} to {high:.4f}':<18}"
            f"{line['parameters']:14,d}"
        )
    for name, loss in content["references"].items():
        print(f"{name:<32}{loss:14.4f}")
    print()
    for line in content["claims"]:
        low, high = line["ci95"]
        print(
            f"{line['verdict']:<14}{line['claim']} ({line['difference']:+.4f}, "
            f"{low:+.4f} to {high:+.4f})"
        )
