"""What broke for others who do this job with other tools, typed at ours.

Equal means equal strings in the submission: rows of the same place in a file that mean the same.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rig import (
    LABELS,
    REPOSITORY,
    TINY,
    call,
    call_apart,
    make_rows,
    predict,
    read_csv,
    read_lines,
    refuse,
    write_csv,
)

from pref_jax.config_file import load
from pref_jax.errors import InputError


@pytest.fixture(scope="module")
def base(run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The answer to the six rows as they are."""
    return predict(run, write_csv(tmp_path_factory.mktemp("base") / "base.csv", make_rows()))


Answer = Callable[..., list[list[str]]]


@pytest.fixture
def answer(run: Path, tmp_path: Path) -> Answer:
    """``answer(r1={"prompt": ...})``: the submission for the six rows, some cells changed."""

    def ask(*flags: str, **changes: dict[str, object]) -> list[list[str]]:
        return predict(run, write_csv(tmp_path / "changed.csv", make_rows(**changes)), *flags)

    return ask


class TestFilesAsTheyArrive:
    def test_byte_order_mark_and_line_ends(
        self, run: Path, base: list[list[str]], tmp_path: Path
    ) -> None:
        file = tmp_path / "file.csv"
        assert predict(run, write_csv(file, make_rows(), encoding="utf-8-sig")) == base
        assert predict(run, write_csv(file, make_rows(), eol="\r\n")) == base

    def test_gzip_of_two_members(self, run: Path, base: list[list[str]], tmp_path: Path) -> None:
        text = write_csv(tmp_path / "plain.csv", make_rows()).read_bytes()
        middle = len(text) // 2
        assert text[middle - 1 : middle] != b"\n"  # inside a row
        file = tmp_path / "two.csv.gz"
        file.write_bytes(gzip.compress(text[:middle]) + gzip.compress(text[middle:]))
        rows = predict(run, file)
        assert len(rows) == 6 and rows == base

    def test_utf16_is_the_same_or_named(
        self, run: Path, base: list[list[str]], tmp_path: Path
    ) -> None:
        file = write_csv(tmp_path / "wide.csv", make_rows(), encoding="utf-16")
        outcome = call("predict", f"--workdir={run}", f"--data={file}", f"--output={file}.out")
        if outcome.code == 0:
            assert predict(run, file) == base
        else:
            refuse(run, file, "UTF-16")

    def test_line_breaks_inside_cells(self, run: Path, tmp_path: Path) -> None:
        originals = [make_rows()[number] for number in (0, 5)]
        spread, compact = [], []
        for number in range(1000):
            row = originals[number % 2]
            turns = [*json.loads(row["prompt"]), "filler " * 160]
            compact.append(row | {"id": number, "prompt": json.dumps(turns)})
            lines = json.dumps(turns, indent=1).replace("\n", "\r\n")
            spread.append(row | {"id": number, "prompt": lines})
        file = write_csv(tmp_path / "spread.csv", spread)
        assert file.stat().st_size > 1 << 20
        rows = predict(run, file)
        assert [row[0] for row in rows] == [str(number) for number in range(1000)]
        assert rows == predict(run, write_csv(tmp_path / "compact.csv", compact))

    def test_cell_of_400_kilobytes(self, answer: Answer) -> None:
        began = time.monotonic()
        long = answer(r3={"response_b": json.dumps(["word " * 80000])})
        assert time.monotonic() - began < 10
        assert long == answer(r3={"response_b": json.dumps(["word " * 4000])})

    def test_locale_does_not_matter(
        self, run: Path, run_command: Any, answer: Answer, tmp_path: Path
    ) -> None:
        change = {
            "r4": {"response_a": json.dumps(["Bonne nuit, ma chérie é."], ensure_ascii=False)}
        }
        file = write_csv(tmp_path / "accents.csv", make_rows(**change))
        output = tmp_path / "out.csv"
        flags = (f"--workdir={run}", f"--data={file}", f"--output={output}")
        environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        environment["XLA_FLAGS"] = os.environ["XLA_FLAGS"]
        outcome = run_command("launch/predict.py", *flags, env=environment)
        assert outcome.returncode == 0, outcome.stderr
        assert [list(row.values()) for row in read_csv(output)] == answer(**change)

    def test_nothing_is_written_beside_data_and_model(
        self, run: Path, base: list[list[str]], tmp_path: Path
    ) -> None:
        data, model = tmp_path / "data", tmp_path / "model"
        data.mkdir()
        file = write_csv(data / "base.csv", make_rows())
        shutil.copytree(run, model)
        folders = [data, *(path for path in (model, *model.rglob("*")) if path.is_dir())]
        output = tmp_path / "out.csv"
        prefix = []
        if os.geteuid() == 0:  # root may write everywhere, unless it gives that up
            setpriv = shutil.which("setpriv")
            if setpriv is None:
                pytest.skip("needs an ordinary user, or setpriv to become like one")
            dropped = "-dac_override,-dac_read_search,-fowner"
            prefix = [setpriv, f"--bounding-set={dropped}", f"--inh-caps={dropped}"]
        before = sorted(str(path) for folder in (data, model) for path in folder.rglob("*"))
        try:
            for folder in folders:
                folder.chmod(0o555)
            probe = subprocess.run([*prefix, "touch", str(data / "probe")], capture_output=True)
            assert probe.returncode != 0
            outcome = subprocess.run(
                [
                    *(*prefix, sys.executable, str(REPOSITORY / "launch" / "predict.py")),
                    *(f"--workdir={model}", f"--data={file}", f"--output={output}"),
                ],
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            for folder in folders:
                folder.chmod(0o755)
        assert outcome.returncode == 0, outcome.stderr
        assert [list(row.values()) for row in read_csv(output)] == base
        after = sorted(str(path) for folder in (data, model) for path in folder.rglob("*"))
        assert after == before


class TestNulls:
    """Row 1's answer A as a null, a word that looks like one, or nothing."""

    def test_null_is_the_word(self, answer: Answer) -> None:
        assert answer(r1={"response_a": "[null]"}) == answer(r1={"response_a": '["null"]'})
        assert answer(r1={"response_a": '["5", null]'}) == answer(r1={"response_a": '["5","null"]'})

    def test_words_that_look_like_nulls_are_words(self, answer: Answer) -> None:
        cells = ['[""]', '["NA"]', '["nan"]', '["None"]']
        answers = [answer(r1={"response_a": cell}) for cell in cells]
        assert len({tuple(rows[1]) for rows in answers}) == len(cells)
        for rows in answers[1:]:  # the other rows do not move
            assert [row for at, row in enumerate(rows) if at != 1] == [
                row for at, row in enumerate(answers[0]) if at != 1
            ]

    @pytest.mark.parametrize("cell", ["[]", '[" "]'])
    def test_nothing_is_an_answer(self, answer: Answer, cell: str) -> None:
        assert len(answer(r1={"response_a": cell})) == 6  # finite, as all that `predict` returns

    @pytest.mark.parametrize("cell", ["[true]", "[5]", '{"a":1}', "NA"])
    def test_no_list_of_texts_is_refused(self, run: Path, tmp_path: Path, cell: str) -> None:
        file = write_csv(tmp_path / "wrong.csv", make_rows(r1={"response_a": cell}))
        refuse(run, file, f"{file}:2:", "response_a")

    @pytest.mark.parametrize("cell", ["null", ""])
    def test_bare_null_and_empty_cell_are_said(
        self, run: Path, answer: Answer, tmp_path: Path, cell: str
    ) -> None:
        file = write_csv(tmp_path / "bare.csv", make_rows(r1={"response_a": cell}))
        assert predict(run, file) == answer(r1={"response_a": "[null]"})
        outcome = call("predict", f"--workdir={run}", f"--data={file}", f"--output={file}.out")
        assert f"{file}:2: empty cell or bare null read as [null]" in outcome.stdout

    def test_second_turn_of_one_side_counts(self, answer: Answer) -> None:
        prompt = json.dumps(["Add 2 and 3.", "And 4?"])
        answers = [
            answer(r1={"prompt": prompt, "response_a": json.dumps(["5", last])})
            for last in ("9", "Nobody knows.")
        ]
        assert answers[0][1] != answers[1][1]

    def test_nul_bytes_cut_nothing(self, run: Path, answer: Answer, tmp_path: Path) -> None:
        escaped = [answer(r1={"response_a": f'["a\\u0000{end}"]'})[1] for end in "bc"]
        assert escaped[0] != escaped[1]
        raw = []
        for end in "bc":
            file = write_csv(
                tmp_path / f"raw{end}.csv", make_rows(r1={"response_a": f'["a {end}"]'})
            )
            file.write_bytes(
                file.read_bytes().replace(b"a %b" % end.encode(), b"a\0%b" % end.encode())
            )
            output = tmp_path / f"raw{end}.out"
            outcome = call("predict", f"--workdir={run}", f"--data={file}", f"--output={output}")
            if outcome.code == 0:
                raw.append(read_csv(output)[1])
            else:
                refuse(run, file, f"{file}:2")
        assert not raw or raw[0] != raw[1]


class TestSpecialTokensTypedByUsers:
    @pytest.mark.parametrize(
        ("column", "typed", "spelled"),
        [
            (
                "response_a",
                "alpha [SEP] beta [MASK] [CLS] [PAD]",
                "alpha [ sep ] beta [ mask ] [ cls ] [ pad ]",
            ),
            ("prompt", "[MASK] [SEP]", "[ mask ] [ sep ]"),  # of a prompt few tokens are read
        ],
    )
    @pytest.mark.parametrize("flags", [(), ("--swap_average",)])
    def test_they_are_text(
        self, answer: Answer, column: str, typed: str, spelled: str, flags: tuple[str, ...]
    ) -> None:
        rows = answer(*flags, r0={column: json.dumps([typed])})
        assert rows == answer(*flags, r0={column: json.dumps([spelled])})
        assert rows[0] != answer(*flags, r0={column: json.dumps(["alpha beta"])})[0]

    def test_examples_of_the_export_hold_none(self, exported: Path) -> None:
        words = (exported / "vocab.txt").read_text(encoding="utf-8").split("\n")
        cls, sep, *others = (words.index(word) for word in ("[CLS]", "[SEP]", "[PAD]", "[MASK]"))
        examples = json.loads((exported / "pref_jax.json").read_text())["examples"]
        assert len(examples) == 8
        for example in examples:
            assert len(example["input_ids"]) == 2
            for ids in example["input_ids"]:
                assert [i for i in ids if i in (cls, sep, *others)] == [cls, sep, sep]
                assert ids[0] == cls and ids[-1] == sep


LENGTH = 48


class TestAccumulationScheduleDecay:
    """37 rows in updates of 32, with held-out rows of their own, from the encoder of `run`."""

    @pytest.fixture(scope="class")
    def files(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("rows")
        rows = []
        for number in range(37):
            row = make_rows()[number % 6] | {"id": number}
            if number % 37 < 30:  # longer than the model reads
                row["response_b"] = json.dumps([f"Answer {number} goes " + "on and on " * LENGTH])
            rows.append(row)
        write_csv(folder / "train.csv", rows, labels=True)
        write_csv(folder / "valid.csv", rows, labels=True)
        # The plan's order of the first epoch; its last five rows are the short update.
        order = np.random.default_rng([0, 0]).permutation(37)
        write_csv(folder / "five.csv", [rows[at] for at in order[32:]], labels=True)
        return folder

    @pytest.fixture(scope="class")
    def trained(self, files: Path, run: Path) -> Path:
        """Several runs, made by one process on one device."""

        def command(case: str, *flags: str) -> list[object]:
            return [
                *("train", *TINY, f"--workdir={files}/{case}", f"--config.model.init_from={run}"),
                *(
                    f"--config.data.train={files}/train.csv",
                    f"--config.data.valid={files}/valid.csv",
                ),
                *("--config.input.layout=single", "--config.train.batch_size=32"),
                *("--config.train.epochs=3", "--config.train.warmup_steps=0", *flags),
            ]

        still = (
            *("--config.train.learning_rate=1e-12", "--config.train.epochs=1"),
            *("--config.model.head_dropout=0", "--config.model.config.hidden_dropout=0"),
            "--config.model.config.attention_dropout=0",
        )
        decay = ("--config.train.weight_decay=1000", "--config.train.learning_rate=1e-4")
        commands = {
            f"micro{size}": command(f"micro{size}", f"--config.train.microbatch_size={size}")
            for size in (1, 4, 16)
        }
        commands |= {
            "still": command("still", *still),
            "five": command("five", *still, f"--config.data.train={files}/five.csv"),
            "decay": command(
                "decay", *decay, "--config.train.max_steps=10", "--config.train.epochs=9"
            ),
            "half": command("half", "--config.train.epochs=0.5", "--config.train.warmup_steps=500"),
            "fold": command(
                *("fold", "--config.data.valid=none", "--config.data.fold=1"),
                "--config.train.epochs=20",
                *("--config.train.max_steps=1e1", "--config.train.learning_rate=1"),
            ),
            "export": ["export", f"--workdir={files}/decay", f"--output={files}/decayed"],
        }
        outcomes = call_apart(files, commands)
        for case, outcome in outcomes.items():
            assert outcome.code == 0, (case, outcome)
            (files / f"{case}.out").write_text(outcome.stdout + outcome.stderr)
        return files

    def test_microbatches_and_short_updates(self, trained: Path) -> None:
        losses = []
        for size in (1, 4, 16):
            lines = [row for row in read_lines(trained / f"micro{size}") if row["split"] == "train"]
            assert len(lines) == 6
            losses.append([row["loss"] for row in lines])
            result = json.loads((trained / f"micro{size}" / "result.json").read_text())
            assert result["train_rows"] == 37 and result["steps"] == 6
        np.testing.assert_allclose(losses[1], losses[0], atol=1e-5)
        np.testing.assert_allclose(losses[2], losses[0], atol=1e-5)

    def test_short_update_is_a_mean_of_its_rows(self, trained: Path) -> None:
        full, short, held_out = read_lines(trained / "still")
        assert (held_out["split"], held_out["step"]) == ("valid", 2)
        # The parameters do not move, and the held-out rows are the trained ones.
        assert (32 * full["loss"] + 5 * short["loss"]) / 37 == pytest.approx(
            held_out["loss"], abs=1e-5
        )
        alone, _ = read_lines(trained / "five")
        assert short["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert short["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=1e-4)

    def test_rate_falls_evenly_and_not_to_zero(self, trained: Path) -> None:
        rates = [
            row["learning_rate"] for row in read_lines(trained / "micro4") if "learning_rate" in row
        ]
        np.testing.assert_allclose(rates, 1e-4 * np.arange(6, 0, -1) / 6, rtol=1e-5)

    def test_decay_is_for_matrices_only(self, trained: Path, exported: Path) -> None:
        from safetensors.numpy import load_file

        start = load_file(exported / "model.safetensors")
        end = load_file(trained / "decayed" / "model.safetensors")
        factor = math.prod(1 - 0.1 * (1 - step / 10) for step in range(10))
        seen = 0
        for name, value in start.items():
            if name.startswith("head."):
                continue
            seen += 1
            wanted = value * factor if value.ndim > 1 else value
            # Ten updates of Adam move a number by 10 * 1e-4 at most.
            np.testing.assert_allclose(end[name], wanted, atol=1e-3, err_msg=name)
            if value.ndim > 1:
                assert np.linalg.norm(end[name] - wanted) < 0.1 * np.linalg.norm(wanted), name
        assert seen > 30

    def test_warm_up_longer_than_the_run_is_said(self, trained: Path) -> None:
        assert "the peak learning rate is never reached" in (trained / "half.out").read_text()

    def test_overrides_do_what_they_say(self, trained: Path) -> None:
        assert json.loads((trained / "half" / "result.json").read_text())["steps"] == 1
        lines = [row for row in read_lines(trained / "fold") if row["split"] == "train"]
        assert len(lines) == 10
        assert lines[0]["learning_rate"] == pytest.approx(1)
        result = json.loads((trained / "fold" / "result.json").read_text())
        out_of_fold = read_csv(trained / "fold" / "out_of_fold.csv")
        assert 0 < len(out_of_fold) < 37 and result["train_rows"] == 37 - len(out_of_fold)

    @pytest.mark.parametrize(
        ("field", "typed", "value"),
        [
            ("train.epochs", "0.5", 0.5),
            ("train.max_steps", "1e2", 100),
            ("train.learning_rate", "1", 1.0),
            ("train.max_hours", "0.01", 0.01),
            ("input.reuse_unused", "false", False),
            ("input.reuse_unused", "true", True),
            ("data.fold", "1", 1),
            ("train.max_steps", "0.5", None),
            ("train.epochs", "0", None),
            ("train.learning_rate", "0", None),
            ("input.reuse_unused", "maybe", None),
            ("data.fold", "1.5", None),
        ],
    )
    def test_override_is_typed_or_refused(self, field: str, typed: str, value: Any) -> None:
        path = str(REPOSITORY / "configs" / "quickstart.py")
        if value is None:
            with pytest.raises(InputError, match=f"--config.{field}"):
                load(path, [(field, typed)])
            return
        found: Any = load(path, [(field, typed)])
        for part in field.split("."):
            found = found[part]
        assert found == value and type(found) is type(value)


class TestMeans:
    """Uneven batches, one class only, both orders."""

    @pytest.fixture(scope="class")
    def files(self, arena: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("means")
        rows = read_csv(arena / "train.csv")
        for row in rows:
            row["source"] = "forum" if row is rows[5] else "chat"
        ties = [row for row in rows if row["winner_tie"] == "1"][:9]
        for name, part in (("1", rows[:1]), ("13", rows[:13]), ("257", rows[:257]), ("ties", ties)):
            write_csv(folder / f"{name}.csv", part, labels=True, more=["source"])
        return folder

    @pytest.fixture(scope="class")
    def unpacked(self, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """`run` with packing off."""
        workdir = Path(shutil.copytree(run, tmp_path_factory.mktemp("unpacked") / "run"))
        config = json.loads((workdir / "config.json").read_text())
        config["input"]["packing"] = "off"
        (workdir / "config.json").write_text(json.dumps(config))
        return workdir

    @pytest.fixture(scope="class")
    def losses(self, run: Path, files: Path) -> dict[str, list[float]]:
        """-ln of what `predict` gives the label, for every row of every file."""
        found = {}
        for file in files.glob("*.csv"):
            labels = [
                next(at for at, name in enumerate(LABELS) if row[name] == "1")
                for row in read_csv(file)
            ]
            answers = predict(run, file)
            found[file.stem] = [
                -math.log(float(row[1 + label])) for row, label in zip(answers, labels, strict=True)
            ]
        return found

    @pytest.mark.parametrize(
        ("devices", "packing", "cases"),
        [(8, "on", "1 13 257 ties"), (8, "off", "13 257"), (1, "on", "1 13 257"), (1, "off", "13")],
    )
    def test_loss_is_the_mean_over_rows(
        self,
        run: Path,
        unpacked: Path,
        files: Path,
        losses: dict[str, list[float]],
        tmp_path: Path,
        devices: int,
        packing: str,
        cases: str,
    ) -> None:
        commands = {
            case: [
                *("evaluate", f"--workdir={run if packing == 'on' else unpacked}"),
                *(f"--data={files}/{case}.csv", f"--output={tmp_path}/{case}.json"),
            ]
            for case in cases.split()
        }
        if devices == 8:
            outcomes = {case: call(*parts) for case, parts in commands.items()}
        else:
            outcomes = call_apart(tmp_path, commands, devices=devices)
        for case, outcome in outcomes.items():
            assert outcome.code == 0, (case, outcome)
            result = json.loads((tmp_path / f"{case}.json").read_text())
            count, mean = len(losses[case]), float(np.mean(losses[case]))
            assert result["rows"] == count
            assert result["log_loss"] == pytest.approx(mean, abs=1e-6)
            for kind, slices in result["slices"].items():
                assert sum(part["rows"] for part in slices.values()) == count, kind
                total = sum(part["rows"] * part["log_loss"] for part in slices.values())
                assert total / count == pytest.approx(result["log_loss"], abs=1e-9), kind
            if case == "13":
                forum = result["slices"]["source"]["forum"]
                assert forum["rows"] == 1
                assert forum["log_loss"] == pytest.approx(losses[case][5], abs=1e-6)

    def test_swap_average_is_the_mean_of_both_orders(
        self, run: Path, base: list[list[str]], tmp_path: Path
    ) -> None:
        def numbers(rows: list[list[str]]) -> np.ndarray:
            return np.array([row[1:] for row in rows], float)

        exchanged = [
            row | {"response_a": row["response_b"], "response_b": row["response_a"]}
            for row in make_rows()
        ]
        other = numbers(predict(run, write_csv(tmp_path / "exchanged.csv", exchanged)))
        both = predict(run, write_csv(tmp_path / "base.csv", make_rows()), "--swap_average")
        wanted = (numbers(base) + other[:, [1, 0, 2]]) / 2
        np.testing.assert_allclose(numbers(both), wanted, atol=1e-5)
        assert np.abs(numbers(base) - wanted).max() > 1e-5  # the order does matter to this model
        assert [row[0] for row in both] == [row[0] for row in base]
