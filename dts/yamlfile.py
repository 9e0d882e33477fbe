"""The one reader of files that users write: lines of text (CSV, JSON Lines), JSON and YAML, with or without a BOM."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dts.errors import UsageError


def read_yaml(path: Path, what: str) -> Any:
    """What a file holds, read safely. Raises `UsageError` that calls the file `what` where that cannot be done."""
    try:
        return parse_yaml(decode_text(path.read_bytes()))
    except OSError as error:
        raise UsageError(f"{what} {path} cannot be read: {error}") from error
    except ValueError as error:
        raise UsageError(f"{what} {path} is not valid YAML: {' '.join(str(error).split())}") from error


def parse_yaml(text: str) -> Any:
    """Plain values only, no objects. Raises `ValueError`; PyYAML itself raises many things, also for a bad date."""
    try:
        value = yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return _writable(value)


def parse_json(line: str) -> Any:
    """A JSON value. Raises `ValueError`, also for text that cannot be written as UTF-8."""
    try:
        value = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return _writable(value) if "\\u" in line else value


def _writable(value: Any) -> Any:
    """The value itself. Escapes can spell half of a surrogate pair, which no tokenizer takes and no file can hold. What
    YAML's aliases share is looked at once: written out, nine lists of nine references each would be gigabytes."""
    waiting, seen = [value], set[int]()
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            _check_text(part)
        elif isinstance(part, (dict, list, tuple, set)) and id(part) not in seen:
            seen.add(id(part))
            waiting += [*part, *part.values()] if isinstance(part, dict) else part
    return value


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise ValueError(f"it holds \\u{half:04x}, half of a surrogate pair; write the whole character") from None


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 text file, plain or gzip, line ends included. Raises `UsageError` naming the line."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, _text(line, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error


def _text(line: bytes, where: str) -> str:
    try:
        return decode_text(line)
    except ValueError as error:
        raise UsageError(f"{where}: {str(error).removeprefix('line 1, ')}") from None


def decode_text(content: bytes) -> str:
    """UTF-8 text, with or without a byte order mark. Raises `ValueError` naming line and byte where it is not."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line}, byte 0x{content[error.start]:02x} at offset {error.start}: not UTF-8 text; save it as UTF-8"
        ) from None
