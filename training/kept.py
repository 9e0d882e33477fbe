"""Results that cost much, kept in a file as they come, so that a run which was killed does not make them again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

TREES = "trees.jsonl"  # in a run's folder: its trees
TOGETHER = 16  # results that are made, and kept, together


def kept(file: Path, about: Mapping[str, Any], count: int, make: Callable[[range], Iterable[Any]]) -> list[Any]:
    """`count` JSON values, a line each after a first line that says what they are of. make: those of some indices.

    Values are made `TOGETHER` at a time, always the same ones: what is decoded in one batch may differ from what is
    decoded in another in the last bit. Lines that a kill left of such a part are made again, and so is everything where
    the first line says something else.
    """
    head = json.dumps(about, sort_keys=True)
    lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
    found = lines[1:-1] if lines[:1] == [head] else []  # the last line has no end, or is empty
    if len(found) < count:
        found = found[: len(found) // TOGETHER * TOGETHER]
    found = found[:count]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in [head, *found]), encoding="utf-8")
    for start in range(len(found), count, TOGETHER):
        with file.open("a", encoding="utf-8") as stream:
            for value in make(range(start, min(start + TOGETHER, count))):
                found.append(json.dumps(value))
                stream.write(found[-1] + "\n")
                stream.flush()
    return [json.loads(line) for line in found]
