"""The one error a user of ffnas sees for wrong input.

A `UserError` carries one line that names the field, the value found and what to do about it; the command line prints
that line and ends with exit code 2, without a traceback. Rejected: a class per kind of mistake. Nothing in the code
decides differently on the kind, and the message is what the user needs.
"""

from __future__ import annotations


class UserError(ValueError):
    """Wrong input by a user: one line naming field, value and remedy. Line breaks in the message become spaces."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class ToldElsewhere(UserError):
    """A `UserError` that another process of the same run reports; this one ends in the same way, silently."""
