"""The line on memory, and the one where there is not enough of it."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rig import TINY, call, make_rows, train, write_csv

from pref_jax.config import encoder_config, llama_config
from pref_jax.errors import RunError
from pref_jax.evaluation.predict import Predictor
from pref_jax.memory import describe_use, is_shortage, list_relief, shortage_explained
from pref_jax.training.run import CompiledStep

GIB = 2**30


class Card:
    device_kind, platform = "Tesla T4", "gpu"

    def __init__(self, **statistics: int) -> None:
        self._statistics = statistics

    def memory_stats(self) -> dict[str, int] | None:
        return self._statistics or None


CARD: Any = Card(
    bytes_in_use=4 * GIB, peak_bytes_in_use=9 * GIB, bytes_limit=11 * GIB + GIB // 10 * 8
)


def exhaust() -> None:
    """The error that XLA raises, in earnest: no address space has so many bytes."""
    jnp.zeros(2**50, jnp.uint8).block_until_ready()


def test_the_line_says_why_another_program_shows_more() -> None:
    line = describe_use(CARD, {})
    assert "4.0 GiB in use, at most 9.0 GiB so far, 11.8 GiB for JAX to use: 75% of" in line
    assert "nvidia-smi" in line and "XLA_PYTHON_CLIENT_PREALLOCATE=false" in line
    assert ": 90% of the card" in describe_use(CARD, {"XLA_CLIENT_MEM_FRACTION": "0.9"})
    assert ": 50% of the card" in describe_use(CARD, {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".50"})
    plain = describe_use(CARD, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    assert "taken as needed" in plain and "taken at the start" not in plain
    assert "keeps no count" in describe_use(Card(), {})  # type: ignore[arg-type]
    assert "of this process" in describe_use(jax.devices()[0], {})


def test_a_shortage_is_told_from_other_errors() -> None:
    for run in (exhaust, lambda: np.zeros(2**50, np.uint8)):
        with pytest.raises(Exception) as caught:
            run()
        assert is_shortage(caught.value), caught.type
    cuda = RuntimeError("INTERNAL: Failed to load: CUDA_ERROR_OUT_OF_MEMORY: out of memory")
    assert is_shortage(cuda)
    tpu = RuntimeError("XLA:TPU compile permanent error. Ran out of memory in memory space hbm.")
    assert is_shortage(tpu)
    wrapped = ValueError("in a thread")
    wrapped.__cause__ = cuda
    assert is_shortage(wrapped)
    assert not is_shortage(RuntimeError("INVALID_ARGUMENT: shapes")) and not is_shortage(OSError())


def experiment(config: Any, *, size: int, devices: int = 1, held: int = GIB, device: Any = CARD):
    mesh = types.SimpleNamespace(
        local_devices=[device],
        devices=np.zeros(devices),
        shape={"data": devices, "fsdp": max(1, config.mesh.fsdp), "tensor": 1},
    )
    return types.SimpleNamespace(
        config=config,
        mesh=mesh,
        microbatch_size=size,
        is_decoder=config.input.layout == "decoder",
        bytes_per_device=lambda training: held,
    )


def relief(config: Any, command: str = "train", limit: int = 2 * GIB, **parts: Any) -> str:
    return list_relief(experiment(config, **parts), command, limit)


def test_what_would_help_is_named_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    encoder, decoder = encoder_config(None, layout="single"), llama_config(None, quantization="nf4")
    line = relief(encoder, size=8, devices=4)
    for named in ("microbatch_size=4", "remat=full", "mesh.fsdp=4", "MEM_FRACTION=0.95"):
        assert named in line
    assert "quantization" not in line  # of a decoder alone
    assert "1.0 GiB of a device" in line
    line = relief(decoder, size=1)  # recomputes everything and has four bits already
    for absent in ("microbatch_size", "remat", "quantization", "fsdp"):
        assert absent not in line
    assert "max_length" in line
    decoder.model.quantization = "none"
    assert "--config.model.quantization=nf4" in relief(decoder, size=1)
    decoder.model.lora.rank = 0
    assert "lora.rank=4 with --config.model.quantization=nf4" in relief(decoder, size=1)
    # Where the weights alone are too much, smaller batches are no help.
    line = relief(encoder, size=8, devices=4, held=3 * GIB)
    assert "mesh.fsdp=4" in line and "microbatch" not in line and "remat" not in line
    line = relief(encoder, "predict", size=8, devices=4)
    assert " --microbatch_size=4" in line and "--config" not in line


def test_what_is_no_shortage_goes_through() -> None:
    parts: Any = experiment(encoder_config(None, layout="single"), size=1)
    with pytest.raises(ZeroDivisionError), shortage_explained(parts, "train"):
        _ = 1 / 0
    with pytest.raises(RunError) as caught, shortage_explained(parts, "train"):
        exhaust()
    assert caught.value.where == "1 x Tesla T4"
    assert "1125899906842624 bytes" in caught.value.what
    assert "checkpoint is kept" in caught.value.remedy


def test_a_run_that_runs_out_keeps_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_csv(tmp_path / "train.csv", make_rows(), labels=True)
    arguments = (
        *(f"--config.data.train={data}", "--config.train.epochs=5", "--config.train.batch_size=2"),
        *("--config.checkpoint.every_steps=1", "--config.data.split=random"),
        *("--config.data.valid_fraction=0.3",),
    )
    straight = tmp_path / "straight"
    outcome = train(straight, *arguments)
    assert outcome.stdout.count("memory: at most") == 2
    executable = CompiledStep.executable

    def failing(self: CompiledStep) -> Any:
        compiled, steps = executable.fget(self), []  # type: ignore[attr-defined]

        def step(*parts: Any) -> Any:
            steps.append(1)
            if len(steps) > 3:
                exhaust()
            return compiled(*parts)

        return step

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(CompiledStep, "executable", property(failing))
        outcome = call("train", *TINY, f"--workdir={run}", *arguments)
    assert outcome.code == 1
    (line,) = outcome.stderr.strip().splitlines()
    assert "out of memory (Out of memory allocating 1125899906842624 bytes)" in line
    assert "--config.train.microbatch_size=2" in line and "--config.train.remat=full" in line
    assert not (run / "result.json").exists()
    # What the line says can be done in the same folder, and the run goes on.
    outcome = train(
        run, *arguments, "--config.train.microbatch_size=2", "--config.train.remat=full"
    )
    assert "resumed" in outcome.stdout and (run / "result.json").exists()

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "compile", lambda self: lambda *parts: exhaust())
        for name, output in (("predict", "s.csv"), ("evaluate", "e.json")):
            outcome = call(
                name, f"--workdir={run}", f"--data={data}", f"--output={tmp_path / output}"
            )
            assert outcome.code == 1 and not (tmp_path / output).exists()
            (line,) = outcome.stderr.strip().splitlines()
            assert "out of memory" in line and " --microbatch_size=1" in line
        outcome = call("benchmark", *TINY, *arguments, "--mode=predict", "--steps=1")
        assert outcome.code == 1 and "out of memory" in outcome.stderr
        assert "--config.train.microbatch_size=2" in outcome.stderr
    outcome = call(
        *("predict", f"--workdir={run}", f"--data={data}", f"--output={tmp_path / 's.csv'}"),
        "--microbatch_size=1",
    )
    assert outcome.code == 0, outcome
