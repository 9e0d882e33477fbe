"""The text in which a reward model sees a completion: template, chat messages, special tokens, and their ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dts.errors import RewardError, UsageError, shown
from dts.models.readings import WHOLE, Reading, Template
from dts.rewards import Context, Finished, Prompt

PROBE = "\ue000\ue001"  # stands for the completion while a chat template is rendered


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the completions of one prompt."""

    before: str
    after: str
    special: bool  # whether the tokenizer adds its special tokens
    ids: tuple[int, ...]  # of what stands before
    exact: bool  # whether the completion's own ids follow them; otherwise texts are encoded as one
    eos_ids: frozenset[int] = frozenset()

    @property
    def root(self) -> tuple[int, ...]:
        """Ids that all texts, or nearly all, begin with: the last one may be another once text follows."""
        return self.ids if self.exact else self.ids[:-1]


class Texts:
    """Completions as ids for one reward model."""

    def __init__(self, tokenizer: Any, template: Template, reading: Reading, limit: int | None) -> None:
        """limit: ids of a text at most; None for no limit."""
        self._tokenizer, self._template, self._reading, self._limit = tokenizer, template, reading, limit
        self._compared: tuple[Any, bool] = (None, False)  # the tokenizer seen last, and whether it has the same ids
        after = _check_template(template)
        if reading.whole and after:
            raise UsageError(f"template={shown(template)} has text after {{completion}}, which this kind does not read")
        ids = [getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")]
        self.pad = next((token for token in ids if token is not None), 0)
        self._stand_in = next((token for token in reversed(ids) if token is not None), 0)  # for a text without tokens

    def frame(self, context: Context) -> Frame:
        """Raises `UsageError` for a prompt that the template cannot take."""
        lm = getattr(context.decode, "__self__", None)
        same = self._same_ids(getattr(lm, "tokenizer", None)) and self._reading.marked("a\nb") == "a\nb"
        before, after, special = self._around(context, same)
        if self._reading.whole:
            after = ""
        if same:
            own = self._template == WHOLE and not _messages(context.prompt)
            ids = tuple(context.prompt_ids) if own else tuple(self._encode(before, special))
            return Frame(before, after, special, ids, True, getattr(lm, "eos_ids", frozenset()))
        return Frame(before, after, special, tuple(self._encode(before, special)), False)

    def ids(self, frame: Frame, done: Finished) -> tuple[list[int], int]:
        """The ids of a completion in its frame, and where the completion starts in them."""
        if frame.exact:
            after = self._encode(frame.after, special=False) if frame.after else []
            ids = [*frame.ids, *self._own(frame, done), *after]
            start = len(frame.ids)
        else:
            ids = self._encode(frame.before + self._reading.marked(done.text) + frame.after, frame.special)
            start = _common(frame.ids, ids)
        if self._reading.whole and len(ids) == start:
            ids = [*ids, self._stand_in]  # ends at once
        return self._fitted(frame, ids or [self._stand_in], start), start

    def _own(self, frame: Frame, done: Finished) -> Sequence[int]:
        """The completion's own ids; of its text, where that is less than they say (it ends before a stop string)."""
        ids = done.token_ids
        if ids and ids[-1] in frame.eos_ids and not self._reading.whole:
            ids = ids[:-1]
        return ids if self._decode(ids) == done.text else self._encode(done.text, special=False)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _encode(self, text: str, special: bool) -> list[int]:
        encoded = self._tokenizer(text) if special else self._tokenizer(text, add_special_tokens=False)
        return list(encoded["input_ids"])

    def _fitted(self, frame: Frame, ids: list[int], start: int) -> list[int]:
        if self._limit is None or len(ids) <= self._limit:
            return ids
        if frame.after or start >= self._limit:
            raise RewardError(f"a text of {len(ids)} tokens exceeds the reward model's context of {self._limit}")
        return ids[: self._limit]

    def _same_ids(self, other: Any) -> bool:
        compared = self._compared  # of one moment: threads may decode with different models
        if other is not compared[0] or other is None:
            compared = (other, other is not None and _vocabulary(other) == _vocabulary(self._tokenizer))
            self._compared = compared
        return compared[1]

    # -- what stands around a completion ---------------------------------------------------------------------------

    def _around(self, context: Context, same: bool) -> tuple[str, str, bool]:
        """Text before and after, and whether it needs special tokens."""
        messages = _messages(context.prompt)
        if self._template == WHOLE and messages:
            return self._rendered([*messages, {"role": "assistant", "content": PROBE}])
        if self._template == WHOLE and not isinstance(context.prompt, str) and same:
            return "", "", False  # token ids, which the reward model knows as they are
        if isinstance(self._template, str):
            before, _, after = self._template.partition("{completion}")
            return _filled(before, context.prompt), _filled(after, context.prompt), True
        chat = [{**message, "content": _filled(message["content"].replace("{completion}", PROBE), context.prompt)}
                for message in self._template]  # fmt: skip
        return self._rendered(chat)

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, str, bool]:
        if getattr(self._tokenizer, "chat_template", None):
            ends = messages[-1]["role"] != "assistant"
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ends)
            before, _, after = text.partition(PROBE)
            return before, after, False
        text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
        before, _, after = text.partition(PROBE)
        return before.removesuffix(" "), after, True  # as `dts.load` writes messages without a template


def _check_template(template: Template) -> str:
    """What follows the completion in its message or text. Raises `UsageError` unless it stands there once."""
    parts = [template] if isinstance(template, str) else [message.get("content", "") for message in template]
    if sum(part.count("{completion}") for part in parts) != 1:
        raise UsageError(
            f"template={shown(template)} is not allowed; give a text, or chat messages, with {{completion}} once and "
            "{prompt} where the prompt goes"
        )
    return next(part.partition("{completion}")[2] for part in parts if "{completion}" in part)


def _messages(prompt: Prompt) -> list[Mapping[str, str]]:
    if isinstance(prompt, str):
        return []
    return [message for message in prompt if isinstance(message, Mapping)]


def _filled(part: str, prompt: Prompt) -> str:
    """A part of a template with the prompt's text in it."""
    if "{prompt}" not in part:
        return part
    messages = _messages(prompt)
    if not messages and not isinstance(prompt, str):
        raise UsageError(
            "a reward model with another tokenizer, or with a template, needs a prompt of text or messages"
        )
    if isinstance(prompt, str):
        text = prompt
    elif len(messages) == 1:
        text = messages[0]["content"]
    else:
        text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return part.replace("{prompt}", text)


def _vocabulary(tokenizer: Any) -> Any:
    """Something that is equal for tokenizers with the same ids."""
    return tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else tokenizer


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
