"""Models that treat long sequences otherwise than short ones: the numbers are those of full recomputation."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import LLAMA_LIKE, ByteTokenizer, random_model, randomize
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention

import dts
from dts.lm import PROMPT_SLOT
from dts.models.huggingface import HFModel
from dts.models.rope import RopeLimit, rope_limits
from dts.models.sessions import RecomputeSession, TreeSession
from dts.search import Greedy, Sampling

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0, 5.0, 9.0, 14.0]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}


def longrope(limit=16, longest=256):
    rope = {**LONGROPE, "original_max_position_embeddings": limit}
    sizes = {**LLAMA_LIKE, "max_position_embeddings": longest, "original_max_position_embeddings": limit}
    return _built(transformers.Phi3Config(**sizes, rope_parameters=rope))


def dynamic():
    return _built(transformers.LlamaConfig(**{**LLAMA_LIKE, "max_position_embeddings": 16, "rope_parameters": DYNAMIC}))


def _built(config):
    torch.manual_seed(0)
    return randomize(AutoModelForCausalLM.from_config(config))


@torch.inference_mode()
def recomputed(model, ids):
    """Log-probabilities [V] of the next token by a model that has seen no other sequence."""
    return copy.deepcopy(model)(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)


def without_eos(logprobs):
    return logprobs.clone().index_fill_(-1, torch.tensor([0]), -torch.inf).log_softmax(-1)


def ids_of(length):
    return [4 + (7 * i) % 250 for i in range(length)]


def worst(model, session, prompt, tokens):
    """Grow one path after the prompt; the largest error of its log-probabilities."""
    slot, errors = PROMPT_SLOT, []
    for count in range(len(tokens) + 1):
        if count:
            slot = session.extend([slot], tokens[count - 1 : count])[0]
        wanted = recomputed(model, [*prompt, *tokens[:count]])
        errors.append((session.logits([slot])[0].log_softmax(-1) - wanted).abs().max().item())
    return max(errors)


@pytest.mark.parametrize(
    ("make", "prompt", "new", "kind"),
    [
        (longrope, 8, 9, TreeSession),  # the last token is not read: 16 tokens at most
        (longrope, 8, 10, RecomputeSession),
        (longrope, 16, 1, TreeSession),
        (longrope, 16, 2, RecomputeSession),
        (longrope, 17, 9, TreeSession),
        (dynamic, 8, 9, TreeSession),
        (dynamic, 8, 10, RecomputeSession),
        (dynamic, 17, 9, RecomputeSession),  # another frequency at each length
    ],
)
def test_lengths_on_one_side_of_the_limit_use_the_tree_and_others_are_recomputed(make, prompt, new, kind, caplog):
    caplog.set_level(logging.WARNING, "dts")
    model = make()
    session = HFModel(model, ByteTokenizer()).open(ids_of(prompt), batch_size=1, max_new_tokens=new)
    assert type(session) is kind
    assert ("changes at 16 tokens" in caplog.text) == (kind is RecomputeSession)
    assert worst(model, session, ids_of(prompt), ids_of(60)[50 : 50 + new - 1]) < 1e-4


def test_a_long_prompt_of_a_longrope_model_gets_the_long_factors_from_its_first_token_on():
    model = longrope(limit=1500, longest=4096)
    session = HFModel(model, ByteTokenizer()).open(ids_of(2000), batch_size=1, max_new_tokens=4)
    assert type(session) is TreeSession and session.usage.model_calls == 1
    assert worst(model, session, ids_of(2000), [9, 30]) < 1e-3


@pytest.mark.parametrize("make", [longrope, dynamic])
def test_decoding_across_the_limit_reports_the_probability_of_full_recomputation(make):
    model = make()
    lm = HFModel(model, ByteTokenizer())
    for seed in range(2):  # the second call starts after the first one's long sequences
        best = dts.decode(lm, ids_of(8), method=Sampling(1), max_new_tokens=20, min_new_tokens=19, seed=seed).best
        ids = [*ids_of(8), *best.token_ids]
        steps = [recomputed(model, ids[:i]) for i in range(8, len(ids))]
        steps[:19] = map(without_eos, steps[:19])  # before min_new_tokens
        wanted = sum(step[token].item() for step, token in zip(steps, best.token_ids, strict=True))
        assert best.logprob == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("make", [longrope, dynamic])
def test_what_a_users_own_call_left_in_the_rotary_module_does_not_count(make):
    model = make()
    wanted = recomputed(model, ids_of(10))
    model(torch.tensor([ids_of(40)]))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    session = HFModel(model, ByteTokenizer()).open(ids_of(10), batch_size=1, max_new_tokens=4)
    assert (session.logits([0])[0].log_softmax(-1) - wanted).abs().max() < 1e-4
    after = dict(model.named_buffers())
    assert before.keys() == after.keys() and all(torch.equal(after[name], held) for name, held in before.items())


def test_limits_are_found_for_each_type_of_layer_and_under_old_names():
    layered = {"full_attention": {**LONGROPE, "original_max_position_embeddings": 9}, "sliding_attention": DYNAMIC}
    config = SimpleNamespace(rope_parameters=layered, max_position_embeddings=30)
    assert rope_limits(config) == [RopeLimit("longrope", 9), RopeLimit("dynamic", 30)]
    old = SimpleNamespace(rope_scaling={"type": "su"}, max_position_embeddings=30, original_max_position_embeddings=8)
    assert rope_limits(old) == [RopeLimit("longrope", 8)]
    assert rope_limits(SimpleNamespace(rope_parameters={"rope_type": "yarn"}, rope_scaling=None)) == []


def test_a_dynamic_rope_stretches_the_context():
    assert HFModel(dynamic(), ByteTokenizer()).context_length == 16 * 8
    assert HFModel(longrope(), ByteTokenizer()).context_length == 256


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "qwen2", "phi3"])
def test_prompts_longer_than_a_prefill_chunk_keep_their_windows(family, monkeypatch):
    from dts.models import huggingface

    monkeypatch.setattr(huggingface, "PREFILL_CHUNK", 5)
    model = random_model(family)
    session = HFModel(model, ByteTokenizer()).open(ids_of(23), batch_size=1, max_new_tokens=4)
    assert session.usage.model_calls == 5
    assert worst(model, session, ids_of(23), [9, 30, 12]) < 1e-4


class ScaledByPosition(LlamaAttention):
    """Like Llama 4: queries grow with the position, which is counted from what the cache holds."""

    floor_scale = 8192

    def forward(self, hidden_states, *args, past_key_values=None, **kwargs):
        seen = past_key_values.get_seq_length(self.layer_idx) if past_key_values is not None else 0
        positions = torch.arange(hidden_states.shape[1]) + seen
        scale = torch.log1p(torch.floor((positions + 1) / self.floor_scale)) + 1
        return super().forward(hidden_states * scale[None, :, None], *args, past_key_values=past_key_values, **kwargs)


class WindowInMask(MistralAttention):
    """Leaves the window to the mask alone."""

    def forward(self, *args, **kwargs):
        held = self.config
        self.config = copy.copy(held)
        self.config.sliding_window = None
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.config = held


@pytest.mark.parametrize(
    ("family", "attention", "kind"),
    [("llama", ScaledByPosition, RecomputeSession), ("mistral", WindowInMask, TreeSession)],
)
def test_the_self_check_sees_what_begins_far_beyond_its_own_length(family, attention, kind):
    model = random_model(family)
    model.config.sliding_window = 4096 if family == "mistral" else None
    for layer in model.model.layers:
        layer.self_attn.__class__ = attention
        layer.self_attn.floor_scale = 8192
    lm = HFModel(model, ByteTokenizer())
    session = lm.open(ids_of(8), batch_size=1, max_new_tokens=4)
    assert type(session) is kind
    assert lm.view().way.own_attention == (kind is TreeSession)  # the mask reaches the family's own code only
    assert worst(model, session, ids_of(8), [9, 30]) < 1e-5


def test_greedy_crosses_a_limit_as_full_recomputation_does():
    model = dynamic()
    ids = ids_of(12)
    for _ in range(10):
        ids.append(int(recomputed(model, ids).argmax()))
    found = dts.decode(HFModel(model, ByteTokenizer()), ids[:12], method=Greedy(), max_new_tokens=10).best.token_ids
    assert list(found) == ids[12 : 12 + len(found)] and (len(found) == 10 or found[-1] == 0)
