"""`decode`: one prompt, one reward, one method, one result."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dts.constraints.constraint import Constraint, check_constraint
from dts.errors import DTSError, UnavailableError, UsageError, shown
from dts.lm import LanguageModel
from dts.memory import REMEDY, first_line, is_out_of_memory
from dts.results import Result, Rollout
from dts.rewards import NO_REWARD, Context, Prompt, Reward, as_reward
from dts.settings import Budget, Decoding, as_stops, check_callable, check_whole
from dts.target import Target

if TYPE_CHECKING:
    from dts.search import Method


def decode(
    lm: LanguageModel,
    prompt: Prompt,
    *,
    method: Method,
    reward: Reward | Callable[..., Any] | None = None,
    max_new_tokens: int = 48,
    min_new_tokens: int = 0,
    batch_size: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: str | Sequence[str] = (),
    logits_processor: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
    require_eos: bool = False,
    constraint: Constraint | None = None,
    constraint_mode: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    max_kv_bytes: int | None = None,
    budget: Budget | None = None,
    on_rollout: Callable[[Rollout], None] | None = None,
) -> Result:
    """Search for completions of `prompt` that `reward` likes.

    lm: from `dts.load`. prompt: text, chat messages, or token ids (a sequence, array or tensor [L] or [1, L], or what
    a tokenizer returns). Text gets the tokenizer's BOS unless it begins with it, and never an EOS; a last message of
    the assistant is continued. reward: a `dts.Reward` or a function of the decoded completion; None gives every
    completion 0. method: from `dts.search`. budget: limits on top of the method's own.
    batch_size: paths decoded together; if not given, the method's choice as far as memory allows.
    stop: strings that end a completion, special tokens among them; its text ends in front of the first one.
    logits_processor: (ids [1, T], logits [1, V]) -> logits, such as a `transformers` LogitsProcessor, or a list of
    them; part of p. One that keeps a state is copied for each path; without arguments it is a factory of such ones.
    require_eos: completions that `max_new_tokens` cuts are not in the target, and rank after the others.
    constraint: one of `dts.constraints`; only completions that it accepts are found. constraint_mode: "condition", p
    among these completions, or "mask", p masked token by token, which is another distribution; if not given, the
    first for methods that sample from a target, else the second.
    chat_template_kwargs: variables of the chat template, and `tools`. on_rollout: called with each finished rollout.
    max_kv_bytes: bound on the keys and values held; idle branches beyond it are given up, and recomputed if needed.

    Raises `UsageError` for bad settings or a prompt longer than the context, `RewardError` when the reward fails,
    `ModelError` for logits that are no distribution or a failing processor, `UnavailableError` without enough memory.
    """
    from dts.search import Search, run  # the one place where this layer looks up

    settings = Decoding(
        max_new_tokens, min_new_tokens, temperature, top_k, top_p, as_stops(stop), seed, batch_size, logits_processor,
        require_eos, constraint, constraint_mode,
    )  # fmt: skip
    max_new_tokens, batch_size = settings.max_new_tokens, settings.batch_size
    check_arguments(lm, method, max_kv_bytes, budget, on_rollout, constraint)
    check_engine(lm, method, settings)
    scorer, prompt_ids = as_scorer(reward), encoded(lm, prompt, chat_template_kwargs)
    check_prompt(lm, prompt_ids, max_new_tokens)
    width = batch_size or min(method.batch_size(), lm.batch_limit(len(prompt_ids), max_new_tokens, max_kv_bytes))
    context = Context(prompt, tuple(prompt_ids), lm.decode)
    limits = tightest(method.budget(), budget)
    with _memory_named(len(prompt_ids), width):
        session = lm.open(prompt_ids, batch_size=width, max_new_tokens=max_new_tokens, max_kv_bytes=max_kv_bytes)
        return run(Search(lm, session, context, scorer, settings, limits, width, on_rollout, target_of(method)), method)


@contextlib.contextmanager
def _memory_named(prompt_tokens: int, paths: int) -> Iterator[None]:
    """Memory that runs out where halving the batch does not help (the prompt, the logits) is an `UnavailableError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, DTSError) or not is_out_of_memory(error):
            raise
        raise UnavailableError(
            f"out of memory with a prompt of {prompt_tokens} tokens and {paths} paths ({first_line(error)}); {REMEDY}"
        ) from error


def check_arguments(
    lm: Any,
    method: Any,
    max_kv_bytes: int | None,
    budget: Budget | None,
    on_rollout: Callable[..., Any] | None,
    constraint: Any = None,
) -> None:
    """Raise `UsageError` for an argument of another kind than `decode` takes."""
    if isinstance(lm, type) or not all(callable(getattr(lm, name, None)) for name in ("encode", "decode", "open")):
        raise UsageError(f"lm={shown(lm)} is not a language model; give what dts.load returns")
    if isinstance(method, type) or not all(callable(getattr(method, name, None)) for name in ("batch_size", "budget")):
        raise UsageError(f"method={shown(method)} is not a method; give one of dts.search, such as MaxEnt(32)")
    if max_kv_bytes is not None:
        check_whole("max_kv_bytes", max_kv_bytes, 1, 2**63, allowed="a whole number of bytes >= 1 or None")
    check_budget("budget", budget)
    if on_rollout is not None:
        check_callable("on_rollout", on_rollout, "a function of one rollout, or None")
    check_constraint(constraint, lm)


def check_engine(lm: Any, method: Any, settings: Decoding) -> None:
    """Raise `UsageError` for what needs every token's probability, on an engine that completes only: it draws from its
    own p, and tells the likeliest tokens."""
    if not getattr(lm, "completes_only", False):
        return
    plain, target = Decoding(), target_of(method)
    options = ("min_new_tokens", "temperature", "top_k", "top_p", "logits_processor", "constraint")
    needs = [f"{option}={shown(getattr(settings, option))}" for option in options
             if getattr(settings, option) != getattr(plain, option)]  # fmt: skip
    if target is not None and target.row_power != 1:
        needs.append(f"the target {target}" if target.power != 1 else "order='target'")
    if getattr(method, "needs_rows", False):
        needs.append(f"method={shown(method)}")
    if needs:
        raise UsageError(
            f"{needs[0]} needs the probabilities of all tokens at every step, and {lm.name} completes texts and tells "
            "those of the likeliest; leave it out, or load the model itself with dts.load(folder or hub id)"
        )


def target_of(method: Any) -> Target | None:
    """What the method samples from, or looks for the best completion under; None for methods without a target."""
    target = getattr(method, "target", None)
    return target if isinstance(target, Target) else None


def check_budget(name: str, budget: Any) -> None:
    """Raise `UsageError` for what is neither a budget nor None."""
    if budget is not None and not isinstance(budget, Budget):
        raise UsageError(
            f"{name}={shown(budget)} is not allowed; give dts.Budget(tokens=, seconds=, reward_calls=, ...) or None"
        )


def as_scorer(reward: Reward | Callable[..., Any] | None) -> Reward:
    """A reward object; for None one that gives 0 to everything."""
    return as_reward(reward) if reward is not None else NO_REWARD


def encoded(lm: LanguageModel, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None) -> list[int]:
    """Prompt ids."""
    if chat_template_kwargs is not None and not isinstance(chat_template_kwargs, Mapping):
        raise UsageError(f"chat_template_kwargs={shown(chat_template_kwargs)} is not allowed; give a dict or None")
    return lm.encode(prompt, chat_template_kwargs) if chat_template_kwargs else lm.encode(prompt)


def check_prompt(lm: LanguageModel, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
    """Raise `UsageError` for an empty prompt, or one that leaves no room for `max_new_tokens`."""
    if not prompt_ids:
        raise UsageError("prompt is empty: give at least one token")
    limit = lm.context_length
    if limit is not None and len(prompt_ids) + max_new_tokens > limit:
        raise UsageError(
            f"prompt of {len(prompt_ids)} tokens plus max_new_tokens={max_new_tokens} exceeds the context of "
            f"{lm.name} ({limit} tokens); shorten the prompt or lower max_new_tokens"
        )


def tightest(own: Budget, given: Budget | None) -> Budget:
    """The smaller of two limits, field by field."""
    if given is None:
        return own
    limits = {}
    for field in dataclasses.fields(Budget):
        values = [v for v in (getattr(own, field.name), getattr(given, field.name)) if v is not None]
        limits[field.name] = min(values, default=None)
    return Budget(**limits)
