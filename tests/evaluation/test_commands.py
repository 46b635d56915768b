"""``evaluate`` scores the file that ``predict`` writes."""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pref_jax import command
from pref_jax.evaluation.commands import closest_rows
from pref_jax.evaluation.submission import read_submission

LABELS = ("winner_model_a", "winner_model_b", "winner_tie")
TINY = (
    "--config.model.pretrained=none --config.model.config.num_layers=1"
    " --config.model.config.hidden_size=8 --config.model.config.num_heads=2"
    " --config.model.config.intermediate_size=8 --config.input.max_length=32"
    " --config.train.max_steps=2 --config.train.learning_rate=0.05"
    " --config.logging.tensorboard=false"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Path]:
    """13 rows, one of which no judge could call a tie, and a run trained on them."""
    folder = tmp_path_factory.mktemp("world")
    with open(folder / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "response_a", "response_b", *LABELS, "tie_allowed"])
        for i in range(13):
            texts = (f"Question {i}?", f"Answer {i}. " * (i + 1), f"No idea, {'really ' * i}.")
            winner = [int(i % 3 == label) for label in range(3)]
            cells = [json.dumps([text]) for text in texts]
            writer.writerow([i, *cells, *winner, int(i != 1)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREF_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        rows = folder / "rows.csv"
        line = (
            f"--config={repository}/configs/quickstart.py --workdir={folder}/run {TINY}"
            f" --config.data.train={rows} --config.data.valid={rows}"
        )
        outcome = command.call(repository / "launch" / "train.py", line.split())
        assert outcome.code == 0, outcome
        yield folder


@pytest.mark.parametrize("swap_average", [False, True])
def test_the_log_loss_is_that_of_the_file(
    world: Path, repository: Path, swap_average: bool
) -> None:
    common = [f"--workdir={world}/run", f"--data={world}/rows.csv"]
    if swap_average:
        common.append("--swap_average")
    for name, output in (("predict", "out.csv"), ("evaluate", "out.json")):
        done = command.call(
            repository / "launch" / f"{name}.py", [*common, f"--output={world / output}"]
        )
        assert done.code == 0, done
    _, probabilities = read_submission(world / "out.csv")
    probabilities[1, 2] = 0.0
    probabilities[1] /= probabilities[1].sum()
    by_hand = np.mean([-math.log(probabilities[i, i % 3]) for i in range(13)])
    result = json.loads((world / "out.json").read_text())
    assert result["rows"] == 13
    assert result["log_loss"] == pytest.approx(by_hand, abs=1e-12)


def test_a_share_of_the_rows_is_read_in_both_orders(world: Path, repository: Path) -> None:
    def ask(*flags: str) -> np.ndarray:
        line = [f"--workdir={world}/run", f"--data={world}/rows.csv", f"--output={world}/out.csv"]
        done = command.call(repository / "launch" / "predict.py", [*line, *flags])
        assert done.code == 0, done
        return read_submission(world / "out.csv")[1]

    once, twice = ask(), ask("--swap_average")
    some = ask("--swap_average", "--swap_share=0.3")
    moved = np.flatnonzero(np.abs(twice - once).max(axis=1) > 1e-6)
    assert len(moved) == 13  # or the test would see nothing
    closest = sorted(range(13), key=lambda row: abs(once[row, 0] - once[row, 1]))
    asked = sorted(closest[:4])  # 3.9 rounded up
    np.testing.assert_allclose(some[asked], twice[asked], atol=2e-7)
    rest = sorted(closest[4:])
    np.testing.assert_array_equal(some[rest], once[rest])


def test_close_rows_are_those_with_the_smallest_gap_between_the_answers() -> None:
    probabilities = np.array([[0.9, 0.05, 0.05], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8], [0.5, 0.3, 0.2]])
    assert closest_rows(probabilities, 0.01).tolist() == [1]
    assert closest_rows(probabilities, 0.5).tolist() == [1, 2]
    assert closest_rows(probabilities, 0.6).tolist() == [1, 2, 3]
    assert closest_rows(probabilities, 1.0).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--swap_average", "--swap_share=0"), "above 0"),
        (("--swap_average", "--swap_share=nan"), "out of range"),
        (("--swap_share=0.5",), "add --swap_average"),
    ],
)
@pytest.mark.parametrize("name", ["predict", "evaluate"])
def test_a_share_that_means_nothing_is_refused(
    world: Path, repository: Path, name: str, flags: tuple[str, ...], words: str
) -> None:
    line = [f"--workdir={world}/run", f"--data={world}/rows.csv", f"--output={world}/no.csv"]
    done = command.call(repository / "launch" / f"{name}.py", [*line, *flags])
    assert done.code == 2 and "--swap_share: " in done.stderr and words in done.stderr, done
    assert not (world / "no.csv").exists()


@pytest.mark.parametrize("name", ["predict", "evaluate"])
def test_data_and_run_are_not_written_over(world: Path, repository: Path, name: str) -> None:
    (world / "link.csv").unlink(missing_ok=True)
    (world / "link.csv").symlink_to(world / "rows.csv")
    before = (world / "rows.csv").read_bytes()
    for output, what in (
        ("rows.csv", "is the data itself"),
        ("link.csv", "is the data itself"),
        ("run/result.json", "lies inside the run's folder"),
        ("run/new.json", "lies inside the run's folder"),
    ):
        done = command.call(
            repository / "launch" / f"{name}.py",
            [f"--workdir={world}/run", f"--data={world}/rows.csv", f"--output={world}/{output}"],
        )
        assert done.code == 2 and f"{world}/{output}: {what}; name" in done.stderr, done
    assert (world / "rows.csv").read_bytes() == before


@pytest.mark.parametrize("name", ["predict", "evaluate"])
def test_what_the_run_learned_from_is_not_written_over(
    world: Path, repository: Path, name: str
) -> None:
    before = (world / "rows.csv").read_bytes()
    (world / "other.csv").write_bytes(before)
    done = command.call(
        repository / "launch" / f"{name}.py",
        [f"--workdir={world}/run", f"--data={world}/other.csv", f"--output={world}/rows.csv"],
    )
    assert done.code == 2 and f"{world}/rows.csv: is the data itself; name" in done.stderr, done
    assert (world / "rows.csv").read_bytes() == before
    assert not (world / "run" / "new.json").exists()
