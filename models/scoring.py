"""What a model says at places inside token sequences: the engine of rewards that a model gives.

A causal model gets a key/value cache shaped like the tree of the sequences, so a token that several of them share is
sent once, whichever of them is asked about first. Other models read the sequences whole, in padded batches.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch

from dts.lm import PROMPT_SLOT
from dts.memory import is_out_of_memory, release
from dts.models.chains import Chain, chains_of, send
from dts.models.forest import Forest, lone
from dts.models.prefixes import Prefix, Segment
from dts.models.rope import context_length, rope_limits
from dts.models.selfcheck import check_ids, refuse_unless_causal, tolerance, tree_problem
from dts.models.sessions import TreeSession, prefill
from dts.models.treecache import Place
from dts.models.view import ModelView, core_of, entry_device

Ids = Sequence[int]
PREFILL_CHUNK = 1024  # tokens per forward call
LONG = 4  # tokens of a chain, in the mean, from which they go in one call
LONGEST = 256  # tokens of a chain in one call
AT_ONCE = 64  # places whose outputs are held together: a vocabulary is wide


class HeadView(ModelView):
    """A view with a score head in the place of the language model's: its "logits" are scores [B, labels]."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.model = self._at_every_position

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.core.score(hidden)
        return scores

    def _at_every_position(self, input_ids: torch.Tensor, **options: Any) -> SimpleNamespace:
        hidden = self.decoder(input_ids=input_ids, **{**options, "use_cache": False}).last_hidden_state
        return SimpleNamespace(logits=self.head(hidden))


class Scorer:
    """A model that is read at places inside sequences: a vocabulary's logits, a head's scores, or, where the model has
    neither at every position, one output for the whole sequence."""

    def __init__(self, model: Any) -> None:
        self.model, self._core = model, core_of(model)
        self.has_vocabulary = self._core.get_output_embeddings() is not None
        self._has_head = not self.has_vocabulary and callable(getattr(self._core, "score", None))
        self._text_config = model.config.get_text_config()
        self.context_length = context_length(self._text_config)
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        return entry_device(self._core)

    def view(self) -> ModelView:
        """The model as it is now."""
        return HeadView(self.model) if self._has_head else ModelView(self.model)

    def shares_prefixes(self, tokens: int) -> bool:
        """Whether the tree cache serves sequences of up to so many tokens."""
        return self._is_tree and not any(limit.crossed(1, tokens) for limit in rope_limits(self._text_config))

    @cached_property
    def _is_tree(self) -> bool:
        if not (self.has_vocabulary or self._has_head):
            return False
        size = int(self._text_config.vocab_size)
        problem = tree_problem(self.view, size, self.device)
        if problem is not None and self.has_vocabulary:
            refuse_unless_causal(self.view, size, self.device)
        return problem is None

    @cached_property
    def sends_chains(self) -> bool:
        """Whether several tokens of a path may go in one call: where the outputs are those of one token at a time."""
        ids = check_ids(self._core.config, int(self._text_config.vocab_size), 12)
        tails = [ids[3:9], [*ids[3:5], *ids[9:]], ids[10:], ids[3:10]]
        try:
            chained, stepped = (self._ends(ids[:3], tails, long_chains) for long_chains in (True, False))
        except Exception as error:  # as in `tree_problem`
            if is_out_of_memory(error):
                raise
            return False
        return bool((chained - stepped).abs().max() <= tolerance(stepped))

    def _ends(self, root: Ids, tails: Sequence[Ids], long_chains: bool) -> torch.Tensor:
        """Outputs at the ends of these sequences, by a tree of their own, [len(tails), V]."""
        tree = TokenTree(self, root, lanes=2, room=8, max_kv_bytes=None, long_chains=long_chains)
        return torch.cat(list(tree.outputs([path[-1] for path in tree.slots(tails)]))).float()

    def open(self, root: Ids, *, lanes: int, room: int, max_kv_bytes: int | None) -> TreeSession:
        """A session whose prompt is `root`, which may be empty, for paths of up to `room` tokens after it."""

        def parts() -> tuple[Forest, Segment, Place]:
            view = self.view()
            prefix = self._prefix(view, root)
            return lone(view, prefix, device=self.device, lanes=lanes, max_new_tokens=room + 1,
                        max_kv_bytes=max_kv_bytes)  # fmt: skip

        session = TreeSession(*parts(), parts)
        session.usage.forwarded_tokens = session.usage.unique_tokens = len(root)
        return session

    def _prefix(self, view: ModelView, root: Ids) -> Prefix:
        if root:
            return prefill(view, root, self.device, chunk=PREFILL_CHUNK)
        with self._lock:
            return self._nothing

    @cached_property
    def _nothing(self) -> Prefix:
        """A prefix without tokens, for texts that share no beginning: the shapes of another one."""
        one = prefill(self.view(), [0], self.device, chunk=1)
        keys, values = ([tensor[:, :0] for tensor in kind] for kind in (one.keys, one.values))
        return Prefix((), keys, values, torch.zeros_like(one.hidden))

    @torch.inference_mode()
    def whole(self, rows: Sequence[Ids], pad: int) -> list[torch.Tensor]:
        """Outputs of whole sequences, [T, V] each; of a model with one output for all, [1, V]. Padding follows the
        tokens and is masked."""
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *([pad] * (longest - len(row)))] for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device)
        outputs = self.view().model(input_ids=ids, attention_mask=mask).logits
        if outputs.ndim == 2:
            return list(outputs[:, None])
        return [outputs[index, : len(row)] for index, row in enumerate(rows)]


class TokenTree:
    """Sequences that begin with `root`, as a trie over the slots of a session: each token is sent once."""

    def __init__(
        self, scorer: Scorer, root: Ids, *, lanes: int, room: int, max_kv_bytes: int | None, long_chains: bool
    ) -> None:
        """lanes: sequences that grow together. room: tokens after the root."""
        self.lanes, self.room = lanes, room
        self.long_chains = long_chains  # whether several tokens of a path may go in one call
        self._scorer, self._view = scorer, scorer.view()
        self._session = scorer.open(root, lanes=lanes, room=room, max_kv_bytes=max_kv_bytes)
        self._child: dict[tuple[int, int], int] = {}  # by slot and token

    @property
    def tokens(self) -> int:
        """Sent so far, the root included."""
        return self._session.usage.forwarded_tokens

    def nbytes(self) -> int:
        """Of keys and values that are held."""
        prompt = self._session.prompt
        return self._session.cache.bytes() + (prompt.held.nbytes if prompt else 0)

    def close(self) -> None:
        """Give up keys and values. It may still be used: what it lacks is sent again, and counted."""
        self._session.close()

    def slots(self, tails: Sequence[Ids]) -> list[list[int]]:
        """The slots of the root and of each token after it, for each of these sequences. The longest are sent first:
        others may be their beginnings."""
        order = sorted(range(len(tails)), key=lambda index: -len(tails[index]))
        parts = _parts([tails[index] for index in order], self.lanes)
        paths = dict(zip(order, (path for part in parts for path in self._grow(part)), strict=True))
        return [paths[index] for index in range(len(tails))]

    def _grow(self, tails: Sequence[Ids]) -> list[list[int]]:
        paths = [[PROMPT_SLOT] for _ in tails]
        while True:
            for path, tail in zip(paths, tails, strict=True):
                while len(path) <= len(tail) and (edge := (path[-1], tail[len(path) - 1])) in self._child:
                    path.append(self._child[edge])
            rests = [tuple(tail[len(path) - 1 :][:LONGEST]) for path, tail in zip(paths, tails, strict=True)]
            chains = chains_of([path[-1] for path in paths], rests)
            if not chains:
                return paths
            self._send(chains)

    def _send(self, chains: Sequence[Chain]) -> None:
        """All of these chains in one call, or their first tokens."""
        if self.long_chains and sum(len(tokens) for _, tokens in chains) >= LONG * len(chains):
            try:
                slots = send(self._session, self._view, self._scorer.device, chains)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.long_chains = False
            else:
                for (parent, tokens), new in zip(chains, slots, strict=True):
                    self._child.update(zip(zip([parent, *new], tokens, strict=False), new, strict=True))
                return
            release()  # outside the handler, whose traceback keeps tensors
        edges = [(parent, tokens[0]) for parent, tokens in chains]
        parents, first = zip(*edges, strict=True)
        self._child.update(zip(edges, self._session.extend(parents, first), strict=True))

    def outputs(self, slots: Sequence[int]) -> Iterator[torch.Tensor]:
        """Outputs after these slots, [some, V] at a time."""
        for part in _parts(slots, AT_ONCE):
            yield self._session.logits(part)


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
