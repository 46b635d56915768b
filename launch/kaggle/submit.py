"""The scoring notebook; launch/kaggle.py builds submit.ipynb from it."""

# %% [markdown]
# # Scoring without internet
# Attach the bundle as a dataset, the competition as input, choose the accelerator it was built for
# and switch the internet off. The last cell checks the submission.

# %%
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

STARTED = time.time()
MAX_HOURS = 8.5  # of the session's nine; everything below counts
PYTHON = "3.11"  # what the wheels are for
BUNDLE = None  # folder of the bundle; None: looked for
DATA = None  # test.csv; None: looked for
OUTPUT = None  # None: submission.csv in /kaggle/working, elsewhere in this folder
PACKAGES = "/tmp/pref_jax_packages"  # where the wheels are installed; None: they are there already

# %%


def find(name, holds=lambda path: True):
    """The first file of this name here or below Kaggle's inputs that holds what is asked for."""
    places = [Path(name), *sorted(Path("/kaggle/input").rglob(name))]
    for path in places:
        if path.is_file() and holds(path):
            return path
    raise SystemExit(f"There is no {name} here or below /kaggle/input: attach what holds it.")


def is_bundle(path):
    return b"pref_jax scoring bundle" in path.read_bytes()[:200]  # others may hold anything


running = f"{sys.version_info.major}.{sys.version_info.minor}"
if PACKAGES is not None and running != PYTHON:
    raise SystemExit(
        f"The bundle is for Python {PYTHON}, this notebook runs {running}: "
        f"build it with --python={running}, or choose another environment."
    )
bundle = Path(BUNDLE) if BUNDLE else find("manifest.json", is_bundle).parent
data = Path(DATA) if DATA else find("test.csv")
working = Path("/kaggle/working")
output = Path(OUTPUT) if OUTPUT else (working if working.is_dir() else Path()) / "submission.csv"
manifest = json.loads((bundle / "manifest.json").read_text())
print("bundle", bundle, "data", data, "output", output, sep="\n  ")

# %%
for name, entry in manifest["files"].items():
    path = bundle / name
    if not path.is_file():
        raise SystemExit(f"{path} is missing: upload the bundle again.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry["sha256"]:
        raise SystemExit(f"{path} is damaged: its hash is not the manifest's; upload it again.")
print(f"{len(manifest['files'])} files are whole after {time.time() - STARTED:.0f} s")

# %%
environment = dict(os.environ, PYTHONUNBUFFERED="1")
environment.setdefault("PREF_JAX_CACHE", "/tmp/pref_jax_cache")


def run(*command):
    """Runs a program and shows what it says; the notebook stops where it fails."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
    if process.wait() != 0:
        raise SystemExit(f"It ended with exit code {process.returncode}; the lines above say why.")


if PACKAGES is not None:
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
        *("--no-index", "--no-deps", "--require-hashes", "--target", PACKAGES, "--upgrade"),
        *("--find-links", str(bundle / "wheels"), "-r", str(bundle / "requirements.txt")),
    )
    # Before what the machine brings along.
    environment["PYTHONPATH"] = PACKAGES
print(f"installed after {time.time() - STARTED:.0f} s")

# %%
run(
    *(sys.executable, "-m", "pref_jax.kaggle", f"--bundle={bundle}", f"--data={data}"),
    *(f"--output={output}", f"--max_hours={MAX_HOURS}", f"--started={STARTED}"),
)

# %%
# In a program of its own too: what it reads the test file with is among the packages.
run(sys.executable, "-m", "pref_jax.kaggle.check", f"--data={data}", f"--output={output}")
print(f"complete after {time.time() - STARTED:.0f} s of {MAX_HOURS} h")
