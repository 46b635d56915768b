"""The front door of every script in ``launch/``: flags, configs, logging and one-line errors.

A script defines its absl flags at module level and ends with::

    if __name__ == "__main__":
        command.run(main, doc=__doc__, config=True)

``main(flags, config)`` does the work and returns an exit code or None. What users get wrong is
answered with one line ``error: WHERE: what is wrong; what to do`` and exit code 2, what fails while
running with one line and exit code 1. Everything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import logging
import os
import re
import runpy
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

# Read by libraries when they are imported, which the scripts do inside their functions.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it says on standard error that it tries again

from absl import flags

from pref_jax.errors import InputError, RunError, Stopped, shown
from pref_jax.memory import is_shortage

Main = Callable[..., int | None]

_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_calling = False  # whether `call` runs a script inside this process
_HELP = ("--help", "-help", "-h", "--helpfull", "--helpshort")


def run(
    main: Main,
    *,
    doc: str | None = None,
    config: bool | str = False,
    positional: str | None = None,
) -> NoReturn:
    """Parses the command line, calls ``main`` and leaves the process with its exit code.

    Args:
      main: called as ``main(flags[, config][, arguments])``; ``flags`` is ``absl.flags.FLAGS``.
      doc: the script's docstring; it opens ``--help``, so it holds the examples.
      config: whether there is a ``--config=FILE.py[:arguments]`` with ``--config.section.field``
        overrides. True: it must be given. A text: the file used when it is not given.
        ``"optional"``: ``main`` gets None when it is not given.
      positional: what the arguments without a dash are called, such as ``RUN``; at least one must
        be given. None: there are none.
    """
    _set_up_streams()
    arguments = list(sys.argv)
    debug = any(re.fullmatch(r"--?debug(=(true|1|yes))?", a, re.IGNORECASE) for a in arguments)
    _set_up_logging(debug)
    try:
        sys.exit(_run(main, arguments, doc or "", config, positional))
    except SystemExit:
        raise
    except BaseException as error:
        if debug:
            traceback.print_exc()
        _leave(_report(error, debug))


def _leave(code: int) -> NoReturn:
    """Ends the process after an error.

    A thread inside XLA's compiler does not survive the interpreter's end: the process would abort
    with a code of its own. Everything that has to be closed has been, on the error's way up.
    """
    if not _calling and any(t is not threading.main_thread() for t in threading.enumerate()):
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run(
    main: Main, arguments: list[str], doc: str, config: bool | str, positional: str | None
) -> int:
    if "debug" not in flags.FLAGS:
        flags.DEFINE_boolean("debug", False, "Show the traceback of an error.")
    # Imported here: scripts without a config start faster.
    from pref_jax.config_file import load, take_overrides

    overrides: list[tuple[str, str | None]] = []
    if config:
        default = config if isinstance(config, str) and config != "optional" else None
        flags.DEFINE_string(
            "config",
            default,
            "FILE.py[:arguments], a preset such as configs/quickstart.py; "
            "--config.section.field=value changes one of its fields.",
        )
        arguments, overrides = take_overrides(arguments)
    if any(argument in _HELP for argument in _before_separator(arguments)):
        print(_help(doc))
        return 0
    rest = _parse(arguments, doc)
    if positional is None and rest:
        raise InputError(
            sys.argv[0], f"unexpected argument {rest[0]!r}", "flags are typed --name=value"
        )
    if positional is not None and not rest:
        raise InputError(sys.argv[0], f"{positional} is missing", _what_to_type(positional, doc))
    parts: list[object] = [flags.FLAGS]
    if config:
        path = flags.FLAGS["config"].value
        if path is None and config != "optional":
            raise missing("--config", doc)
        if path is None and overrides:
            raise InputError(
                f"--config.{overrides[0][0]}",
                "there is no config that it could change",
                "name one with --config=FILE.py",
            )
        parts.append(None if path is None else load(path, overrides, script=sys.argv[0]))
    if positional is not None:
        parts.append(rest)
    return main(*parts) or 0


def _parse(arguments: list[str], doc: str) -> list[str]:
    """Parses the flags; returns what is left without the program's name."""
    flag_values = flags.FLAGS
    flag_values.set_gnu_getopt(True)  # flags may follow positional arguments
    try:
        rest = flag_values(arguments)[1:]
    except flags.UnrecognizedFlagError as error:
        known = [name for name in _own_flags() if name != "debug"]
        close = difflib.get_close_matches(error.flagname, known, n=1)
        remedy = f"did you mean --{close[0]}?" if close else f"known: --{', --'.join(known)}"
        if error.flagname.startswith("config."):
            remedy = "this command takes no config"
        raise InputError(f"--{error.flagname}", "unknown flag", remedy) from error
    except flags.IllegalFlagValueError as error:
        raise _illegal_value(str(error), doc) from error
    except flags.Error as error:  # a flag without its value, a flag file that is not there
        named = re.search(r"--?([\w.]+)", str(error))
        where = f"--{named[1]}" if named else sys.argv[0]
        raise InputError(where, str(error), _what_to_type(where, doc)) from error
    for name in _own_flags():
        flag = flag_values[name]
        if flag.present and flag.value == "":
            raise InputError(f"--{name}", "it is empty", _what_to_type(f"--{name}", doc))
    return rest


def _illegal_value(message: str, doc: str) -> InputError:
    named = re.match(r"flag --([\w.]+)=(.*?): (.*)", message, re.DOTALL)
    where = f"--{named[1]}" if named else sys.argv[0]
    if named is None:
        return InputError(where, message, "--help tells what the flags take")
    name, value, why = named[1], named[2], named[3]
    if "other than None" in why:
        return missing(where, doc)
    flag = flags.FLAGS[name]
    choices = getattr(flag.parser, "enum_values", None)
    if choices:
        return InputError(where, f"unknown value {value!r}", f"known: {', '.join(choices)}")
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    kind = kinds.get(flag.flag_type())
    if kind and re.search(r"invalid literal|could not convert|Non-boolean|Expect", why):
        why = f"not {kind}"
    return InputError(where, f"{value!r}: {why}", (flag.help or "").rstrip(".") or "see --help")


def missing(flag: str, doc: str) -> InputError:
    """The error of a flag that is needed and was not given; ``doc`` is the script's docstring."""
    return InputError(flag, "it is missing", _what_to_type(flag, doc))


def _what_to_type(name: str, doc: str) -> str:
    """The command's first example, the shortest lesson in what is missing."""
    for line in doc.splitlines():
        if re.match(r"\s*(\$ )?(python|\./)\s*\S*launch/", line):
            return f"for example: {line.strip().removeprefix('$ ')}"
    return f"type {name}=..." if name.startswith("--") else f"type {name}"


def _own_flags() -> list[str]:
    """Names of the script's own flags, not those of the libraries it imports."""
    own = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])}
    return sorted(own | ({"config", "debug"} & set(flags.FLAGS)))


def _help(doc: str) -> str:
    lines = [doc.strip(), "", "Flags:"]
    for name in _own_flags():
        flag = flags.FLAGS[name]
        default = "" if flag.default in (None, "", False) else f" (default: {flag.default})"
        lines += [f"  --{name}", f"      {' '.join((flag.help or '').split())}{default}"]
    return "\n".join(lines)


def _before_separator(arguments: Sequence[str]) -> Sequence[str]:
    return arguments[1 : arguments.index("--") if "--" in arguments else None]


def _report(error: BaseException, debug: bool) -> int:
    """Writes an error as its one line and returns the exit code that goes with it."""
    if isinstance(error, InputError):
        return _print_error(str(error), 2)
    if isinstance(error, RunError):
        return _print_error(str(error), 1)
    if isinstance(error, Stopped):
        logging.getLogger("pref_jax").info("%s", error)
        return 0
    if isinstance(error, KeyboardInterrupt):
        return _print_error(
            f"{sys.argv[0]}: interrupted; type the same command again", 130
        )  # 128 + SIGINT
    if isinstance(error, BrokenPipeError):  # ``... | head`` has seen enough
        with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if is_shortage(error):
        return _print_error(
            f"{sys.argv[0]}: out of memory; lower --config.train.microbatch_size, or set "
            "--config.train.remat=full",
            1,
        )
    if isinstance(error, OSError) and (line := _explain_file_error(error)) is not None:
        return _print_error(str(line), 2 if isinstance(line, InputError) else 1)
    if not debug:  # there it has been printed already
        traceback.print_exception(error)
    return 1


def _explain_file_error(error: OSError) -> InputError | RunError | None:
    """The one line of a full disk, a lack of permission or a wrong path; None for anything else."""
    place = sys.argv[0] if error.filename is None else os.fsdecode(error.filename)
    if error.errno in _FULL or "No space left" in str(error):
        return RunError(place, "the disk is full", "free some space and type it again")
    if error.errno in _PERMISSION:
        return InputError(place, "no permission", "choose another place or change its mode")
    if error.filename is not None and error.errno is not None:
        return InputError(place, os.strerror(error.errno).lower(), "name another path")
    return None


def _print_error(line: str, code: int) -> int:
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(line.split()))
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    print(f"error: {shown}", file=sys.stderr, flush=True)
    return code


def _set_up_streams() -> None:
    # Under LC_ALL=C Python writes ASCII and would stop at the first accent of a prompt.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _set_up_logging(debug: bool) -> None:
    """Our own lines go to standard output: standard error is for the one line of an error."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Formatter("%(message)s"))
    logger = logging.getLogger("pref_jax")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if debug:
        return
    warnings.filterwarnings("ignore")
    for name in ("absl", "jax", "tensorflow", "transformers", "orbax", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _Formatter(logging.Formatter):
    """Names what the user named, not the local copy of it."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


class Outcome(NamedTuple):
    """What a command left behind: exit code and the text of both streams."""

    code: int
    stdout: str
    stderr: str


def is_called() -> bool:
    """Whether the script runs by `call`, in a process that is not its own."""
    return _calling


def call(script: str | Path, arguments: Sequence[object] = ()) -> Outcome:
    """Runs a script of ``launch/`` inside this process, as tests do sixty times over.

    The flags that it defines itself are gone afterwards, so that another script can define its own.
    """
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        _own_flag_values([str(script), *map(str, arguments)]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
            code = 0
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


@contextlib.contextmanager
def _own_flag_values(argv: list[str]) -> Iterator[None]:
    global _calling
    before, old_argv, old_path = set(flags.FLAGS), sys.argv, list(sys.path)
    threads, was_calling, _calling = set(threading.enumerate()), _calling, True
    logger = logging.getLogger("pref_jax")
    old_logging = list(logger.handlers), logger.level, logger.propagate
    sys.argv = argv
    try:
        with warnings.catch_warnings():
            yield
    finally:
        _calling = was_calling
        for thread in set(threading.enumerate()) - threads:
            with contextlib.suppress(RuntimeError):  # a server's, which has not begun yet
                thread.join(timeout=60)  # see _leave: this process ends some day, too
        sys.argv, sys.path[:] = old_argv, old_path
        logger.handlers[:], logger.level, logger.propagate = old_logging
        for name in set(flags.FLAGS) - before:
            # A library defines its flags once, when it is imported.
            if flags.FLAGS.find_module_defining_flag(name) not in (argv[0], __name__):
                continue
            with contextlib.suppress(AttributeError):
                delattr(flags.FLAGS, name)
