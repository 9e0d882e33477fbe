"""vLLM in this process as `dts.lm.Completer`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

from dts.errors import EngineError, UnavailableError
from dts.lm import Tail, TailRequest
from dts.models.engines.dialects import BAR


class InProcess:
    """Tails from an engine that this process runs. Its continuous batching is the batch."""

    def __init__(self, source: str, **options: Any) -> None:
        """source: a folder or hub id. options: of `vllm.LLM`."""
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        try:
            vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise UnavailableError(
                f"vllm:{source} needs vLLM ({error}); run: pip install vllm, in an environment of its own"
            ) from error
        given = {"max_logprobs": -1, "enable_prefix_caching": True, "generation_config": "vllm", **options}
        try:
            self.llm = vllm.LLM(source, **given)
        except Exception as error:  # an option, the weights, the card: it fails in as many ways as it has parts
            raise UnavailableError(f"vllm:{source} did not start ({type(error).__name__}: {_line(error)})") from error
        self._params = vllm.SamplingParams

    @property
    def max_top(self) -> int:
        return int(self.llm.llm_engine.model_config.get_vocab_size())

    def complete(self, requests: Sequence[TailRequest]) -> list[Tail | Exception]:
        try:
            return list(self._drawn(requests))
        except ValueError as error:  # vLLM refuses one of them, and with it the others
            if len(requests) == 1:
                return [UnavailableError(f"vLLM refused a request: {_line(error)}")]
            half = len(requests) // 2
            return [*self.complete(requests[:half]), *self.complete(requests[half:])]
        except Exception as error:
            raise EngineError(f"vLLM failed ({type(error).__name__}: {_line(error)}); load the model again") from error

    def _drawn(self, requests: Sequence[TailRequest]) -> list[Tail]:
        prompts = [{"prompt_token_ids": [*request.prompt, *request.tokens]} for request in requests]
        params = [self._params(
            max_tokens=request.limit, seed=request.seed, logprobs=request.top, temperature=1.0, detokenize=False,
            logit_bias=dict.fromkeys(request.barred, BAR) or None,
        ) for request in requests]  # fmt: skip
        return [_tail(output) for output in self.llm.generate(prompts, params, use_tqdm=False)]


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tail(output: Any) -> Tail:
    drawn = output.outputs[0]
    rows = tuple({int(token): float(one.logprob) for token, one in row.items()} for row in drawn.logprobs)
    cached = output.num_cached_tokens or 0
    tokens = tuple(int(token) for token in drawn.token_ids)
    return Tail(tokens, rows, len(output.prompt_token_ids) - cached + len(tokens) - 1)
