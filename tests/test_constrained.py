"""Searches under a constraint: what is found belongs to it, the distribution is the one that was asked for, dead ends
are learnt."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import defaultdict

import jsonschema
import numpy as np
import pytest
from toys import Texts, Worded

import dts
from dts.models.table import TableModel, random_logits
from dts.search import METHODS, BestOfN, MaxEnt, ParticleFilter, Sampling

pytest.importorskip("llguidance", reason="needs llguidance: pip install 'maxent-decoding[constraints]'")

from dts.constraints import Choice, Grammar, JsonSchema, Regex

WORDS = (b"a", b"b", b"ab", b";")
HORIZON = 4
PROMPT = (1,)


def model(seed=0):
    return Worded(TableModel(random_logits(5, seed, 1.5), 5, eos=0), WORDS)


def complete(lm, pattern, horizon=HORIZON):
    """Sequences whose text matches, with log p."""
    found = {tokens: log for tokens, log in lm.sequences(horizon, PROMPT) if re.fullmatch(pattern, lm.decode(tokens))}
    assert 3 < len(found) < 400
    return found


def masked(lm, pattern, horizon=HORIZON):
    """The same with the probabilities of token-by-token masking, those of dead ends included in what is missing."""
    every = ("".join(text) for size in range(2 * horizon + 3) for text in itertools.product("ab;", repeat=size))
    texts = [text for text in every if re.fullmatch(pattern, text)]
    found = defaultdict(float)

    def walk(done, log):
        text = lm.decode(done)
        if len(done) == horizon or (done and done[-1] == 0):
            if re.fullmatch(pattern, text):
                found[done] = log
            return
        p = np.exp(lm.table(PROMPT + done))
        row = [re.fullmatch(pattern, text) is not None] + [
            any(one.startswith(text + word.decode()) for one in texts) for word in WORDS
        ]
        p = p * row / (p * row).sum()
        for token in np.flatnonzero(row).tolist():
            walk((*done, token), log + math.log(p[token]))

    walk((), 0.0)
    return dict(found)


def shares(result):
    return {result.tree.tokens(leaf): share for leaf, share in result.shares.items()}


def normalised(logs):
    total = np.logaddexp.reduce(list(logs.values()))
    return {tokens: math.exp(log - total) for tokens, log in logs.items()}, total


PATTERNS = ["(ab)+;?", "a{2,3}b?;", "(a|b;)*", "b(ab|;)*a"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_complete_tree_under_condition_is_p_among_the_texts(pattern):
    lm = model()
    result = dts.decode(lm, PROMPT, method=MaxEnt(600), constraint=Regex(pattern), max_new_tokens=HORIZON)
    truth, log_mass = normalised(complete(lm, pattern))
    assert shares(result) == pytest.approx(truth)
    assert result.log_z == pytest.approx(log_mass)


@pytest.mark.parametrize("pattern", PATTERNS[:2])
def test_a_complete_tree_under_mask_is_p_masked_token_by_token(pattern):
    lm = model()
    result = dts.decode(
        lm, PROMPT, method=MaxEnt(600), constraint=Regex(pattern), constraint_mode="mask", max_new_tokens=HORIZON
    )
    truth, _ = normalised(masked(lm, pattern))
    assert shares(result) == pytest.approx(truth)
    exact, _ = normalised(complete(lm, pattern))
    assert 0.5 * sum(abs(truth[tokens] - exact[tokens]) for tokens in exact) > 0.1


def test_samples_are_masked_and_report_the_probability_that_the_model_gives_them():
    lm, pattern = model(), "(ab)+;?"
    result = dts.decode(lm, PROMPT, method=Sampling(400), constraint=Regex(pattern), max_new_tokens=HORIZON)
    own = complete(lm, pattern)
    assert all(c.logprob == pytest.approx(own[c.token_ids]) for c in result.completions)
    truth, _ = normalised(masked(lm, pattern))
    drawn = [result.tree.tokens(rollout.leaf) for rollout in result.rollouts]
    for tokens, share in truth.items():
        assert abs(drawn.count(tokens) / len(drawn) - share) < 4 * math.sqrt(share * (1 - share) / len(drawn)) + 1e-9


@pytest.mark.parametrize("mode", ["condition", "mask"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_finds_texts_of_the_constraint_only(name, mode):
    lm, pattern, found = model(), "(ab)+;?|b{1,9}", 0
    for seed in range(3):
        result = dts.decode(
            lm, PROMPT, method=METHODS[name](12, 2.0), reward=lambda text: text.count("a"), seed=seed,
            constraint=Regex(pattern), constraint_mode=mode, max_new_tokens=HORIZON,
        )  # fmt: skip
        texts = [completion.text for completion in result.completions]
        assert all(re.fullmatch(pattern, text) for text in texts), texts
        found += len(texts)
    assert found


def test_a_stop_ends_a_text_where_the_constraint_accepts_it_with_the_stop():
    lm = model()
    result = dts.decode(lm, PROMPT, method=MaxEnt(600), constraint=Regex("a+;(b;)?"), stop=";", max_new_tokens=HORIZON)
    assert {completion.text for completion in result.completions} == {"a", "aa", "aaa"}
    assert {completion.finished_by for completion in result.completions} == {"stop"}


def test_a_text_that_the_length_cuts_in_the_constraint_is_none():
    lm = model()
    result = dts.decode(lm, PROMPT, method=MaxEnt(600), constraint=Choice(["aaa", "aaaab", "b" * 9]), max_new_tokens=3)
    assert [completion.text for completion in result.completions] == ["aaa"]
    assert result.best.finished_by == "length"  # it is a member as it stands
    whole = dts.decode(
        lm, PROMPT, method=MaxEnt(600), constraint=Choice(["aaa", "a"]), max_new_tokens=3, require_eos=True
    )
    assert whole.best.text == "a" and set(shares(whole)) == {(1, 0)}


@pytest.mark.parametrize("search", ["sample", "best"])
def test_a_language_that_turns_out_to_be_empty_is_one_clear_line(search):
    for constraint in (Choice(["a" * 9]), Grammar('start: "a" start')):  # too long; without an end
        with pytest.raises(dts.UsageError, match="holds for no completion of up to max_new_tokens=3 tokens") as raised:
            dts.decode(model(), PROMPT, method=MaxEnt(500, search=search), constraint=constraint, max_new_tokens=3)
        assert "\n" not in str(raised.value)


def test_samples_that_all_miss_the_language_say_what_to_do():
    result = dts.decode(model(), PROMPT, method=Sampling(2), constraint=Choice(["a" * 9]), max_new_tokens=3)
    assert not result.completions
    with pytest.raises(RuntimeError, match="or max_new_tokens if a constraint needs longer texts"):
        _ = result.best


@pytest.mark.parametrize("search", ["sample", "best"])
def test_dead_ends_are_learnt_and_never_repeated(search):
    """Every wrong turn is allowed at first. A search with far more rollouts than there are prefixes ends by itself, and
    forwards no prefix twice."""
    lm = TableModel(random_logits(4, 0), 4, eos=0)
    constraint = Texts([(1, 2, 3), (3,), (2, 2)], 4, far=True)
    result = dts.decode(
        lm, PROMPT, method=MaxEnt(10_000, search=search), constraint=constraint, max_new_tokens=4,
        reward=lambda text: len(text) / 10,
    )  # fmt: skip
    prefixes = sum(3**depth for depth in range(1, 4))
    assert result.usage.forwarded_tokens <= prefixes + len(PROMPT)
    assert {completion.token_ids for completion in result.completions} <= {(1, 2, 3, 0), (3, 0), (2, 2, 0)}
    if search == "sample":
        assert len(result.completions) == 3 and not result.partial


def test_draws_from_the_result_belong_to_the_constraint():
    lm, pattern = model(), "(ab)+;?"
    result = dts.decode(lm, PROMPT, method=MaxEnt(3), constraint=Regex(pattern), max_new_tokens=HORIZON)
    assert all(re.fullmatch(pattern, completion.text) for completion in result.sample(8, 0))


def test_many_prompts_have_constraints_of_their_own():
    lm = model()
    requests = [
        dts.Request((1,), constraint=Regex("a+")),
        dts.Request((2,), constraint=Choice(["ab", "b;"])),
        (3,),
        dts.Request((4,), constraint=Texts([(3, 3), (1,)], 5)),
    ]
    for method in (MaxEnt(20), BestOfN(6), ParticleFilter(6)):
        for call in (None, Regex("b*")):
            options = {"method": method, "max_new_tokens": HORIZON}
            many = list(dts.decode_many(lm, requests, batch_size=8, width=2, constraint=call, **options))
            for index, (request, result) in enumerate(zip(requests, many, strict=True)):
                own = request.constraint if isinstance(request, dts.Request) else call
                prompt = request.prompt if isinstance(request, dts.Request) else request
                alone = dts.decode(lm, prompt, batch_size=2, seed=index, constraint=own, **options)
                assert [c.token_ids for c in result.completions] == [c.token_ids for c in alone.completions]


def test_the_seconds_of_the_constraint_are_counted():
    lm = model()
    result = dts.decode(lm, PROMPT, method=BestOfN(4), constraint=Regex("a+"), max_new_tokens=HORIZON)
    assert 0 < result.usage.constraint_seconds < result.usage.seconds
    free = dts.decode(lm, PROMPT, method=BestOfN(4), max_new_tokens=HORIZON)
    assert free.usage.constraint_seconds == 0


class Unopened:
    """A model that must not be called."""

    vocab_size, eos_ids, name, context_length = 5, frozenset([0]), "unopened", None

    def __init__(self):
        self.tokenizer = model().tokenizer

    def encode(self, prompt):
        return list(prompt)

    decode = batch_limit = encode

    def open(self, *args, **options):
        raise AssertionError("the model was called")


def test_a_bad_constraint_is_named_before_the_model_is_called():
    lm = Unopened()
    for constraint, said in ((Regex("[a&&b]"), "allows no text"), ("a+", "give one of dts.constraints")):
        with pytest.raises(dts.UsageError, match=said):
            dts.decode(lm, PROMPT, method=MaxEnt(4), constraint=constraint)
        with pytest.raises(dts.UsageError, match=said):
            dts.decode_many(lm, [PROMPT], method=MaxEnt(4), constraint=constraint)
        with pytest.raises(dts.UsageError, match=f"prompt 0: .*{said}"):
            next(dts.decode_many(lm, [dts.Request(PROMPT, constraint=constraint)], method=MaxEnt(4)))
    with pytest.raises(dts.UsageError, match="constraint_mode='hard' is not allowed; give 'condition', 'mask' or None"):
        dts.decode(lm, PROMPT, method=MaxEnt(4), constraint=Regex("a"), constraint_mode="hard")


@pytest.mark.parametrize("mode", ["condition", "mask"])
def test_a_real_model_writes_valid_json(smollm, mode):
    schema = {
        "type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}, "cold": {"type": "boolean"}},
        "required": ["city", "cold"], "additionalProperties": False,
    }  # fmt: skip
    result = dts.decode(
        smollm, 'JSON: {"city": "Rome", "cold": false}\nJSON: ',
        method=MaxEnt(3), constraint=JsonSchema(schema), constraint_mode=mode,
        max_new_tokens=20,
    )  # fmt: skip
    assert result.completions
    for completion in result.completions:
        jsonschema.validate(json.loads(completion.text), schema)
