"""Bodies of requests in OpenAI's form, and what they ask the search for.

An argument that cannot be honoured is refused, never ignored, unless it says nothing about the text. No argument brings
code: rewards are names, and the chat template is the model's own.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dts.doors.choices import AnyReward, method_by_name
from dts.errors import UsageError, shown
from dts.evaluation.decode import Settings
from dts.rewards import Prompt
from dts.search import Method
from dts.settings import Decoding, as_stops, check_whole

LEGACY_TOKENS = 16  # of a completion without `max_tokens`, as at OpenAI
SAYS_NOTHING = frozenset(["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"])
# Arguments that a search does not honour, and the values that ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "top_logprobs": (0,),
}
Scalar = bool | int | float | str | None


class StreamOptions(BaseModel):
    """What a stream ends with."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Body(BaseModel):
    """What chat and plain completions have in common. null is as good as nothing."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # ours
    method: str | None = None
    rollouts: int | None = None
    reward: str | None = None
    reward_scale: float | None = None
    power: float | None = None
    order: str | None = None
    top_k: int | None = None


class CompletionBody(Body):
    """Of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None

    def prompts(self) -> list[Prompt]:
        """Each text or list of token ids."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # one text, or the ids of one
        return list(self.prompt)  # type: ignore[arg-type]  # texts, or ids of several

    def limit(self, most: int) -> int | None:
        return min(LEGACY_TOKENS, most) if self.max_tokens is None else self.max_tokens

    def log_probs(self) -> bool:
        if self.logprobs:
            raise UsageError(f"logprobs={self.logprobs}: only the tokens of the text have log-probabilities; give 0")
        return self.logprobs is not None

    def variables(self) -> dict[str, Scalar]:
        return {}


class ChatBody(Body):
    """Of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    chat_template_kwargs: dict[str, Scalar] | None = None

    def prompts(self) -> list[Prompt]:
        if not self.messages:
            raise UsageError("messages is empty: give at least one message")
        return [self.messages]

    def limit(self, most: int) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def log_probs(self) -> bool:
        return bool(self.logprobs)

    def variables(self) -> dict[str, Scalar]:
        """Of the chat template; another template would be code."""
        given = self.chat_template_kwargs or {}
        if "chat_template" in given:
            raise UsageError("chat_template_kwargs: chat_template cannot be set; the model's own is used")
        return given


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for, how many may wait, and how many share a batch."""

    body_bytes: int = 1 << 20
    new_tokens: int = 1024
    rollouts: int = 64
    choices: int = 16
    prompts: int = 16
    seconds: float = 120.0  # from the arrival of a request to the end of its search
    waiting: int = 64  # requests that wait for the model
    together: int = 8  # prompts that are searched at the same time


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, checked as far as it can be without the model."""

    prompts: list[Prompt]
    method: Method
    reward: AnyReward | None
    n: int
    independent: bool  # the choices are draws in their order, equal ones included; else the n best distinct texts
    seed: int
    new_tokens: int | None  # None: as many as the limit and the context allow
    decoding: dict[str, Any]  # of `dts.decode`
    variables: dict[str, Scalar]
    log_probs: bool


def parsed(kind: type[Body], data: bytes) -> Any:
    """The body as `kind`. Raises `UsageError` with the place and the reason."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{where}: {first['msg']}" if where else first["msg"]) from error


def asked_for(body: Any, rewards: Mapping[str, AnyReward], limits: Limits) -> Asked:
    """What a body asks the search for. Raises `UsageError`."""
    _check_extra(body.model_extra or {})
    n = _within("n", body.n, 1, limits.choices)
    prompts = body.prompts()
    if not 0 < len(prompts) <= limits.prompts:
        raise UsageError(f"prompt holds {len(prompts)} prompts; give 1 to {limits.prompts}")
    new_tokens = body.limit(limits.new_tokens)
    if new_tokens is not None:
        _within("max_tokens", new_tokens, 1, limits.new_tokens)
    plain = body.method is None and body.reward is None
    greedy = body.method == "greedy" or (plain and body.temperature == 0)
    decoding = _decoding(body, greedy and body.temperature == 0)
    return Asked(
        prompts, _method(body, n, limits), _reward(body.reward, rewards), n,
        body.reward is None and not greedy and body.method in (None, "sampling"),
        secrets.randbits(32) if body.seed is None else body.seed % 2**64, new_tokens, decoding, body.variables(),
        body.log_probs(),
    )  # fmt: skip


def _check_extra(extra: Mapping[str, Any]) -> None:
    for name, value in extra.items():
        if name in SAYS_NOTHING or value is None:
            continue
        if name not in NEUTRAL:
            raise UsageError(f"{shown(name)} is not an argument of this server")
        if not any(value == neutral for neutral in NEUTRAL[name]):
            raise UsageError(f"{name}={shown(value)} is not supported by this server; leave it out")


def _within(name: str, value: int | None, least: int, most: int) -> int:
    """The value, or the least one where none was given."""
    if value is None:
        return least
    return check_whole(name, value, least, most, allowed=f"a whole number from {least} to {most}")


def _decoding(body: Body, coldest: bool) -> dict[str, Any]:
    """coldest: temperature 0 asks for the greedy text, and the model's own p."""
    given: dict[str, Any] = {
        "temperature": None if coldest else body.temperature, "top_p": body.top_p, "top_k": body.top_k,
        "stop": None if body.stop is None else as_stops(body.stop),
    }  # fmt: skip
    settings = {name: value for name, value in given.items() if value is not None}
    if len(settings.get("stop", ())) > 16:
        raise UsageError("stop holds more than 16 strings")
    Decoding(**settings)  # raises for values that cannot be used
    return settings


def _method(body: Body, n: int, limits: Limits) -> Method:
    """A request that names neither method nor reward is answered by n independent draws, as OpenAI does."""
    if body.rollouts is not None:
        _within("rollouts", body.rollouts, 1, limits.rollouts)
    if body.method is None and body.reward is None:
        _refuse_ignored(body)
        return method_by_name("greedy") if body.temperature == 0 else method_by_name("sampling", Settings(n))
    size = None if body.method == "greedy" and body.rollouts is None else max(body.rollouts or 16, n)
    given = Settings(size, body.reward_scale, body.power, body.order)
    return method_by_name(body.method or "maxent-star", given)


def _refuse_ignored(body: Body) -> None:
    """A plain request is no search: it has no size and no target."""
    for option in ("rollouts", "reward_scale", "power", "order"):
        if (value := getattr(body, option)) is not None:
            raise UsageError(f"{option}={shown(value)} has no effect without a search; add a method, such as maxent")


def _reward(name: str | None, rewards: Mapping[str, AnyReward]) -> AnyReward | None:
    if name is None:
        return None
    if name not in rewards:
        known = ", ".join(rewards) or "this server has none"
        raise UsageError(f"reward={shown(name)} is not known: {known}")
    return rewards[name]
