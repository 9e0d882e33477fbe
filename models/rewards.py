"""Models as rewards: classifiers, reward models, process reward models, likelihoods and judges.

`ModelReward` puts the completions of a prompt into the text that the model was trained on and reads its outputs there
(`dts.models.readings`). All texts of a search share one tree cache (`dts.models.scoring`), so a token passes through
the reward model once, whether the text is finished or not. Where the tokenizer gives the ids of the decoding model the
completion's very tokens are read; otherwise its text, tokenized again, as far as the ids begin like earlier ones.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from dts.errors import RewardError, UsageError, shown
from dts.memory import free_bytes
from dts.models.frames import Frame, Texts
from dts.models.loading import load_pretrained
from dts.models.readings import KINDS, PRESETS, VOCABULARY, Reading, Steps, Template
from dts.models.registry import ModelSpec
from dts.models.scoring import Scorer, TokenTree
from dts.rewards import Context, Finished, Reward
from dts.settings import check_whole

MAX_TOKENS = 2048
Root = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A text as the model sees it, and where it is read."""

    ids: tuple[int, ...]
    places: tuple[int, ...]  # positions in ids
    following: tuple[int, ...]  # the token after each place; -1 where it does not matter


@dataclass(eq=False, slots=True)
class _Search:
    """What is held for one search: its state for all paths, since a text says which path it is."""

    frame: Frame
    trees: dict[Root, TokenTree] = field(default_factory=dict)
    values: dict[tuple[Root, int, int], float] = field(default_factory=dict)  # by root, slot and following token


class ModelReward(Reward):
    """A reward that a Hugging Face model gives. `tokens` counts what went through it, over all searches.

    Not monotone: `MaxEnt(search="best")` asks it about unfinished texts, too, at the cost of the tokens that are new
    (not a judge, which reads its question again each time).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        kind: str = "scalar",
        *,
        template: Template | None = None,
        batch_size: int = 16,
        max_tokens: int = MAX_TOKENS,
        max_kv_bytes: int | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        """model, tokenizer: Hugging Face objects. kind: classifier (label=), scalar, prm (steps=, aggregate=),
        likelihood (per_token=) or judge (yes=, no=), see `dts.models.readings`.
        template: the text that the model sees, with {prompt} and {completion}, or a list of chat messages with them;
        None for the kind's own. batch_size: texts that go through the model together. max_tokens: of a text without its
        prompt, at most. max_kv_bytes: bound on keys and values of all searches together; beyond it the searches that
        were asked longest ago give theirs up. None: half of the free memory.

        Raises `UsageError` for a model, label, token or template that does not fit the kind.
        """
        if kind not in KINDS:
            raise UsageError(f"kind={shown(kind)} is not known; give one of {', '.join(KINDS)}")
        self._batch_size = check_whole("batch_size", batch_size, 1, allowed="a whole number >= 1")
        self._max_tokens = check_whole("max_tokens", max_tokens, 1, allowed="a whole number >= 1")
        self._scorer = Scorer(model)
        if kind in VOCABULARY and not self._scorer.has_vocabulary:
            raise UsageError(f"kind={kind!r} needs a causal language model; {type(model).__name__} has no vocabulary")
        self._reading = _reading(kind, model, tokenizer, options)
        self.partial = kind != "judge"  # its question comes after the text, and costs its tokens each time
        self._texts = Texts(tokenizer, template or self._reading.template, self._reading, self._scorer.context_length)
        if max_kv_bytes is not None:
            check_whole("max_kv_bytes", max_kv_bytes, 1, 2**63, allowed="a whole number of bytes >= 1 or None")
        self._max_kv_bytes = self._bound = max_kv_bytes
        self.name = name or kind
        self.tokens = 0
        self._lock = threading.Lock()
        self._used: WeakKeyDictionary[TokenTree, int] = WeakKeyDictionary()  # when, by a clock of calls
        self._clock = itertools.count()

    def start(self, context: Context) -> _Search:
        return _Search(self._texts.frame(context))

    def earned(self, states: Sequence[_Search]) -> list[float]:
        return [self._reading.bounds[0]] * len(states)

    def upper(self, states: Sequence[_Search]) -> list[float]:
        return [self._reading.bounds[1]] * len(states)

    def finish(self, states: Sequence[_Search], finished: Sequence[Finished]) -> list[float]:
        if not finished:
            return []
        with self._lock:
            rows = [self._row(states[0].frame, done) for done in finished]
            values = self._from_tree(states[0], rows) if self._shares(rows) else self._from_whole(rows)
            return [self._reading.combine(of_row) for of_row in values]

    def _row(self, frame: Frame, done: Finished) -> Row:
        ids, start = self._texts.ids(frame, done)
        places = tuple(self._reading.places(ids, start))
        if not places and not self._reading.whole:
            raise RewardError(f"reward {self.name!r} found no marker of a step in {shown(done.text)}")
        following = tuple(ids[place + 1] if self._reading.whole else -1 for place in places)
        return Row(tuple(ids), places, following)

    # -- through the tree cache ------------------------------------------------------------------------------------

    def _shares(self, rows: Sequence[Row]) -> bool:
        return self._scorer.shares_prefixes(max(len(row.ids) for row in rows))

    def _from_tree(self, search: _Search, rows: Sequence[Row]) -> list[list[float]]:
        values: list[list[float]] = [[] for _ in rows]
        members: dict[Root, list[int]] = {}
        for index, row in enumerate(rows):
            root = search.frame.root
            members.setdefault(root if row.ids[: len(root)] == root else (), []).append(index)
        for root, chosen in members.items():
            found = self._read_tree(search, root, [rows[index] for index in chosen])
            for index, of_row in zip(chosen, found, strict=True):
                values[index] = of_row
        return values

    def _read_tree(self, search: _Search, root: Root, rows: Sequence[Row]) -> list[list[float]]:
        """Values at the places of rows that begin with `root`. Only what is read, or stands before it, is sent."""
        tails = [row.ids[len(root) : max(row.places, default=-1) + 1] for row in rows]
        tree = self._tree(search, root, max(map(len, tails)))
        before = tree.tokens
        try:
            paths = tree.slots(tails)
            keys = [
                [(root, path[place + 1 - len(root)], token)
                 for place, token in zip(row.places, row.following, strict=True)]
                for row, path in zip(rows, paths, strict=True)
            ]  # fmt: skip
            self._read_slots(search, tree, keys)
        finally:  # what was sent counts, whatever happens after it
            self.tokens += tree.tokens - before
        self._keep_within_memory(tree)
        return [[search.values[key] for key in of_row] for of_row in keys]

    def _read_slots(self, search: _Search, tree: TokenTree, keys: Sequence[Sequence[tuple[Root, int, int]]]) -> None:
        """Values by root, slot and following token, of those that are not known yet."""
        missing = [key for key in dict.fromkeys(itertools.chain.from_iterable(keys)) if key not in search.values]
        waiting = iter(missing)
        for outputs in tree.outputs([slot for _, slot, _ in missing]):
            part = list(itertools.islice(waiting, len(outputs)))
            search.values.update(zip(part, self._read(outputs, [token for _, _, token in part]), strict=True))

    def _tree(self, search: _Search, root: Root, longest: int) -> TokenTree:
        limit = self._scorer.context_length
        room = self._max_tokens if limit is None else min(self._max_tokens, limit - len(root))
        if longest > room:
            raise RewardError(f"reward {self.name!r} got a text of {longest} tokens; raise max_tokens={room}")
        if root not in search.trees:
            search.trees[root] = TokenTree(self._scorer, root, lanes=self._batch_size, room=room,
                                           max_kv_bytes=self._max_kv_bytes,
                                           long_chains=self._scorer.sends_chains)  # fmt: skip
            self.tokens += search.trees[root].tokens
        return search.trees[root]

    def _keep_within_memory(self, tree: TokenTree) -> None:
        """Close trees of other searches, the one that was asked longest ago first, while all hold too much."""
        self._used[tree] = next(self._clock)
        if self._bound is None:
            self._bound = free_bytes(self._scorer.device) // 2
        held = sum(other.nbytes() for other in self._used)
        for other in sorted(self._used, key=self._used.__getitem__)[:-1]:
            if held <= self._bound:
                return
            held -= other.nbytes()
            other.close()

    # -- whole -----------------------------------------------------------------------------------------------------

    def _from_whole(self, rows: Sequence[Row]) -> list[list[float]]:
        values: list[list[float]] = [[] for _ in rows]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))  # like lengths together
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            outputs = self._scorer.whole([rows[index].ids for index in chosen], self._texts.pad)
            self.tokens += sum(len(rows[index].ids) for index in chosen)
            for index, of_row in zip(chosen, outputs, strict=True):
                places = [min(place, len(of_row) - 1) for place in rows[index].places]
                values[index] = self._read(of_row[places], rows[index].following) if places else []
        return values

    def _read(self, outputs: torch.Tensor, following: Sequence[int]) -> list[float]:
        if outputs.device.type == "mps":  # has no float64
            outputs = outputs.cpu()
        values: list[float] = self._reading.read(outputs.double(), following).tolist()
        return values


def _reading(kind: str, model: Any, tokenizer: Any, options: dict[str, Any]) -> Reading:
    try:
        return KINDS[kind](model, tokenizer, **options)
    except TypeError as error:
        raise UsageError(f"kind={kind!r} does not take these options: {error}") from error


# -- loading -----------------------------------------------------------------------------------------------------------


def load_reward(
    model: str | Path | ModelSpec,
    kind: str = "scalar",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> ModelReward:
    """A reward from a registry name, a hub id or a local folder. options: those of `ModelReward`; the others are those
    of `dts.load`.

    Raises `UnavailableError` where the weights cannot be had, or lack the head that the kind reads.
    """
    if kind not in KINDS:
        raise UsageError(f"kind={shown(kind)} is not known; give one of {', '.join(KINDS)}")
    loaded, tokenizer = load_pretrained(
        model if isinstance(model, ModelSpec) else str(model),
        device=device,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        architecture=_architecture(kind, options.get("steps")),
    )
    return ModelReward(loaded, tokenizer, kind, **options)


def _architecture(kind: str, steps: Any) -> Any:
    """What loads the model of a kind: something with `from_pretrained`."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if kind in VOCABULARY:
        return AutoModelForCausalLM
    if kind != "prm":
        return AutoModelForSequenceClassification
    form = steps if isinstance(steps, Steps) else PRESETS.get(steps)
    return AutoModelForCausalLM if form is not None and form.good is not None else _StepModel


class _StepModel:
    """Loads a process reward model: a head on every token, of one layer or, in Qwen's, of two."""

    @staticmethod
    def from_pretrained(source: str, **options: Any) -> Any:
        from transformers import AutoConfig, AutoModelForTokenClassification

        config = AutoConfig.from_pretrained(source, local_files_only=options["local_files_only"])
        names = config.architectures or []
        if any(name.startswith("Qwen2") and name.endswith("ForProcessRewardModel") for name in names):
            return _qwen_steps().from_pretrained(source, **options)
        return AutoModelForTokenClassification.from_pretrained(source, **options)


def _qwen_steps() -> Any:
    """The architecture of Qwen2.5-Math-PRM, without running code from the hub."""
    from torch import nn
    from transformers import Qwen2ForTokenClassification

    class Qwen2ForProcessRewardModel(Qwen2ForTokenClassification):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            hidden = config.hidden_size
            self.score = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, config.num_labels))
            self.post_init()

    return Qwen2ForProcessRewardModel
