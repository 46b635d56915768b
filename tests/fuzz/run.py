"""Coverage-guided fuzzing of one target for a while, with atheris (``pip install -e '.[fuzz]'``).

    python tests/fuzz/run.py csv --seconds=600
    python tests/fuzz/run.py all --seconds=60 --findings=/tmp/findings

Begins with the target's seeds and with ``corpus/TARGET``, of which nothing is changed. An input
that fails is written to the folder of findings, with its traceback on standard error; once it is
mended it belongs into the corpus, which the tests replay. Seconds are of processor time.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_REPOSITORY), str(_REPOSITORY / "tests")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse  # noqa: E402
import logging  # noqa: E402
import math  # noqa: E402
import re  # noqa: E402
import resource  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402

_INSTRUMENTED = ["pref_jax", "gguf", "tomllib", "json", "csv", "ast"]
_LONGEST_INPUT = 8192  # bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", help="one of tests/fuzz/targets.py, or all")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--findings", type=Path, default=None)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is not None:
        _fuzz(options.target, options.inside, options.findings, options.seconds)
    from fuzz import targets

    names = sorted(targets.TARGETS) if options.target == "all" else [options.target]
    if unknown := set(names) - set(targets.TARGETS):
        parser.error(f"no target {unknown.pop()}; known: {', '.join(sorted(targets.TARGETS))}")
    findings = options.findings or Path(tempfile.mkdtemp(prefix="findings-"))
    findings.mkdir(parents=True, exist_ok=True)
    failed = [name for name in names if not _run(name, options.seconds, findings)]
    if failed:
        print(f"failed: {', '.join(failed)}; see {findings}")
    return bool(failed)


def _run(name: str, seconds: float, findings: Path) -> bool:
    """Fuzzes in processes of their own until the time is used; says how far it came."""
    from fuzz import targets

    inputs, used, tried, code = 0, 0.0, 0, 0
    with tempfile.TemporaryDirectory() as parent:
        folder = f"{parent}/inputs"
        os.mkdir(folder)
        for number, content in enumerate(targets.beginnings(name)):
            (Path(folder) / f"{number}").write_bytes(content)
        while used < seconds - 1 and not code:
            before = _children_seconds()
            process = subprocess.Popen(
                [
                    *(sys.executable, __file__, name, f"--inside={folder}"),
                    *(f"--findings={findings}", f"--seconds={seconds - used}"),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            assert process.stderr is not None
            last: list[str] = []
            for line in process.stderr:
                if found := re.match(r"#(\d+)\s|Done (\d+) runs", line):
                    inputs = int(found[1] or found[2])
                else:
                    last = [*last[-200:], line]
            code = process.wait()
            used, tried = used + _children_seconds() - before, tried + inputs
            if code:
                print("".join(last), file=sys.stderr, flush=True)
        kept = len(list(Path(folder).iterdir()))
    print(
        f"{name}: {'FAILED' if code else 'passed'}, {tried:,} inputs in {used:.0f} s of processor "
        f"time, {kept} of them reach something new",
        flush=True,
    )
    return not code


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _fuzz(name: str, folder: Path, findings: Path, seconds: float) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=_INSTRUMENTED, enable_loader_override=False):
        from fuzz import targets
    logging.disable(logging.CRITICAL)
    for seed in targets.beginnings(name):  # what is imported late is not the first input's doing
        targets.run(name, seed)

    def try_one(content: bytes) -> None:
        targets.run(name, content)

    words = folder.with_name(f"{folder.name}.words")
    words.write_text("".join(f'"{_quote(word)}"\n' for word in targets.WORDS))
    arguments = [
        *(sys.argv[0], str(folder), f"-dict={words}"),
        f"-max_total_time={max(1, math.ceil(seconds))}",
        *(f"-max_len={_LONGEST_INPUT}", f"-timeout={math.ceil(2 * targets.MOST_SECONDS)}"),
        *(f"-rss_limit_mb={targets.MOST_BYTES >> 20}", f"-artifact_prefix={findings}/{name}-"),
        *("-len_control=20", "-print_final_stats=1"),
    ]
    atheris.Setup(arguments, try_one)
    atheris.Fuzz()


def _quote(word: bytes) -> str:
    return "".join(f"\\x{byte:02X}" for byte in word)


if __name__ == "__main__":
    sys.exit(main())
