"""Training data: JSON Lines files (also .gz) of prompts, responses, engagement and groups.

Accepted lines: {"messages": [...]}, {"prompt": text or messages, "response" or "completion": text}, both with optional
"engagement" (a number), "group" or "thread", and "cut": true where the response continues (no end is taught after it);
and reply threads: {"source_text", "post_text", "reply_text", "reply_likes", "thread"}, whose engagement is
log(1 + likes).
"""

from __future__ import annotations

import glob
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dts.errors import UsageError
from dts.yamlfile import lines, parse_json

Message = dict[str, str]
FIELDS = ("prompt", "response", "engagement", "group")
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Row:
    """One example."""

    prompt: list[Message]  # chat messages, the last one not the assistant's
    response: str | None
    engagement: float | None  # finite; for reply threads log(1 + likes)
    group: str | None  # rows of a group belong together in any split
    source: str  # "file:line"
    cut: bool = False  # the response continues, so no EOS follows it


class _Bad(Exception):
    """What is wrong with a line."""


def read_rows(paths: str | Path | Sequence[str | Path], *, need: Sequence[str] = ("prompt", "response")) -> list[Row]:
    """All rows of the files, in order; a path may be a glob pattern.

    need: the fields of `FIELDS` that every row must have. Raises `UsageError` naming file, line and reason.
    """
    if unknown := [name for name in need if name not in FIELDS]:
        raise UsageError(f"need={unknown!r} is not allowed; give some of {', '.join(FIELDS)}")
    rows: list[Row] = []
    for file in find_files(paths):
        before = len(rows)
        for number, line in lines(file):
            if not line.strip():
                continue
            source = f"{file}:{number}"
            try:
                rows.append(_row(line, source, need))
            except _Bad as error:
                raise UsageError(f"{source}: {error}") from None
        if len(rows) == before:
            raise UsageError(f"{file}: the file has no rows; give a JSON Lines file, one object a line")
    return rows


def find_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that paths and glob patterns name, each once, patterns in sorted order."""
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    found: dict[Path, None] = {}
    for item in given:
        path = Path(item).expanduser()
        matches = [path] if path.exists() else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        if not matches:
            raise UsageError(f"data {str(item)!r}: there is no such file; give a JSON Lines file or a glob pattern")
        found |= dict.fromkeys(matches)
    if not found:
        raise UsageError("no data file was named; give a JSON Lines file")
    return list(found)


def _row(line: str, source: str, need: Sequence[str]) -> Row:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise _Bad(f"not valid JSON ({error}); write one object a line") from None
    if not isinstance(record, dict):
        raise _Bad(f"{type(record).__name__} instead of an object; write one {{...}} a line")
    prompt, response = _texts(record)
    row = Row(prompt, response, _engagement(record), _group(record), source, _cut(record))
    for name in need:
        if getattr(row, name) in (None, []):
            keys = {"response": '"response" or "completion"', "group": '"group" or "thread"'}
            raise _Bad(f"the row has no {name}; add {keys.get(name, json.dumps(name))}")
    return row


def _texts(record: dict[str, Any]) -> tuple[list[Message], str | None]:
    if "messages" in record:
        messages = _messages(record["messages"], "messages")
        if messages and messages[-1]["role"] == "assistant":
            return messages[:-1], _text(messages[-1]["content"], "the last message")
        return messages, None
    if "reply_text" in record:
        return _thread_prompt(record), _text(record["reply_text"], "reply_text")
    prompt = record.get("prompt")
    messages = [] if prompt is None else _messages(prompt, "prompt")
    if messages and messages[-1]["role"] == "assistant":
        raise _Bad('the prompt ends with an assistant message; put that text into "response"')
    response = record.get("response", record.get("completion"))
    if isinstance(response, list):  # TRL's conversational form: [{"role": "assistant", "content": text}]
        replies = _messages(response, "response")
        if len(replies) != 1:
            raise _Bad(f"the response has {len(replies)} messages; give one")
        response = replies[0]["content"]
    return messages, None if response is None else _text(response, "response")


def _messages(value: Any, name: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "user", "content": _text(value, name)}]
    if not isinstance(value, list):
        raise _Bad(f"{name} is {type(value).__name__}; give text or a list of messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise _Bad(f'{name}: {str(message)[:60]!r} is not a message; write {{"role": "user", "content": "..."}}')
        if message.get("role") not in ROLES:
            raise _Bad(f"{name}: role {message.get('role')!r} is unknown; give one of {', '.join(ROLES)}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _Bad(f"{name} is {value!r}; give text")
    return value


def _thread_prompt(record: dict[str, Any]) -> list[Message]:
    first, last = record.get("source_text"), record.get("post_text")
    posts = [_text(post, "post_text") for post in dict.fromkeys([first, last]) if post is not None]
    if not posts:
        return []
    ask = "Write a short reply to this post." if len(posts) == 1 else "Write a short reply to the last of these posts."
    return [{"role": "user", "content": "\n\n".join([ask, *posts])}]


def _engagement(record: dict[str, Any]) -> float | None:
    likes = "engagement" not in record and "reply_likes" in record
    value = record.get("reply_likes" if likes else "engagement")
    if value is None:
        return None
    name = "reply_likes" if likes else "engagement"
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise _Bad(f"{name} is {value!r}; give a finite number, or leave it out")
    if likes and value < 0:
        raise _Bad(f"reply_likes is {value!r}; give a count >= 0")
    return math.log1p(value) if likes else float(value)


def _group(record: dict[str, Any]) -> str | None:
    value = record.get("group", record.get("thread"))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _Bad(f"group is {value!r}; give text or a whole number")
    return str(value)


def _cut(record: dict[str, Any]) -> bool:
    value = record.get("cut", False)
    if not isinstance(value, bool):
        raise _Bad(f"cut is {value!r}; give true or false")
    return value
