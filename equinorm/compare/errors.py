"""What ends a comparison early."""

from __future__ import annotations


class InputError(ValueError):
    """What was asked for cannot be done; the message says what was expected, what came and what to do. Nothing measured is lost."""


class Interrupted(Exception):
    """The comparison was stopped from outside; every finished cell is kept."""
