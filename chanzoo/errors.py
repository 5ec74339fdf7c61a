"""Every exception that chanzoo raises on purpose.

The first line of a message says what is wrong, which thing and why; further lines say what was
expected and found, what was left untouched, and what to do next. The command line prints the message
without a traceback and exits with ``exit_code``.
"""

from __future__ import annotations

__all__ = ["ChanzooError", "HubError", "NoWeightsError", "UsageError", "WeightsRejectedError"]


class ChanzooError(RuntimeError):
    """Something a user can mend; the message says how."""

    exit_code = 1


class UsageError(ChanzooError, ValueError):
    """An argument, a file or a folder is not what was asked for."""

    exit_code = 2


class NoWeightsError(ChanzooError):
    """No pretrained weights exist, or none can be had from here."""


class WeightsRejectedError(ChanzooError):
    """A weight file is not the published one.

    Attributes:
        path: The file.
        expected: What the weight row says.
        found: What the file is.
    """

    exit_code = 3

    def __init__(self, message: str, path: str = "", expected: str = "", found: str = "") -> None:
        """Keep what was compared beside the message."""
        super().__init__(message)
        self.path = path
        self.expected = expected
        self.found = found


class HubError(ChanzooError):
    """The Hugging Face Hub cannot be reached or has not got the file."""

    exit_code = 4
