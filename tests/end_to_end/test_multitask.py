"""Ratings to a multi-task run, and from its encoder to preferences with frozen layers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from rig import REPOSITORY, TINY, call, finish, read_arrays, read_lines, start, wait_for

from pref_jax.annotation.properties import DEFAULT_FILE, load_properties
from pref_jax.annotation.ratings import read_ratings
from pref_jax.config_file import load
from pref_jax.data.arena import read_comparisons
from pref_jax.experiment import Experiment, find_backbone, load_run
from pref_jax.training.goals import make_goal, read_data

RATE = (
    *TINY[1:],
    f"--config={REPOSITORY}/configs/multitask_bert.py",
    "--config.model.pretrained=none",
    "--config.model.config.num_layers=4",
    "--config.input.budget=(0.1,0.9)",
    "--config.train.learning_rate=3e-3",
    "--config.train.warmup_steps=2",
    "--config.train.max_steps=40",
    "--config.eval.every_steps=20",
    "--config.checkpoint.every_steps=20",
)


DISTIL = "--config.model.family=distilbert"


@pytest.fixture(scope="module")
def arguments(arena: Path) -> tuple[str, ...]:
    return (
        *RATE,
        f"--config.data.train={arena}/train.csv",
        f"--config.data.annotations={arena}/annotations.jsonl",
    )


@pytest.fixture(scope="module")
def rated(arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("multitask") / "rated"
    outcome = call("train", *arguments, f"--workdir={workdir}")
    assert outcome.code == 0, outcome
    return workdir


def test_both_responses_of_a_query_stay_on_one_side(arena: Path) -> None:
    config = load(
        f"{REPOSITORY}/configs/multitask_bert.py",
        [
            ("model.pretrained", "none"),
            ("data.train", f"{arena}/train.csv"),
            ("data.annotations", f"{arena}/annotations.jsonl"),
        ],
    )
    data = read_data(config)
    experiment = Experiment(config, find_backbone(config, data.train))
    goal = make_goal(experiment, data)
    groups = [
        set(data.train.groups[numbers // 2].tolist())
        for numbers in (goal.train_numbers, goal.valid_numbers)
    ]
    assert all(groups) and not groups[0] & groups[1]
    for numbers in (goal.train_numbers, goal.valid_numbers):
        assert set(Counter(numbers // 2).values()) == {2}
    # Each sample has its own response's ratings.
    ratings = read_ratings(f"{arena}/annotations.jsonl", load_properties())
    at = {place: n for n, place in enumerate(zip(ratings.ids, ratings.sides, strict=True))}
    samples, _ = goal.make_samples()
    ids = data.train.ids
    for sample in goal.train_numbers[:40]:
        values = ratings.values[at[str(ids[sample // 2]), "ab"[sample % 2]]]
        np.testing.assert_array_equal(samples.labels[sample], values)


def test_a_multi_task_run_is_judged_beside_majority_and_length(rated: Path, arena: Path) -> None:
    result = json.loads((rated / "result.json").read_text())
    valid = result["valid"]
    assert set(valid["properties"]) == set(load_properties().rating_names)
    assert result["baselines"]["majority"] == valid["baselines"]["majority"]["log_loss"]
    for part in valid["properties"].values():
        assert 0 <= part["accuracy"] <= 1 and set(part["baselines"]) == {"majority", "length"}
    last = [row for row in read_lines(rated) if row["split"] == "valid"][-1]
    assert last["loss"] == pytest.approx(valid["log_loss"])
    assert last["loss"] < 1.386  # ln 4: less than knowing nothing
    outcome = call(
        "evaluate",
        f"--workdir={rated}",
        f"--data={arena}/train.csv",
        f"--annotations={arena}/annotations.jsonl",
        f"--output={rated.parent}/all.json",
    )
    assert outcome.code == 0, outcome
    everything = json.loads((rated.parent / "all.json").read_text())
    assert everything["rows"] == 600 and everything["ratings"] == 12_000
    assert "non_repetitive" in outcome.stdout


def test_predicted_ratings_can_be_learned(rated: Path, arena: Path, tmp_path: Path) -> None:
    output = tmp_path / "ratings.jsonl"
    flags = (f"--workdir={rated}", f"--data={arena}/train.csv", f"--output={output}")
    assert call("predict", *flags).code == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    ids = read_comparisons(f"{arena}/train.csv").ids
    assert [(line["id"], line["side"]) for line in lines] == [
        (str(name), side) for name in ids for side in "ab"
    ]
    # The loss of the file that was written is less than that of its own majority.
    ratings = read_ratings(output, load_properties())
    assert ratings.values.min() >= 0
    outcome = call(
        "train",
        *RATE,
        f"--config.data.train={arena}/train.csv",
        f"--config.data.annotations={output}",
        "--config.train.max_steps=2",
        f"--workdir={tmp_path}/again",
    )
    assert outcome.code == 0, outcome


def test_annotated_presets_keep_the_bits_of_three_layers(
    rated: Path, arena: Path, tmp_path: Path
) -> None:
    for name in ("single", "parallel"):
        workdir = tmp_path / name
        outcome = call(
            "train",
            f"--config={REPOSITORY}/configs/{name}_bert.py:annotated",
            f"--config.model.init_from={rated}",
            f"--config.data.train={arena}/train.csv",
            "--config.input.max_length=32",
            "--config.train.batch_size=8",
            "--config.train.max_steps=2",
            "--config.train.warmup_steps=0",
            "--config.train.learning_rate=1e-3",
            "--config.logging.tensorboard=false",
            f"--workdir={workdir}",
        )
        assert outcome.code == 0, outcome
        before, after = (
            traverse_util.flatten_dict(jax.device_get(load_run(folder).params), sep="/")
            for folder in (rated, workdir)
        )
        frozen = tuple(f"encoder/layer_{layer}/" for layer in range(3))
        for path in (path for path in before if path.startswith("encoder/")):
            same = np.array_equal(before[path], after[path])
            # The bias of keys adds the same to a whole row of the softmax: no gradient.
            assert same == path.startswith(frozen) or path.endswith("key/bias"), path
        assert after["head/kernel"].shape == (32 * (2 if name == "parallel" else 1), 3)
        # Nothing of them in the checkpoint: no weights, no moments.
        kept = read_arrays(workdir, 2)
        assert not [path for path in kept if "layer_0" in path or "layer_2" in path]
        assert [path for path in kept if "layer_3" in path]


def test_a_killed_multi_task_run_goes_on_to_the_same_bits(
    rated: Path, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    process = start(log, "train", *arguments, f"--workdir={tmp_path}/run")
    wait_for(lambda: (tmp_path / "run/checkpoints/20/manifest.json").exists(), process, log)
    process.kill()
    process.join()
    finish(start(log, "train", *arguments, f"--workdir={tmp_path}/run"), log)
    # The straight run had eight devices: it agrees to rounding.
    ours, straight = read_lines(tmp_path / "run"), read_lines(rated)
    assert [row["step"] for row in ours] == [row["step"] for row in straight]
    for mine, theirs in zip(ours, straight, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


def test_another_set_of_properties_makes_other_heads(arena: Path, tmp_path: Path) -> None:
    text = DEFAULT_FILE.read_text()
    head, *parts = text.split("[[ratings]]")
    properties = tmp_path / "three.toml"
    properties.write_text("[[ratings]]".join([head, *parts[:3]]).replace('"preference-20"', '"x"'))
    names = load_properties(properties).rating_names
    annotations = tmp_path / "three.jsonl"
    lines = [json.loads(line) for line in (arena / "annotations.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["ratings"] = {name: line["ratings"][name] for name in names[number % 2 :]}
    annotations.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = (
        *RATE,
        f"--config.data.train={arena}/train.csv",
        f"--config.data.annotations={annotations}",
        "--config.train.max_steps=2",
        f"--workdir={tmp_path}/run",
    )
    wrong = call("train", *flags)
    assert wrong.code == 0, wrong  # the built-in set has these names too: 17 are missing everywhere
    other = (*flags[:-1], f"--workdir={tmp_path}/other", f"--config.data.properties={properties}")
    assert call("train", *other).code == 0
    result = json.loads((tmp_path / "other/result.json").read_text())
    assert set(result["valid"]["properties"]) == set(names)
    assert load_run(tmp_path / "other").params["head"]["kernel"].shape == (32, 12)
    # The run keeps its own copy of the set.
    properties.unlink()
    output = tmp_path / "out.jsonl"
    done = call(
        "predict",
        f"--workdir={tmp_path}/other",
        f"--data={arena}/test.csv",
        f"--output={output}",
    )
    assert done.code == 0, done
    assert set(json.loads(output.read_text().splitlines()[0])["ratings"]) == set(names)


def test_heads_that_nobody_rated_are_named(
    rated: Path, arena: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load(
        f"{REPOSITORY}/configs/multitask_bert.py",
        [("model.pretrained", "none"), ("data.train", f"{arena}/train.csv")],
    )
    some = tmp_path / "some.jsonl"
    with open(arena / "annotations.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    for line in lines:
        line["ratings"].pop("polite")
        line["ratings"]["funny"] = None
    some.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path, said in ((some, "rated by polite, funny"), (arena / "annotations.jsonl", "")):
        config.data.annotations = str(path)
        data = read_data(config)
        caplog.clear()
        make_goal(Experiment(config, find_backbone(config, data.train)), data)
        assert said in caplog.text and ("no training response" in caplog.text) == bool(said)


def test_what_makes_no_sense_is_one_line(rated: Path, arena: Path, tmp_path: Path) -> None:
    nobody = tmp_path / "nobody.jsonl"
    nobody.write_text(json.dumps({"id": "x", "side": "a", "ratings": {"polite": 1}}) + "\n")
    unknown = tmp_path / "unknown.jsonl"
    unknown.write_text(json.dumps({"id": "x", "side": "a", "ratings": {"kind": 1}}) + "\n")
    out = f"--output={tmp_path}/out"
    data = f"--data={arena}/train.csv"
    new = (*RATE, f"--config.data.train={arena}/train.csv", f"--workdir={tmp_path}/new")
    labels = (f"--config.data.annotations={arena}/annotations.jsonl",)
    for arguments, named in (
        (("export", f"--workdir={rated}", out), "knows no preferences"),
        (("report", rated, out), "multi-task run"),
        (("evaluate", f"--workdir={rated}", data), "--annotations"),
        (("evaluate", f"--workdir={rated}", data, f"--annotations={nobody}"), "rates no response"),
        (("predict", f"--workdir={rated}", data, out, "--swap_average"), "one response"),
        (("train", *new), "--config.data.annotations"),
        (("train", *new, f"--config.data.annotations={nobody}"), "rates no response"),
        (("train", *new, f"--config.data.annotations={unknown}"), "unknown.jsonl:1"),
        (("train", *new, f"--config.data.annotations={tmp_path}/none"), "no such file"),
        (("train", *new, *labels, f"--config.model.init_from={rated}", DISTIL), "is a run of a"),
    ):
        outcome = call(*arguments)
        assert outcome.code == 2 and outcome.stderr.count("\n") == 1, outcome
        assert named in outcome.stderr
    assert not (tmp_path / "out").exists()
