"""What the processes of a race share. Imports no framework, whose memory and start are measured."""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pref_jax.errors import InputError, RunError

JOB = "job.json"
ROWS = "rows.csv"
SEQUENCES = "sequences.npz"
TEXTS = "texts.json"
MODEL = "model"

Work = Callable[[Path, dict[str, Any], float], dict[str, Any]]


def serve(work: Work) -> None:
    """Runs one turn: ``python -m MODULE FOLDER RESULT STARTED [NAME=VALUE...]``.

    ``work(folder, job, started)`` returns what is written to RESULT as JSON; STARTED is the
    `time.time` at which the process was asked for. A user's error travels in RESULT too.
    """
    folder, result, started = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    path = folder / JOB
    job = json.loads(path.read_text(encoding="utf-8"))
    job |= dict(argument.split("=", 1) for argument in sys.argv[4:])
    code = 0
    try:
        content = work(folder, job, started)
    except (InputError, RunError) as error:
        kind = "input" if isinstance(error, InputError) else "run"
        content = {"error": [kind, error.where, error.what, error.remedy]}
    except BaseException:
        traceback.print_exc()
        content, code = None, 1
    if content is not None:
        result.write_text(json.dumps(content), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of either framework may not hold up the next turn
