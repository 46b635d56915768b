import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from pref_jax import cache, command
from pref_jax.errors import InputError, RunError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path):
    path.mkdir()
    (path / "part").write_text("whole")


def test_entry_is_made_once():
    calls = []

    def make(path):
        calls.append(path)
        write(path)

    first, second = (cache.entry("things", "key", make) for _ in range(2))
    assert first == second
    assert (first / "part").read_text() == "whole"
    assert len(calls) == 1


def test_entry_may_be_a_file():
    assert cache.entry("things", "file", lambda path: path.write_text("x")).read_text() == "x"


def test_failed_make_leaves_nothing(own_cache):
    def fail(path):
        write(path)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.entry("things", "key", fail)
    assert [path.name for path in (own_cache / "things").iterdir()] == ["CACHEDIR.TAG"]


def test_full_disk_is_one_line():
    def fail(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="disk is full"):
        cache.entry("things", "key", fail)


SLOW = """
import sys, time
from pref_jax import cache, command
def make(path):
    path.mkdir()
    (path / "part").write_text("half")
    print("started", flush=True)
    time.sleep(float(sys.argv[1]))
    (path / "part").write_text("whole")
print(cache.entry("things", "key", make) / "part", flush=True)
"""


def test_killed_maker_is_replaced_and_cleaned_up(own_cache):
    process = subprocess.Popen([sys.executable, "-c", SLOW, "60"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"started\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert list((own_cache / "things").glob(".*.tmp"))
    # Another entry's maker sweeps, too.
    cache.entry("things", "other", write)
    assert not list((own_cache / "things").glob(".*.tmp"))
    assert (cache.entry("things", "key", write) / "part").read_text() == "whole"
    assert sorted(path.name for path in (own_cache / "things").iterdir()) == [
        ".key.sha256",
        ".other.sha256",
        "CACHEDIR.TAG",
        "key",
        "other",
    ]


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_flipped_bit_is_found_and_made_again(as_folder, caplog):
    def make_file(path):
        path.write_text("whole")

    make_it, inside = (write, "part") if as_folder else (make_file, "")
    damaged = cache.entry("things", "key", make_it) / inside
    content = bytearray(damaged.read_bytes())
    content[2] ^= 1
    damaged.write_bytes(content)
    assert (cache.entry("things", "key", make_it) / inside).read_text() == "whole"
    assert caplog.text.count("was damaged and is made again") == 1
    cache.entry("things", "key", fail_if_called)
    assert caplog.text.count("was damaged and is made again") == 1


def fail_if_called(path):
    raise AssertionError("it is there")


def test_second_process_waits_for_the_first():
    process = subprocess.Popen([sys.executable, "-c", SLOW, "0.5"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"started\n"
    path = cache.entry("things", "key", lambda path: pytest.fail("made twice"))
    assert (path / "part").read_text() == "whole"
    process.communicate()
    assert process.returncode == 0


def _count(path, turns):
    for _ in range(turns):
        with cache.locked(path):
            number = int((path.parent / "number").read_text())
            time.sleep(0.0005)
            (path.parent / "number").write_text(str(number + 1))


def test_lock_excludes_although_its_file_comes_and_goes(tmp_path):
    (tmp_path / "number").write_text("0")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_count, args=(tmp_path / "lock", 40)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (tmp_path / "number").read_text() == "120"
    assert not (tmp_path / "lock").exists()


def test_lock_without_waiting_says_so(tmp_path):
    with (
        cache.locked(tmp_path / "lock") as first,
        cache.locked(tmp_path / "lock", wait=False) as second,
    ):
        assert (first, second) == (True, False)
    assert not (tmp_path / "lock").exists()


def test_clear_deletes_only_what_is_the_caches(own_cache):
    entry = cache.entry("things", "key", write)
    (own_cache / "precious").mkdir()
    (own_cache / "precious" / "file").write_text("mine")
    assert cache.clear() == [own_cache / "things"]
    assert not entry.exists()
    assert (own_cache / "precious" / "file").read_text() == "mine"


def test_train_clears_the_cache_without_a_config(own_cache, repository):
    cache.entry("things", "key", write)
    script = repository / "launch" / "train.py"
    outcome = command.call(script, ["--clear_cache"])
    assert outcome == (0, f"removed {own_cache / 'things'}\n", "")
    assert command.call(script, ["--clear_cache"]) == (0, "the cache was empty\n", "")


def test_unusable_folder_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    with pytest.raises(InputError, match=cache.VARIABLE):
        cache.cache_dir()
