"""The two kinds of failure that a user sees as one line.

Everything else is a defect of this project and keeps its traceback.
"""


class _OneLineError(Exception):
    """Message of the form ``WHERE: what is wrong; what to do``."""

    def __init__(self, where: str, what: str, remedy: str) -> None:
        self.where, self.what, self.remedy = (_one_line(part) for part in (where, what, remedy))
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


def _one_line(text: object) -> str:
    return " ".join(str(text).split()) or "?"
