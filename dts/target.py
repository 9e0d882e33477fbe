"""The target: the distribution over completions that a search samples from, or whose best completion it looks for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dts.constraints.constraint import Constraint
from dts.settings import Decoding, check_real

LARGEST_POWER = 32.0  # beyond it p^power of a token that counts may be too small for a float


@dataclass(frozen=True, slots=True)
class Target:
    """p(x)^power * 1[x in L] * exp(reward_scale * r(x)), up to its sum Z.

    power: above 1 it sharpens p (power sampling, arXiv 2510.14901), below 1 it flattens p. L: the texts of the
    `constraint`, and with `require_eos` only those that EOS or a stop string ended.
    Token by token the weights w(a|s) = p(a|s)^power * 1[a is allowed after s] are not normalised: what a row lacks
    to 1, or has beyond it, is part of the target, and the tree learns the mass of every prefix (grammar-aligned
    decoding, arXiv 2405.21047).
    """

    reward_scale: float = 4.0
    power: float = 1.0
    require_eos: bool = False
    constraint: Constraint | None = None
    masked: bool = False  # the constraint's mask was put on p token by token, with each row normalised
    sharpness: float = 1.0  # a search for the mode works with the target to this power, which has the same mode

    def __post_init__(self) -> None:
        check_real("reward_scale", self.reward_scale, lambda x: 0 <= x < math.inf, "a number >= 0")
        check_real("power", self.power, lambda x: 0 < x <= LARGEST_POWER, f"a number > 0, up to {LARGEST_POWER:g}")

    def among(self, decoding: Decoding, *, masked: bool) -> Target:
        """The same among the texts that these settings allow."""
        masked = masked and decoding.constraint is not None
        return replace(self, require_eos=decoding.require_eos, constraint=decoding.constraint, masked=masked)

    @property
    def conserves(self) -> bool:
        """Whether the weights of all continuations of a prefix sum to 1, as those of p do."""
        return self.row_power == 1 and not self.require_eos and self.constraint is None

    @property
    def row_power(self) -> float:
        """Of p in the rows of weights that the search works with."""
        return self.power * self.sharpness

    def __str__(self) -> str:
        p = f"p(x, masked by {self.constraint!r})" if self.masked else "p(x)"
        parts = [p if self.power == 1 else f"{p}^{self.power:g}"]
        parts += [f"1[x in {self.constraint!r}]"] if self.constraint is not None else []
        parts += ["1[x ended by EOS or a stop string]"] if self.require_eos else []
        return " ".join([*parts, f"exp({self.reward_scale:g} r(x))"])
