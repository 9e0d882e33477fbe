"""Prompts that went through the model, and what they have in common.

`Prefixes` is a tree of segments: a prompt is the chain of segments from a root to its leaf, and a beginning that
several prompts share is one segment, found by comparing token ids. Keys and values of a segment are held once, and
attention reads them once for the paths of all its prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from dts.models.states import PromptState


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens that went through the model: keys and values per layer, [heads, P, dim], and last hidden states."""

    token_ids: tuple[int, ...]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    hidden: torch.Tensor  # [P, hidden]
    state: PromptState | None = None  # of a recurrent model, after the last token

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token, also where it holds none."""
        return sum(tensor.shape[0] * tensor.shape[2] * tensor.element_size() for tensor in (*self.keys, *self.values))

    def part(self, start: int, stop: int) -> Prefix:
        """A copy of some of its tokens, so that the rest can be given up."""
        kept = slice(start, stop)
        return Prefix(
            self.token_ids[kept],
            [keys[:, kept].clone() for keys in self.keys],
            [values[:, kept].clone() for values in self.values],
            self.hidden[kept].clone(),
            self.state if stop == len(self) else None,
        )


@dataclass(eq=False)
class Segment:
    """A stretch of one or more prompts. `users` counts who holds its end: sessions and prompts under way."""

    held: Prefix
    start: int = 0  # position of its first token
    parent: Segment | None = None
    children: list[Segment] = field(default_factory=list)
    users: int = 0

    @property
    def stop(self) -> int:
        """Position after its last token."""
        return self.start + len(self.held)

    def chain(self) -> list[Segment]:
        """From the first token of the prompt to the end of this segment; none of them is empty."""
        found, segment = [], self
        while segment is not None:
            if len(segment.held):
                found.append(segment)
            segment = segment.parent  # type: ignore[assignment]
        return found[::-1]


class Prefixes:
    """The segments that are in use. Nothing is kept that nobody holds."""

    def __init__(self) -> None:
        self._roots: list[Segment] = []

    def __len__(self) -> int:
        """Tokens held."""
        waiting, tokens = list(self._roots), 0
        while waiting:
            segment = waiting.pop()
            tokens += len(segment.held)
            waiting += segment.children
        return tokens

    def match(self, token_ids: Sequence[int]) -> Segment | None:
        """The segment that ends where a prompt leaves all others; it is cut there if need be. None: nothing shared.

        A segment with a recurrent state is not cut: the state is known at its end only."""
        found, begun = None, 0
        while True:
            children = self._children(found)
            shared = [(_common(child.held.token_ids, token_ids[begun:]), child) for child in children]
            length, child = max(shared, key=lambda pair: pair[0], default=(0, None))
            if child is None or not length:
                return found
            if length < len(child.held):
                if child.held.state is not None:
                    return found
                return self._cut(child, length)
            found, begun = child, begun + length

    def add(self, parent: Segment | None, held: Prefix) -> Segment:
        """A segment after `parent`."""
        made = Segment(held, parent.stop if parent else 0, parent)
        self._children(parent).append(made)
        return made

    def drop(self, segment: Segment | None) -> None:
        """One user less; gives up what nobody holds any more."""
        if segment is not None:
            segment.users -= 1
        while segment is not None and not segment.users and not segment.children:
            self._children(segment.parent).remove(segment)
            segment = segment.parent

    def _children(self, segment: Segment | None) -> list[Segment]:
        return segment.children if segment else self._roots

    def _cut(self, segment: Segment, length: int) -> Segment:
        """Put the first tokens of a segment into one of their own; who holds its end still does."""
        upper = Segment(segment.held.part(0, length), segment.start, segment.parent, [segment])
        siblings = self._children(segment.parent)
        siblings[siblings.index(segment)] = upper
        segment.held = segment.held.part(length, len(segment.held))
        segment.start, segment.parent = upper.stop, upper
        return upper


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))
