"""Text and YAML files that users write."""

from __future__ import annotations

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
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def decode_text(content: bytes) -> str:
    """UTF-8 text, with or without a byte order mark. Raises `ValueError` naming line and byte where it is not."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line}, byte 0x{content[error.start]:02x} at offset {error.start}: not UTF-8 text; save it as UTF-8"
        ) from None
