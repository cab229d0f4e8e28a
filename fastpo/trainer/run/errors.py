"""Errors a user can act on: the command line prints them as one line and exits with their code."""

from __future__ import annotations


class TrainerError(Exception):
    """A run cannot go on; the message says what was found and what to do. Exit code 1."""

    exit_code = 1


class RecipeError(TrainerError):
    """A recipe or an override is wrong; nothing was started. Exit code 2."""

    exit_code = 2


class Interrupted(TrainerError):
    """A signal asked to stop, and the checkpoint was saved. Exit code 128 + signal number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number
