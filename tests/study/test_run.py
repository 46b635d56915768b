"""What is finished stays, what was killed goes on, a change concerns what depends on it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rig import make_rows, write_csv

from pref_jax.data.arena import read_comparisons
from pref_jax.errors import InputError, RunError
from pref_jax.study import report, run
from pref_jax.study.plan import Part, Sources, make_parts

SOURCES = Sources(rows=(100, 50))
Study = Callable[..., list[str]]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Runs a study whose parts write a file each; returns the names of those that were made."""

    def call(
        *changes: str,
        fail_at: str = "",
        sources: Sources = SOURCES,
        scale: str = "tiny",
        seeds: int = 1,
    ) -> list[str]:
        made: list[str] = []

        def make(part: Part, folder: Path, sources: Sources) -> None:
            made.append(part.name)
            (folder / part.name).mkdir(parents=True, exist_ok=True)
            with open(folder / part.name / "times", "a", encoding="utf-8") as file:
                file.write("made\n")
            if part.name == fail_at:
                raise RunError(part.name, "killed", "go on")

        monkeypatch.setattr(run, "_make", make)
        monkeypatch.setattr(report, "make_study_report", lambda folder, *_: folder / "index.html")
        try:
            run.reproduce(scale, str(tmp_path / "study"), sources, seeds=seeds, changes=changes)
        except RunError:
            assert fail_at
        return made

    return call


def names(parts: Sequence[str], *keep: str) -> set[str]:
    return {name for name in parts if any(word in name for word in keep)}


def test_everything_once_and_in_order(study: Study) -> None:
    first = study()
    parts = make_parts("tiny", SOURCES, 1)
    assert first == list(parts) and len(first) == 1 + 2 + 9 + 9
    for number, name in enumerate(first):
        assert set(parts[name].needs) <= set(first[:number])
    assert study() == []


def test_a_killed_part_goes_on_in_its_folder(study: Study, tmp_path: Path) -> None:
    place = "seed0/single_bert-base"
    before = study(fail_at=place)
    assert before[-1] == place
    after = study()
    assert after[0] == place and set(before) & set(after) == {place}
    # It was not started over: what the first attempt wrote was still there.
    assert (tmp_path / "study" / place / "times").read_text() == "made\n" * 2
    assert set(before) | set(after) == set(make_parts("tiny", SOURCES, 1))


def test_a_change_reruns_what_depends_on_it(study: Study, tmp_path: Path) -> None:
    everything = study()
    changed = study("multitask_distilbert:train.epochs=5")
    assert set(changed) == names(everything, "multitask_distilbert", "distilbert_annotated")
    # Made again from nothing, not gone on with.
    assert (tmp_path / "study/seed0/multitask_distilbert/times").read_text() == "made\n"
    llama = study("multitask_distilbert:train.epochs=5", "llama:train.learning_rate=1e-3")
    assert set(llama) == {"seed0/llama", "test/seed0/llama"}
    more = study("multitask_distilbert:train.epochs=5", "llama:train.learning_rate=1e-3", seeds=2)
    assert set(more) == names(list(make_parts("tiny", SOURCES, 2)), "seed1")
    assert set(study(sources=Sources(rows=(100, 51)))) == set(everything)


def test_a_part_whose_folder_was_removed_is_made_again(study: Study, tmp_path: Path) -> None:
    study()
    folder = tmp_path / "study/test/seed0/llama"
    (folder / "times").unlink()
    folder.rmdir()
    (tmp_path / "study/notes/seed0/llama.json").write_text("{half")
    assert study() == ["seed0/llama", "test/seed0/llama"]


def test_what_changes_no_result_reruns_nothing(study: Study) -> None:
    study()
    assert study("*:mesh.data=1", "*:logging.every_steps=7") == []


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        (None, ()),
        ("train", ("data", "seed0", "test")),
        ("test", ("data", "test")),
        ("annotations", ("data", "multitask", "annotated")),
        ("properties", ("data", "multitask", "annotated")),
    ],
)
def test_other_files_rerun_what_reads_their_content(
    study: Study, monkeypatch: pytest.MonkeyPatch, changed: str | None, again: tuple[str, ...]
) -> None:
    monkeypatch.setattr(run, "_refuse_changed", lambda *_: None)  # no such files
    digests = {"train": "1", "test": "2", "annotations": "3", "properties": "4"}
    everything = study(scale="minilm", sources=Sources("a.csv", "b.csv", "c", None, digests))
    moved = {**digests, **({changed: "5"} if changed else {})}
    made = study(scale="minilm", sources=Sources("x/a.csv", "x/b.csv", "x/c", None, moved))
    assert set(made) == names(everything, *again)


def test_files_that_change_while_it_runs_end_it(tmp_path: Path) -> None:
    paths = {name: str(tmp_path / f"{name}.csv") for name in ("train", "test")}
    for path in paths.values():
        write_csv(Path(path), make_rows(), labels=True)
    digests = {name: read_comparisons(path).digest for name, path in paths.items()}
    sources = Sources(**paths, annotations="A.jsonl", digests=digests)
    parts = make_parts("minilm", sources, 1).values()
    for part in parts:
        run._refuse_changed(part, sources)
    exchanged = {"winner_model_a": 0, "winner_model_b": 1}
    for changed, kinds in (("test", {"test"}), ("train", {"test", "train", "rate"})):
        write_csv(Path(paths[changed]), make_rows(r0=exchanged), labels=True)
        refused = set()
        for part in parts:
            try:
                run._refuse_changed(part, sources)
            except InputError as error:
                assert "has changed since the study began" in str(error)
                refused.add(part.kind)
        assert refused == kinds


def test_wrong_use_is_one_line(study: Study, tmp_path: Path) -> None:
    for change, named in (
        ("nobody:train.epochs=1", "fits no run"),
        ("llama:train.epoch=1", "did you mean epochs"),
        ("llama:train.epochs=soon", "train.epochs"),
        ("llama", "is not PATTERN:field=value"),
    ):
        with pytest.raises(InputError, match=named):
            study(change)
    study()
    with pytest.raises(InputError, match="scale tiny"):
        study(scale="minilm")
    with pytest.raises(InputError, match="give --data, --test and --annotations together"):
        run.find_sources("tiny", "a.csv", None, None, None, None)
    for words in (["1"], ["0", "5"], ["a", "b"], ["1", "2", "3"]):
        with pytest.raises(InputError, match="--rows"):
            run.parse_rows(words)
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not a study"):
        run.reproduce("tiny", str(foreign), SOURCES, seeds=1)
