"""Models with recurrent or convolution states in the tree: what a path remembers, copied where it branches."""

from __future__ import annotations

import random

import pytest
import torch
from all_families import LATER, PROMPT, plain_logits, tiny_model
from families import VOCAB, ByteTokenizer
from test_engine import grow

import dts
from dts.lm import PROMPT_SLOT
from dts.models.huggingface import HFModel
from dts.models.sessions import TreeSession
from dts.models.states import KeptStates, LaneStates
from dts.search import BestOfN, MaxEnt

HYBRIDS = ["qwen3_next", "qwen3_5_text", "granitemoehybrid", "nemotron_h", "jamba", "recurrent_gemma", "olmo_hybrid",
           "falcon_h1", "bamba", "zamba2", "lfm2", "mamba", "mamba2", "falcon_mamba"]  # fmt: skip


def letters(text):
    return len(set(text)) / 10


@pytest.fixture(scope="module", params=[family for family in HYBRIDS if family not in LATER])
def lm(request):
    return HFModel(tiny_model(request.param), ByteTokenizer())


@pytest.fixture(scope="module")
def one():
    return HFModel(tiny_model("granitemoehybrid"), ByteTokenizer())


def search(lm, **more):
    return dts.decode(lm, PROMPT, reward=letters, method=MaxEnt(64, reward_scale=4.0), max_new_tokens=12,
                      batch_size=8, seed=0, **more)  # fmt: skip


def bound(lm, copies):
    """Memory for so many copies of states, beside the lanes and all keys and values of the search."""
    prefix = lm.prefix(PROMPT)
    tokens, state = prefix.nbytes // len(prefix), prefix.state.nbytes
    return tokens * (len(PROMPT) + 8 * 11) + state * (8 + 1) + 2 * copies * state


def worst(model, session, ids):
    direct = torch.stack([plain_logits(model, sequence) for sequence in ids.values()])
    return (session.logits(list(ids)) - direct).abs().max() / max(1.0, direct.abs().max())


@torch.no_grad()
def test_a_search_with_few_copies_of_states_recomputes_few_tokens_and_its_logprobs_are_those_of_plain_calls(lm):
    result = search(lm, max_kv_bytes=bound(lm, copies=64))
    usage = result.usage
    assert len(result.rollouts) == 64
    assert usage.forwarded_tokens == usage.unique_tokens + usage.recomputed_tokens
    assert 0 < usage.recomputed_tokens <= 0.1 * usage.forwarded_tokens
    for found in result.completions[:3]:
        ids = [*PROMPT, *found.token_ids]
        rows = lm.model(torch.tensor([ids]), use_cache=False).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        direct = [float(row[token]) for row, token in zip(rows, found.token_ids, strict=True)]
        assert list(found.token_logprobs) == pytest.approx(direct, abs=1e-3)


def test_a_search_with_memory_recomputes_nothing(one):
    usage, few = search(one).usage, search(one, max_kv_bytes=bound(one, copies=64)).usage
    assert usage.recomputed_tokens == 0 and usage.forwarded_tokens == usage.unique_tokens == few.unique_tokens


@pytest.mark.parametrize("copies", [0, 3, 1000])
def test_trees_branch_anywhere_whatever_is_kept(lm, copies):
    session = lm.open(PROMPT, batch_size=4, max_new_tokens=40)
    assert isinstance(session, TreeSession)
    session.cache._kept._rows.limit = copies
    ids = grow(session, seed=1, steps=15, vocabulary=VOCAB)
    assert worst(lm.model, session, ids) < 1e-4
    usage = session.usage
    assert usage.forwarded_tokens == len(PROMPT) + len(ids) - 1 + usage.recomputed_tokens
    assert (usage.recomputed_tokens > 0) == (copies < 1000)


def test_trees_of_many_prompts_equal_plain_calls(lm):
    rng = random.Random(1)
    prompts = [PROMPT, PROMPT[:5], [*PROMPT, 60, 61, 62], PROMPT, [50, 51]]
    batch = lm.batch(prompts=5, width=3, max_new_tokens=10)
    assert all(batch.admit(key, prompt) for key, prompt in enumerate(prompts))
    sessions = [session for _, session in batch.advance(1000)]
    # A prompt that another one begins with is shared. Where two prompts part later, the state is not known.
    assert [session.usage.cached_tokens for session in sessions] == [0, 0, 8, 8, 0]
    ids = [{PROMPT_SLOT: prompt} for prompt in prompts]
    for _ in range(4):
        requests = []
        for session, held in zip(sessions, ids, strict=True):
            parents = [rng.choice(sorted(held)[-4:]) for _ in range(rng.randint(0, 3))]
            requests.append((session, parents, rng.sample(range(1, 256), len(parents))))
        for held, (_, parents, tokens), slots in zip(ids, requests, batch.extend(requests), strict=True):
            held.update({s: [*held[p], token] for s, p, token in zip(slots, parents, tokens, strict=True)})
    for session, held in zip(sessions, ids, strict=True):
        assert worst(lm.model, session, held) < 1e-4


def test_decode_many_gives_what_decode_gives(lm):
    prompts = [PROMPT, PROMPT[:5], [50, 51]]
    options = {"reward": letters, "method": BestOfN(4), "max_new_tokens": 4}
    many = list(dts.decode_many(lm, prompts, batch_size=8, width=4, **options))
    for seed, (prompt, result) in enumerate(zip(prompts, many, strict=True)):
        alone = dts.decode(lm, prompt, batch_size=4, seed=seed, **options)
        assert [c.token_ids for c in result.completions] == [c.token_ids for c in alone.completions]
        assert result.usage.forwarded_tokens == result.usage.unique_tokens


# Copies of states -----------------------------------------------------------------------------------------------------


def kept_depths(max_rows, depths):
    """Depths that are kept of a path that was saved token by token, in one lane."""
    like = [torch.zeros(1, 2)]
    lanes, kept = LaneStates(like, 1), KeptStates(like, max_rows)
    for depth in range(1, depths + 1):
        lanes.put([0], [torch.full((1, 2), float(depth))])
        kept.save([depth], [depth], [0], lanes)
        assert len(kept) <= max_rows and kept.nbytes <= 8 * max_rows
    found = [depth for depth in range(1, depths + 1) if depth in kept]
    assert all(torch.equal(kept.read(depth)[0], torch.full((1, 2), float(depth))) for depth in found)
    return found


def test_states_are_kept_at_every_depth_until_there_is_no_room_and_then_at_the_first_and_at_every_second():
    assert kept_depths(8, 8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert kept_depths(8, 9) == [1, 2, 4, 6, 8]
    assert kept_depths(8, 15) == [1, 2, 4, 6, 8, 10, 12, 14]
    assert kept_depths(8, 16) == [1, 2, 4, 8, 12, 16]
    assert kept_depths(0, 5) == []


@pytest.mark.parametrize("max_rows", [1, 4, 7])
def test_first_depths_of_a_bush_take_a_quarter_of_the_rows_at_most(max_rows):
    """Eight paths at once: more than there is room for at any depth."""
    like = [torch.zeros(1, 2)]
    lanes, kept = LaneStates(like, 8), KeptStates(like, max_rows)
    for depth in range(1, 5):
        kept.save([8 * depth + lane for lane in range(8)], [depth] * 8, list(range(8)), lanes)
        kept.save([100 + depth], [depth], [0], lanes)
        assert len(kept) <= max_rows
