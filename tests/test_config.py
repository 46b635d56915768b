"""Configs: typed overrides, checked values, and errors that name the field."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pref_jax.config import (
    default_config,
    get,
    parse_arguments,
    resolve,
    run_name,
    training_data,
)
from pref_jax.config_file import load, override, take_overrides
from pref_jax.errors import InputError

PRESETS = [
    "quickstart.py",
    *(
        f"{layout}_bert.py{backbone}"
        for layout in ("single", "parallel")
        for backbone in ("", ":bert-base", ":distilbert", ":minilm")
    ),
]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes_the_checks(preset: str, repository: Path) -> None:
    config = load(f"{repository}/configs/{preset}")
    if preset != "quickstart.py":  # the paper's values, section "Training"
        assert (config.train.learning_rate, config.train.weight_decay) == (2e-5, 0.01)
        assert (config.train.epochs, config.train.batch_size) == (3, 32)
        assert (config.train.warmup_steps, config.eval.every_steps) == (500, 500)
        assert config.input.max_length == 512 and not config.input.reuse_unused
        budget = (0.1, 0.45, 0.45) if preset.startswith("single") else (0.1, 0.9)
        assert config.input.budget == budget


@pytest.mark.parametrize(
    ("best", "paper", "changed"),
    [
        (
            "best_encoder.py:minilm",
            "parallel_bert.py:minilm",
            {"symmetric": True, "pooling": "cls_mean", "length_features": True},
        ),
        *(
            (f"best_llama.py{size}", f"llama_lora.py{size}", {"length_features": True})
            for size in ("", ":8b", ":smollm2", ":tiny")
        ),
    ],
)
def test_the_best_presets_are_the_papers_but_for_what_they_say(
    best: str, paper: str, changed: dict[str, object], repository: Path
) -> None:
    ours = load(f"{repository}/configs/{best}").to_dict()
    theirs = load(f"{repository}/configs/{paper}").to_dict()
    assert theirs["model"] | changed != theirs["model"]
    theirs["model"] |= changed
    assert ours == theirs


def test_configs_do_not_import_jax(repository: Path) -> None:
    code = (
        "import sys; from pref_jax.config_file import load; "
        f"load({str(repository / 'configs/quickstart.py')!r}); "
        "sys.exit(bool({'jax', 'tensorflow', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("train.epochs", "0.5", 0.5),
        ("train.max_steps", "1e2", 100),
        ("train.max_steps", "none", None),
        ("train.learning_rate", "1", 1.0),
        ("train.max_hours", "0.01", 0.01),
        ("input.reuse_unused", "false", False),
        ("input.reuse_unused", "True", True),
        ("input.reuse_unused", None, True),
        ("input.budget", "(0.1,0.45,0.45)", (0.1, 0.45, 0.45)),
        ("input.budget", "[0.2, 0.4, 0.4]", (0.2, 0.4, 0.4)),
        ("input.budget", "0.1,0.45,0.45", (0.1, 0.45, 0.45)),
        ("data.fold", "1", 1),
        ("data.train", "a=b.csv", "a=b.csv"),
        ("model.pretrained", "none", None),
        ("mesh.data", "-1", -1),
        ("model.config.num_layers", "2", 2),
    ],
)
def test_values_get_the_type_of_their_field(name: str, text: str | None, value: object) -> None:
    config = default_config()
    override(config, name, text)
    resolve(config)
    assert get(config, name) == value
    assert type(get(config, name)) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("train.batch_size", "0.5", "'0.5' is not a whole number"),
        ("train.batch_size", "1e999", "not a whole number"),
        ("train.batch_size", "many", "not a whole number"),
        ("train.batch_size", "None", "not a whole number"),
        ("train.epochs", "three", "not a number"),
        ("train.epochs", None, "its value is missing"),
        ("input.reuse_unused", "maybe", "not true or false"),
        ("input.budget", "half", "not a list of numbers"),
        ("input.budget", "(0.1,'x')", "not a list of numbers"),
        ("input.layout", "", "it is empty"),
        ("train", "3", "it is a section"),
        ("train.lerning_rate", "3", "did you mean learning_rate?"),
        ("trian.epochs", "3", "did you mean train?"),
        ("seed.x", "3", "seed is a field, not a section"),
        ("", "3", "unknown field"),
        ("data.soft_label", "x", "unknown field 'soft_label' of data; did you mean soft_labels?"),
        ("model.adapter.rank", "4", "unknown field 'adapter' of model"),
    ],
)
def test_overrides_that_do_not_fit(name: str, text: str | None, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        override(default_config(), name, text)
    assert caught.value.where == f"--config.{name}".rstrip() and expected in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("seed", "-1"),
        ("train.ema", "1.0"),
        ("train.distill_weight", "1.5"),
        ("model.pooling", "max"),
        ("data.split", "stratified"),
        ("data.valid_fraction", "0"),
        ("data.valid_fraction", "1"),
        ("data.valid_fraction", "nan"),
        ("data.fold", "5"),
        ("data.fold", "-1"),
        ("data.folds", "1"),
        ("data.swap", "yes"),
        ("input.layout", "double"),
        ("input.max_length", "3"),
        ("input.max_length", "513"),
        ("input.max_length", "100000"),
        ("input.budget", "(0.1,0.9)"),
        ("input.budget", "(0.5,0.5,0.5)"),
        ("input.budget", "(0,0.5,0.5)"),
        ("input.budget", "(-0.1,0.5,0.5)"),
        ("input.budget", "()"),
        ("input.truncation", "middle"),
        ("input.packing", "true"),
        ("input.tokenizer", "spacy"),
        ("model.family", "roberta"),
        ("model.frozen_layers", "13"),
        ("model.frozen_layers", "-1"),
        ("model.head_dropout", "1"),
        ("model.config.num_heads", "7"),
        ("model.config.hidden_dropout", "-0.1"),
        ("train.epochs", "0"),
        ("train.epochs", "-1"),
        ("train.epochs", "inf"),
        ("train.epochs", "nan"),
        ("train.max_steps", "0"),
        ("train.max_hours", "0"),
        ("train.batch_size", "0"),
        ("train.microbatch_size", "0"),
        ("train.learning_rate", "-1e-5"),
        ("train.learning_rate", "nan"),
        ("train.learning_rate", "inf"),
        ("train.weight_decay", "-0.1"),
        ("train.warmup_steps", "-1"),
        ("train.schedule", "step"),
        ("train.clip_norm", "-1"),
        ("train.layer_decay", "0"),
        ("train.layer_decay", "5"),
        ("train.precision", "fp8"),
        ("train.remat", "all"),
        ("eval.every_steps", "0"),
        ("checkpoint.keep", "0"),
        ("mesh.data", "0"),
        ("mesh.fsdp", "-2"),
        ("mesh.fsdp", "-1"),
    ],
)
def test_values_out_of_range_name_the_field(name: str, text: str) -> None:
    config = default_config()
    override(config, name, text)
    with pytest.raises(InputError) as caught:
        resolve(config)
    assert caught.value.where == f"--config.{name}"


@pytest.mark.parametrize(
    ("name", "text", "remedy"),
    [
        ("train.max_steps", "0", "it can be 1 to 2,147,483,647"),
        ("seed", "-1", "it can be 0 to 4,294,967,295"),
        ("train.weight_decay", "-1", "it can be 0 or more"),
    ],
)
def test_ranges_are_written_out(name: str, text: str, remedy: str) -> None:
    config = default_config()
    override(config, name, text)
    with pytest.raises(InputError) as caught:
        resolve(config)
    assert caught.value.remedy == remedy


def test_the_example_of_a_budget_fits_the_layout(repository: Path) -> None:
    overrides = [("input.budget", "(nan,0.9)"), ("input.layout", "parallel")]
    with pytest.raises(InputError) as caught:
        load(f"{repository}/configs/single_bert.py", overrides)
    assert caught.value.remedy == 'type --config.input.budget="(0.1,0.9)"'


def test_overrides_are_taken_out_of_the_command_line() -> None:
    others, overrides = take_overrides(
        [
            *("x.py", "--config=f.py", "--config.train.epochs=2", "--config.mesh.data", "-1"),
            *("--config.input.reuse_unused", "--rows=1", "--noconfig.eval.calibrate"),
            *("--config.data.train=a=b", "--config.train.epochs=3", "--", "--config.seed=1"),
        ]
    )
    assert others == ["x.py", "--config=f.py", "--rows=1", "--", "--config.seed=1"]
    assert overrides == [
        ("train.epochs", "2"),
        ("mesh.data", "-1"),
        ("input.reuse_unused", None),
        ("eval.calibrate", "false"),
        ("data.train", "a=b"),
        ("train.epochs", "3"),
    ]


def test_the_last_override_wins(repository: Path) -> None:
    config = load(f"{repository}/configs/quickstart.py", [("seed", "1"), ("seed", "2")])
    assert config.seed == 2


@pytest.mark.parametrize(
    ("source", "where", "expected"),
    [
        ("def get_config(a):\n  return (", ":2", "never closed"),
        ("x = 1", "", "does not define get_config"),
        ("def get_config(a):\n  return 3", "", "returned a int"),
        ("import nothing_here\n", ":1", "No module named 'nothing_here'"),
        ("{head}  c.train.lerning_rate = 1\n  return c", ":4", 'Key "lerning_rate" does not exist'),
        ("{head}  c.train.epochs = 'x'\n  return c", ":4", "TypeError"),
        ("{head}  c.unlock()\n  c.extra = 1\n  return c", "", "unknown field extra"),
        ("{head}  c.unlock()\n  del c.seed\n  return c", "", "the field seed is missing"),
        ("{head}  c.seed = None\n  return c", "--config.seed", "None is not of type int"),
        ("{head}  c.seed = -1\n  return c", "--config.seed", "out of range"),
        ("\x00", "", ""),
    ],
)
def test_a_config_file_that_is_wrong(
    tmp_path: Path, source: str, where: str, expected: str
) -> None:
    head = (
        "from pref_jax.config import default_config\ndef get_config(a):\n  c = default_config()\n"
    )
    path = tmp_path / "mine.py"
    path.write_text(source.replace("{head}", head))
    with pytest.raises(InputError) as caught:
        load(str(path))
    assert expected in str(caught.value)
    assert caught.value.where == (where if where.startswith("--") else caught.value.where)
    if where.startswith(":"):
        assert caught.value.where == f"{path}{where}"


def test_files_that_are_no_config(tmp_path: Path) -> None:
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.py", tmp_path, tmp_path / "binary.py"):
        with pytest.raises(InputError, match="--config"):
            load(str(path))


def test_unknown_arguments_list_the_known_ones(repository: Path) -> None:
    for text in ("roberta", "bert-base,distilbert", "bert-base,", "annotated,annotated"):
        with pytest.raises(InputError, match=r"--config=.*single_bert"):
            load(f"{repository}/configs/single_bert.py:{text}")
    with pytest.raises(InputError, match="known: none"):
        load(f"{repository}/configs/quickstart.py:fast")
    assert parse_arguments("b,z", first=("a", "b"), second=("z",)) == {"first": "b", "second": "z"}


def test_the_annotated_preset_starts_from_the_multi_task_run_of_its_backbone(
    repository: Path,
) -> None:
    for words, backbone in (("annotated", ""), ("minilm,annotated", ":minilm")):
        config = load(f"{repository}/configs/parallel_bert.py:{words}")
        rated = f"configs/multitask_bert.py{backbone}"
        assert config.model.init_from == f"runs/{run_name(rated)}"
        assert config.model.pretrained is None and config.model.frozen_layers == 3
        assert load(f"{repository}/{rated}").train.epochs == 5


def test_names_of_runs() -> None:
    assert run_name("configs/quickstart.py") == "quickstart"
    assert run_name("configs/single_bert.py:minilm,annotated") == "single_bert_minilm_annotated"


def test_missing_training_data_is_asked_for() -> None:
    with pytest.raises(InputError, match=r"type --config.data.train=train.csv"):
        training_data(default_config())
