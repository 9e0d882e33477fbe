"""Where in a JSON schema a fault is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

DEFINITIONS = ("$defs", "definitions")
NAMED = (*DEFINITIONS, "properties", "patternProperties", "dependentSchemas")
LISTED = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
ONE = ("additionalProperties", "additionalItems", "items", "not", "if", "then", "else", "contains", "propertyNames",
       "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
OVERLAP = 'no support for "oneOf" with parts that overlap (give "anyOf")'
UNSUPPORTED = re.compile(r"Unimplemented keys: \[(.*)\]")


def fault_in(schema: Any, problem: Callable[[Any], str | None]) -> str | None:
    """What is wrong with a schema and where, such as `no support for "not" at #/properties/name`; None where nothing
    is. problem: says what is wrong with a schema, without the place."""
    said = problem(schema)
    if said is None:
        return None
    definitions = {name: schema[name] for name in DEFINITIONS if isinstance(schema, dict) and name in schema}
    place = _place("#", schema, lambda part: problem(_with(part, definitions)) == said)
    wording = UNSUPPORTED.sub(r"no support for \1", OVERLAP if said.startswith("oneOf constraints") else said)
    return f"{wording} at {place}"


def _place(place: str, schema: Any, has_fault: Callable[[Any], bool]) -> str:
    """The innermost part with the same fault."""
    for step, part in _parts(schema):
        if has_fault(part):
            return _place(f"{place}/{step}", part, has_fault)
    return place


def _with(part: Any, definitions: dict[str, Any]) -> Any:
    """A part that can be read alone: with what it may refer to."""
    return {**definitions, **part} if isinstance(part, dict) else part


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """Schemas inside a schema with the steps of a JSON pointer that lead there; definitions before what refers to
    them."""
    if not isinstance(schema, dict):
        return
    for key in [*(key for key in NAMED if key in schema), *schema]:
        value = schema[key]
        if key in NAMED and isinstance(value, dict):
            yield from ((f"{key}/{name.replace('~', '~0').replace('/', '~1')}", part) for name, part in value.items())
        elif key in LISTED and isinstance(value, list):
            yield from ((f"{key}/{index}", part) for index, part in enumerate(value))
        elif key in ONE and isinstance(value, (dict, bool)):
            yield key, value
