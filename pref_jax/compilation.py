"""Where compiled programs are kept between processes."""

import jax

from pref_jax import cache


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, below `cache.cache_dir`.

    `launch/train.py --clear_cache` empties it with the rest. Programs that compile in less than a
    second are not worth a file.
    """
    # jax adds its options to this object at run time, unseen by type checkers.
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache.folder("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
