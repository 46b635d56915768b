"""Variants on the same folds: what the table says, what is run again, what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from rig import REPOSITORY, call, make_rows, read_csv, write_csv
from sklearn.metrics import log_loss

from pref_jax import config_file
from pref_jax.data.arena import read_comparisons
from pref_jax.errors import InputError
from pref_jax.study import ablation
from pref_jax.study.embeddings import fit_and_predict, load_vectors, save_vectors
from pref_jax.study.folds import check_folds, write_folds
from pref_jax.study.plan import Part
from pref_jax.study.variants import STAGES, make_parts, make_possible_parts, read_variants

LIST = """
[[variant]]
name = "base"
kind = "base"
[[variant]]
name = "lengths"
kind = "option"
config = { "model.symmetric" = true, "model.length_features" = true }
[[variant]]
name = "calibrate"
kind = "option"
read = "calibrate"
[[variant]]
name = "both_orders"
kind = "option"
read = "swap_average"
[[variant]]
name = "embeddings"
kind = "reference"
read = "embeddings"
"""

TAUGHT = """
[[variant]]
name = "taught"
kind = "set"
teacher = true
rows = "all"
config = { "train.distill_weight" = 1.0 }
"""


def typed(folder: Path, *flags: str) -> list[str]:
    """The command on a tiny model; the folder has rows.csv and variants.toml."""
    return [
        f"--config={REPOSITORY}/configs/ablation.py",
        "--config.model.pretrained=none",
        *(f"--config.model.config.{size}" for size in ("num_layers=1", "hidden_size=16")),
        *(f"--config.model.config.{size}" for size in ("num_heads=2", "intermediate_size=16")),
        *("--config.input.tokenizer=tokenizers", "--config.train.microbatch_size=4"),
        *("--config.train.learning_rate=3e-2", "--config.train.warmup_steps=0"),
        *("--config.train.batch_size=8", "--max_length=32", "--epochs=3"),
        *(f"--data={folder}/rows.csv", f"--list={folder}/variants.toml"),
        *(f"--workdir={folder}/ablation", f"--adversarial={folder}/adversarial.csv"),
        *flags,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rows, 8 of them without ties: the longer answer wins; prompts come in pairs."""
    place = tmp_path_factory.mktemp("ablation")
    rows = []
    for number in range(48):
        longer, tie = number % 2, number % 6 == 5
        could_tie = number < 40
        winner = 2 if tie and could_tie else longer
        long, short = "word " * 20, "word"
        rows.append(
            {
                "id": f"r{number}",
                # The last four repeat prompts of rows that could be a tie.
                "prompt": json.dumps([f"Question {number // 2 % 22}?"]),
                "response_a": json.dumps([short if longer else long]),
                "response_b": json.dumps([long if longer else short]),
                **{
                    name: int(winner == at)
                    for at, name in enumerate(("winner_model_a", "winner_model_b", "winner_tie"))
                },
                "tie_allowed": int(could_tie),
                "source": "people" if could_tie else "others",
            }
        )
    write_csv(place / "rows.csv", rows, labels=True, more=("tie_allowed", "source"))
    decided = [row for row in rows if not row["winner_tie"]][:10]
    write_csv(place / "adversarial.csv", decided, labels=True)
    (place / "variants.toml").write_text(LIST)
    return place


@pytest.fixture(scope="module")
def table(folder: Path) -> dict:
    outcome = call("ablate", *typed(folder))
    assert outcome.code == 0, outcome
    assert "| lengths |" in outcome.stdout
    return json.loads((folder / "ablation/screen.json").read_text())


def read_answers(folder: Path, name: str) -> list[dict[str, str]]:
    places = [folder / f"ablation/screen/{name}/seed0_fold{fold}" for fold in range(2)]
    return [row for place in places for row in read_csv(place / "valid_predictions.csv")]


NAMES = ("base", "lengths", "calibrate", "both_orders", "embeddings")


def test_the_table_is_that_of_the_answers(folder: Path, table: dict) -> None:
    lines = {line["name"]: line for line in table["variants"]}
    assert tuple(lines) == NAMES and table["rows"] == 40
    losses = {}
    for name, line in lines.items():
        rows = read_answers(folder, name)
        assert {row["id"] for row in rows} == {f"r{number}" for number in range(40)}
        values = [
            [float(row[f"winner_{of}"]) for of in ("model_a", "model_b", "tie")] for row in rows
        ]
        labels = [int(row["label"]) for row in rows]
        losses[name] = log_loss(labels, np.array(values), labels=[0, 1, 2])
        assert line["log_loss"] == pytest.approx(losses[name], abs=1e-6)
        assert line["log_loss_ci95"][0] < line["log_loss"] < line["log_loss_ci95"][1]
    assert len({round(loss, 6) for loss in losses.values()}) == len(NAMES)
    for name in NAMES[1:]:
        gap = losses[name] - losses["base"]
        assert lines[name]["difference"] == pytest.approx(gap, abs=1e-6)
        low, high = lines[name]["difference_ci95"]
        assert low <= gap <= high
    assert all(line["seconds"] > 0 for line in lines.values())
    assert lines["both_orders"]["passes"] == 2 and lines["base"]["passes"] == 1


def test_the_best_answer_the_adversarial_rows(table: dict) -> None:
    lines = {line["name"]: line for line in table["adversarial"]}
    assert set(lines) == {"base", "lengths", "length only"}
    assert all(line["rows"] == 10 for line in lines.values())
    # The longer answer wins here too.
    assert lines["length only"]["accuracy"] > 0.9 and lines["lengths"]["accuracy"] > 0.9
    assert lines["length only"]["log_loss"] < np.log(2)


@pytest.mark.skipif("PREF_JAX_LONG_TESTS" not in os.environ, reason="six trainings more")
def test_a_teacher_has_not_seen_what_it_teaches(folder: Path, table: dict) -> None:
    (folder / "taught.toml").write_text(LIST + TAUGHT)
    flags = typed(folder, f"--list={folder}/taught.toml", "--variants=taught")
    outcome = call("ablate", *flags)
    assert outcome.code == 0, outcome
    screen = folder / "ablation/screen"
    for fold in range(2):
        said = read_csv(screen / f"taught/seed0_fold{fold}.teacher.csv")
        train = read_csv(screen / f"folds/train{fold}.csv")
        assert {row["id"] for row in said} == {row["id"] for row in train}
        halves = [
            read_csv(screen / f"teacher{half}/seed0_fold{fold}/out_of_fold.csv")
            for half in range(2)
        ]
        assert len(said) == sum(map(len, halves)) and all(halves)
    lines = json.loads((folder / "ablation/screen.json").read_text())["variants"]
    assert [line["name"] for line in lines] == [*NAMES, "taught"]
    seconds = {line["name"]: line["seconds"] for line in lines}
    assert seconds["taught"] > seconds["base"] > 0


def test_teachers_learn_from_the_training_rows_of_their_fold(recipe: ConfigDict) -> None:
    variants = read_variants()
    parts = make_parts(
        recipe, [variants["base"], variants["distilled"]], STAGES["screen"], "digest"
    )
    for fold in range(2):
        student = parts[f"screen/distilled/seed0_fold{fold}"]
        halves = [parts[name] for name in student.needs[1:]]
        assert [part.config.data.fold for part in halves if part.config] == [0, 1]
        for part in halves:
            assert part.config is not None and part.config.data.folds == 2
            assert part.settings["fold"] == fold and part.settings["rows"] == "tie"
            assert part.needs == ("screen/folds",)


DAMAGED = [
    ("base/seed0_fold0/result.json", b"{}", "has no number train_seconds"),
    ("base/seed0_fold0/result.json", b"[]", "is not a JSON object"),
    ("base/seed0_fold0/baselines.json", None, "is missing"),
    ("base/seed0_fold1/baselines.json", b"{}", "is not a file of fitted baselines"),
    ("base/seed0_fold1/valid_predictions.csv", None, "No such file"),
    ("base/seed0_fold0/valid_predictions.csv", -1, "is not of the rows of its fold"),
    ("calibrate/seed0_fold1/valid_predictions.csv", -1, "is not of the rows of its fold"),
    ("lengths/seed0_fold0/valid_predictions.csv", b"id", "has no rows"),
    ("embeddings/seed0_fold1/evaluation.json", b'{"seconds": "5"}', "has no number seconds"),
]


@pytest.mark.parametrize(("name", "content", "words"), DAMAGED)
def test_a_damaged_part_says_how_to_mend_it(
    folder: Path, table: dict, tmp_path: Path, name: str, content: bytes | int | None, words: str
) -> None:
    shutil.copytree(folder / "ablation", tmp_path / "ablation")
    path = tmp_path / "ablation/screen" / name
    if content is None:
        path.unlink()
    elif isinstance(content, int):
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:content]))
    else:
        path.write_bytes(content)
    flags = typed(folder, f"--workdir={tmp_path}/ablation")
    outcome = call("ablate", *flags)
    assert outcome.code == 2 and outcome.stderr.startswith(f"error: {path}: {words}"), outcome
    assert f"; remove {path.parent} and type the same command again" in outcome.stderr
    if not name.startswith(("base", "lengths")):  # the others train nothing
        shutil.rmtree(path.parent)
        assert call("ablate", *flags).code == 0
        lines = json.loads((tmp_path / "ablation/screen.json").read_text())["variants"]
        assert [line["log_loss"] for line in lines] == pytest.approx(
            [line["log_loss"] for line in table["variants"]], abs=1e-6
        )


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_damaged_vectors_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "vectors.npz"
    save_vectors(path, ["a", "b"], np.ones((2, 3, 4), np.float32))
    assert load_vectors(path, ["b"]).shape == (1, 3, 4)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"vectors.npz: .*; remove {tmp_path} and type"):
        load_vectors(path, ["a", "c"])


def test_what_is_finished_is_not_run_again(
    folder: Path, table: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    make = ablation._make

    def note(part: Part, *rest: object) -> None:
        made.append(part.name)
        make(part, *rest)

    monkeypatch.setattr(ablation, "_make", note)
    assert call("ablate", *typed(folder)).code == 0 and made == []
    # Fewer variants named: the table still holds all that are finished.
    assert call("ablate", *typed(folder, "--variants=lengths")).code == 0 and made == []
    assert json.loads((folder / "ablation/screen.json").read_text()) == table
    note_file = folder / "ablation/notes/screen/lengths/seed0_fold1.json"
    content = json.loads(note_file.read_text())
    note_file.write_text(json.dumps({**content, "finished": False}))  # as if killed
    assert call("ablate", *typed(folder, "--max_hours=0")).code == 0 and made == []
    assert call("ablate", *typed(folder)).code == 0 and made == ["screen/lengths/seed0_fold1"]


def test_no_prompt_is_on_both_sides(folder: Path, tmp_path: Path) -> None:
    rows = read_csv(folder / "rows.csv")
    # Six rows whose prompts only the column says are the same.
    for number, row in enumerate(rows):
        row["prompt_group"] = "same" if number in (0, 8, 14, 20, 30, 46) else ""
    more = ("tie_allowed", "source", "prompt_group")
    path = write_csv(tmp_path / "rows.csv", rows, labels=True, more=more)
    write_folds(read_comparisons(path, labelled=True), 2, tmp_path / "folds")
    held_out: list[str] = []
    for fold in range(2):
        parts = {
            name: read_csv(tmp_path / f"folds/{name}{fold}.csv")
            for name in ("train", "all", "valid")
        }
        valid = parts["valid"]
        assert {row["tie_allowed"] for row in valid} == {"1"}
        assert {row["tie_allowed"] for row in parts["all"]} == {"0", "1"}
        assert [row for row in parts["all"] if row["tie_allowed"] == "1"] == parts["train"]
        for name in ("train", "all"):
            assert not {row["prompt"] for row in valid} & {row["prompt"] for row in parts[name]}
        sides = {name for name, part in parts.items() if any(row["prompt_group"] for row in part)}
        assert sides in ({"valid"}, {"train", "all"})
        held_out += [row["id"] for row in valid]
    assert sorted(held_out) == sorted(row["id"] for row in rows[:40])


@pytest.mark.parametrize(
    ("labels", "groups"),
    [
        ([0, 1, 2, 0, 1, 2], [7, 7, 8, 8, 9, 9]),
        ([0, 1, 2, 0, 1, 2], [7, 7, 7, 8, 8, 8]),
        ([0, 1, 2, 0, 1, 2], [7] * 6),
        ([0, 0, 0, 1, 1, 1], [7, 7, 7, 8, 8, 8]),  # either half knows one label
        ([0, 0, 0, 0, 0, 1], [7, 7, 8, 8, 9, 9]),
        ([1] * 6, [7, 7, 8, 8, 9, 9]),
    ],
)
def test_the_regression_answers_with_few_prompts(labels: list[int], groups: list[int]) -> None:
    features = np.random.default_rng(0).normal(size=(10, 13))
    answers = fit_and_predict(features[:6], np.array(labels), np.array(groups), features[6:])
    assert answers.shape == (4, 3) and np.isfinite(np.log(answers)).all()
    np.testing.assert_allclose(answers.sum(axis=1), 1.0)
    seldom = [label for label in range(3) if label not in labels]
    assert (answers[:, seldom] > 0.01).all() and (answers[:, seldom] < 0.1).all()


@pytest.mark.parametrize("kind", ["train", "all", "valid"])
@pytest.mark.parametrize("missing", [False, True])
def test_folds_that_have_changed_are_noticed(
    folder: Path, tmp_path: Path, kind: str, missing: bool
) -> None:
    place = tmp_path / "folds"
    write_folds(read_comparisons(folder / "rows.csv", labelled=True), 2, place)
    written = {path.name: path.read_bytes() for path in place.iterdir()}
    check_folds(place, 0)
    check_folds(place, 1)
    changed = place / f"{kind}1.csv"
    if missing:
        changed.unlink()
    else:
        changed.write_bytes(b"".join(changed.read_bytes().splitlines(keepends=True)[:-1]))
    check_folds(place, 0)
    with pytest.raises(InputError) as caught:
        check_folds(place, 1)
    assert caught.value.where == str(changed)
    what = "is missing" if missing else "has changed since the folds were made"
    assert caught.value.what == what
    assert caught.value.remedy == f"remove its folder {place} and type the same command again"
    # Folds are made again as they were: what was trained before on them stays comparable.
    shutil.rmtree(place)
    write_folds(read_comparisons(folder / "rows.csv", labelled=True), 2, place)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == written


def test_no_part_reads_folds_that_have_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "ablation/screen/folds/valid1.csv"
    trained: list[str] = []

    def train(config: ConfigDict, workdir: Path) -> None:
        trained.append(workdir.name)
        workdir.mkdir(parents=True)
        changed.write_bytes(changed.read_bytes() + b"\n")

    monkeypatch.setattr(ablation, "train_whole", train)
    outcome = call("ablate", *typed(folder, f"--workdir={tmp_path}/ablation"))
    assert outcome.code == 2 and trained == ["seed0_fold0"]
    assert f"error: {changed}: has changed since the folds were made" in outcome.stderr


@pytest.fixture
def recipe() -> ConfigDict:
    return config_file.load(f"{REPOSITORY}/configs/ablation.py")


def test_every_variant_goes_with_a_recipe(recipe: ConfigDict) -> None:
    variants = read_variants()
    decoder = config_file.load(f"{REPOSITORY}/configs/ablation.py:smollm2")
    for stage in STAGES.values():
        fitting = set()
        for config in (recipe, decoder):
            parts, refused = make_possible_parts(config, variants, stage, "digest")
            names = list(parts)
            for number, part in enumerate(parts.values()):
                assert set(part.needs) <= set(names[:number])
            for variant in variants.keys() - refused.keys():
                assert f"{stage.name}/{variant}/seed0_fold{stage.folds - 1}" in parts
            fitting |= variants.keys() - refused.keys()
        assert fitting == variants.keys()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--variants=symetric",), "--variants: there is no variant 'symetric'"),
        (("--stage=confirm", "--workdir={folder}/new"), "run --stage=screen first"),
        (("--list={folder}/rows.csv",), "is not TOML"),
        (("--data={folder}/never.csv",), "no row could be a tie"),
        (("--adversarial={folder}/rows.csv",), "a row is a tie"),
        (("--workdir={folder}",), "is not a study"),
        (("--folds=1000",), "different prompts whose rows could be a tie, too few for 1000 folds"),
        (("--epochs=0",), "--epochs: 0 is out of range"),
        (("--epochs=nan",), "--epochs: nan is out of range"),
        (("--variants=",), "--variants: it is empty"),
        (("--max_hours=nan",), "--max_hours: nan is not a number"),
    ],
)
def test_wrong_use_is_one_line(folder: Path, flags: tuple[str, ...], words: str) -> None:
    rows = [
        {**row, "winner_tie": 0, "winner_model_a": 1, "winner_model_b": 0, "tie_allowed": 0}
        for row in make_rows().copy()
    ]
    write_csv(folder / "never.csv", rows, labels=True, more=("tie_allowed",))
    outcome = call("ablate", *typed(folder, *(flag.format(folder=folder) for flag in flags)))
    assert outcome.code == 2 and words in outcome.stderr, outcome
    assert outcome.stderr.count("error:") == 1


def decoder(folder: Path, *flags: str) -> list[str]:
    """The command on a decoder; it trains nothing."""
    return [
        f"--config={REPOSITORY}/configs/llama_lora.py:tiny",
        *("--max_length=384", f"--data={folder}/rows.csv", "--max_hours=0"),
        *flags,
    ]


def test_what_does_not_go_with_the_recipe_is_left_out_and_said(
    folder: Path, tmp_path: Path
) -> None:
    outcome = call("ablate", *decoder(folder, f"--workdir={tmp_path}/ablation"))
    assert outcome.code == 0, outcome
    left_out = [line for line in outcome.stdout.splitlines() if line.startswith("left out: ")]
    for words in ("variant cls_mean, model.pooling: ", "variant embeddings: a decoder embeds no"):
        assert sum(words in line for line in left_out) == 1
    assert not any("variant ema" in line for line in left_out)


@pytest.mark.parametrize(
    "config",
    [
        *('{ "train.emma" = 0.9 }', '{ "train.ema" = 2.0 }', '{ "train.ema" = "much" }'),
        '{ "train.layer_decay" = 0.0 }',
    ],
)
@pytest.mark.parametrize("stage", ["screen", "confirm"])
def test_a_wrong_variant_of_ones_own_is_not_left_out(
    folder: Path, tmp_path: Path, config: str, stage: str
) -> None:
    (tmp_path / "list.toml").write_text(
        LIST + f'[[variant]]\nname = "x"\nkind = "option"\nconfig = {config}\n'
    )
    flags = typed(folder, f"--list={tmp_path}/list.toml", f"--workdir={tmp_path}/ablation")
    outcome = call("ablate", *flags, f"--stage={stage}")
    assert outcome.code == 2 and "error: variant x, train." in outcome.stderr, outcome
    assert not (tmp_path / "ablation/screen").exists()
    # Who names others can train them.
    assert call("ablate", *flags, "--variants=lengths", "--max_hours=0").code == 0


def write_screen(folder: Path, *names: str) -> None:
    folder.mkdir()
    (folder / "study.json").write_text('{"scale": "ablation"}')
    lines = [{"name": name, "kind": "option", "log_loss": 1.0} for name in names]
    (folder / "screen.json").write_text(json.dumps({"variants": lines}))


def test_confirm_adds_the_regression_where_it_can(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shorter.toml").write_text(LIST[: LIST.rindex("[[variant]]")])
    asked: list[str] = []

    def ask(_: Path, wanted: dict[str, Part], *rest: object) -> tuple[()]:
        asked.extend(wanted)
        return ()

    monkeypatch.setattr(ablation, "make_missing", ask)
    for flags, expected in (
        (typed(folder), True),
        (typed(folder, f"--list={tmp_path}/shorter.toml"), False),
        (decoder(folder, "--max_hours=1"), False),
    ):
        asked.clear()
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        write_screen(place, "base")
        outcome = call("ablate", *flags, "--stage=confirm", f"--workdir={place}")
        assert outcome.code == 0, outcome
        assert ("confirm/embeddings/seed0_fold4" in asked) is expected


@pytest.mark.parametrize(
    "variants",
    [3, None, [3], [{"name": "ema", "kind": "option"}], [{"name": [], "kind": 1, "log_loss": 1}]],
)
def test_a_damaged_screen_is_named(folder: Path, tmp_path: Path, variants: object) -> None:
    write_screen(tmp_path / "ablation")
    path = tmp_path / "ablation/screen.json"
    path.write_text(json.dumps({"variants": variants}))
    outcome = call("ablate", *typed(folder, "--stage=confirm", f"--workdir={path.parent}"))
    words = f"error: {path}: is not a table of variants; run --stage=screen again"
    assert outcome.code == 2 and words in outcome.stderr, outcome


def test_a_screen_of_another_list_is_named(folder: Path, tmp_path: Path) -> None:
    write_screen(tmp_path / "ablation", "gone")
    flags = typed(folder, "--stage=confirm", f"--workdir={tmp_path}/ablation")
    outcome = call("ablate", *flags)
    words = f"error: {tmp_path}/ablation/screen.json: the variant 'gone' is not in the list"
    assert outcome.code == 2 and words in outcome.stderr, outcome


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('config = { "data.swapp" = "both" }', "variant x, data.swapp: unknown field"),
        ('config = { "train.epochs" = 2 }', "give --epochs"),
        ('config = { "model.symmetric" = false }', "variant x, config: the recipe is so already"),
        ('rows = "some"', "rows is 'some'"),
        ('read = "calibrate"\nconfig = { "train.ema" = 0.9 }', "trains nothing; leave out config"),
        ('read = "embeddings"\nrows = "all"', "trains nothing; leave out rows"),
        ("colour = 3", "has not the right fields"),
        ('[[variant]]\nname = "x"\nkind = "option"', "no new folder"),
    ],
)
def test_a_wrong_variant_is_named(
    tmp_path: Path, recipe: ConfigDict, entry: str, words: str
) -> None:
    path = tmp_path / "list.toml"
    start = '[[variant]]\nname = "base"\nkind = "base"\n[[variant]]\nname = "x"\nkind = "option"\n'
    path.write_text(start + entry)
    with pytest.raises(InputError, match=words):
        variants = read_variants(str(path))
        make_parts(recipe, list(variants.values()), STAGES["screen"], "digest")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("variant = 5", "variant is no list of tables"),
        ("variant = [5]", "variant 1: has not the right fields"),
        ('variant = "base"', "variant is no list of tables"),
        ("[variant]\nname = 3", "variant is no list of tables"),
        ("name = 5", "name is 5"),
        ("kind = ['option']", r"kind is \['option'\]"),
        ("config = 'abc'", "config is 'abc'"),
        ("config = []", r"config is \[\]"),
        ("teacher = 'no'", "teacher is 'no'"),
        ("teacher = 0", "teacher is 0"),
        ("rows = 1", "rows is 1"),
        ("read = [1]", r"read is \[1\]"),
        *(
            (f'name = "{name}"', "is no new folder")
            for name in ("", ".", "..", "a/b", "folds", "vectors", "teacher0", "teacher1")
        ),
        (r'name = "a\u0000b"', "is no new folder"),
        (f'name = "{"long" * 60}"', "is no new folder"),
    ],
)
def test_a_list_of_wrong_types_is_one_line(tmp_path: Path, entry: str, words: str) -> None:
    fields = {"name": '"x"', "kind": '"option"'}
    text = entry
    if not entry.startswith(("variant", "[")):
        name, value = entry.split(" = ")
        lines = [f"{field} = {said}" for field, said in (fields | {name: value}).items()]
        text = "\n".join(["[[variant]]", *lines])
    path = tmp_path / "list.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        read_variants(str(path))
    assert caught.value.where.startswith(str(path))


def test_base_comes_first_wherever_it_stands(tmp_path: Path, recipe: ConfigDict) -> None:
    path = tmp_path / "list.toml"
    path.write_text(TAUGHT + LIST)
    variants = read_variants(str(path))
    assert list(variants) == ["base", "taught", "lengths", "calibrate", "both_orders", "embeddings"]
    # Teachers are the recipe, not the first variant of the file.
    parts = make_parts(recipe, list(variants.values()), STAGES["screen"], "digest")
    teacher = parts["screen/teacher0/seed0_fold0"].config
    assert teacher is not None and teacher.train.distill_weight == recipe.train.distill_weight
