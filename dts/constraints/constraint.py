"""What a search asks of a constraint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from dts.errors import UsageError, shown

State = Any
METHODS = ("start", "advance", "allowed", "accepts")


class Constraint(Protocol):
    """A set of completions, read token by token. All methods but `start` are batched over paths.

    EOS ends a completion and is no part of it: `advance` never sees it, and what `allowed` says of it does not count.
    """

    def start(self, lm: Any) -> State:
        """State of the empty completion of this `dts.lm.LanguageModel`. Raises `UsageError` where none of its
        completions belongs to the set, or where the bytes of its tokens are not known."""

    def advance(self, states: Sequence[State], tokens: Sequence[int]) -> list[State]:
        """States after one more token each. A token that is not allowed leads to a state that allows and accepts
        nothing."""

    def allowed(self, states: Sequence[State]) -> torch.Tensor:
        """Tokens after which the path may still become a member, bool [len(states), V]. A superset will do: paths that
        turn out to lead nowhere cost time, and nothing else."""

    def accepts(self, states: Sequence[State]) -> list[bool]:
        """Whether each path is a member as it stands."""


def check_constraint(constraint: Any, lm: Any) -> None:
    """Raise `UsageError` for what is no constraint, and for one that this model cannot satisfy; None is none."""
    if constraint is None:
        return
    missing = [name for name in METHODS if not callable(getattr(constraint, name, None))]
    if missing or isinstance(constraint, type):
        raise UsageError(
            f"constraint={shown(constraint)} is not allowed; give one of dts.constraints, such as Regex('[0-9]+'), or "
            f"an object with the methods {', '.join(METHODS)}"
        )
    constraint.start(lm)
