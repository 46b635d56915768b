"""Programs that are kept between processes are those that would have been compiled."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from pref_jax import cache, compilation
from pref_jax.compilation import compile_program


class State(struct.PyTreeNode):
    values: jax.Array


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Programs are kept, in a cache of this test alone, and JAX keeps none of its own."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(compilation, "_kept", True)
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    yield tmp_path / "programs"
    jax.config.update("jax_enable_compilation_cache", before)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


def abstract(length: int = 8) -> Any:
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    everywhere = NamedSharding(mesh, PartitionSpec())
    return State(jax.ShapeDtypeStruct((length,), jnp.float32, sharding=everywhere))


def run(identity: str, step: Callable[[State], Any] | None, length: int = 8) -> tuple[Any, int]:
    """Result of the program, and how often it was traced; without a step it may not be."""
    traced = 0

    def counted(state: State) -> Any:
        nonlocal traced
        traced += 1
        assert step is not None, "traced again"
        return step(state)

    function = jax.jit(counted, donate_argnums=0)
    program = compile_program(function, (abstract(length),), (identity,))
    state = State(jax.device_put(jnp.arange(float(length)), abstract(length).values.sharding))
    result = program(state)
    assert state.values.is_deleted()  # donated by a loaded program too
    return result, traced


def double(state: State) -> tuple[State, dict[str, jax.Array]]:
    return State(state.values * 2.0), {"sum": state.values.sum()}


def test_a_kept_program_is_not_traced_and_gives_the_same(programs: Path) -> None:
    (first, sums), traced = run("double", double)
    assert traced == 1
    (again, more), traced = run("double", None)
    assert traced == 0 and isinstance(again, State)
    np.testing.assert_array_equal(first.values, again.values)
    assert sums["sum"] == more["sum"] == 28.0


@pytest.mark.parametrize("what", ["identity", "shape", "option", "source"])
def test_another_program_is_compiled(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run("double", double)
    identity, length = "double", 8
    if what == "identity":
        identity = "triple"
    elif what == "shape":
        length = 9
    elif what == "option":
        monkeypatch.setattr(compilation, "_options", lambda: ["precision=highest"])
    else:
        monkeypatch.setattr(compilation, "_source", lambda: "edited")
    (state, _), traced = run(identity, lambda state: (State(state.values * 3.0), {}), length)
    assert traced == 1 and state.values[2] == 6.0


@pytest.mark.parametrize("damage", ["flipped", "empty", "foreign"])
def test_a_damaged_program_is_compiled_again(
    programs: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run("double", double)
    (path,) = [path for path in programs.iterdir() if not path.name.startswith((".", "CACHE"))]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"flipped": bytes(content), "empty": b"", "foreign": b"\x80\x04N."}[damage])
    if damage == "foreign":  # another version's, whole
        sums = path.with_name(f".{path.name}.sha256")
        sums.write_text(cache._digest(path))
    cache._looked_through.clear()
    logging.getLogger("pref_jax").propagate = True
    (state, _), traced = run("double", double)
    assert traced == 1 and state.values[3] == 6.0
    assert "damaged" in caplog.text or "cannot be loaded" in caplog.text
    assert run("double", None)[1] == 0


def test_options_of_jax_and_of_compilers_tell_programs_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = compilation._options()
    precision = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        assert compilation._options() != before
    finally:
        jax.config.update("jax_default_matmul_precision", precision)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    assert compilation._options() == before
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    assert compilation._options() != before


def test_what_is_known_by_an_address_only_is_not_kept(programs: Path) -> None:
    compile_program(jax.jit(double), (abstract(),), (object(),))
    assert not programs.exists()


def test_a_full_disk_is_no_failure(
    programs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pref_jax.errors import RunError

    def full(*_: Any, **__: Any) -> Path:
        raise RunError("cache", "the disk is full", "free some space")

    monkeypatch.setattr(cache, "entry", full)
    logging.getLogger("pref_jax").propagate = True
    (state, _), _ = run("double", double)
    assert state.values[3] == 6.0
    assert "the disk is full" in caplog.text


def test_what_jax_has_loaded_itself_is_not_kept_incomplete(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLA saves a part only of a program that it has itself loaded, and fails when it is run."""
    monkeypatch.setattr(compilation, "_kept", False)
    folder = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    compilation.keep_compiled_programs()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        for number in range(3):  # compiled, loaded by JAX, and whatever was kept of that
            jax.clear_caches()
            (state, _), _ = run("double", double)
            assert state.values[3] == 6.0
            if number == 0:
                cache.remove(programs)
        assert not [path for path in programs.iterdir() if len(path.name) == 64]
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
