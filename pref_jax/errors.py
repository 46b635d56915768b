"""The two kinds of failure that a user sees as one line, and the wish to stop.

Everything else is a defect of this project and keeps its traceback.
"""

_LONGEST_PLACE = 300  # characters of a message's WHERE
_LONGEST_WORD = 200  # characters of a file name in the rest

_copies: dict[str, str] = {}  # path of a local copy -> what the user named


def show_as(copy: object, original: str) -> None:
    """From now on messages name ``original`` where they would name its local copy."""
    _copies[str(copy)] = original


def shown(text: str) -> str:
    """``text`` with what the user named in place of its local copies."""
    for copy, original in _copies.items():
        text = text.replace(copy, original)
    return text


class _OneLineError(Exception):
    """Message of the form ``WHERE: what is wrong; what to do``."""

    def __init__(self, where: str, what: str, remedy: str) -> None:
        self.where = shorten(_one_line(where), _LONGEST_PLACE)
        self.what, self.remedy = (_shorten_words(_one_line(part)) for part in (what, remedy))
        super().__init__(f"{self.where}: {self.what}; {self.remedy}")


class InputError(_OneLineError):
    """Wrong use, a wrong config or bad input (exit code 2).

    Args:
      where: ``FILE:ROW`` (1-based data row, the header not counted), ``FILE``, ``--flag`` or
        ``--config.section.field``.
      what: what is wrong there.
      remedy: what to do about it.
    """


class RunError(_OneLineError):
    """A failure while running: disk full, non-finite loss, a lost host (exit code 1)."""


class Stopped(BaseException):
    """A signal asked to stop where there is nothing to save: one line, exit code 0.

    Attributes:
      signal: its name, such as "SIGTERM".
    """

    def __init__(self, signal: str) -> None:
        self.signal = signal
        super().__init__(f"stopped by {signal}; nothing is lost, the same command goes on")


def shorten(text: str, longest: int) -> str:
    """``text`` with its middle left out where it is longer than ``longest`` characters."""
    if len(text) <= longest:
        return text
    end = (longest - 3) // 2
    return f"{text[: longest - 3 - end]}...{text[-end:]}"


def _shorten_words(text: str) -> str:
    return " ".join(shorten(word, _LONGEST_WORD) for word in text.split(" "))


def _one_line(text: object) -> str:
    return " ".join(shown(str(text)).split()) or "?"
