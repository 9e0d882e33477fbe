"""Sessions of many prompts in one forest: who is let in, and how prompts get through the model."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dts.errors import UsageError
from dts.lm import Session
from dts.models.forest import Forest, share_out
from dts.models.prefixes import Prefix, Prefixes, Segment
from dts.models.sessions import Prefill, TreeSession
from dts.models.treecache import Place
from dts.models.view import ModelView, Viewable

log = logging.getLogger(__name__)

CHUNK = 1024  # prompt tokens per forward call at most


class Served(Viewable, Protocol):
    """What a batch needs of its model: `dts.models.huggingface.HFModel`."""

    def grows_with_length(self, prompt_tokens: int, max_new_tokens: int) -> bool:
        """Whether positions get other frequencies within these lengths, which neighbours in a batch would share."""

    def kept(self, prompt_ids: Sequence[int]) -> Prefix | None:
        """What the caller prefilled and holds."""

    def unknown_ids(self) -> torch.Tensor | None:
        """Ids of probability 0."""

    def open(self, prompt_ids: Sequence[int], *, batch_size: int, max_new_tokens: int) -> Session:
        """A session of its own."""

    def alone(self, prompt_ids: Sequence[int], lanes: int, max_new_tokens: int) -> tuple[Forest, Segment, Place]:
        """A forest for one prompt only, which went through the model."""


class Room:
    """Memory for keys and values, shared out: lanes for `places` trees, and for each tree its prompt and an archive.

    A prompt that is longer than its share takes more, and others wait. Beginnings that prompts share are charged to
    each of them, so that what is held stays below the bound.
    """

    def __init__(self, bound: int, token: int, prompts: int, width: int, lane_length: int, state: int = 0) -> None:
        """bound: bytes. token, state: bytes of one token and of one recurrent state. prompts: trees at most."""
        self.width, self.lane_length = width, lane_length
        self.token, self.state, self._bound = token, state, bound
        self._lanes = width * (token * lane_length + state)  # of one tree
        self._charged: dict[int, int] = {}  # bytes by key
        self._set_places(max(1, min(prompts, bound // 2 // self._lanes)))

    def _set_places(self, places: int) -> None:
        self.places, self._left = places, self._bound - places * self._lanes
        self._share = max(self._left // (places + 1), 0)  # one is for the prompt that was closed last

    def take(self, key: int, prompt_tokens: int) -> int | None:
        """Charge a prompt; returns the tokens of its archive, or None where it must wait. There may be fewer places
        after it, if it was the only one."""
        prompt = self.token * prompt_tokens + self.state
        if not self._charged and prompt > self._left:
            self._set_places(max(1, (self._bound - prompt) // self._lanes))
            if prompt > self._left:
                raise UsageError(
                    f"max_kv_bytes={self._bound} is too small: the prompt and {self.width} paths of {self.lane_length} "
                    f"tokens need {prompt + self._lanes}; raise it, or lower width or max_new_tokens"
                )
        charge = max(self._share, prompt)
        if len(self._charged) == self.places or not self.fits(charge):
            return None
        self._charged[key] = charge
        return (charge - prompt) // self.token

    def fits(self, size: int) -> bool:
        """Whether so many bytes are left."""
        return sum(self._charged.values()) + size <= self._left

    def give_back(self, key: int) -> None:
        del self._charged[key]


@dataclass(eq=False)
class _Prompt:
    """An admitted prompt."""

    key: int
    ids: tuple[int, ...]
    place: Place
    leaf: Segment | None = None  # the end of what is held of it
    cached: int = 0  # tokens that others had sent
    sent: Prefill | None = None  # under way
    session: Session | None = None


@dataclass(eq=False)
class TreeBatch:
    """`dts.lm.Batch` of a Hugging Face model that the tree cache serves."""

    lm: Served
    room: Room
    max_new_tokens: int
    _waiting: deque[_Prompt] = field(default_factory=deque)
    _prompts: dict[int, _Prompt] = field(default_factory=dict)  # by key
    _prefixes: Prefixes = field(default_factory=Prefixes)
    _last: Segment | None = None  # of the prompt that was closed last: the next one may share with it
    _forest: Forest | None = None
    _plain: ModelView | None = None  # for prompts

    def __post_init__(self) -> None:
        self._blocks = _blocks(self.room.places)  # free ones

    def admit(self, key: int, prompt_ids: Sequence[int]) -> bool:
        rows = self.room.take(key, len(prompt_ids))
        if rows is None:
            return False
        if not self._prompts and len(self._blocks) != self.room.places:
            self._forest, self._blocks = None, _blocks(self.room.places)
        if self._last is not None and not self.room.fits(self._last.stop * self.room.token):
            self._forget_last()
        width, token = self.room.width, self.room.token
        rooms = share_out(rows * token, token, self.room.state)
        prompt = _Prompt(key, tuple(prompt_ids), Place(self._blocks.pop() * width, width, *rooms))
        self._prompts[key] = prompt
        self._waiting.append(prompt)
        return True

    def advance(self, tokens: int) -> list[tuple[int, Session | Exception]]:
        through: list[tuple[int, Session | Exception]] = []
        while self._waiting and tokens > 0:
            prompt = self._waiting[0]
            try:
                tokens -= self._send(prompt, tokens)
            except Exception as error:
                through.append((self._waiting.popleft().key, error))
                continue
            if prompt.session is not None:
                through.append((self._waiting.popleft().key, prompt.session))
        return through

    def extend(self, requests: Sequence[tuple[Session, Sequence[int], Sequence[int]]]) -> list[list[int]]:
        together = [(session, parents, tokens) for session, parents, tokens in requests
                    if isinstance(session, TreeSession) and session.forest is self._forest]  # fmt: skip
        slots = iter(self._forest.extend(together)) if self._forest and together else iter(())
        joined = {id(session) for session, _, _ in together}
        return [next(slots) if id(session) in joined else session.extend(parents, tokens)
                for session, parents, tokens in requests]  # fmt: skip

    def close(self, key: int) -> None:
        prompt = self._prompts.pop(key)
        if prompt in self._waiting:
            self._waiting.remove(prompt)
        if isinstance(prompt.session, TreeSession):
            prompt.session.close()
        self._blocks.append(prompt.place.first // self.room.width)
        self.room.give_back(key)
        if prompt.leaf is not None:
            self._forget_last()
            self._last = prompt.leaf

    def _forget_last(self) -> None:
        self._prefixes.drop(self._last)
        self._last = None

    # -- prompts ---------------------------------------------------------------------------------------------------

    def _send(self, prompt: _Prompt, tokens: int) -> int:
        """Send up to so many tokens of a prompt; opens its session once it is through. Returns how many went."""
        if self.lm.grows_with_length(len(prompt.ids), self.max_new_tokens):
            prompt.session = self.lm.open(prompt.ids, batch_size=self.room.width, max_new_tokens=self.max_new_tokens)
            return len(prompt.ids)
        if prompt.sent is None:
            self._begin(prompt)
        count = 0
        if prompt.sent is not None:
            count = min(prompt.sent.left, tokens, CHUNK)
            prompt.sent.send(count)
            if prompt.sent.left:
                return count
            self._hold(prompt, self._prefixes.add(prompt.leaf, prompt.sent.prefix()))
        prompt.session = self._open(prompt)
        return count

    def _begin(self, prompt: _Prompt) -> None:
        """Find what is held of a prompt already, and prepare to send the rest."""
        self._hold(prompt, self._prefixes.match(prompt.ids))
        prompt.cached = prompt.leaf.stop if prompt.leaf else 0
        kept = self.lm.kept(prompt.ids)
        if kept is not None and prompt.cached < len(kept):
            rest = kept.part(prompt.cached, len(kept)) if prompt.cached else kept
            self._hold(prompt, self._prefixes.add(prompt.leaf, rest))
            prompt.cached = len(kept)
        if prompt.cached < len(prompt.ids):
            self._plain = self._plain or self.lm.view()
            prompt.sent = Prefill(self._plain, prompt.ids, self.lm.device, prompt.leaf)

    def _hold(self, prompt: _Prompt, leaf: Segment | None) -> None:
        if leaf is not None:
            leaf.users += 1
        self._prefixes.drop(prompt.leaf)
        prompt.leaf = leaf

    def _open(self, prompt: _Prompt) -> TreeSession:
        lm, room, leaf = self.lm, self.room, prompt.leaf
        assert leaf is not None
        if self._forest is None:
            self._forest = Forest(lm.view(), leaf.held, device=lm.device, lanes=room.places * room.width,
                                  max_length=room.lane_length, unknown=lm.unknown_ids())  # fmt: skip
        ids, lanes, longest = prompt.ids, room.width, self.max_new_tokens  # not the batch, which would live on
        session = TreeSession(self._forest, leaf, prompt.place, lambda: lm.alone(ids, lanes, longest))
        usage = session.usage
        usage.cached_tokens = prompt.cached
        usage.forwarded_tokens = usage.unique_tokens = len(ids) - prompt.cached
        usage.model_calls = prompt.sent.calls if prompt.sent else 0
        prompt.sent = None
        return session


def _blocks(places: int) -> list[int]:
    """Numbers of blocks of lanes, the first one last."""
    return list(range(places))[::-1]
