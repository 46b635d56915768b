"""Keeps native libraries off standard error, which is for the one line of an error."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def native_libraries_silenced() -> Iterator[None]:
    """Discards what C++ code writes to file descriptor 2 inside the block.

    TensorFlow 2.21 writes there while it is imported, before it reads TF_CPP_MIN_LOG_LEVEL.
    Exceptions pass as usual. Other threads' writes to standard error are lost meanwhile.
    """
    try:
        kept = os.dup(2)
    except OSError:  # standard error is closed
        yield
        return
    silence = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(silence, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(silence)
