"""Results of searches in OpenAI's form: whole answers, and the parts of a stream."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from dts.doors.bodies import Asked
from dts.doors.choices import first_rollouts
from dts.results import Completion, Result, Rollout
from dts.text import TextState, advance, flush

Decode = Callable[[Sequence[int]], str]
REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer: the text that it settled, and its log-probability under what it was drawn from."""

    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Choice:
    """One text of an answer."""

    index: int
    completion: Completion
    tokens: list[Token]


@dataclass(frozen=True, slots=True)
class Answer:
    """All of one request."""

    id: str
    chat: bool
    model: str
    created: int  # seconds of the epoch
    asked: Asked
    choices: list[Choice]
    results: list[Result]


def answer_of(asked: Asked, results: list[Result], *, chat: bool, model: str, decode: Decode) -> Answer:
    """The choices of each prompt in turn, n for each."""
    picked = [completion for result in results for completion in chosen(result, asked.n, asked.independent)]
    choices = [Choice(index, one, tokens_of(one, decode)) for index, one in enumerate(picked)]
    name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
    return Answer(name, chat, model, now(), asked, choices, results)


def now() -> int:
    """The date of an answer, in seconds since 1970."""
    return int(datetime.now(timezone.utc).timestamp())


def chosen(result: Result, n: int, independent: bool) -> list[Completion]:
    """n completions: the best distinct ones, the last of them again where fewer were found; or, for independent
    draws, those of the first n rollouts."""
    picked = first_rollouts(result, n) if independent else result.completions[:n]
    return picked + picked[-1:] * (n - len(picked))


def tokens_of(completion: Completion, decode: Decode) -> list[Token]:
    """The tokens of a text, without the EOS token and without a stop; joined, they are the text."""
    state, pieces = TextState(), []
    for token in completion.token_ids:
        state, piece = advance(decode, state, token)
        pieces.append(piece)
    if pieces:
        pieces[-1] += flush(decode, state)
    left, shown = len(completion.text), []
    for piece in pieces:
        shown.append(piece[:left])
        left -= len(shown[-1])
    if completion.finished_by != "length":  # what ended the text shows nothing
        last = max((index for index, piece in enumerate(shown) if piece), default=-1)
        shown = shown[: last + 1]
    return [Token(text, logprob) for text, logprob in zip(shown, completion.token_logprobs, strict=False)]


# -- whole answers -----------------------------------------------------------------------------------------------------


def as_body(answer: Answer) -> dict[str, Any]:
    """What a request without `stream` gets."""
    return {
        **_head(answer, "chat.completion" if answer.chat else "text_completion"),
        "choices": [_choice(answer, choice) for choice in answer.choices],
        "usage": usage(answer),
        "dts": search_facts(answer),
    }


def _head(answer: Answer, kind: str) -> dict[str, Any]:
    return {"id": answer.id, "object": kind, "created": answer.created, "model": answer.model}


def _choice(answer: Answer, choice: Choice) -> dict[str, Any]:
    text: dict[str, Any] = {"text": choice.completion.text}
    if answer.chat:
        text = {"message": {"role": "assistant", "content": choice.completion.text, "refusal": None}}
    return {
        "index": choice.index, **text, "logprobs": _log_probs(answer, choice.tokens),
        "finish_reason": REASONS[choice.completion.finished_by], "reward": choice.completion.reward,
        "logprob": choice.completion.logprob,
    }  # fmt: skip


def _log_probs(answer: Answer, tokens: Sequence[Token], offset: int = 0) -> dict[str, Any] | None:
    """offset: characters of the text before the first of these tokens."""
    if not answer.asked.log_probs:
        return None
    if answer.chat:
        content = [
            {"token": t.text, "logprob": t.logprob, "bytes": list(t.text.encode()), "top_logprobs": []} for t in tokens
        ]
        return {"content": content, "refusal": None}
    starts = [offset + sum(len(t.text) for t in tokens[:index]) for index in range(len(tokens))]
    return {
        "tokens": [t.text for t in tokens], "token_logprobs": [t.logprob for t in tokens], "top_logprobs": None,
        "text_offset": starts,
    }  # fmt: skip


def usage(answer: Answer) -> dict[str, int]:
    """Tokens of the prompts and of the texts that are returned; what the search took is in `dts`."""
    prompt = sum(result.usage.prompt_tokens for result in answer.results)
    written = sum(len(choice.completion.token_ids) for choice in answer.choices)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def search_facts(answer: Answer) -> dict[str, Any]:
    """What the search did and took, all prompts together."""
    results = answer.results
    return {
        "method": results[0].method, "seed": answer.asked.seed, "partial": any(result.partial for result in results),
        "rollouts": sum(len(result.rollouts) for result in results),
        **{
            name: sum(getattr(result.usage, name) for result in results)
            for name in ("generated_tokens", "forwarded_tokens", "reward_calls")
        },
    }  # fmt: skip


# -- streams -----------------------------------------------------------------------------------------------------------


def progress(rollout: Rollout, best: str) -> str:
    """A comment of a stream, which clients skip: the best text so far may still change, and what was sent as content
    cannot be taken back."""
    facts = {"rollout": rollout.index, "reward": rollout.best_so_far, "tokens": rollout.tokens, "best_so_far": best}
    return f": {json.dumps(facts)}\n\n"


def as_stream(answer: Answer, *, with_usage: bool) -> Iterator[str]:
    """The best texts token by token, choice by choice, and the end."""
    for choice in answer.choices:
        if answer.chat:
            yield _chunk(answer, choice.index, {"delta": {"role": "assistant", "content": ""}}, None)
        offset = 0
        for token in choice.tokens:
            text = {"delta": {"content": token.text}} if answer.chat else {"text": token.text}
            yield _chunk(answer, choice.index, text, _log_probs(answer, [token], offset))
            offset += len(token.text)
        end: dict[str, Any] = {
            **({"delta": {}} if answer.chat else {"text": ""}),
            "finish_reason": REASONS[choice.completion.finished_by],
            "reward": choice.completion.reward,
        }
        yield _chunk(answer, choice.index, end, None)
    kind = _kind_of_chunk(answer)
    if with_usage:
        yield event({**_head(answer, kind), "choices": [], "usage": usage(answer), "dts": search_facts(answer)})
    yield DONE


def _kind_of_chunk(answer: Answer) -> str:
    return "chat.completion.chunk" if answer.chat else "text_completion"


def _chunk(answer: Answer, index: int, part: dict[str, Any], log_probs: dict[str, Any] | None) -> str:
    choice = {"index": index, "finish_reason": None, "logprobs": log_probs, **part}
    return event({**_head(answer, _kind_of_chunk(answer)), "choices": [choice]})


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
