"""A bundle scores what `predict` says, with nothing else than itself; a training notebook goes on.

The notebook's environment is this one, in which what the wheels leave out cannot be imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rig import REPOSITORY, TINY, call, predict
from storage import standing_in

from pref_jax.evaluation.submission import read_submission

ABSENT = (
    *("tensorflow", "tensorflow_text", "orbax", "tensorstore", "sklearn", "matplotlib", "clu"),
    *("grain", "aiohttp", "huggingface_hub", "torch", "transformers", "packaging", "jinja2"),
)
LLAMA = (
    f"--config={REPOSITORY}/configs/llama_lora.py:tiny",
    "--config.input.max_length=96",
    "--config.train.microbatch_size=1",
    "--config.train.batch_size=8",
    "--config.train.warmup_steps=0",
    "--config.train.learning_rate=1e-2",
    "--config.train.max_steps=2",
    "--config.logging.tensorboard=false",
)


@pytest.fixture(scope="module")
def adapter(arena: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters on an nf4 base, which is the merged export of another tiny run."""
    folder = tmp_path_factory.mktemp("llama")
    data = f"--config.data.train={arena}/train.csv"
    first, base, workdir = folder / "first", folder / "base", folder / "run"
    for arguments in (
        ("train", *LLAMA, data, f"--workdir={first}"),
        ("export", f"--workdir={first}", f"--output={base}", "--merge"),
        (
            *("train", *LLAMA, data, f"--workdir={workdir}", f"--config.model.pretrained={base}"),
            "--config.model.quantization=nf4",
        ),
    ):
        outcome = call(*arguments)
        assert outcome.code == 0, outcome
    return workdir


@pytest.fixture(scope="module")
def bundle(run: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    outcome = call(
        *("kaggle", f"--workdir={run}", f"--workdir={adapter}", f"--output={folder}"),
        *("--swap_average", "--nowheels", "--max_hours=2"),
    )
    assert outcome.code == 0, outcome
    return folder


def run_notebook(
    notebook: Path, values: dict[str, object], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Runs the cells in another process, in which `ABSENT` cannot be imported."""
    blocked = folder / "blocked"
    blocked.mkdir(exist_ok=True)
    names = ", ".join(map(repr, ABSENT)) if "submit" in notebook.name else ""
    text = f"import sys\nfor name in [{names}]:\n    sys.modules[name] = None\n"
    (blocked / "sitecustomize.py").write_text(text)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(blocked), str(REPOSITORY)])
    return subprocess.run(
        [sys.executable, REPOSITORY / "tests/kaggle/execute.py", notebook, json.dumps(values)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_notebook_says_what_predict_says(
    bundle: Path, run: Path, adapter: Path, arena: Path, tmp_path: Path
) -> None:
    data = tmp_path / "test.csv"  # in a form that the project's reader takes
    text = (arena / "test.csv").read_text(encoding="utf-8")
    data.write_text(text.replace("id,", "id ,", 1), encoding="utf-16")
    values = {"BUNDLE": str(bundle)}  # test.csv and the output are those of the folder
    done = run_notebook(bundle / "submit.ipynb", values, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    ids, found = read_submission(tmp_path / "submission.csv")
    wanted = []
    for workdir in (run, adapter):
        rows = predict(workdir, data, "--swap_average")
        assert [row[0] for row in rows] == ids
        wanted.append([[float(cell) for cell in row[1:]] for row in rows])
    np.testing.assert_allclose(found, np.mean(wanted, axis=0), atol=1e-5)
    assert np.abs(np.subtract(*wanted)).max() > 0.01  # either alone would be seen
    result = json.loads((tmp_path / "scoring.json").read_text())
    assert [part["status"] for part in result["parts"]] == ["finished"] * 4
    assert result["fallback_rows"] == 0


def test_no_time_at_all_still_answers_every_row(bundle: Path, arena: Path, tmp_path: Path) -> None:
    values = {"BUNDLE": str(bundle), "DATA": str(arena / "test.csv"), "MAX_HOURS": 1e-6}
    done = run_notebook(bundle / "submit.ipynb", values, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read_submission(tmp_path / "submission.csv")[0]) == 60
    result = json.loads((tmp_path / "scoring.json").read_text())
    assert {part["status"] for part in result["parts"]} == {"dropped"}
    assert result["fallback_rows"] == 60
    assert "60 rows, each with its probabilities" in done.stdout
    assert done.stdout.count("dropped") >= 4 and "60 rows have the length" in done.stdout


def score(bundle: Path, data: Path, folder: Path, *more: str):
    return _call_module(f"--bundle={bundle}", f"--data={data}", f"--output={folder}/out.csv", *more)


def _call_module(*arguments: str):
    from pref_jax import command

    return command.call(REPOSITORY / "pref_jax" / "kaggle" / "__main__.py", arguments)


def test_a_hanging_model_is_left_in_time(bundle: Path, arena: Path, tmp_path: Path) -> None:
    program = f"""
import time
from pref_jax.kaggle import scoring
scoring._RESERVE = 1.0, 1.0, 0.0
scoring.BundledModel.open = lambda self: time.sleep(600)
scoring.score_file({str(bundle)!r}, {str(arena / "test.csv")!r}, {str(tmp_path / "out.csv")!r},
                   max_hours=4 / 3600)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    assert len(read_submission(tmp_path / "out.csv")[0]) == 60
    assert "the time was up" in done.stdout


def test_a_damaged_bundle_is_named(bundle: Path, arena: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "bundle"
    shutil.copytree(bundle, damaged)
    weights = damaged / "models" / "run" / "model.safetensors"
    weights = weights if weights.exists() else next(damaged.glob("models/*/model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    values = {"BUNDLE": str(damaged), "DATA": str(arena / "test.csv")}
    done = run_notebook(damaged / "submit.ipynb", values, tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "model.safetensors is damaged" in done.stderr
    assert not (tmp_path / "submission.csv").exists()


def test_another_base_is_refused_and_the_other_model_answers(
    bundle: Path, arena: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "bundle"
    shutil.copytree(bundle, damaged)
    weights = next(damaged.glob("bases/*/model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    outcome = score(damaged, arena / "test.csv", tmp_path)
    assert outcome.code == 0, outcome
    result = json.loads((tmp_path / "scoring.json").read_text())
    failed = [part for part in result["parts"] if part["status"] == "failed"]
    assert len(failed) == 1 and "hash" in failed[0]["reason"]
    assert result["fallback_rows"] == 0


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("pref_jax.json", {"temperature": None}, "pref_jax.json: temperature: it is not a number"),
        ("pref_jax.json", {"examples": [{}]}, "pref_jax.json: its examples are missing"),
        ("run.json", {"step": None}, "run.json: step: it is not a whole number"),
    ],
)
def test_the_reason_names_the_damaged_file(
    bundle: Path, arena: Path, tmp_path: Path, name: str, change: dict[str, object], expected: str
) -> None:
    damaged = tmp_path / "bundle"
    shutil.copytree(bundle, damaged)
    path = damaged / "models" / "run" / name
    path = path if path.exists() else next(damaged.glob(f"models/*/{name}"))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    manifest = json.loads((damaged / "manifest.json").read_text())
    model = next(one for one in manifest["models"] if one["name"] == path.parent.name)
    (damaged / "manifest.json").write_text(json.dumps(manifest | {"models": [model]}))
    outcome = score(damaged, arena / "test.csv", tmp_path)
    assert outcome.code == 1 and outcome.stderr.count("\n") == 1, outcome
    result = json.loads((tmp_path / "scoring.json").read_text())
    assert expected in result["parts"][0]["reason"]
    assert result["fallback_rows"] == 60


def test_a_run_in_a_bucket_is_bundled_as_a_local_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with standing_in(monkeypatch) as storage:
        for path in run.rglob("*"):
            if path.is_file():
                name = path.relative_to(run).as_posix()
                storage.put(f"gs://b/runs/{run.name}/{name}", path.read_bytes())
        for workdir, output in ((f"gs://b/runs/{run.name}", "there"), (run, "here")):
            outcome = call(
                *("kaggle", f"--workdir={workdir}", f"--output={tmp_path}/{output}", "--nowheels"),
            )
            assert outcome.code == 0, outcome
        outcome = call("kaggle", "--workdir=gs://b/nobody/r", f"--output={tmp_path}/none")
    assert outcome.code == 2 and "gs://b/nobody/r" in outcome.stderr, outcome
    there, here = (
        json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("there", "here")
    )
    assert there == here


def test_another_python_is_one_line(bundle: Path, tmp_path: Path) -> None:
    values = {"BUNDLE": str(bundle), "PYTHON": "3.10", "PACKAGES": str(tmp_path / "p")}
    done = run_notebook(bundle / "submit.ipynb", values, tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "is for Python 3.10" in done.stderr and "--python=" in done.stderr


def test_bad_input_is_one_line(run: Path, adapter: Path, arena: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    untrained = tmp_path / "untrained"
    shutil.copytree(run, untrained, ignore=shutil.ignore_patterns("checkpoints"))
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    model = json.loads((moved / "model.json").read_text())
    model["base"]["source"] = str(tmp_path / "gone")
    (moved / "model.json").write_text(json.dumps(model))
    new = f"--output={tmp_path}/new"
    before = sorted(tmp_path.rglob("*"))
    for arguments, expected in (
        ((new,), "--workdir"),
        ((f"--workdir={arena}", new), "arena"),
        ((f"--workdir={untrained}", new), "checkpoint"),
        ((f"--workdir={run}", f"--workdir={run}", new), "twice"),
        ((f"--workdir={run}", f"--output={run}/bundle"), "lies on its way"),
        ((f"--workdir={run}", f"--output={tmp_path}/full"), "holds notes.txt"),
        ((f"--workdir={run}", "--max_hours=0", new), "--max_hours"),
        ((f"--workdir={run}", "--platform=win_amd64", new), "--platform"),
        ((f"--workdir={run}", "--quantization=nf4", new), "--quantization"),
        ((f"--workdir={moved}", "--nowheels", new), "gone"),
    ):
        outcome = call("kaggle", *arguments)
        assert outcome.code == 2, (arguments, outcome)
        assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1
        assert expected in outcome.stderr, (arguments, outcome.stderr)
    assert sorted(tmp_path.rglob("*")) == before


def test_training_goes_on_in_the_next_session(arena: Path, tmp_path: Path) -> None:
    from pref_jax.kaggle.training import build_training

    training = build_training(
        f"{tmp_path}/training",
        REPOSITORY,
        accelerator="gpu",
        python="3.11",
        platform="manylinux_2_31_x86_64",
        wheels=False,
    )
    inputs, arguments = tmp_path / "input", [*TINY[1:], "--config.eval.every_steps=4"]
    inputs.mkdir()
    shutil.copyfile(arena / "train.csv", inputs / "train.csv")
    shutil.move(training, inputs / "bundle")
    values: dict[str, object] = {
        "INPUTS": str(inputs),
        "CONFIG": "configs/quickstart.py",
        "OVERRIDES": [*arguments, "--config.train.max_steps=8"],
        "PACKAGES": None,
        "SESSION_HOURS": 0.2501,  # a second or two: less than it takes to start
    }
    for session, hours in enumerate((0.2501, 9.0)):
        working = tmp_path / f"session{session}"
        working.mkdir()
        values |= {"SESSION_HOURS": hours, "WORKING": str(working)}
        done = run_notebook(inputs / "bundle" / "train_gpu.ipynb", values, working)
        assert done.returncode == 0, done.stdout + done.stderr
        result = json.loads((working / "run" / "result.json").read_text())
        if session == 0:
            assert result["stopped"] == "max_hours" and result["steps"] < 8
            assert "attach this output" in done.stdout
            shutil.copytree(working / "run", inputs / "earlier" / "run")
        else:
            assert result["stopped"] is None and result["steps"] == 8
            assert "goes on with" in done.stdout and "resumed" in done.stdout
