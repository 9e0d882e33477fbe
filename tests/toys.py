"""Small models, trees, random streams and rewards that several tests share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from dts.decoding import as_scorer, target_of
from dts.models.table import TableModel
from dts.results import Result
from dts.rewards import Context, Reward
from dts.search import Search, run
from dts.settings import Decoding
from dts.softvalue import SoftValues
from dts.tree import Tree

LOG = math.log


class Paid(Reward):
    """1 for each time that a token comes: monotone."""

    name, monotone = "paid", True

    def __init__(self, token: int) -> None:
        self._token = token

    def start(self, context):
        return 0

    def extend(self, states, tokens):
        return [state + (token == self._token) for state, token in zip(states, tokens, strict=True)]

    def earned(self, states):
        return [float(state) for state in states]

    def finish(self, states, finished):
        return self.earned(states)


class Uniforms:
    """A random stream of known numbers."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)


def leaf(tree: Tree, parent: int, token: int, log_p: float, rest: float, reward: float) -> int:
    node = tree.add(parent, token, log_p, rest)
    tree.terminal[node], tree.reward[node] = 1, reward
    return node


def table(rows):
    """Logits by the tokens after the prompt; zeros elsewhere."""
    return TableModel(lambda prefix: np.array(rows.get(prefix[1:], np.zeros(3)), float), 3, eos=0, name="broken")


def chain(*tokens):
    """A model that surely writes these tokens."""
    rows = {tokens[:i]: np.where(np.arange(4) == token, 0.0, -math.inf) for i, token in enumerate(tokens)}
    return TableModel(lambda prefix: rows[prefix[1:]], 4, eos=0)


class UpTo:
    """Monotone and with bounds: the share of `most` times that a token came. Nothing comes after EOS (0)."""

    name, monotone = "up to", True

    def __init__(self, token: int, most: int, horizon: int) -> None:
        self._token, self._most, self._horizon = token, most, horizon

    def start(self, context):
        return 0, self._horizon  # times, tokens left

    def extend(self, states, tokens):
        return [(n + (t == self._token), left - 1 if t else 0) for (n, left), t in zip(states, tokens, strict=True)]

    def earned(self, states):
        return [min(n, self._most) / self._most for n, _ in states]

    def upper(self, states):
        return [min(n + left, self._most) / self._most for n, left in states]

    def finish(self, states, finished):
        return self.earned(states)


class Texts:
    """A constraint: one of these token sequences, EOS left out. `far`: tokens are allowed whether or not they lead to
    one, so that every wrong turn is a dead end."""

    def __init__(self, members, vocab: int, *, far: bool = False) -> None:
        self.members, self.vocab = {tuple(member) for member in members}, vocab
        self._prefixes = {member[:i] for member in self.members for i in range(len(member) + 1)}
        self._far = far

    def start(self, lm):
        return ()

    def advance(self, states, tokens):
        return [(*state, token) for state, token in zip(states, tokens, strict=True)]

    def allowed(self, states):
        rows = [[self._far or (*s, token) in self._prefixes for token in range(self.vocab)] for s in states]
        return torch.tensor(rows, dtype=torch.bool)

    def accepts(self, states):
        return [state in self.members for state in states]


def run_with(lm, prompt, method, reward, **settings) -> Result:
    """As `dts.decode`, with a constraint."""
    decoding = Decoding(**settings)
    ids = tuple(lm.encode(prompt))
    session = lm.open(ids, batch_size=4, max_new_tokens=decoding.max_new_tokens)
    context = Context(prompt, ids, lm.decode)
    return run(
        Search(lm, session, context, as_scorer(reward), decoding, method.budget(), 4, None, target_of(method)), method
    )


def finish(values: SoftValues, leaf: int) -> None:
    """Count a scored leaf and learn from it; a second time changes nothing."""
    if values.visits.close(leaf):
        values.learn(leaf)


def fast_tokenizer(words: Sequence[bytes]):
    """A fast tokenizer of transformers: token 0 is EOS, then these bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    spelled = ["<eos>", *(word.decode("latin-1").replace(" ", "Ġ") for word in words)]  # as byte-level BPE spells them
    made = Tokenizer(models.BPE({word: token for token, word in enumerate(spelled)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


class Worded:
    """A table model with such a tokenizer: constraints on text work on it, and every sequence can be enumerated."""

    def __init__(self, model: TableModel, words: Sequence[bytes]) -> None:
        assert model.vocab_size == len(words) + 1 and model.eos == 0
        self.words, self.tokenizer = [b"", *words], fast_tokenizer(words)
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def decode(self, token_ids):
        return b"".join(self.words[token] for token in token_ids).decode(errors="replace")
