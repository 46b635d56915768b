"""The training notebooks; launch/kaggle.py builds train_tpu.ipynb and train_gpu.ipynb from it."""

# %% [markdown]
# # Training in sessions
# Attach the training bundle as a dataset and the competition as input, choose the accelerator, and
# save a version. Where the time was not enough, attach the output of that version to this notebook
# and save another: it goes on where the last one stopped.

# %%
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

STARTED = time.time()
ACCELERATOR = "gpu"
SESSION_HOURS = 9.0  # after which Kaggle cuts a session
RESERVE_HOURS = 0.25  # to finish an update, evaluate and save; Kaggle copies the output besides
CONFIG = "configs/single_bert.py:minilm"
OVERRIDES: list[str] = []  # such as "--config.model.pretrained=/kaggle/input/FOLDER"
RUN = "run"  # the run's folder in the output; the same in every session
TRAIN = None  # train.csv; None: looked for below INPUTS
BUNDLE = None  # the training bundle; None: looked for below INPUTS
INPUTS = "/kaggle/input"
WORKING = "/kaggle/working"
PACKAGES = "/tmp/pref_jax_packages"  # where everything is installed; None: it is there already

# %%


def find(name, wanted):
    """The first file of this name below the inputs."""
    found = sorted(Path(INPUTS).rglob(name))
    if not found:
        raise SystemExit(f"There is no {name} below {INPUTS}: attach {wanted}.")
    return found[0]


bundle = Path(BUNDLE) if BUNDLE else find("training_bundle.json", "the training bundle").parent
train = Path(TRAIN) if TRAIN else find("train.csv", "the competition")
about = json.loads((bundle / "training_bundle.json").read_text())
running = f"{sys.version_info.major}.{sys.version_info.minor}"
if PACKAGES is not None and running not in about["pythons"]:
    raise SystemExit(
        f"The bundle is for Python {' or '.join(about['pythons'])}, this notebook runs {running}."
    )
print("bundle", bundle, "data", train, sep="\n  ")

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
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    into = ("--upgrade", "--target", PACKAGES)
    wheels, listed = bundle / "wheels", bundle / "requirements.txt"
    if listed.is_file():  # everything is in the bundle
        hashed = ("--no-index", "--no-deps", "--require-hashes", "-r", str(listed))
        run(*pip, *into, *hashed, "--find-links", str(wheels))
    else:
        project = next(wheels.glob("pref_jax-*.whl"))
        constraints = ("--constraint", str(bundle / "constraints.txt"))
        run(*pip, *into, *constraints, f"{project}[{ACCELERATOR}]")
    environment["PYTHONPATH"] = PACKAGES
print(f"installed after {time.time() - STARTED:.0f} s")

# %%
workdir = Path(WORKING) / RUN


def count_updates(folder):
    """The newest checkpoint of a run; -1 where there is none that is whole."""
    whole = [path.parent.name for path in folder.glob("*/manifest.json")]
    return max((int(name) for name in whole if name.isdigit()), default=-1)


earlier = [path for path in Path(INPUTS).rglob(f"{RUN}/checkpoints") if path.is_dir()]
if earlier and count_updates(workdir / "checkpoints") < 0:
    best = max(earlier, key=count_updates)
    copying = workdir.with_name(f".{workdir.name}.copying")  # the run's name is for a whole one
    for unfinished in (copying, workdir):
        shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(best.parent, copying, copy_function=shutil.copyfile)  # inputs are read-only
    copying.rename(workdir)
    print(f"goes on with {best.parent}, which has {count_updates(best)} updates")
else:
    print("goes on where it stopped" if workdir.exists() else "starts from the beginning")

# %%
hours = SESSION_HOURS - RESERVE_HOURS - (time.time() - STARTED) / 3600
if hours <= 0:
    raise SystemExit("Nothing is left of SESSION_HOURS.")
os.chdir(bundle / "project")
run(
    *(sys.executable, "launch/train.py", f"--config={CONFIG}", f"--config.data.train={train}"),
    *(f"--workdir={workdir}", f"--config.train.max_hours={hours:.4f}", *OVERRIDES),
)

# %%
result = json.loads((workdir / "result.json").read_text())
if result["stopped"] is None:
    print(f"finished after {result['steps']} updates: attach or download {workdir}")
else:
    print(f"{result['steps']} updates: attach this output to this notebook, and save it again")
