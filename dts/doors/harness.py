"""Our search as a model of lm-evaluation-harness: `lm_eval --model dts --model_args pretrained=NAME,method=...`.

Everything but generation is the harness's own `hf` model around the model that `dts.load` gives: tokens, chat
templates, likelihoods. So a score that needs no generation is that of `hf`, and greedy generation is too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

import dts
from dts.doors.choices import method_by_name, reward_by_name
from dts.errors import UsageError, shown
from dts.evaluation.decode import Settings
from dts.models.huggingface import HFModel
from dts.results import Result
from dts.settings import check_whole

AUTO = 16  # prompts in flight for `--batch_size auto`
PASSED_ON = ("top_k", "top_p", "min_new_tokens")  # arguments of generation that `dts.decode` has too


@dataclass(frozen=True, slots=True)
class Asked:
    """One request for a text."""

    index: int  # among all requests of the call: the seed depends on it and on nothing else
    context: str
    given: dict[str, Any]  # the task's generation arguments


@register_model("dts")
class SearchLM(HFLM):
    """`hf` that searches where it generates."""

    def __init__(
        self,
        pretrained: str | tuple[Any, Any],
        method: str = "maxent",
        rollouts: int | None = None,
        reward: str | None = None,
        reward_file: str | None = None,
        reward_scale: float | None = None,
        power: float | None = None,
        order: str | None = None,
        width: int = 4,
        seed: int = 0,
        device: str | None = None,
        dtype: str | None = "auto",
        trust_remote_code: bool = False,
        max_batch_size: int | None = 64,
        **options: Any,
    ) -> None:
        """pretrained, device, dtype: as of `dts.load`, which takes float32 on a CPU where the harness's `hf` takes what
        the checkpoint says. method, rollouts, reward_scale, power, order: as of `dts decode`.
        reward: a name of `dts decode`; reward_file: FILE.py:FUNCTION. width: paths of one prompt decoded together;
        `--batch_size` prompts are in flight. options: those of the harness's `hf` that do not load the model
        (batch_size, max_length, add_bos_token, prefix_token_id, enable_thinking, chat_template_args, ...)."""
        self._method = method_by_name(method, Settings(rollouts, reward_scale, power, order))
        self._reward = reward_by_name(reward, reward_file)
        self._width = check_whole("width", width, 1, allowed="a whole number >= 1")
        self._seed = check_whole("seed", seed, 0, 2**128, allowed="a whole number >= 0")
        self._searched: HFModel = dts.load(
            pretrained, device=device, dtype=None if dtype == "auto" else dtype, trust_remote_code=trust_remote_code
        )
        if getattr(self._searched, "model", None) is None:
            raise UsageError(f"pretrained={shown(pretrained)} is no model in this process, which likelihoods need")
        super().__init__(
            pretrained=self._searched.model, tokenizer=self._searched.tokenizer, max_batch_size=max_batch_size,
            trust_remote_code=trust_remote_code, **options,
        )  # fmt: skip
        if isinstance(self.think_end_token, int):
            raise UsageError(f"think_end_token={self.think_end_token} is not allowed; give the token's text")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The best text for each request, searched in one batch for all that have the same arguments."""
        groups: dict[str, list[Asked]] = {}
        for index, request in enumerate(requests):
            context, given = request.args
            groups.setdefault(json.dumps(given, sort_keys=True, default=repr), []).append(Asked(index, context, given))
        texts: dict[int, str] = {}
        for group in groups.values():
            for asked, text in zip(group, self._searched_texts(group, disable_tqdm), strict=True):
                texts[asked.index] = text
                self.cache_hook.add_partial("generate_until", (asked.context, asked.given), text)
        return [texts[index] for index in range(len(requests))]

    def _searched_texts(self, group: Sequence[Asked], disable_tqdm: bool) -> list[str]:
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        settings = decoding_of(group[0].given, self.max_gen_toks, eos)
        prompts = [
            dts.Request(self._prompt(asked.context, settings["max_new_tokens"]), seed=self._seed + asked.index)
            for asked in group
        ]
        results: Any = dts.decode_many(
            self._searched, prompts, method=self._method, reward=self._reward, width=self._width,
            batch_size=self._width * (AUTO if self.batch_size == "auto" else int(self.batch_size)),
            progress=not disable_tqdm, **settings,
        )  # fmt: skip
        return [
            postprocess_generated_text(text_of(result), list(settings["stop"]), self.think_end_token)
            for result in results
        ]

    def _prompt(self, context: str, max_new_tokens: int) -> str | list[int]:
        """The text itself, which rewards may read; its ids where the harness cuts or begins it in another way."""
        room = self.max_length - max_new_tokens
        if room < 1:
            raise UsageError(f"max_gen_toks={max_new_tokens} leaves no room in a context of {self.max_length} tokens")
        ids = self.tok_encode(context, left_truncate_len=room) or [self.prefix_token_id]
        return context if context and self._searched.encode(context) == ids else ids


def text_of(result: Result) -> str:
    """The best text; an empty one where a budget ended the search before any was finished."""
    return result.completions[0].text if result.completions else ""


def decoding_of(given: dict[str, Any], max_gen_toks: int, eos: str) -> dict[str, Any]:
    """Settings of `dts.decode_many` for a task's generation arguments.

    Temperature 0 and `do_sample: false` are what tasks say by habit and mean the model's own p here: the method says
    how texts are found. Raises `UsageError` for an argument that a search would ignore.
    """
    wanted = normalize_gen_kwargs(given, max_gen_toks)
    stops = handle_stop_sequences(wanted.pop("until", None), eos=eos)
    settings: dict[str, Any] = {"max_new_tokens": wanted.pop("max_gen_toks"), "stop": [stop for stop in stops if stop]}
    sampled, temperature = wanted.pop("do_sample", None), wanted.pop("temperature", 0.0)
    if sampled is not False and temperature:
        settings["temperature"] = temperature
    settings.update({name: wanted.pop(name) for name in PASSED_ON if name in wanted})
    if wanted:
        name, value = next(iter(wanted.items()))
        raise UsageError(
            f"{name}={shown(value)} of the task's generation_kwargs has no effect in a search; remove it, or use "
            f"until, max_gen_toks, temperature, do_sample, {', '.join(PASSED_ON)}"
        )
    return settings
