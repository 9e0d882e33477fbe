"""How servers are asked for a tail, and where their answers hold it. Each of them has sampling defaults of its own, of
the model's or of the engine's maker; all of them are set, so that tokens are drawn from the model's p and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dts.errors import UnavailableError
from dts.lm import Tail, TailRequest

BAR = -100.0  # added to logits of tokens that must not be drawn; the least that the servers take
SGLANG_UNSET = ("stop", "stop_token_ids", "json_schema", "regex", "ebnf", "structural_tag")  # its command line may set
PLAIN = [["a", 1000.0]]  # a logit bias of llama.cpp after which the drawn token is plain text
EVERY = 2**24  # tokens to list; llama.cpp gives as many as there are
Again = Callable[..., Any]  # sends the body again with these fields changed, and gives the answer


class Dialect(Protocol):
    """One server's way to speak."""

    @property
    def start(self) -> str:
        """What its server must be started with."""

    def url(self, base: str) -> str:
        """Where requests go. base: as given, such as http://host:8000/v1."""

    def body(self, request: TailRequest, model: str) -> dict[str, Any]:
        """JSON of a request."""

    def tail(self, answer: Any, request: TailRequest, again: Again) -> Tail:
        """What an answer holds. Raises errors of looking things up where it lacks some."""


def _root(base: str) -> str:
    return base.rstrip("/").removesuffix("/v1")


def _ids(request: TailRequest) -> list[int]:
    return [*request.prompt, *request.tokens]


def _computed(prompt: int, cached: int, drawn: int) -> int:
    """Positions that entered the model: the last token that was drawn did not."""
    return prompt - cached + drawn - 1


@dataclass(frozen=True, slots=True)
class VLLM:
    """`/v1/completions` of vLLM, with ids in the places of texts."""

    start: str = "--max-logprobs 64 --enable-prompt-tokens-details"

    def url(self, base: str) -> str:
        return f"{base.rstrip('/')}/completions"

    def body(self, request: TailRequest, model: str) -> dict[str, Any]:
        made = {
            "model": model, "prompt": _ids(request), "max_tokens": request.limit, "seed": request.seed,
            "logprobs": request.top, "return_token_ids": True, "return_tokens_as_token_ids": True, "temperature": 1.0,
            "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "n": 1, "stream": False,
        }  # fmt: skip
        if request.barred:
            made["logit_bias"] = {str(token): BAR for token in request.barred}
        return made

    def tail(self, answer: Any, request: TailRequest, again: Again) -> Tail:
        choice, usage = answer["choices"][0], answer["usage"]
        tokens, found = [int(token) for token in choice["token_ids"]], choice["logprobs"]
        rows = []
        for token, log, top in zip(tokens, found["token_logprobs"], found["top_logprobs"], strict=True):
            row = {int(name.removeprefix("token_id:")): float(value) for name, value in top.items()}
            rows.append({**row, token: float(log)})
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Tail(tuple(tokens), tuple(rows), _computed(int(usage["prompt_tokens"]), int(cached), len(tokens)))


@dataclass(frozen=True, slots=True)
class SGLang:
    """`/generate` of SGLang; its OpenAI endpoint keys log-probabilities by text. It draws by the request's seed only
    with `--enable-deterministic-inference`."""

    start: str = "--enable-deterministic-inference"

    def url(self, base: str) -> str:
        return f"{_root(base)}/generate"

    def body(self, request: TailRequest, model: str) -> dict[str, Any]:
        sampling: dict[str, Any] = {
            "max_new_tokens": request.limit, "sampling_seed": request.seed, "temperature": 1.0, "top_p": 1.0,
            "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "n": 1, "min_new_tokens": 0, "ignore_eos": False, **dict.fromkeys(SGLANG_UNSET),
        }  # fmt: skip
        if request.barred:
            sampling["logit_bias"] = {str(token): BAR for token in request.barred}
        return {
            "input_ids": _ids(request), "sampling_params": sampling, "return_logprob": True,
            "top_logprobs_num": request.top, "logprob_start_len": -1, "stream": False,
        }  # fmt: skip

    def tail(self, answer: Any, request: TailRequest, again: Again) -> Tail:
        meta = answer["meta_info"]
        end = meta.get("finish_reason") or {}
        if end.get("type") == "abort":
            raise UnavailableError(f"SGLang gave the request up: {end.get('message')}")
        drawn = [(int(entry[1]), float(entry[0])) for entry in meta["output_token_logprobs"]]
        rows = []
        for (token, log), top in zip(drawn, meta["output_top_logprobs"], strict=True):
            rows.append({**{int(entry[1]): float(entry[0]) for entry in top}, token: log})
        computed = _computed(int(meta["prompt_tokens"]), int(meta.get("cached_tokens") or 0), len(drawn))
        ended = bool(drawn) and end.get("matched") == drawn[-1][0]  # also at tokens that it knows by their names
        return Tail(tuple(token for token, _ in drawn), tuple(rows), computed, ended)


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """`/completion` of llama.cpp's server, with its samplers switched off.

    It searches the text for stop strings, and while the text ends within a character it notes neither text nor
    probabilities: rows of such tokens are missing. They are asked for one by one: its log-probabilities do not know the
    logit bias, so a request that must draw something plain reports the same row.
    """

    start: str = "a version of 2025 or later"

    def url(self, base: str) -> str:
        return f"{_root(base)}/completion"

    def body(self, request: TailRequest, model: str) -> dict[str, Any]:
        return {
            "model": model, "prompt": _ids(request), "n_predict": request.limit, "seed": request.seed,
            "n_probs": request.top, "post_sampling_probs": False, "return_tokens": True, "cache_prompt": True,
            "stream": False, "samplers": ["temperature"], "temperature": 1.0, "dynatemp_range": 0.0, "top_k": 0,
            "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repeat_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "dry_multiplier": 0.0, "xtc_probability": 0.0, "mirostat": 0,
            "logit_bias": [[token, False] for token in request.barred],
        }  # fmt: skip

    def tail(self, answer: Any, request: TailRequest, again: Again) -> Tail:
        _check_llama_cpp(answer, request.limit)
        tokens = [int(token) for token in answer["tokens"]]
        computed = int(answer["timings"]["prompt_n"]) + len(tokens) - 1
        entries = _entries(tokens, answer.get("completion_probabilities") or [])
        rows = []
        for place, (token, entry) in enumerate(zip(tokens, entries, strict=True)):
            if entry is None:
                row, more = _plain_row([*_ids(request), *tokens[:place]], token, request.top, again)
                computed += more
            else:
                row = {**_listed(entry), token: float(entry["logprob"])}
            rows.append(row)
        return Tail(tuple(tokens), tuple(rows), computed, answer.get("stop_type") == "eos")


def _check_llama_cpp(answer: Any, limit: int) -> None:
    """Raises `UnavailableError` for what the server was started with and no request can switch off."""
    settings = answer.get("generation_settings", {})
    for name, option in (("grammar", "--grammar and --json-schema"), ("stop", "--reverse-prompt")):
        if settings.get(name):
            raise UnavailableError(f"the llama.cpp server changes what the model draws; start it without {option}")
    if settings.get("speculative.types", "none") != "none":
        raise UnavailableError(
            "the llama.cpp server does not report probabilities of tokens that it drafts; start it without --spec-type "
            "and without a draft model"
        )
    # Also where the last token just fits. Fewer tokens are kept where the context was shifted (--context-shift).
    drawn = len(answer["tokens"])
    kept = int(answer.get("tokens_cached", 0)) >= int(answer["tokens_evaluated"]) + drawn - 1
    if answer.get("truncated") and not (kept and (drawn == limit or answer.get("stop_type") == "eos")):
        raise UnavailableError(
            f"the llama.cpp server has no room for all tokens after a prompt of {answer['tokens_evaluated']}; start it "
            "with a larger --ctx-size, of which each of its --parallel slots has an equal part"
        )


def _entries(tokens: Sequence[int], noted: Sequence[Any]) -> list[Any]:
    """For each token what was noted of it, None where that is missing or could be another's. noted: of some of the
    tokens, in their order."""
    first, last = _places(tokens, noted), _places(tokens[::-1], noted[::-1])[::-1]
    entries: list[Any] = [None] * len(tokens)
    for entry, early, late in zip(noted, first, last, strict=True):
        if early == len(tokens) - 1 - late:
            entries[early] = entry
    return entries


def _places(tokens: Sequence[int], noted: Sequence[Any]) -> list[int]:
    """The first place that each can have."""
    places, place = [], -1
    for entry in noted:
        place = tokens.index(int(entry["id"]), place + 1)
        places.append(place)
    return places


def _listed(entry: Any) -> dict[int, float]:
    return {int(one["id"]): float(one["logprob"]) for one in entry["top_logprobs"]}


def _plain_row(prefix: list[int], token: int, top: int, again: Again) -> tuple[dict[int, float], int]:
    """The row after a prefix, with this token, and how many tokens were computed for it."""
    computed, row = 0, dict[int, float]()
    for listed in (top, EVERY):
        answer = again(prompt=prefix, n_predict=1, n_probs=listed, logit_bias=PLAIN)
        (entry,) = answer["completion_probabilities"]
        row, computed = _listed(entry), computed + int(answer["timings"]["prompt_n"])
        if token in row:
            break
    return {**dict(sorted(row.items(), key=lambda item: -item[1])[:top]), token: row[token]}, computed


DIALECTS: Mapping[str, Dialect] = {"vllm": VLLM(), "sglang": SGLang(), "llama.cpp": LlamaCpp()}
