"""Search where a plain TRL script generates: `GRPOTrainer(..., rollout_func=search_rollouts(method, reward))`.

`rollout_func` is experimental in TRL; this module is the one place outside `dts.training` that knows its form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import dts
from dts.decoding import as_scorer, encoded
from dts.doors.choices import first_rollouts
from dts.errors import UsageError, shown
from dts.models.huggingface import HFModel
from dts.results import Completion, Result
from dts.rewards import Reward
from dts.search import Method
from dts.training.sampling import decoder_of, in_eval_mode, stream

Rollouts = Callable[[list[Any], Any], dict[str, Any]]
TRAINERS: Mapping[str, str] = {  # options of `decode_many` that the trainer's arguments set
    "max_new_tokens": "max_completion_length", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k",
    "chat_template_kwargs": "chat_template_kwargs", "seed": "seed",
}  # fmt: skip
_PROCESSOR = "give search_rollouts a logits_processor of transformers, such as {}"
# Arguments of the trainer that the search does not take: the value that asks for nothing, and what to do instead.
REFUSED: Mapping[str, tuple[Any, str]] = {
    "min_p": (0.0, _PROCESSOR.format("MinPLogitsWarper")),
    "repetition_penalty": (1.0, _PROCESSOR.format("RepetitionPenaltyLogitsProcessor")),
    "generation_kwargs": ({}, "give search_rollouts the options of dts.decode_many"),
    "vllm_structured_outputs_regex": ("", "give search_rollouts constraint=dts.constraints.Regex(...)"),
}


def search_rollouts(
    method: Method, reward: Reward | Callable[..., Any], *, width: int = 4, batch_size: int = 64, **decoding: Any
) -> Rollouts:
    """A `rollout_func` that draws each group of completions from one search over its prompt.

    method, reward: of the search. With `MaxEnt` a group holds independent draws from the tree's estimate of the target
    p exp(lambda r) / Z; with other methods the group holds their first rollouts, so give them at least
    `num_generations`. width, batch_size: as of `dts.decode_many`. decoding: further options of it (`stop`, ...).
    Length, temperature, `top_p`, `top_k`, `chat_template_kwargs` and seed are the trainer's; its other arguments of
    generation are refused.

    The search's reward of each completion reaches the trainer's reward functions as `search_reward`. `logprobs` are the
    model's own, so TRL trains on the draws as if they came from the model: `dts train grpo` has the weights that
    correct for the search.
    """
    if taken := [name for name in TRAINERS if name in decoding]:
        raise UsageError(
            f"{taken[0]}={shown(decoding[taken[0]])} is the trainer's; set {TRAINERS[taken[0]]} of its args"
        )
    scorer = as_scorer(reward)
    models = WeakKeyDictionary[Any, HFModel]()  # the decoder of each trainer, which keeps what it prepared

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        settings = decoding_of(trainer.args)
        size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        groups = list(_groups(prompts, size))
        if trainer not in models:
            models[trainer] = decoder_of(trainer)
        lm = models[trainer]
        key = (trainer.args.seed, trainer.state.global_step, trainer.args.process_index, int(trainer.model.training))
        requests = [dts.Request(prompt, seed=stream(*key, number)) for number, prompt in enumerate(groups)]
        with in_eval_mode(lm.model):
            results: list[Result] = list(dts.decode_many(
                lm, requests, method=method, reward=scorer, width=width, batch_size=batch_size, **settings, **decoding,
            ))  # fmt: skip
            drawn = [draws(result, size, request.seed or 0) for request, result in zip(requests, results, strict=True)]
        variables = settings["chat_template_kwargs"]
        prompt_ids = [ids for prompt in groups for ids in [encoded(lm, prompt, variables)] * size]
        return {"prompt_ids": prompt_ids, **_columns([one for group in drawn for one in group])}

    return rollout


def decoding_of(args: Any) -> dict[str, Any]:
    """Settings of `dts.decode_many` for a trainer's arguments. Raises `UsageError` for one that it would ignore."""
    for name, (nothing, instead) in REFUSED.items():
        if (value := getattr(args, name, None)) not in (None, nothing):
            raise UsageError(
                f"{name}={shown(value)} of the trainer has no effect in a search; remove it, and {instead}"
            )
    top_k = getattr(args, "top_k", None)
    return {
        "max_new_tokens": args.max_completion_length, "temperature": args.temperature,
        "top_p": getattr(args, "top_p", None), "top_k": top_k if top_k and top_k > 0 else None,  # TRL: 0 for all tokens
        "chat_template_kwargs": getattr(args, "chat_template_kwargs", None) or None,
    }  # fmt: skip


def _groups(prompts: Sequence[Any], size: int) -> Iterator[Any]:
    """The prompt of each group; TRL repeats it for each member."""
    for start in range(0, len(prompts), size):
        members = prompts[start : start + size]
        if len(members) < size or any(member != members[0] for member in members):
            raise UsageError(f"{len(prompts)} prompts do not come in groups of {size} equal ones; let TRL repeat them")
        yield members[0]


def draws(result: Result, n: int, seed: int) -> list[Completion]:
    """n independent draws from the target, where the method estimates one; else its first n rollouts."""
    if result.estimate is not None and result.estimate.sample is not None:
        return result.sample(n, seed)
    if len(result.rollouts) < n:
        raise UsageError(
            f"{result.method} made {len(result.rollouts)} rollouts for a group of {n}; give it {n} or more"
        )
    return first_rollouts(result, n)


def _columns(completions: Sequence[Completion]) -> dict[str, list[Any]]:
    return {
        "completion_ids": [list(one.token_ids) for one in completions],
        "logprobs": [list(one.token_logprobs) for one in completions],
        "search_reward": [one.reward for one in completions],
    }
