"""The benchmark of the data path runs the real stages and sees the memory that they take."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from rig import REPOSITORY, call

from pref_jax import cache
from pref_jax.data.arena import read_comparisons
from pref_jax.data_benchmark import _MemoryWatch, read_memory, write_short_rows

TINY = f"{REPOSITORY}/configs/llama_lora.py:tiny"
STAGES = ["read", "split", "model", "tokenise", "features", "baselines", "first_batch", "serve"]
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


@needs_proc
def test_every_stage_runs_on_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    output = tmp_path / "data.json"
    command = ("benchmark", f"--config={TINY}", "--mode=data", "--simulated_rows=400")
    outcome = call(*command, f"--output={output}")
    assert outcome.code == 0, outcome
    result = json.loads(output.read_text())
    assert list(result["stages"]) == STAGES
    assert result["rows"] == 400
    assert result["served_rows"] == 360  # a tenth is held out
    assert result["seconds"] == pytest.approx(
        sum(stage["seconds"] for stage in result["stages"].values())
    )
    assert 0 < result["first_batch_seconds"] < result["seconds"]
    assert result["stages"]["tokenise"]["cpu_seconds"] > 0
    for stage in result["stages"].values():
        assert 1e7 < stage["anonymous_bytes_before"] <= stage["peak_anonymous_bytes"]
    assert result["cache_bytes"].keys() >= {"comparisons", "tokens", "features"}
    assert result["cache_bytes"]["tokens"] > 4 * 400 * 60
    # Its own cache is gone, and the usual one is in use again.
    assert not list((tmp_path / "cache").glob("benchmark.*"))
    assert os.environ[cache.VARIABLE] == str(tmp_path / "cache")


@needs_proc
def test_memory_is_what_is_held_and_not_what_is_mapped(tmp_path: Path) -> None:
    size = 64 << 20
    (tmp_path / "file").write_bytes(bytes(size))
    with _MemoryWatch() as mapped:
        assert np.memmap(tmp_path / "file", np.uint8, "r").sum() == 0
    with _MemoryWatch() as held:
        ballast = np.ones(size, np.uint8)
        deadline = time.monotonic() + 30
        while held.peak < held.before + size / 2 and time.monotonic() < deadline:
            time.sleep(0.01)  # until it has been looked at
        assert ballast.all()
        del ballast
    assert mapped.peak - mapped.before < size / 4
    assert held.peak - held.before > size / 2
    assert read_memory() < held.peak - size / 2


def test_simulated_rows_are_what_a_run_reads(tmp_path: Path) -> None:
    write_short_rows(tmp_path / "rows.csv", 500)
    comparisons = read_comparisons(tmp_path / "rows.csv", labelled=True)
    assert len(comparisons) == 500
    assert np.bincount(comparisons.labels, minlength=3).min() > 100
    assert len(np.unique(comparisons.groups)) == 450  # repeated prompts, as in real files
