"""The errors a user can meet. Each message names the option, the value and the fix."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


class DTSError(Exception):
    """Base of every error this library raises on purpose."""


class UsageError(DTSError, ValueError):
    """Bad input: an option, a file or a name. Raised before any long work starts."""


class UnavailableError(DTSError, RuntimeError):
    """Something outside is missing: a model, a data file, a network."""


class EngineError(UnavailableError):
    """The engine that all searches share is gone, or refuses everybody: it ends all of them."""


class ModelError(DTSError, RuntimeError):
    """A model gave logits that are no distribution (NaN, an infinity, or minus infinity for every token), or a logits
    processor failed."""


class RewardError(DTSError, RuntimeError):
    """A reward raised, took too long, returned the wrong number of values, or returned NaN or an infinity."""


def shown(value: object) -> str:
    """A value for a message: one line, at most 80 characters."""
    text = ascii(value) if isinstance(value, str) else " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def raised(outcome: T | Exception) -> T:
    """What is no error; raises what is one."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
