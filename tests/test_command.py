"""The front door: what a user gets wrong is one line and the right exit code."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pref_jax import command

SCRIPT = '''"""Counts rows.

    python launch/count.py --rows=3 --output=x.csv
"""
import logging
from absl import flags
from pref_jax import command
from pref_jax.errors import InputError, RunError

flags.DEFINE_integer("rows", 3, "How many rows.", lower_bound=1)
flags.DEFINE_enum("mode", "train", ["train", "predict"], "What to time.")
flags.DEFINE_string("output", None, "Where to write.", required=True)


def main(flags{extra}):
    {body}


if __name__ == "__main__":
    command.run(main, doc=__doc__{options})
'''


@pytest.fixture
def script(tmp_path: Path):
    def write(body: str = "print(flags.rows)", extra: str = "", options: str = "") -> Path:
        path = tmp_path / "count.py"
        path.write_text(SCRIPT.format(body=body, extra=extra, options=options))
        return path

    return write


def test_flags_reach_main(script) -> None:
    outcome = command.call(script(), ["--rows=7", "--output=x"])
    assert outcome == (0, "7\n", "")


def test_scripts_with_the_same_flags_run_one_after_the_other(script) -> None:
    for _ in range(2):
        assert command.call(script(), ["--output=x"]).code == 0


def test_what_main_returns_is_the_exit_code(script) -> None:
    assert command.call(script("return 3"), ["--output=x"]).code == 3


def test_help_opens_with_the_examples_and_lists_own_flags_only(script) -> None:
    outcome = command.call(script(), ["--help"])
    assert outcome.code == 0
    assert "python launch/count.py" in outcome.stdout.splitlines()[2]
    for name in ("--rows", "--mode", "--output", "--debug"):
        assert f"  {name}\n" in outcome.stdout
    assert "--verbosity" not in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--output: it is missing; for example: python launch/count.py"),
        (["--output"], "--output: "),
        (["--output="], "--output: it is empty"),
        (["--output=x", "--rows=many"], "--rows: 'many': not a whole number; How many rows"),
        (["--output=x", "--rows=1.5"], "--rows: '1.5': not a whole number"),
        (["--output=x", "--rows=0"], "--rows: '0'"),
        (["--output=x", "--mode=tain"], "--mode: unknown value 'tain'; known: train, predict"),
        (["--outptu=x"], "--outptu: unknown flag; did you mean --output?"),
        (["--output=x", "--zzz=1"], "--zzz: unknown flag; known: --mode, --output, --rows"),
        (["--output=x", "--debug=maybe"], "--debug: 'maybe'"),
        (["--output=x", "stray"], "unexpected argument 'stray'"),
        (["--output=x", "--config.train.epochs=1"], "this command takes no config"),
        (["--output=x", "--flagfile=absent"], ""),
    ],
)
def test_wrong_use_is_one_line(script, arguments: list[str], expected: str) -> None:
    code, stdout, stderr = command.call(script(), arguments)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert expected in stderr


@pytest.mark.parametrize(
    ("body", "code", "expected"),
    [
        ('raise InputError("a.csv:3", "no\\nlabel", "add one")', 2, "a.csv:3: no label; add one"),
        ('raise RunError("step 4", "loss is nan", "lower the rate")', 1, "step 4: loss is nan"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("raise MemoryError", 1, "--config.train.microbatch_size"),
        ('raise RuntimeError("RESOURCE_EXHAUSTED: 9GB")', 1, "--config.train.remat=full"),
        (f'raise OSError({errno.ENOSPC}, "full", "a/b")', 1, "a/b: the disk is full"),
        (f'raise OSError({errno.EACCES}, "denied", "a/b")', 2, "a/b: no permission"),
        (f'raise OSError({errno.EROFS}, "read-only", "a/b")', 2, "a/b: no permission"),
        ('open("absent/there")', 2, "absent/there: no such file"),
        ('raise InputError("a\\x1b[31m", "b", "c")', 2, r"a\x1b[31m"),
    ],
)
def test_failures_are_one_line(script, body: str, code: int, expected: str) -> None:
    outcome = command.call(script(body), ["--output=x"])
    assert outcome.code == code
    assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1
    assert expected in outcome.stderr


def test_a_defect_keeps_its_traceback(script) -> None:
    outcome = command.call(script("1 / 0"), ["--output=x"])
    assert outcome.code == 1
    assert "Traceback" in outcome.stderr and "ZeroDivisionError" in outcome.stderr


def test_debug_shows_the_traceback_and_still_the_line(script) -> None:
    body = 'raise InputError("a", "b", "c")'
    outcome = command.call(script(body), ["--output=x", "--debug"])
    assert outcome.code == 2
    assert "Traceback" in outcome.stderr and outcome.stderr.endswith("error: a: b; c\n")


def test_an_error_ends_the_process_though_a_thread_is_busy(script) -> None:
    body = """import threading, time
    threading.Thread(target=time.sleep, args=(60,)).start()
    raise InputError("a", "b", "c")"""
    done = subprocess.run(
        [sys.executable, script(body), "--output=x"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, "error: a: b; c\n")


def test_flags_may_follow_positional_arguments(script) -> None:
    path = script("print(arguments)", ", arguments", ', positional="RUN"')
    assert command.call(path, ["a", "b", "--output=x"]).stdout == "['a', 'b']\n"
    missing = command.call(path, ["--output=x"])
    assert missing.code == 2 and "RUN is missing" in missing.stderr


def test_log_lines_are_not_on_standard_error(script) -> None:
    body = 'logging.getLogger("pref_jax.data").info("reading %d", 3)'
    assert command.call(script(body), ["--output=x"]) == (0, "reading 3\n", "")


def test_any_text_can_be_printed_in_any_locale(script) -> None:
    path = script('print("na\\u00efve \\u6c34 \\ud83d")')
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, path, "--output=x"], env=environment, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == "na\u00efve \u6c34 \\ud83d\n"


def test_a_closed_pipe_is_no_error(script) -> None:
    path = script("[print('x' * 100) for _ in range(10000)]")
    done = subprocess.run(
        f'"{sys.executable}" "{path}" --output=x | head -n 1',
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == "" and done.stdout.startswith("xxx")


def test_a_config_is_read_overridden_and_checked(script, repository: Path) -> None:
    path = script("print(config.train.epochs)", ", config", ", config=True")
    file = f"--config={repository}/configs/single_bert.py:minilm"
    outcome = command.call(path, ["--output=x", file, "--config.train.epochs=0.5"])
    assert outcome == (0, "0.5\n", "")
    missing = command.call(path, ["--output=x"])
    assert missing.code == 2 and "--config: it is missing" in missing.stderr


def test_an_optional_config_may_be_left_out(script) -> None:
    path = script("print(config)", ", config", ', config="optional"')
    assert command.call(path, ["--output=x"]).stdout == "None\n"
    stray = command.call(path, ["--output=x", "--config.train.epochs=1"])
    assert stray.code == 2 and "--config.train.epochs" in stray.stderr


def test_flags_of_a_library_outlive_the_call(script, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "some_library.py").write_text(
        'from absl import flags\nflags.DEFINE_integer("some_library_flag", 3, "x")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = script("import some_library; print(flags.some_library_flag)")
    try:
        for _ in range(2):
            assert command.call(path, ["--output=x"]) == (0, "3\n", "")
        assert "some_library_flag" in command.flags.FLAGS
        assert "rows" not in command.flags.FLAGS and "config" not in command.flags.FLAGS
    finally:
        sys.modules.pop("some_library", None)
        delattr(command.flags.FLAGS, "some_library_flag")
