"""Prompts as token ids: text, chat messages, or ids in the forms in which tokenizers and arrays hold them."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from dts.errors import UsageError, shown
from dts.settings import LARGEST, check_text

log = logging.getLogger(__name__)

# Arguments of `apply_chat_template` that are set here; every other one may be given.
OURS = frozenset(
    ["conversation", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation",
     "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"]
)  # fmt: skip
NOT_VARIABLES = frozenset(["tools", "documents", "chat_template", "sanitize_control_tokens"])  # of the template
PROBE = "a"  # shows what a tokenizer puts around a text


def encode(lm: Any, prompt: Any, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
    """Token ids of a prompt for a model with `tokenizer` and `vocab_size`.

    Raises `UsageError` that names the position of what cannot be used.

    Text gets the tokens that the tokenizer puts before a text, unless it starts with them already (text that a chat
    template rendered), and none that it puts after one. Messages go through the chat template; a last message of the
    assistant is continued. Ids: a sequence, array or tensor of shape [L] or [1, L], or a `BatchEncoding` of one
    prompt, whose padding is dropped.
    """
    tokenizer = lm.tokenizer
    chat = isinstance(prompt, (list, tuple)) and any(isinstance(message, Mapping) for message in prompt)
    if chat_template_kwargs and not (chat and tokenizer.chat_template):
        what = "this tokenizer has no chat template" if chat else "the prompt is no list of chat messages"
        raise UsageError(f"chat_template_kwargs={shown(chat_template_kwargs)} has no effect: {what}")
    if isinstance(prompt, str):
        return _encode_text(tokenizer, prompt)
    if chat:
        return _encode_messages(tokenizer, prompt, chat_template_kwargs or {})
    return token_ids(prompt, lm.vocab_size)


# -- text --------------------------------------------------------------------------------------------------------------


def _encode_text(tokenizer: Any, text: str) -> list[int]:
    check_text("prompt", text)
    if not list(tokenizer("")["input_ids"]):  # this tokenizer puts nothing around a text
        return list(tokenizer(text)["input_ids"])
    before = _before(tokenizer)
    if before is None:
        return list(tokenizer(text)["input_ids"])
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids if before and ids[: len(before)] == before else [*before, *ids]


def _before(tokenizer: Any) -> list[int] | None:
    """The ids that this tokenizer puts before a text; None where they cannot be told from the text's own."""
    around = list(tokenizer(PROBE)["input_ids"])
    bare = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    size = len(bare)
    return next((around[:i] for i in range(len(around) - size + 1) if around[i : i + size] == bare), None)


# -- chat messages -----------------------------------------------------------------------------------------------------


def _encode_messages(tokenizer: Any, prompt: Sequence[Any], options: Mapping[str, Any]) -> list[int]:
    messages = [_message(index, message) for index, message in enumerate(prompt)]
    last = messages[-1]
    continued = last["role"] == "assistant" and isinstance(last["content"], str)
    if not tokenizer.chat_template:
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
        return _encode_text(tokenizer, text[:-1] if continued else text + "assistant:")
    _check_options(tokenizer.chat_template, options)
    turn: dict[str, Any] = {"add_generation_prompt": not continued}
    if continued:
        turn["continue_final_message"] = True
    try:
        return list(tokenizer.apply_chat_template(messages, return_dict=False, **turn, **options))
    except Exception as error:  # a template is a program: it raises what it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"prompt: the chat template refuses these messages ({reason})") from error


def _message(index: int, message: Any) -> dict[str, Any]:
    """The message with its content as one string."""
    where = f"prompt[{index}]"
    if not isinstance(message, Mapping):
        raise UsageError(f"{where}={shown(message)} is not a chat message; give a dict with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise UsageError(f"{where}: role={shown(role)} is not allowed; give a string such as 'user'")
    check_text(f"{where}['role']", role)
    if isinstance(content, (list, tuple)):
        content = "".join(_part(f"{where}['content'][{i}]", part) for i, part in enumerate(content))
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise UsageError(f"{where}: content={shown(content)} is not allowed; give text, or a list of text parts")
    if content is not None:
        check_text(f"{where}['content']", content)
    return {**message, "content": content}


def _part(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        raise UsageError(f"{where}={shown(part)} is not text; give {{'type': 'text', 'text': ...}}")
    return text


def _check_options(template: Any, options: Mapping[str, Any]) -> None:
    for name in options:
        if not isinstance(name, str) or name in OURS:
            raise UsageError(f"chat_template_kwargs: {name!r} cannot be set; give variables of the template, or tools")
        if name not in NOT_VARIABLES and name not in str(options.get("chat_template", template)):
            log.warning("chat_template_kwargs: the chat template does not mention %r, which has no effect", name)


# -- ids ---------------------------------------------------------------------------------------------------------------


def token_ids(prompt: Any, vocab_size: int | None) -> list[int]:
    """Ids from a sequence, array or tensor of shape [L] or [1, L], or from a mapping that holds `input_ids`.

    vocab_size: ids from there on are refused; None for all that can be held.
    """
    mask = None
    if isinstance(prompt, Mapping):
        if "input_ids" not in prompt:
            raise UsageError("prompt is a mapping without input_ids; a chat message has to be in a list of messages")
        prompt, mask = prompt["input_ids"], prompt.get("attention_mask")
    ids = [_token_id(index, value, vocab_size) for index, value in enumerate(_one_row("prompt", prompt))]
    if mask is None:
        return ids
    keep = _one_row("attention_mask", mask)
    if len(keep) != len(ids):
        raise UsageError(f"prompt has {len(ids)} input_ids and an attention_mask of {len(keep)}")
    return [token for token, kept in zip(ids, keep, strict=True) if kept]


def _one_row(option: str, values: Any) -> Sequence[Any]:
    """The only row of [L] or [1, L]."""
    outer = _sequence(option, values)
    if len(outer) == 1 and _is_row(outer[0]):
        return _sequence(option, outer[0])
    if any(map(_is_row, outer)):
        raise UsageError(f"{option} holds {len(outer)} rows; give one prompt at a time")
    return outer


def _is_row(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0


def _sequence(option: str, values: Any) -> Sequence[Any]:
    if hasattr(values, "tolist") and not isinstance(values, memoryview):
        try:
            values = values.tolist()
        except Exception as error:  # a tensor without values
            raise UsageError(f"{option} cannot be read as a list of token ids ({error})") from error
    # Iterating over bytes would give numbers, which are no token ids.
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes, bytearray, memoryview)):
        raise UsageError(
            f"{option}={shown(values)} ({type(values).__name__}) is not allowed; give text, a list of chat messages, "
            "or token ids as a sequence, array or tensor of shape [L] or [1, L]"
        )
    return values


def _token_id(index: int, value: Any, vocab_size: int | None) -> int:
    try:
        boolean = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
        token = None if boolean else operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        token = None
    if token is None:
        raise UsageError(f"prompt[{index}]={shown(value)} is not a token id; give token ids, text or chat messages")
    last = LARGEST if vocab_size is None else vocab_size - 1
    if not 0 <= token <= last:
        raise UsageError(f"prompt[{index}]={shown(token)} is outside the vocabulary (0 to {last})")
    return token
