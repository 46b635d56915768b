"""A LLaMA run from weights to export: the right token pooled, the head saved, the base watched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rig import (
    REPOSITORY,
    call,
    make_rows,
    predict,
    read_arrays,
    read_csv,
    read_lines,
    start,
    wait_for,
    write_csv,
)
from safetensors.numpy import load_file

from pref_jax import command
from pref_jax.errors import InputError
from pref_jax.experiment import load_run
from pref_jax.weights.exported import load_exported, write_run
from pref_jax.weights.run import export_loaded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

DECODER = (
    f"--config={REPOSITORY}/configs/llama_lora.py:tiny",
    "--config.input.max_length=128",
    "--config.train.microbatch_size=1",
    "--config.train.batch_size=8",
    "--config.train.warmup_steps=0",
    "--config.train.learning_rate=1e-2",
    "--config.model.lora.targets=all-linear",
    "--config.logging.tensorboard=false",
)


def write_base(folder: Path) -> Path:
    """A random LLaMA written by transformers in three shards, with a byte-pair tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([f"line {n} of a text about rain" for n in range(20)], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="250KB")
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "lm")


def train_decoder(workdir: Path, base: Path, arena: Path, *flags: str) -> command.Outcome:
    """What the command said of a run on ``base`` and the arena's rows."""
    outcome = call(
        *("train", *DECODER, f"--workdir={workdir}", f"--config.model.pretrained={base}"),
        *(f"--config.data.train={arena}/train.csv", *flags),
    )
    assert outcome.code == 0, outcome
    return outcome


@pytest.fixture(scope="module")
def decoder(base: Path, arena: Path) -> Path:
    """A run of ten updates."""
    workdir = base.parent / "run"
    train_decoder(workdir, base, arena, "--config.train.max_steps=10")
    return workdir


def numbers(rows: list[list[str]]) -> np.ndarray:
    return np.array([[float(cell) for cell in row[1:]] for row in rows])


def test_a_mean_of_adapters_is_the_mean_of_their_updates(
    base: Path, decoder: Path, arena: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    flags = ("--config.train.max_steps=4", "--config.seed=5", "--config.train.learning_rate=0.01")
    train_decoder(other, base, arena, *flags)

    def weights(run: Path) -> dict[str, np.ndarray]:
        """The merged model: every projection with its update added."""
        folder = tmp_path / f"merged-{run.name}"
        outcome = call("export", f"--workdir={run}", f"--output={folder}", "--merge")
        assert outcome.code == 0, outcome
        return {
            name: array
            for path in folder.glob("*.safetensors")
            for name, array in load_file(path).items()
        }

    mean = tmp_path / "mean"
    outcome = call(
        *("ensemble", decoder, other, "--mean_adapters", "--weights=1,3", f"--output={mean}")
    )
    assert outcome.code == 0, outcome
    first, second, both = weights(decoder), weights(other), weights(mean)
    assert set(first) == set(second) == set(both)
    moved = [name for name in first if np.abs(first[name] - second[name]).max() > 1e-5]
    assert any("q_proj" in name for name in moved) and any("score" in name for name in moved)
    for name in first:
        expected = 0.25 * first[name].astype(np.float64) + 0.75 * second[name]
        np.testing.assert_allclose(both[name], expected, atol=2e-6, err_msg=name)

    rows = write_csv(tmp_path / "rows.csv", make_rows())
    answers = [numbers(predict(run, rows)) for run in (decoder, other, mean)]
    assert np.abs(answers[2] - answers[0]).max() > 1e-4
    assert np.abs(answers[2] - answers[1]).max() > 1e-4
    again = call("ensemble", decoder, other, "--mean_adapters", f"--output={mean}")
    assert again.code == 2 and "is not empty" in again.stderr


def test_adapters_of_different_models_have_no_mean(
    decoder: Path, run: Path, base: Path, arena: Path, tmp_path: Path
) -> None:
    wider = tmp_path / "wider"
    train_decoder(wider, base, arena, "--config.train.max_steps=1", "--config.model.lora.rank=3")
    for other, words in ((run, "without adapters"), (wider, "model.lora is not that of")):
        outcome = call("ensemble", decoder, other, "--mean_adapters", f"--output={tmp_path}/new")
        assert outcome.code == 2 and words in outcome.stderr, outcome
        assert not (tmp_path / "new").exists()


def test_checkpoints_hold_what_was_trained(decoder: Path) -> None:
    manifest = json.loads(next(decoder.glob("checkpoints/*/manifest.json")).read_text())
    names = manifest["leaves"]
    assert any("lora" in name for name in names) and any("head" in name for name in names)
    assert not any("embed_tokens" in name or "layernorm" in name for name in names)
    model = json.loads((decoder / "model.json").read_text())
    assert len(model["base"]["digest"]) == 64


def test_any_arrangement_of_rows_gives_the_same(decoder: Path, tmp_path: Path) -> None:
    rows = make_rows()
    whole = numbers(predict(decoder, write_csv(tmp_path / "all.csv", rows)))
    back = numbers(predict(decoder, write_csv(tmp_path / "back.csv", rows[::-1])))
    alone = numbers(predict(decoder, write_csv(tmp_path / "one.csv", rows[3:4])))
    np.testing.assert_allclose(back[::-1], whole, atol=1e-5)
    np.testing.assert_allclose(alone[0], whole[3], atol=1e-5)
    assert np.abs(whole[0] - whole[1]).max() > 1e-4


def test_typed_special_tokens_are_text(decoder: Path, tmp_path: Path) -> None:
    answers = [
        predict(
            decoder,
            write_csv(tmp_path / "x.csv", make_rows(r0={"response_a": json.dumps([text])})),
        )[0][1:]
        for text in ("ok <|end_of_text|> good", "ok <|end_of_text|> bad", "ok")
    ]
    assert answers[0] != answers[1] != answers[2]


def test_the_settings_of_padding_change_nothing(base: Path, decoder: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "rows.csv", make_rows())
    before = predict(decoder, data)
    moved = shutil.copytree(base, tmp_path / "other")
    settings = json.loads((moved / "tokenizer_config.json").read_text())
    settings |= {"padding_side": "left", "pad_token": "<|end_of_text|>"}
    (moved / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"pad_token_id": 511}))
    assert predict(decoder, data, f"--base={moved}") == before


def test_a_base_that_moved_or_changed(base: Path, decoder: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "rows.csv", make_rows())
    before = predict(decoder, data)
    away = base.rename(base.with_name("away"))
    try:
        flags = (f"--workdir={decoder}", f"--data={data}", f"--output={tmp_path}/out.csv")
        gone = call("predict", *flags)
        assert gone.code == 2 and "--base=FOLDER" in gone.stderr and gone.stderr.count("\n") == 1
        assert predict(decoder, data, f"--base={away}") == before
        shard = next(away.glob("model-*.safetensors"))
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        changed = shutil.copytree(away, tmp_path / "changed")
        (changed / shard.name).write_bytes(content)
        refused = call("predict", *flags, f"--base={changed}")
        assert refused.code == 2 and "its weights have the hash" in refused.stderr
    finally:
        away.rename(base)


READ = """
import sys
sys.modules["pref_jax"] = None
import json, torch
from peft import PeftModel
from transformers import LlamaForSequenceClassification
base, adapter, merged = sys.argv[1:]
whole = LlamaForSequenceClassification.from_pretrained(merged).eval()
plain = LlamaForSequenceClassification.from_pretrained(base, num_labels=3)
tuned = PeftModel.from_pretrained(plain, adapter).eval()
described = json.load(open(adapter + "/pref_jax.json"))
answers = []
for example in described["examples"]:
    ids = torch.tensor([example["input_ids"]])
    with torch.no_grad():
        answers.append([m(input_ids=ids).logits.softmax(-1)[0].tolist() for m in (tuned, whole)])
print(json.dumps(answers))
"""


def test_peft_and_plain_transformers_agree(base: Path, decoder: Path, tmp_path: Path) -> None:
    for name, flags in (("adapter", ()), ("merged", ("--merge",))):
        outcome = call("export", f"--workdir={decoder}", f"--output={tmp_path}/{name}", *flags)
        assert outcome.code == 0, outcome
    # Nothing of this machine is needed to load: all moves together.
    moved = shutil.copytree(base, tmp_path / "elsewhere")
    done = subprocess.run(
        [sys.executable, "-I", "-c", READ, str(moved), f"{tmp_path}/adapter", f"{tmp_path}/merged"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    described = json.loads((tmp_path / "adapter" / "pref_jax.json").read_text())
    assert described["input"]["layout"] == "decoder"
    wanted = np.array([example["probabilities"] for example in described["examples"]])
    for number, answers in enumerate(np.array(json.loads(done.stdout.splitlines()[-1]))):
        np.testing.assert_allclose(answers, np.stack([wanted[number]] * 2), atol=1e-4)
    settings: dict[str, Any] = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert "score" not in settings["target_modules"] and len(settings["target_modules"]) == 7
    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.score.weight"].shape == (3, 64)
    assert len(tensors) == 2 * 7 * 2 + 1
    assert not any("score" in name and "lora" in name for name in tensors)


def test_a_symmetric_decoder_reads_both_orders_and_says_so(
    base: Path, arena: Path, tmp_path: Path
) -> None:
    """Its export holds two sequences a row; the mean of plain transformers' logits is its own."""
    rows = read_csv(arena / "test.csv")[:8]
    other = [
        {**row, "response_a": row["response_b"], "response_b": row["response_a"]} for row in rows
    ]
    run = tmp_path / "run"
    train_decoder(run, base, arena, "--config.model.symmetric", "--config.train.max_steps=4")
    ours = numbers(predict(run, write_csv(tmp_path / "rows.csv", rows)))
    exchanged = numbers(predict(run, write_csv(tmp_path / "other.csv", other)))
    assert np.abs(ours[:, 0] - ours[:, 1]).max() > 1e-3
    np.testing.assert_allclose(exchanged[:, [1, 0, 2]], ours, atol=1e-6)

    folder = tmp_path / "merged"
    outcome = call("export", f"--workdir={run}", f"--output={folder}", "--merge")
    assert outcome.code == 0, outcome
    described = json.loads((folder / "pref_jax.json").read_text())
    assert described["input"]["both_orders"] is True
    model = transformers.LlamaForSequenceClassification.from_pretrained(folder).eval()
    for example in described["examples"]:
        first, second = (
            model(torch.tensor([ids])).logits[0].detach().numpy() for ids in example["input_ids"]
        )
        logits = (first + second[[1, 0, 2]]) / 2
        weights = np.exp(logits - logits.max())
        np.testing.assert_allclose(weights / weights.sum(), example["probabilities"], atol=1e-4)


@pytest.mark.parametrize("symmetric", ["false", "true"])
def test_a_decoder_that_is_told_lengths_takes_them_along(
    base: Path, arena: Path, tmp_path: Path, symmetric: str
) -> None:
    """Plain transformers with what the export says of lengths has its examples; so has a bundle."""
    run = tmp_path / "run"
    flags = (f"--config.model.symmetric={symmetric}", "--config.model.length_features")
    outcome = train_decoder(run, base, arena, *flags, "--config.train.max_steps=4")
    assert "fitted the head to the lengths" in outcome.stdout, outcome

    loaded = load_run(run)
    for form in ("adapter", "merged"):
        folder = tmp_path / form
        export_loaded(loaded, folder, merge=form == "merged")
        write_run(folder, loaded, form=form)
        head = load_exported(folder, base if form == "adapter" else None).params["head"]
        for name, leaf in loaded.params["head"].items():
            np.testing.assert_array_equal(head[name], leaf)

    model = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    described = json.loads((tmp_path / "merged" / "pref_jax.json").read_text())
    weights, bias = (np.array(described["lengths"][name]) for name in ("weights", "bias"))
    untold = []
    for example in described["examples"]:
        a, b = np.log1p(example["text_lengths"]) - np.log(129)
        orders = [(a, b, [0, 1, 2]), (b, a, [1, 0, 2])][: 2 if symmetric == "true" else 1]
        sequences = example["input_ids"] if symmetric == "true" else [example["input_ids"]]
        of_text, of_lengths = np.zeros(3), np.zeros(3)
        for ids, (mine, other, places) in zip(sequences, orders, strict=True):
            logits = model(torch.tensor([ids])).logits[0].detach().numpy()
            of_text += logits[places] / len(orders)
            told = np.array([mine, other, mine - other]) @ weights + bias
            of_lengths += told[places] / len(orders)
        for logits in (of_text + of_lengths, of_text):
            probabilities = np.exp(logits - logits.max())
            untold.append(probabilities / probabilities.sum())
        np.testing.assert_allclose(untold[-2], example["probabilities"], atol=1e-4)
    assert np.abs(np.subtract(untold[::2], untold[1::2])).max() > 1e-2

    path = tmp_path / "adapter" / "pref_jax.json"
    described = json.loads(path.read_text())
    for damaged in (None, {"weights": [1.0], "bias": [0.0] * 3}, {"weights": [[0.0] * 3] * 3}):
        path.write_text(json.dumps(described | {"lengths": damaged}))
        with pytest.raises(InputError, match="lengths: missing or damaged"):
            load_exported(path.parent, base)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantised_base_trains_and_merges(
    base: Path, arena: Path, tmp_path: Path, quantization: str
) -> None:
    workdir = tmp_path / "run"
    flags = (f"--config.model.quantization={quantization}", "--config.train.max_steps=2")
    train_decoder(workdir, base, arena, *flags)
    outcome = call("export", f"--workdir={workdir}", f"--output={tmp_path}/adapter")
    assert outcome.code == 0 and "--merge" in outcome.stdout, outcome
    said = json.loads((tmp_path / "adapter" / "pref_jax.json").read_text())
    assert said["base_quantization"] == quantization
    outcome = call("export", f"--workdir={workdir}", f"--output={tmp_path}/merged", "--merge")
    assert outcome.code == 0, outcome
    model = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "merged")
    described = json.loads((tmp_path / "merged" / "pref_jax.json").read_text())
    for example in described["examples"]:
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([example["input_ids"]])).logits
        got = logits.softmax(-1)[0].numpy()
        np.testing.assert_allclose(got, example["probabilities"], atol=1e-4)


def test_layers_can_be_frozen_without_adapters(base: Path, arena: Path, tmp_path: Path) -> None:
    outcome = call(
        "train",
        *DECODER,
        "--config.model.lora.rank=0",
        "--config.model.frozen_layers=1",
        f"--config.model.pretrained={base}",
        f"--config.data.train={arena}/train.csv",
        "--config.train.max_steps=2",
        f"--workdir={tmp_path}/run",
    )
    assert outcome.code == 0, outcome
    outcome = call("export", f"--workdir={tmp_path}/run", f"--output={tmp_path}/whole")
    assert outcome.code == 0, outcome
    before = transformers.LlamaForSequenceClassification.from_pretrained(base, num_labels=3)
    after = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    changed = {
        name: not torch.equal(value, after.state_dict()[name])
        for name, value in before.state_dict().items()
    }
    assert changed == {name: "layers.0." not in name for name in changed}
    manifest = json.loads(next((tmp_path / "run").glob("checkpoints/*/manifest.json")).read_text())
    assert not any("frozen_layers" in name for name in manifest["leaves"])
    described = json.loads((tmp_path / "whole" / "pref_jax.json").read_text())
    for example in described["examples"]:
        with torch.no_grad():
            logits = after(input_ids=torch.tensor([example["input_ids"]])).logits
        np.testing.assert_allclose(logits.softmax(-1)[0], example["probabilities"], atol=1e-4)


def _cut_shard(folder: Path) -> str:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return shard.name


def _lose_shard(folder: Path) -> str:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    return shard.name


def _lose_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "tokenizer.json"


def _only_sentencepiece(folder: Path) -> str:
    _lose_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"x")
    return "sentencepiece"


def _wrong_shape(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    return "has shape"


def _more_tokens(folder: Path) -> str:
    content = json.loads((folder / "tokenizer.json").read_text())
    last = max(content["model"]["vocab"].values())
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    content["added_tokens"] += [
        {**content["added_tokens"][0], "id": max(last, rows) + n, "content": f"<new{n}>"}
        for n in range(12)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return f"the model's table has {rows} rows"


def _another_family(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "roberta"}))
    return "its model_type is 'roberta'"


def _map_elsewhere(folder: Path) -> str:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    name = next(name for name, shard in index["weight_map"].items() if shard == shards[0])
    index["weight_map"][name] = shards[1]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return name


def _rewrite(folder: Path, change: Callable[[list[dict[str, np.ndarray]]], None]) -> None:
    from safetensors.numpy import load_file, save_file

    shards = sorted(folder.glob("model-*.safetensors"))
    tensors = [load_file(shard) for shard in shards]
    change(tensors)
    for shard, content in zip(shards, tensors, strict=True):
        save_file(content, shard, metadata={"format": "pt"})


def _twice(folder: Path) -> str:
    name = "model.norm.weight"

    def change(tensors: list[dict[str, np.ndarray]]) -> None:
        value = next(content[name] for content in tensors if name in content)
        for content in tensors:
            content[name] = value

    _rewrite(folder, change)
    return name


def _one_too_many(folder: Path) -> str:
    name = "model.layers.0.self_attn.q_proj.bias"
    _rewrite(folder, lambda tensors: tensors[0].update({name: np.ones(64, np.float32)}))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = sorted(set(index["weight_map"].values()))[0]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return name


def _only_pickled(folder: Path) -> str:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x" * 100)
    return "safetensors"


@pytest.mark.parametrize(
    "damage",
    [
        *(_cut_shard, _lose_shard, _lose_tokenizer, _only_sentencepiece, _wrong_shape),
        *(_more_tokens, _another_family, _map_elsewhere, _twice, _one_too_many, _only_pickled),
    ],
)
def test_broken_folders_are_refused(base: Path, arena: Path, tmp_path: Path, damage: Any) -> None:
    broken = shutil.copytree(base, tmp_path / "lm")
    named = damage(broken)
    outcome = call(
        "train",
        *DECODER,
        f"--config.model.pretrained={broken}",
        f"--config.data.train={arena}/train.csv",
        f"--workdir={tmp_path}/run",
    )
    assert outcome.code == 2 and outcome.stderr.count("\n") == 1, outcome
    assert named in outcome.stderr


def test_a_stray_file_is_not_merged(base: Path, decoder: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "rows.csv", make_rows())
    before = predict(decoder, data)
    linked = tmp_path / "linked"  # as a hub's cache is
    linked.mkdir()
    for file in base.iterdir():
        (linked / file.name).symlink_to(file)
    assert predict(decoder, data, f"--base={linked}") == before
    beside = shutil.copytree(base, tmp_path / "lm")
    shutil.copy(next(beside.glob("model-*.safetensors")), beside / "consolidated.safetensors")
    assert predict(decoder, data, f"--base={beside}") == before


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--config.model.lora.targets=q_proj,score", "no projection is called 'score'"),
        ("--config.input.layout=single", "choose decoder"),
        ("--config.input.max_length=20", "give at least"),
        # Said at once, not in two rounds: the template is most of it.
        ("--config.input.max_length=4", "give at least 90"),
        ("--config.model.config.head_dim=7", "7 is odd"),
        ("--config.model.pretrained=./absent.gguf", "no such file"),
        ("--config.input.template=x", "input.template"),
        ("--config.model.frozen_layers=1", "beside adapters"),
        ("--config.model.lora.rank=0 --config.model.quantization=nf4", "beside adapters"),
        ("--config.mesh.tensor=3", "mesh"),
    ],
)
def test_wrong_settings_are_one_line(arena: Path, tmp_path: Path, flag: str, named: str) -> None:
    outcome = call(
        "train",
        *DECODER,
        f"--config.data.train={arena}/train.csv",
        f"--workdir={tmp_path}/run",
        *flag.split(" "),
    )
    assert outcome.code == 2 and outcome.stderr.count("\n") == 1, outcome
    assert named in outcome.stderr
    assert not (tmp_path / "run" / "config.json").exists()  # or the corrected command is refused


def test_a_killed_export_leaves_nothing_for_good(decoder: Path, tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = tmp_path / f".adapter.{ended.pid}-0123abcd.new"
    running = tmp_path / f".adapter.{os.getppid()}-0123abcd.new"
    other = tmp_path / f".other.{ended.pid}-0123abcd.new"
    for folder in (left, running, other):
        folder.mkdir()
        (folder / "half.safetensors").write_bytes(b"x")
    outcome = call("export", f"--workdir={decoder}", f"--output={tmp_path}/adapter")
    assert outcome.code == 0, outcome
    assert not left.exists() and running.exists() and other.exists()


@pytest.fixture(scope="module")
def short(base: Path, arena: Path) -> dict[str, Path]:
    """Runs of one update that read 96 tokens, one for each way to shorten."""
    runs = {}
    for truncation in ("head", "tail", "head_tail"):
        runs[truncation] = base.parent / truncation
        outcome = call(
            "train",
            *DECODER,
            "--config.input.max_length=96",
            f"--config.input.truncation={truncation}",
            f"--config.model.pretrained={base}",
            f"--config.data.train={arena}/train.csv",
            "--config.train.max_steps=1",
            f"--workdir={runs[truncation]}",
        )
        assert outcome.code == 0, outcome
    return runs


@pytest.mark.parametrize(
    ("truncation", "first_word", "last_word"),
    [("head", True, False), ("tail", False, True), ("head_tail", True, True)],
)
def test_what_is_cut_off_cannot_be_seen(
    short: dict[str, Path], tmp_path: Path, truncation: str, first_word: bool, last_word: bool
) -> None:
    """Texts of 50,000 characters: a change that is kept changes the row, another does not."""
    long = "rain " * 10_000
    texts = {"prompt": long, "response_a": long, "response_b": long}
    changes = [
        texts,
        texts | {"prompt": f"snow {long}"},
        texts | {"response_b": f"{long}snow"},
    ]
    rows = make_rows(
        **{
            f"r{n}": {name: json.dumps([text]) for name, text in change.items()}
            for n, change in enumerate(changes)
        }
    )[:3]
    plain, prompt, response = predict(short[truncation], write_csv(tmp_path / "long.csv", rows))
    assert (plain[1:] != prompt[1:], plain[1:] != response[1:]) == (first_word, last_word)
    outcome = call("export", f"--workdir={short[truncation]}", f"--output={tmp_path}/out")
    assert outcome.code == 0, outcome
    examples = json.loads((tmp_path / "out" / "pref_jax.json").read_text())["examples"]
    ends = {tuple(example["input_ids"][-4:]) for example in examples}
    assert len(examples) > 3 and len(ends) == 1


def test_a_killed_run_goes_on_to_the_same_bits(base: Path, arena: Path, tmp_path: Path) -> None:
    """Adapters, head and optimizer come from the checkpoint, the frozen base from its folder."""
    command = (
        "train",
        *DECODER,
        f"--config.model.pretrained={base}",
        f"--config.data.train={arena}/train.csv",
        "--config.train.max_steps=6",
        "--config.checkpoint.every_steps=1",
    )
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    outcome = call(*command, f"--workdir={straight}")
    assert outcome.code == 0, outcome
    log = tmp_path / "log"
    process = start(log, *command, f"--workdir={broken}", devices=8)
    wait_for(lambda: any(broken.glob("checkpoints/[0-9]/manifest.json")), process, log)
    process.kill()
    process.join()
    assert not (broken / "result.json").exists()
    outcome = call(*command, f"--workdir={broken}")
    assert outcome.code == 0 and "resumed" in outcome.stdout, outcome
    assert read_lines(broken) == read_lines(straight)
    ours, wanted = (read_arrays(folder, 6) for folder in (broken, straight))
    assert ours.keys() == wanted.keys() and any("lora" in name for name in ours)
    for name, array in ours.items():
        assert array.tobytes() == wanted[name].tobytes(), name


def test_packing_changes_nothing(base: Path, arena: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "rows.csv", make_rows())
    answers = []
    for packing in ("on", "off"):
        workdir = tmp_path / packing
        outcome = call(
            "train",
            *DECODER,
            "--config.model.lora.dropout=0",
            f"--config.input.packing={packing}",
            f"--config.model.pretrained={base}",
            f"--config.data.train={arena}/train.csv",
            "--config.train.max_steps=3",
            f"--workdir={workdir}",
        )
        assert outcome.code == 0, outcome
        answers.append(numbers(predict(workdir, data)))
    np.testing.assert_allclose(*answers, atol=1e-5)


def test_the_loss_of_a_file_is_the_mean_over_its_rows(decoder: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "rows.csv", make_rows(), labels=True)
    answers = numbers(predict(decoder, data))
    flags = (f"--workdir={decoder}", f"--data={data}", f"--output={tmp_path}/out.json")
    outcome = call("evaluate", *flags)
    assert outcome.code == 0, outcome
    labels = [[float(row[f"winner_{kind}"]) for kind in ("model_a", "model_b", "tie")]
              for row in read_csv(data)]  # fmt: skip
    loss = -np.log((answers * np.array(labels)).sum(axis=1)).mean()
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["rows"] == 6 and abs(result["log_loss"] - loss) < 1e-6
