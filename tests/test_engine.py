"""The tree cache against full recomputation: one contract for every family."""

from __future__ import annotations

import logging
import random

import pytest
import torch
from families import FAMILIES, SLOW_FAMILIES, ByteTokenizer, random_model

from dts.errors import UsageError
from dts.lm import PROMPT_SLOT
from dts.models.huggingface import HFModel
from dts.models.sessions import RecomputeSession, TreeSession, full_logits

PROMPT = [13, 5, 7, 11, 13, 17, 19, 23]


def grow(session, seed, steps=30, lanes=4, max_depth=39, vocabulary=256):
    """A random tree: mostly along recent branches, often from deep in idle ones. Returns ids by slot."""
    rng, ids, edges = random.Random(seed), {PROMPT_SLOT: list(PROMPT)}, set()
    for _ in range(steps):
        parents, tokens = [], []
        for _ in range(rng.randint(1, lanes)):
            recent = sorted(ids)[-6:] if rng.random() < 0.7 else sorted(ids)
            edge = rng.choice(recent), rng.randrange(1, vocabulary)
            if edge not in edges and len(ids[edge[0]]) - len(PROMPT) < max_depth:
                edges.add(edge)
                parents.append(edge[0])
                tokens.append(edge[1])
        if parents:
            for slot, parent, token in zip(session.extend(parents, tokens), parents, tokens, strict=True):
                ids[slot] = [*ids[parent], token]
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_branching_trees_equal_full_recomputation(family):
    lm = HFModel(random_model(family), ByteTokenizer())
    session = lm.open(PROMPT, batch_size=4, max_new_tokens=40)
    assert isinstance(session, TreeSession)
    ids = grow(session, seed=1)
    assert max(len(sequence) for sequence in ids.values()) > len(PROMPT) + 6  # deeper than the windows
    logits = session.logits(list(ids))
    direct = torch.cat([full_logits(lm, sequence) for sequence in ids.values()])
    assert (logits - direct).abs().max() < 1e-4
    assert session.usage.forwarded_tokens == len(PROMPT) + len(ids) - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_of_many_prompts_equal_full_recomputation(family):
    lm, rng = HFModel(random_model(family), ByteTokenizer()), random.Random(1)
    prompts = [PROMPT, [*PROMPT[:5], 40, 41], [50, 51], [*PROMPT, 60, 61, 62]]  # the last is behind the first
    batch = lm.batch(prompts=4, width=3, max_new_tokens=30)
    assert all(batch.admit(key, prompt) for key, prompt in enumerate(prompts))
    sessions = [session for _, session in batch.advance(1000)]
    assert [session.usage.cached_tokens for session in sessions] == [0, 5, 0, 8]
    ids = [{PROMPT_SLOT: prompt} for prompt in prompts]
    for _ in range(12):
        requests = []
        for session, held in zip(sessions, ids, strict=True):
            parents = [rng.choice(sorted(held)[-4:]) for _ in range(rng.randint(0, 3))]
            requests.append((session, parents, rng.sample(range(1, 256), len(parents))))
        for held, (_, parents, tokens), slots in zip(ids, requests, batch.extend(requests), strict=True):
            held.update({s: [*held[p], token] for s, p, token in zip(slots, parents, tokens, strict=True)})
    for session, held in zip(sessions, ids, strict=True):
        direct = torch.cat([full_logits(lm, sequence) for sequence in held.values()])
        assert (session.logits(list(held)) - direct).abs().max() < 1e-4
        usage = session.usage
        assert usage.forwarded_tokens == usage.prompt_tokens - usage.cached_tokens + len(held) - 1


@pytest.mark.parametrize("family", SLOW_FAMILIES)
def test_other_architectures_take_the_slow_correct_path_and_say_so(family, caplog):
    caplog.set_level(logging.WARNING, logger="dts")
    lm = HFModel(random_model(family), ByteTokenizer())
    session = lm.open(PROMPT, batch_size=2, max_new_tokens=4)
    assert isinstance(session, RecomputeSession)
    assert "cannot use the tree cache" in caplog.text
    slots = session.extend([PROMPT_SLOT, PROMPT_SLOT], [5, 6])
    slots += session.extend(slots[:1], [9])
    direct = torch.cat([full_logits(lm, [*PROMPT, *tail]) for tail in ([5], [6], [5, 9])])
    assert torch.equal(session.logits(slots), direct)
    assert session.usage.forwarded_tokens == len(PROMPT) + 9 + 9 + 10
    assert session.usage.recomputed_tokens == session.usage.forwarded_tokens - len(PROMPT) - 3


def test_encoder_decoder_models_are_refused():
    import transformers

    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UsageError, match="encoder-decoder"):
        HFModel(transformers.T5ForConditionalGeneration(config), ByteTokenizer())


def test_two_prompts_with_the_same_suffix_never_mix(tiny_lm):
    prompts, suffix = ([20, 21, 22, 23], [90, 91, 92, 23]), [40, 41, 42]
    sessions = [tiny_lm.open(prompt, batch_size=2, max_new_tokens=5) for prompt in prompts]
    slots = [PROMPT_SLOT, PROMPT_SLOT]
    for token in suffix:  # interleaved, so that state kept outside a session would show
        slots = [session.extend([slot], [token])[0] for session, slot in zip(sessions, slots, strict=True)]
    for prompt, session, slot in zip(prompts, sessions, slots, strict=True):
        assert (session.logits([slot]) - full_logits(tiny_lm, prompt + suffix)).abs().max() < 1e-4


def test_logits_do_not_depend_on_what_else_is_in_the_batch(tiny_lm):
    def path(batch):
        session = tiny_lm.open(PROMPT, batch_size=batch, max_new_tokens=12)
        slots, rng = [PROMPT_SLOT], random.Random(0)
        slots = session.extend([PROMPT_SLOT] * batch, [30, *rng.sample(range(60, 250), batch - 1)])
        for token in range(31, 40):
            slots = session.extend(slots, [token, *(rng.randrange(1, 250) for _ in slots[1:])])
        return session.logits(slots[:1])

    alone = path(1)
    for batch in (2, 5, 9):
        assert (path(batch) - alone).abs().max() < 1e-5


def test_long_prompts_are_prefilled_in_chunks(tiny_lm, monkeypatch):
    from dts.models import huggingface

    whole = tiny_lm.open(PROMPT * 4, batch_size=1, max_new_tokens=2)
    monkeypatch.setattr(huggingface, "PREFILL_CHUNK", 5)
    chunked = tiny_lm.open(PROMPT * 4, batch_size=1, max_new_tokens=2)
    assert chunked.usage.model_calls == 7 and chunked.usage.forwarded_tokens == 32
    assert (whole.logits([0]) - chunked.logits([0])).abs().max() < 1e-5


def test_the_users_model_is_left_as_it_was(tiny_lm):
    before = tiny_lm.model.config._attn_implementation
    ids = torch.tensor([PROMPT])
    direct = tiny_lm.model(ids).logits
    grow(tiny_lm.open(PROMPT, batch_size=4, max_new_tokens=40), seed=0, steps=3)
    assert tiny_lm.model.config._attn_implementation == before
    assert torch.equal(tiny_lm.model(ids).logits, direct)


def test_bfloat16_stays_close_to_float32():
    precise, coarse = (HFModel(random_model("llama").to(dtype), ByteTokenizer()) for dtype in (None, torch.bfloat16))
    ids, errors = {}, []
    for lm in (precise, coarse):
        session = lm.open(PROMPT, batch_size=4, max_new_tokens=40)
        ids = grow(session, seed=2, steps=12)
        errors.append(session.logits(list(ids)).float())
    direct = torch.cat([full_logits(coarse, sequence) for sequence in ids.values()]).float()
    # As far from float32 as the plain bfloat16 model is, not further.
    assert (errors[1] - errors[0]).abs().mean() < 1.5 * (direct - errors[0]).abs().mean()


@pytest.mark.parametrize("rows", [0, 1, 7, 40])
def test_a_memory_bound_changes_no_number_and_recomputation_is_counted(rows, tiny_lm):
    token = sum(t.shape[0] * t.shape[2] * t.element_size() for t in _columns(tiny_lm))
    bound = token * (len(PROMPT) + 4 * 39 + rows)
    session = tiny_lm.open(PROMPT, batch_size=4, max_new_tokens=40, max_kv_bytes=bound)
    ids = grow(session, seed=1)
    direct = torch.cat([full_logits(tiny_lm, sequence) for sequence in ids.values()])
    assert (session.logits(list(ids)) - direct).abs().max() < 1e-4
    assert session.cache.bytes() + tiny_lm.prefix(PROMPT).nbytes <= bound
    usage = session.usage
    assert usage.recomputed_tokens > 0
    assert usage.forwarded_tokens == len(PROMPT) + len(ids) - 1 + usage.recomputed_tokens


def _columns(lm):
    prefix = lm.prefix(PROMPT)
    return [*prefix.keys, *prefix.values]


def test_a_bound_below_what_active_paths_need_is_refused(tiny_lm):
    with pytest.raises(UsageError, match="max_kv_bytes=1000 is too small"):
        tiny_lm.open(PROMPT, batch_size=4, max_new_tokens=40, max_kv_bytes=1000)


def test_the_batch_follows_the_memory_bound(tiny_lm):
    token = sum(t.shape[0] * t.shape[2] * t.element_size() for t in _columns(tiny_lm))
    assert tiny_lm.batch_limit(100, 10, max_kv_bytes=token * (100 + 35)) == 3
    assert tiny_lm.batch_limit(100, 10, max_kv_bytes=1) == 1
    assert tiny_lm.batch_limit(10, 10, max_kv_bytes=None) > 1000


def test_a_kept_prompt_is_prefilled_once(tiny_lm):
    kept = tiny_lm.prefix(PROMPT)
    first, second = (tiny_lm.open(PROMPT, batch_size=2, max_new_tokens=5) for _ in range(2))
    other = tiny_lm.open([*PROMPT, 9], batch_size=2, max_new_tokens=5)
    assert first.usage.cached_tokens == second.usage.cached_tokens == len(PROMPT)
    assert first.usage.forwarded_tokens == 0 and other.usage.cached_tokens == 0
    slots = [first.extend([PROMPT_SLOT], [30])[0], second.extend([PROMPT_SLOT], [31])[0]]
    logits = torch.cat([first.logits(slots[:1]), second.logits(slots[1:])])
    direct = torch.cat([full_logits(tiny_lm, [*PROMPT, token]) for token in (30, 31)])
    assert (logits - direct).abs().max() < 1e-4
    del kept, first, second
    assert tiny_lm.open(PROMPT, batch_size=2, max_new_tokens=5).usage.cached_tokens == 0


def test_slots_in_use_stay_near_the_live_tree(tiny_lm):
    session = tiny_lm.open(PROMPT, batch_size=4, max_new_tokens=40)
    ids = grow(session, seed=3, steps=200)
    # Lanes may hold a second copy of an archived path: four of at most 39 tokens.
    assert len(ids) - 1 <= session.cache.held_tokens() <= len(ids) - 1 + 4 * 39


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_branching_trees_on_a_gpu(family):
    lm = HFModel(random_model(family).cuda(), ByteTokenizer())
    session = lm.open(PROMPT, batch_size=4, max_new_tokens=40)
    assert isinstance(session, TreeSession)
    ids = grow(session, seed=1)
    direct = torch.cat([full_logits(lm, sequence) for sequence in ids.values()])
    assert (session.logits(list(ids)) - direct).abs().max() < 1e-3  # TF32 is off by default
