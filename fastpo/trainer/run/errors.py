"""Errors a user can act on: the command line prints them as one line and exits with their code."""

from __future__ import annotations

import pickle


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


def reason_of(error: Exception) -> str:
    """The first line of a foreign error, without the advice to run the code that it warns of."""
    if "trust_remote_code" in str(error):
        return "it comes with code of its own, which is not run (trust_remote_code=False)"
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "it holds more than tensors and plain values, and is not loaded"
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
