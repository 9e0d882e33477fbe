"""How servers are asked for a tail, and where their answers hold it. Each of them has sampling defaults of its own, of
the model's or of the engine's maker; all of them are set, so that tokens are drawn from the model's p and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dts.lm import Tail, TailRequest

BAR = -100.0  # added to logits of tokens that must not be drawn; the least that the servers take


class Dialect(Protocol):
    """One server's way to speak."""

    @property
    def start(self) -> str:
        """Options of its command line that it needs."""

    def url(self, base: str) -> str:
        """Where requests go. base: as given, such as http://host:8000/v1."""

    def body(self, request: TailRequest, model: str) -> dict[str, Any]:
        """JSON of a request."""

    def tail(self, answer: Any, request: TailRequest) -> Tail:
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

    def tail(self, answer: Any, request: TailRequest) -> Tail:
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
        }  # fmt: skip
        if request.barred:
            sampling["logit_bias"] = {str(token): BAR for token in request.barred}
        return {
            "input_ids": _ids(request), "sampling_params": sampling, "return_logprob": True,
            "top_logprobs_num": request.top, "logprob_start_len": -1, "stream": False,
        }  # fmt: skip

    def tail(self, answer: Any, request: TailRequest) -> Tail:
        meta = answer["meta_info"]
        drawn = [(int(entry[1]), float(entry[0])) for entry in meta["output_token_logprobs"]]
        rows = []
        for (token, log), top in zip(drawn, meta["output_top_logprobs"], strict=True):
            rows.append({**{int(entry[1]): float(entry[0]) for entry in top}, token: log})
        computed = _computed(int(meta["prompt_tokens"]), int(meta.get("cached_tokens") or 0), len(drawn))
        return Tail(tuple(token for token, _ in drawn), tuple(rows), computed)


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """`/completion` of llama.cpp's server, with its samplers switched off."""

    start: str = "--parallel 8"

    def url(self, base: str) -> str:
        return f"{_root(base)}/completion"

    def body(self, request: TailRequest, model: str) -> dict[str, Any]:
        return {
            "prompt": _ids(request), "n_predict": request.limit, "seed": request.seed, "n_probs": request.top,
            "post_sampling_probs": False, "return_tokens": True, "cache_prompt": True, "stream": False,
            "samplers": ["temperature"], "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0,
            "repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "dry_multiplier": 0.0,
            "xtc_probability": 0.0, "mirostat": 0, "logit_bias": [[token, False] for token in request.barred],
        }  # fmt: skip

    def tail(self, answer: Any, request: TailRequest) -> Tail:
        tokens = [int(token) for token in answer["tokens"]]
        rows = []
        for token, entry in zip(tokens, answer["completion_probabilities"], strict=True):
            row = {int(one["id"]): float(one["logprob"]) for one in entry["top_logprobs"]}
            rows.append({**row, token: float(entry["logprob"])})
        cached = int(answer.get("timings", {}).get("cache_n") or 0)
        return Tail(tuple(tokens), tuple(rows), _computed(int(answer["tokens_evaluated"]), cached, len(tokens)))


DIALECTS: Mapping[str, Dialect] = {"vllm": VLLM(), "sglang": SGLang(), "llama.cpp": LlamaCpp()}
