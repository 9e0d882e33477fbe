"""What a path can do at a node besides following one of its children."""

from __future__ import annotations

from enum import Enum


class Choice(Enum):
    """The other answers of a policy that is asked for the next node."""

    EXPAND = "expand"  # choose a token that is no child yet
    LATER = "later"  # another path is expanding this node: select when it has
    BLOCKED = "blocked"  # nothing below is left to choose; other paths are finishing every remaining sequence
    PRUNED = "pruned"  # nothing below is worth finishing
