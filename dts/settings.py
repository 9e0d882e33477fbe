"""How p is defined and how long a search may run."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dts.errors import UsageError, shown
from dts.processors import check_processor

if TYPE_CHECKING:
    from dts.constraints.constraint import Constraint

TINY = 1e-200
LARGEST = 2**31 - 1  # for numbers of tokens, paths and ids, which are held in 32 bits


def _require(condition: bool, option: str, value: object, allowed: str) -> None:
    if not condition:
        raise UsageError(f"{option}={shown(value)} is not allowed; give {allowed}")


def check_whole(option: str, value: Any, low: int, high: int = LARGEST, *, allowed: str) -> int:
    """A whole number of Python or NumPy from `low` to `high`, as an int; True and 2.0 are none."""
    number = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None
    _require(number is not None and low <= number <= high, option, value, allowed)
    return number or 0


def check_number(option: str, value: Any, low: float, high: float = sys.float_info.max, *, allowed: str) -> float:
    """A real number above `low`, up to `high`, as a float; True is none."""
    try:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number beyond all floats
        number = math.nan
    _require(low < number <= high, option, value, allowed)
    return number


def check_real(option: str, value: Any, fits: Callable[[float], bool], allowed: str) -> None:
    """A real number of Python or NumPy that fits; True is none."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    _require(real and fits(value), option, value, allowed)


def check_callable(option: str, value: Any, allowed: str) -> None:
    _require(callable(value), option, value, allowed)


def check_text(option: str, text: str) -> None:
    """Text that UTF-8 can hold: half of a surrogate pair, which no tokenizer takes, is named by its position."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{option} holds {text[error.start]!r} at position {error.start}, half of a surrogate pair, which is no "
            "character; decode the text again, or drop it with text.encode('utf-8', 'ignore').decode()"
        ) from error


def as_stops(stop: Any) -> tuple[str, ...]:
    """One stop string or several, as a tuple."""
    _require(isinstance(stop, (str, list, tuple, set, frozenset)), "stop", stop, "a string or a list of strings")
    return (stop,) if isinstance(stop, str) else tuple(stop)


@dataclass(frozen=True, slots=True)
class Decoding:
    """The distribution p that tokens are drawn from, and where sequences end.

    Whatever p is set here is the p of every formula and of every reported log-probability.
    """

    max_new_tokens: int = 48
    min_new_tokens: int = 0  # EOS has probability 0 before this many tokens
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int | None = None  # paths decoded together; None: the method's own choice
    # (ids so far [1, T], logits [1, V]) -> logits, as in `transformers`; see `dts.processors`. Applied before the rest
    logits_processor: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None
    require_eos: bool = False  # a completion that the length limit cut is not in the target, and ranks last
    constraint: Constraint | None = None  # the set that completions have to belong to
    # "condition": the target is p among the constraint's texts. "mask": each row of p is normalised over the tokens
    # that are allowed, which gives another distribution. None: "condition" where the method has a target, else "mask"
    constraint_mode: str | None = None

    def __post_init__(self) -> None:
        whole = "a whole number >= 1"
        new = check_whole("max_new_tokens", self.max_new_tokens, 1, allowed=whole)
        checked: dict[str, Any] = {
            "max_new_tokens": new,
            "min_new_tokens": check_whole("min_new_tokens", self.min_new_tokens, 0, new,
                                          allowed=f"a whole number from 0 to max_new_tokens ({new})"),
            "temperature": check_number("temperature", self.temperature, 0,
                                        allowed="a number > 0 (for the most likely tokens use Greedy)"),
            "seed": check_whole("seed", self.seed, 0, 2**128, allowed="a whole number >= 0"),
        }  # fmt: skip
        for option in ("top_k", "batch_size"):
            if getattr(self, option) is not None:
                checked[option] = check_whole(option, getattr(self, option), 1, allowed=f"{whole} or None")
        if self.top_p is not None:
            checked["top_p"] = check_number("top_p", self.top_p, 0, 1, allowed="a number in (0, 1] or None")
        for option, value in checked.items():
            object.__setattr__(self, option, value)
        _require(isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop), "stop", self.stop,
                 "a non-empty string or a list of them")  # fmt: skip
        for string in self.stop:
            check_text("stop", string)
        if self.logits_processor is not None:
            check_processor(self.logits_processor)
        _require(isinstance(self.require_eos, bool), "require_eos", self.require_eos, "True or False")
        _require(self.constraint_mode in (None, "condition", "mask"), "constraint_mode", self.constraint_mode,
                 "'condition', 'mask' or None")  # fmt: skip

    def probabilities(
        self, logits: torch.Tensor, forbidden: tuple[Sequence[int], Sequence[int]] = ((), ())
    ) -> torch.Tensor:
        """p in float64, [B, V], from logits [B, V]; `forbidden`: rows, and the tokens that have probability 0 in them.

        Temperature first, then top-k, then top-p, as in `transformers`' generate.
        """
        if logits.device.type == "mps":  # has no float64
            logits = logits.cpu()
        scores = logits.double()
        if self.temperature < TINY:  # the quotients would overflow
            scores = scores - scores.amax(-1, keepdim=True)
        scores = scores if self.temperature == 1 else scores / self.temperature
        rows, tokens = forbidden
        if rows and tokens:
            scores = scores.clone() if scores is logits else scores
            scores[
                torch.tensor(rows, device=scores.device)[:, None], torch.tensor(tokens, device=scores.device)
            ] = -math.inf
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            kth = scores.topk(self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < kth, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = scores.sort(dim=-1, descending=True)
            mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            drop = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, mass_before >= self.top_p)
            scores = scores.masked_fill(drop, -math.inf)
        return scores.softmax(-1)


class Costs(Protocol):
    """What of `dts.results.Usage` can be limited."""

    forwarded_tokens: int
    reward_calls: int
    reward_tokens: int
    reward_seconds: float


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits that mean the same for every method; a search stops at the first one it meets."""

    rollouts: int | None = None  # finished paths
    tokens: int | None = None  # forwarded tokens, prompt included
    seconds: float | None = None  # wall clock
    reward_calls: int | None = None  # texts that the reward scores; never exceeded
    reward_tokens: int | None = None  # of the reward's models; exceeded by one batch of texts at most
    reward_seconds: float | None = None  # in the reward; exceeded by one batch of texts at most

    def __post_init__(self) -> None:
        for option in ("rollouts", "tokens", "reward_calls", "reward_tokens"):
            value = getattr(self, option)
            if value is not None:
                check_whole(option, value, 1, 2**63, allowed="a whole number >= 1 or None")
        for option in ("seconds", "reward_seconds"):
            value = getattr(self, option)
            if value is not None:
                check_number(option, value, 0, math.inf, allowed="a number > 0 or None")

    def spent(self, usage: Costs, rollouts: int, seconds: float, next_tokens: int = 0) -> bool:
        """Whether a limit is used up, or would be exceeded by forwarding `next_tokens` more."""
        return (
            (self.rollouts is not None and rollouts >= self.rollouts)
            or (self.tokens is not None and usage.forwarded_tokens + next_tokens > self.tokens)
            or (self.seconds is not None and seconds >= self.seconds)
            or self.reward_calls_left(usage) <= 0
        )

    def reward_calls_left(self, usage: Costs) -> float:
        """How many more texts the reward may score; infinite without a limit."""
        if (self.reward_tokens is not None and usage.reward_tokens >= self.reward_tokens) or (
            self.reward_seconds is not None and usage.reward_seconds >= self.reward_seconds
        ):
            return 0
        return math.inf if self.reward_calls is None else self.reward_calls - usage.reward_calls
