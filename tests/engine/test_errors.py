"""The error a user sees is one line, and a ValueError."""

from __future__ import annotations

from engine.errors import UserError


def test_the_message_is_one_line():
    error = UserError("data.train: 'a\nb' not found;\n  give a file")
    assert str(error) == "data.train: 'a b' not found; give a file"
    assert isinstance(error, ValueError)
