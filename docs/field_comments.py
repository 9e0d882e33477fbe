"""For the reference: the comments after the fields of a class, as a list in its description."""

from __future__ import annotations

import re
from typing import Any

import griffe

COMMENT = re.compile(r"\S\s{2}# (?P<text>.+)$")
FOR_TOOLS = ("fmt:", "noqa", "type:", "pragma:")


class FieldComments(griffe.Extension):
    """Adds the comments after its fields to the docstring of a class."""

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        lines = [f"- `{name}`: {text}" for name, field in cls.attributes.items() if (text := comment(field))]
        if lines:
            before = f"{cls.docstring.value}\n\n" if cls.docstring else ""
            cls.docstring = griffe.Docstring(before + "\n".join(lines), parent=cls)


def comment(field: griffe.Attribute) -> str:
    """The comment on a public field's last line, if it is meant for readers."""
    if field.is_private or field.endlineno is None:
        return ""
    found = COMMENT.search(field.lines_collection[field.filepath][field.endlineno - 1])
    return found["text"] if found and not found["text"].startswith(FOR_TOOLS) else ""
