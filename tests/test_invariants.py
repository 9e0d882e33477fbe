"""What holds after any sequence of operations: tree, soft values, key/value cache, rewards, tokenizers."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from families import ByteTokenizer, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from test_task_rewards import ANY, BUILT_IN, decode
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from toys import finish
from transformers import PreTrainedTokenizerFast

from dts.lm import PROMPT_SLOT
from dts.models.huggingface import HFModel
from dts.models.sessions import full_logits
from dts.models.table import TableModel, random_logits
from dts.rewards import Context, Finished, clip, gate, minimum, weighted_sum
from dts.search import Search
from dts.settings import Budget, Decoding
from dts.softvalue import SoftValues, logsumexp
from dts.text import TextState, advance, flush
from dts.timeout import with_timeout
from dts.tree import NONE, ROOT

VOCAB, HORIZON, PROMPT = 4, 3, (1, 2)
DRAWN = st.integers(0, 2**16)

# The tree and its values --------------------------------------------------------------------------------------------


class Steps:
    """A monotone reward in [0, 1]: each token adds its number over VOCAB * HORIZON."""

    name, monotone = "steps", True

    def start(self, context):
        return (0.0, 0)

    def extend(self, states, tokens):
        return [(s + t / (VOCAB * HORIZON), n + 1) for (s, n), t in zip(states, tokens, strict=True)]

    def earned(self, states):
        return [s for s, _ in states]

    def upper(self, states):
        return [s + (HORIZON - n) / HORIZON for s, n in states]

    def finish(self, states, finished):
        return self.earned(states)


class Endings:
    """A reward in [0, 1] known at the end only."""

    name, monotone = "endings", False

    def start(self, context):
        return ()

    def extend(self, states, tokens):
        return [(*s, t) for s, t in zip(states, tokens, strict=True)]

    def earned(self, states):
        return [-math.inf] * len(states)

    def upper(self, states):
        return [math.inf] * len(states)

    def finish(self, states, finished):
        return [float(np.random.default_rng([7, *s]).random()) for s in states]


class SearchMachine(RuleBasedStateMachine):
    """Draws, takes, forward calls, finished and closed branches in any order."""

    reward, scale = Steps(), 3.0

    def __init__(self):
        super().__init__()
        self.lm = TableModel(random_logits(VOCAB, seed=5), VOCAB, eos=0)
        session = self.lm.open(PROMPT, batch_size=8, max_new_tokens=HORIZON)
        context = Context(PROMPT, PROMPT, self.lm.decode)
        settings_ = Decoding(max_new_tokens=HORIZON)
        self.search = Search(self.lm, session, context, self.reward, settings_, Budget(), 8)
        self.tree = self.search.tree
        self.values = SoftValues(self.tree, self.scale)
        self.finished: list[int] = []
        self.closed = False

    def inner(self):
        return [n for n in range(len(self.tree)) if not self.tree.terminal[n]]

    def open(self):
        """Evaluated nodes that have tokens left."""
        return [n for n in self.inner() if self.search.evaluated(n) and self.tree.n_children[n] < VOCAB]

    @rule(pick=DRAWN, uniforms=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=3))
    @precondition(lambda self: self.open())
    def draw(self, pick, uniforms):
        node = self.open()[pick % len(self.open())]
        before = {self.tree.token[c] for c in self.tree.children(node)}
        children = self.search.draw([node] * len(uniforms), uniforms)
        assert not before & {self.tree.token[c] for c in children}
        self.values.grow()

    @rule(pick=DRAWN, tokens=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3, unique=True))
    @precondition(lambda self: any(self.search.evaluated(n) for n in self.inner()))
    def take(self, pick, tokens):
        nodes = [n for n in self.inner() if self.search.evaluated(n)]
        node = nodes[pick % len(nodes)]
        found = self.search.take([node] * len(tokens), tokens)
        assert [self.tree.token[c] for c in found] == tokens
        assert self.search.take([node] * len(tokens), tokens) == found
        self.values.grow()

    @rule(pick=DRAWN)
    def evaluate(self, pick):
        fresh = [n for n in self.inner() if not self.search.evaluated(n)]
        if chosen := [n for i, n in enumerate(fresh) if (pick >> i % 16) & 1]:
            self.search.evaluate(chosen)

    @rule(pick=DRAWN, times=st.integers(1, 2))
    def finish(self, pick, times):
        leaves = [n for n in range(len(self.tree)) if self.tree.terminal[n]]
        if leaves:
            leaf = leaves[pick % len(leaves)]
            for _ in range(times):  # a leaf reached twice counts once
                self.search.record([leaf], [0])
                finish(self.values, leaf)
            self.finished += [leaf] * (leaf not in self.finished)

    @rule(pick=DRAWN)
    @precondition(lambda self: self.finished)  # a search prunes what cannot beat the best reward found
    def close(self, pick):
        self.values.close(pick % len(self.tree))
        self.closed = True

    @invariant()
    def mass_is_conserved_and_children_have_the_models_p(self):
        tree = self.tree
        for node in self.inner():
            children = list(tree.children(node))
            assert len(children) == tree.n_children[node] == len({tree.token[c] for c in children})
            mass = math.fsum(math.exp(tree.log_p[c]) for c in children) + math.exp(tree.log_unexplored[node])
            assert mass == pytest.approx(1, abs=1e-12)
            if children:
                p = torch.from_numpy(self.lm.table(PROMPT + tree.tokens(node))).double().softmax(-1)
                assert [tree.log_p[c] for c in children] == pytest.approx(
                    p.log()[[tree.token[c] for c in children]].tolist(), abs=1e-12)  # fmt: skip

    @invariant()
    def links_are_a_tree(self):
        tree = self.tree
        for node in range(1, len(tree)):
            assert node in tree.children(tree.parent[node]) and tree.depth[node] == tree.depth[tree.parent[node]] + 1
            assert tree.path(node)[-1] == node and len(tree.tokens(node)) == tree.depth[node]

    @invariant()
    def visits_count_finished_leaves_below(self):
        tree, count = self.tree, [0] * len(self.tree)
        for leaf in self.finished:
            for node in (ROOT, *tree.path(leaf)):
                count[node] += 1
        assert list(self.values.visits.finished) == count
        assert sorted(self.finished) == tree.leaves()
        assert len(self.search.rollouts) >= len(self.finished)

    @invariant()
    def values_stay_within_bounds(self):
        values, tree = self.values, self.tree
        for node in range(len(tree)):
            low, high = max(tree.earned[node], 0.0), min(tree.upper[node], 1.0)
            assert low - 1e-9 <= values.value(node) <= high + 1e-9, node
            assert values.log_open[node] <= values.log_value[node] + 1e-9
        _, log_probs, rest = values.transitions(ROOT)
        assert logsumexp([*log_probs, rest]) == pytest.approx(0, abs=1e-9)

    @invariant()
    def slots_are_not_shared(self):
        held = [slot for slot in self.tree.slot if slot != NONE]
        assert len(set(held)) == len(held) and self.search.usage.unique_tokens == len(held) - 1 + len(PROMPT)

    def teardown(self):
        """Once everything is finished, the root's value is the exact log Z, whatever happened before."""
        frontier = [ROOT]
        while frontier:
            node = frontier.pop()
            if self.tree.terminal[node]:
                self.search.record([node], [0])
                finish(self.values, node)
                continue
            if not self.search.evaluated(node):
                self.search.evaluate([node])
            frontier += self.search.take([node] * VOCAB, range(VOCAB))
            self.values.grow()
        assert self.values.log_value[ROOT] == pytest.approx(self.log_z(), abs=1e-9)
        assert self.values.log_open[ROOT] == -math.inf

    def log_z(self):
        """By enumeration, without a tree."""
        terms = []
        for length in range(1, HORIZON + 1):
            for sequence in itertools.product(range(VOCAB), repeat=length):
                if 0 in sequence[:-1] or (length < HORIZON and sequence[-1] != 0):
                    continue
                states = [self.reward.start(None)]
                log_p = 0.0
                for place, token in enumerate(sequence):
                    logits = torch.from_numpy(self.lm.table(PROMPT + sequence[:place])).double()
                    log_p += float(logits.log_softmax(-1)[token])
                    states = self.reward.extend(states, [token])
                value = self.reward.finish(states, [Finished(sequence, "")])[0]
                terms.append(log_p + self.scale * value)
        return logsumexp(terms)


class EndingsMachine(SearchMachine):
    reward = Endings()


SearchMachine.TestCase.settings = EndingsMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None
)
TestTreeWithBounds = SearchMachine.TestCase
TestTreeWithoutBounds = EndingsMachine.TestCase


# The key/value cache ------------------------------------------------------------------------------------------------

LANES, LENGTH, PROMPT_IDS = 3, 6, [5, 9, 30, 77]


class CacheMachine(RuleBasedStateMachine):
    """Random extensions of random slots under a memory bound; now and then the device has no room."""

    lm = HFModel(random_model("llama"), ByteTokenizer(), name="tiny")
    rows: int | None = 4  # of the archive; None: no bound

    def __init__(self):
        super().__init__()
        prefix = self.lm.prefix(PROMPT_IDS)
        token = sum(t.shape[0] * t.shape[2] * t.element_size() for t in (*prefix.keys, *prefix.values))
        fixed = token * (len(PROMPT_IDS) + LANES * (LENGTH - 1))
        self.bound = None if self.rows is None else fixed + self.rows * token
        self.session = self.lm.open(PROMPT_IDS, batch_size=LANES, max_new_tokens=LENGTH, max_kv_bytes=self.bound)
        self.ids = {PROMPT_SLOT: tuple(PROMPT_IDS)}
        self.failing = 0
        decoder, machine = self.session.forest._view.decoder, self

        class Tight:
            """The model, which at times has no memory for more than one row."""

            def __call__(self, **arguments):
                if machine.failing and arguments["input_ids"].shape[1] > 1:
                    machine.failing -= 1
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                return decoder(**arguments)

        self.session.forest._view.decoder = Tight()

    @rule(data=st.data())
    def extend(self, data):
        parents = [slot for slot, ids in self.ids.items() if len(ids) < len(PROMPT_IDS) + LENGTH - 1]
        pairs = data.draw(st.lists(st.tuples(st.sampled_from(parents), st.integers(4, 259)), min_size=1,
                                   max_size=LANES, unique=True))  # fmt: skip
        known = set(self.ids.values())
        pairs = [(p, t) for p, t in pairs if (*self.ids[p], t) not in known]
        if pairs:
            slots = self.session.extend([p for p, _ in pairs], [t for _, t in pairs])
            assert not set(slots) & set(self.ids) and len(set(slots)) == len(slots)
            self.ids |= {slot: (*self.ids[p], t) for slot, (p, t) in zip(slots, pairs, strict=True)}

    @rule(times=st.integers(1, 2))
    def memory_gets_short(self, times):
        self.failing = times

    @rule()
    def memory_comes_back(self):
        self.failing = 0
        self.session.forest._at_once = LANES

    @invariant()
    def lanes_hold_paths(self):
        cache = self.session.cache
        for path in cache._path.values():
            assert all(cache._parent[slot] == before for before, slot in itertools.pairwise([PROMPT_SLOT, *path]))
            assert len(path) <= LENGTH - 1

    @invariant()
    def archive_rows_are_neither_leaked_nor_shared(self):
        archive = self.session.cache._archive
        used = list(archive._row.values())
        assert sorted([*used, *archive._rows.free]) == list(range(archive._rows.held))
        for slot in archive._row:  # an ancestor outlives its descendants
            parent = self.session.cache._parent[slot]
            assert parent == PROMPT_SLOT or parent in archive or self.session.cache._held(parent)

    @invariant()
    def the_bound_is_kept_and_everything_is_counted_once(self):
        usage, cache = self.session.usage, self.session.cache
        prompt = sum(segment.held.nbytes for segment in self.session.prompt.chain())
        assert self.bound is None or prompt + cache.bytes() <= self.bound
        assert (
            usage.forwarded_tokens
            == len(self.ids) - 1 + usage.recomputed_tokens + len(PROMPT_IDS) - usage.cached_tokens
        )
        assert self.rows is not None or usage.recomputed_tokens == 0

    def teardown(self):
        slots = list(self.ids)
        direct = torch.cat([full_logits(self.lm, self.ids[slot]) for slot in slots])
        assert (self.session.logits(slots) - direct).abs().max() < 1e-4


class UnboundedCacheMachine(CacheMachine):
    rows = None


class TightestCacheMachine(CacheMachine):
    rows = 0


for _machine in (CacheMachine, UnboundedCacheMachine, TightestCacheMachine):
    _machine.TestCase.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
TestCacheUnderABound = CacheMachine.TestCase
TestCacheWithoutABound = UnboundedCacheMachine.TestCase
TestCacheWithoutAnArchive = TightestCacheMachine.TestCase


# Rewards ------------------------------------------------------------------------------------------------------------


def walk(reward, ids):
    """States after each token, alone."""
    states = [reward.start(Context("p", (), decode))]
    for token in ids:
        states.append(reward.extend(states[-1:], [token])[0])
    return states


def values_of(reward, states, done):
    return reward.earned(states), reward.upper(states), reward.finish(states, done)


@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=25, deadline=None)
@given(st.lists(ANY, min_size=1, max_size=3))
def test_a_reward_is_the_same_alone_in_a_batch_and_under_a_timeout(name, many):
    reward = BUILT_IN[name]()
    alone = [walk(reward, ids) for ids in many]
    done = [Finished(tuple(ids), decode(ids)) for ids in many]
    expected = [values_of(reward, [states[-1]], [one]) for states, one in zip(alone, done, strict=True)]
    for other in (reward, with_timeout(BUILT_IN[name](), 60)):
        states = [other.start(Context("p", (), decode)) for _ in many]
        for place in range(max(map(len, many))):
            rows = [row for row, ids in enumerate(many) if place < len(ids)]
            for row, state in zip(rows, other.extend([states[row] for row in rows], [many[row][place] for row in rows]),
                                  strict=True):  # fmt: skip
                states[row] = state
        found = values_of(other, states, done)
        assert found == tuple([one[kind][0] for one in expected] for kind in range(3))
        backwards = values_of(other, states[::-1], done[::-1])
        assert backwards == tuple(column[::-1] for column in found)


@settings(max_examples=40, deadline=None)
@given(ANY, st.floats(0, 3), st.floats(0, 1))
def test_laws_of_combinations(ids, weight, low):
    one, two = BUILT_IN["keywords"](), BUILT_IN["length"]()
    done = [Finished(tuple(ids), decode(ids))]

    def of(reward):
        state = walk(reward, ids)[-1]
        earned, upper, value = (column[0] for column in values_of(reward, [state], done))
        assert earned - 1e-12 <= value <= upper + 1e-12
        return np.array([earned, upper, value])

    a, b = of(one), of(two)
    assert of(minimum(one, two)) == pytest.approx(np.minimum(a, b))
    assert of(minimum(two, one)) == pytest.approx(np.minimum(a, b))
    assert of(minimum(one, one)) == pytest.approx(a)
    assert of(weighted_sum([(one, weight), (two, 1)])) == pytest.approx(weight * a + b)
    assert of(weighted_sum([(one, 0), (two, 1)])) == pytest.approx(b)
    assert of(clip(one, low, 2)) == pytest.approx(np.clip(a, low, 2))
    assert of(clip(clip(one, low, 2), low, 2)) == pytest.approx(np.clip(a, low, 2))
    assert of(gate(one, two)) == pytest.approx(a * b)


# Tokenizers ---------------------------------------------------------------------------------------------------------

CORPUS = [
    "the weather today is fine and dry",
    "naïve café, 北京 12:30 😀",
    "def f(x):\n    return x * 2\n\n",
    "aaaa   bb\t.",
] * 4


def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))  # fmt: skip
    return tokenizer


def sentencepiece_bpe() -> Tokenizer:
    """As Llama 2: a mark for spaces, bytes for what the vocabulary lacks."""
    marks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = Tokenizer(models.BPE())
    words.normalizer = marks
    words.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    content = json.loads(words.to_str())["model"]
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for piece in content["vocab"]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [tuple(merge) for merge in content["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = marks
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])  # fmt: skip
    return tokenizer


def with_added_tokens() -> Tokenizer:
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens(["<end>", "<|im_start|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("weather station", normalized=False)])
    return tokenizer


TOKENIZERS = {make.__name__: make() for make in (byte_level_bpe, sentencepiece_bpe, with_added_tokens)}
WORDS = ["the weather", " today", "北京", "😀", "é", "\n\n", "   ", "<tool>", "weather station", "\x00", "\u200d"]
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
TEXT = st.lists(st.text(CHARACTERS, max_size=6) | st.sampled_from(WORDS), max_size=6).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(TEXT)
def test_text_survives_the_tokenizer_and_the_stream(name, text):
    inner = TOKENIZERS[name]
    lm = HFModel.__new__(HFModel)  # encode and decode need nothing of a model
    lm.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>" if "added" in name else None)
    ids = lm.encode(text)
    assert lm.decode(ids) == text
    state, pieces = TextState(), []
    for token in ids:
        state, piece = advance(lm.decode, state, token)
        pieces.append(piece)
    assert "".join(pieces) + flush(lm.decode, state) == text
    if "added" in name:  # special tokens are no text; added ones are, each as one token
        end, tool = (inner.token_to_id(token) for token in ("<end>", "<tool>"))
        assert lm.decode([end, *ids, end]) == text
        assert ids.count(tool) == text.count("<tool>")


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(st.lists(DRAWN, max_size=30))
def test_any_ids_stream_to_what_they_decode_to(name, numbers):
    tokenizer = TOKENIZERS[name]
    # Decoders of fallback bytes replace every byte of a run that is no UTF-8, also those given out before: only text.
    first = 257 if "sentencepiece" in name else 0
    ids = [first + number % (tokenizer.get_vocab_size() - first) for number in numbers]
    state, pieces = TextState(), []
    for token in ids:
        state, piece = advance(tokenizer.decode, state, token)
        pieces.append(piece)
    assert "".join(pieces) + flush(tokenizer.decode, state) == tokenizer.decode(ids)
