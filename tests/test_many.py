"""Many prompts in one batch: what each gets is what it gets alone, and nobody pays for another's trouble."""

from __future__ import annotations

import gc
import itertools
import random
import weakref

import pytest
import torch
from families import ByteTokenizer, random_model
from test_processors import Alternates, Locked

import dts
from dts.many import LATER
from dts.models import batch as batches
from dts.models.batch import Room
from dts.models.huggingface import HFModel
from dts.models.prefixes import Prefix, Prefixes
from dts.models.sessions import TreeSession, full_logits
from dts.models.table import TableModel, TableSession, random_logits
from dts.search import METHODS, BestOfN, MaxEnt, Sampling
from dts.search.many import OneByOne

TABLE = TableModel(random_logits(5, 3), 5, eos=0)
TABLE_PROMPTS = [(1, 2), (3,), (4, 4, 4), (2, 1), (1,), (3, 3, 2, 1), (2,)]
SMALL = {"max_new_tokens": 7, "batch_size": 12, "width": 3}


def letters(text: str) -> float:
    return len(set(text)) / 10


def ragged(count: int, *, head: int = 0, seed: int = 0) -> list[list[int]]:
    """Prompts of different lengths; every other one begins with the same `head` tokens."""
    rng = random.Random(seed)
    shared = [rng.randrange(5, 250) for _ in range(head)]
    own = [[rng.randrange(5, 250) for _ in range(3 + 5 * (i % 9))] for i in range(count)]
    return [shared + tail if i % 2 else tail for i, tail in enumerate(own)]


def one_by_one(lm, prompts, *, seed=0, width=3, batch_size=None, **options):
    return [dts.decode(lm, prompt, seed=seed + i, batch_size=width, **options) for i, prompt in enumerate(prompts)]


def assert_same(many, alone, tolerance):
    for one, other in zip(many, alone, strict=True):
        assert [c.token_ids for c in one.completions] == [c.token_ids for c in other.completions]
        assert [r.text for r in one.rollouts] == [r.text for r in other.rollouts]
        for c, d in zip(one.completions, other.completions, strict=True):
            assert c.token_logprobs == pytest.approx(d.token_logprobs, abs=tolerance, rel=0)
        assert one.usage.generated_tokens == other.usage.generated_tokens
        assert one.usage.forwarded_tokens == one.usage.unique_tokens


@pytest.fixture(scope="module", params=[("llama", torch.float32, 1e-5), ("gemma3", torch.float32, 1e-5),
                                        ("mistral", torch.float64, 2e-6)], ids=lambda case: case[0])  # fmt: skip
def served(request):
    """A model of the tree cache, with what rounding may change in the log p of a token."""
    family, dtype, tolerance = request.param
    return HFModel(random_model(family).to(dtype), ByteTokenizer(), name=family), tolerance


# The same as one by one ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_table_model_gives_exactly_what_it_gives_one_by_one(name):
    options = {"method": METHODS[name](9, 2.0), "reward": letters, "max_new_tokens": 4}
    many = list(dts.decode_many(TABLE, TABLE_PROMPTS, seed=3, batch_size=10, width=3, **options))
    assert_same(many, one_by_one(TABLE, TABLE_PROMPTS, seed=3, **options), tolerance=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_real_model_gives_what_it_gives_one_by_one(name, served):
    lm, tolerance = served
    prompts = ragged(6, head=9)
    options = {"method": METHODS[name](6, 2.0), "reward": letters, "max_new_tokens": 7}
    many = list(dts.decode_many(lm, prompts, seed=3, batch_size=12, width=3, **options))
    assert_same(many, one_by_one(lm, prompts, seed=3, **options), tolerance)


@pytest.mark.parametrize("beside", [0, 1, 15])
def test_a_prompt_gets_the_same_alone_and_beside_others(beside, tiny_lm):
    prompts = ragged(1 + beside, head=5)
    options = {"method": MaxEnt(8), "reward": letters, "max_new_tokens": 8}
    first, *_ = dts.decode_many(tiny_lm, prompts, batch_size=64, width=4, **options)
    assert_same([first], one_by_one(tiny_lm, prompts[:1], width=4, **options), 1e-5)


def test_the_slow_path_is_served_too():
    lm = HFModel(random_model("openai_gpt"), ByteTokenizer())
    options = {"method": BestOfN(3), "reward": letters, "max_new_tokens": 3}
    many = list(dts.decode_many(lm, ragged(3), batch_size=6, width=3, **options))
    alone = one_by_one(lm, ragged(3), **options)
    assert [r.completions for r in many] == [r.completions for r in alone]
    assert all(r.usage.recomputed_tokens for r in many)


def test_lengths_that_change_the_frequencies_of_rope_are_not_mixed(caplog):
    model = random_model("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model.config.max_position_embeddings = 24
    lm = HFModel(type(model)(model.config).eval(), ByteTokenizer())
    prompts = [list(range(5, 10)), list(range(5, 14)), list(range(30, 70))]  # the last is beyond 24
    options = {"method": Sampling(3), "max_new_tokens": 5}
    lm.context_length = None
    assert_tokens_equal(
        dts.decode_many(lm, prompts, batch_size=9, width=3, **options), one_by_one(lm, prompts, **options)
    )


def assert_tokens_equal(many, alone):
    for one, other in zip(many, alone, strict=True):
        assert [c.token_ids for c in one.completions] == [c.token_ids for c in other.completions]
        assert [c.logprob for c in one.completions] == pytest.approx([c.logprob for c in other.completions], abs=1e-5)


def test_equal_suffixes_after_different_prompts_keep_their_own_numbers(tiny_lm):
    """A trie of suffixes would give both the first one's log p."""
    prompts, suffix = ([20, 21, 22, 23], [90, 91, 92, 23, 23, 23]), [40, 41, 42]
    batch = tiny_lm.batch(prompts=2, width=2, max_new_tokens=5)
    for key, prompt in enumerate(prompts):
        assert batch.admit(key, prompt)
    sessions = [session for _, session in batch.advance(100)]
    slots = [0, 0]
    for token in suffix:
        slots = [
            new for (new,) in batch.extend([(s, [slot], [token]) for s, slot in zip(sessions, slots, strict=True)])
        ]
    for prompt, session, slot in zip(prompts, sessions, slots, strict=True):
        assert (session.logits([slot]) - full_logits(tiny_lm, prompt + suffix)).abs().max() < 1e-4


@pytest.mark.parametrize("processor", [Alternates(), Locked], ids=["copied", "made anew"])
def test_stops_and_processors_with_a_state_are_each_prompts_own(processor):
    options = {
        "method": MaxEnt(8),
        "reward": letters,
        "max_new_tokens": 5,
        "logits_processor": processor,
        "stop": "3 1",
    }
    many = list(dts.decode_many(TABLE, TABLE_PROMPTS, batch_size=9, width=3, **options))
    assert_same(many, one_by_one(TABLE, TABLE_PROMPTS, **options), tolerance=0)
    assert any(c.finished_by == "stop" for r in many for c in r.completions)


@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float64, 2e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.25),
])  # fmt: skip
def test_log_probabilities_do_not_depend_on_the_batch(dtype, tolerance):
    lm, rng = HFModel(random_model("llama").to(dtype), ByteTokenizer()), random.Random(0)
    prompts = ragged(8, head=9)
    batch = lm.batch(prompts=8, width=3, max_new_tokens=10)
    assert all(batch.admit(key, prompt) for key, prompt in enumerate(prompts))
    sessions = [session for _, session in batch.advance(1000)]
    alone = [lm.open(prompt, batch_size=3, max_new_tokens=10) for prompt in prompts]
    slots, errors = [[0, 0, 0]] * 8, []
    for _ in range(9):
        tokens = [rng.sample(range(5, 250), 3) for _ in prompts]
        requests = list(zip(sessions, slots, tokens, strict=True))
        slots = batch.extend(requests)
        assert [one.extend(*rest) for one, (_, *rest) in zip(alone, requests, strict=True)] == slots
        for pair in zip(sessions, alone, slots, strict=True):
            one, other = (session.logits(pair[2]).double().log_softmax(-1) for session in pair[:2])
            errors.append((one - other).abs().max().item())
    assert max(errors) <= tolerance


# Order and laziness -------------------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_prompts_or_as_they_finish():
    lm = TableModel(
        lambda ids: [50.0 if len(ids) > ids[0] else -50.0, 0.0, 0.0, 0.0], 4, eos=0
    )  # EOS after ids[0] tokens
    prompts = [(3,), (1,), (2,)]
    options = {"method": Sampling(2), "max_new_tokens": 9, "batch_size": 9, "width": 3}
    assert [r.usage.prompt_tokens for r in dts.decode_many(lm, prompts, **options)] == [1, 1, 1]
    ordered = [len(r.best.token_ids) for r in dts.decode_many(lm, prompts, **options)]
    assert ordered == [4, 2, 3]
    pairs = [(i, len(r.best.token_ids)) for i, r in dts.decode_many(lm, prompts, as_completed=True, **options)]
    assert pairs == [(1, 2), (2, 3), (0, 4)]


@pytest.mark.parametrize("as_completed", [False, True])
def test_prompts_are_read_as_places_become_free(as_completed):
    taken = []

    def prompts():
        for i in range(10_000):
            taken.append(i)
            yield (1 + i % 4,)

    results = dts.decode_many(
        TABLE, prompts(), method=Sampling(4), max_new_tokens=4, batch_size=6, width=2, as_completed=as_completed
    )
    assert not taken
    for _ in itertools.islice(results, 20):
        pass
    results.close()
    assert 20 <= len(taken) <= 20 + 4 * 3 + 3  # those in flight, and results that wait for their turn


def test_a_slow_first_prompt_lets_a_bounded_number_of_others_wait():
    lm = TableModel(lambda ids: [-50.0 if ids[0] == 3 else 50.0, 0.0, 0.0, 0.0], 4, eos=0)
    taken = []

    def prompts():
        for i in range(1000):
            taken.append(i)
            yield (1,) if i else (3,)

    first = next(dts.decode_many(lm, prompts(), method=Sampling(2), max_new_tokens=200, batch_size=4, width=2))
    assert len(first.best.token_ids) == 200
    assert len(taken) == 4 * 2


# Errors -------------------------------------------------------------------------------------------------------------


def failing(text: str) -> float:
    raise ZeroDivisionError("no")


BAD = {
    "a reward that fails": (
        ragged(5),
        [letters, letters, failing, letters, letters],
        dts.RewardError,
        "prompt 2: .*no",
    ),
    "too long": ([[5], [6], [7] * 300, [8]], letters, dts.UsageError, "prompt 2: prompt of 300 tokens"),
    "empty": ([[5], [6], [], [8]], letters, dts.UsageError, "prompt 2: "),
    "no prompt": ([[5], [6], 7.5, [8]], letters, dts.UsageError, "prompt 2: prompt=7.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_error_of_one_prompt_is_raised_after_the_results_before_it(case, tiny_lm):
    prompts, reward, kind, message = BAD[case]
    results = dts.decode_many(tiny_lm, prompts, reward=reward, method=BestOfN(3), **SMALL)
    assert len([next(results), next(results)]) == 2
    with pytest.raises(kind, match=message):
        next(results)
    assert next(results, None) is None


@pytest.mark.parametrize("case", BAD)
def test_an_error_of_one_prompt_can_be_returned_in_its_place(case, tiny_lm):
    prompts, reward, kind, message = BAD[case]
    options = {"method": BestOfN(3), "max_new_tokens": 7}
    many = list(dts.decode_many(tiny_lm, prompts, reward=reward, errors="return", batch_size=12, width=3, **options))
    with pytest.raises(kind, match=message):
        raise many.pop(2)
    alone = [dts.decode(tiny_lm, prompt, reward=letters, seed=i, batch_size=3, **options)
             for i, prompt in enumerate(prompts) if i != 2]  # fmt: skip
    assert_same(many, alone, 1e-5)


def test_as_completed_yields_what_finished_before_it_raises(tiny_lm):
    prompts, reward, kind, message = BAD["a reward that fails"]
    finished = []
    with pytest.raises(kind, match=message):
        for index, _ in dts.decode_many(tiny_lm, prompts, reward=reward, method=BestOfN(3), as_completed=True, **SMALL):
            finished.append(index)
    assert 2 not in finished


def test_an_error_of_another_kind_keeps_its_type_and_names_the_prompt():
    def tell(index, rollout):
        if index == 1:
            raise KeyError("mine")

    results = dts.decode_many(TABLE, [(1,), (2,)], method=Sampling(2), on_rollout=tell, **SMALL)
    next(results)
    with pytest.raises(KeyError, match="mine") as raised:
        next(results)
    assert raised.value.__notes__ == ["at prompt 1 of decode_many"]


def test_a_model_that_fails_on_one_prompt_leaves_the_others_alone(monkeypatch):
    """In the middle of a search, with a model whose sessions are extended one after another."""
    extend = TableSession.extend

    def fails(self, parents, tokens):
        if self._prefixes[0] == (2,):
            raise KeyError("mine")
        return extend(self, parents, tokens)

    prompts = [(1,), (2,), (3,)]
    calm = list(dts.decode_many(TABLE, prompts, method=BestOfN(3), reward=letters, **SMALL))
    monkeypatch.setattr(TableSession, "extend", fails)
    first, failed, last = dts.decode_many(TABLE, prompts, method=BestOfN(3), reward=letters, errors="return", **SMALL)
    assert isinstance(failed, KeyError) and failed.__notes__ == ["at prompt 1 of decode_many"]
    assert [[r.text for r in one.rollouts] for one in (first, last)] == [
        [r.text for r in one.rollouts] for one in (calm[0], calm[2])
    ]


def test_prompts_that_raise_are_named_after_the_results_before_them():
    def prompts():
        yield (1,)
        yield (2,)
        raise OSError("disk")

    results = dts.decode_many(TABLE, prompts(), method=Sampling(2), errors="return", **SMALL)
    assert len([next(results), next(results)]) == 2
    with pytest.raises(dts.UsageError, match="prompts raised OSError at index 2: disk"):
        next(results)


@pytest.mark.parametrize(("changes", "message"), [
    ({"prompts": []}, "prompts is empty"),
    ({"prompts": "one string"}, "prompts='one string' is not allowed; give a list"),
    ({"prompts": 3}, "prompts=3 is not allowed"),
    ({"reward": [letters]}, "reward has 1 entries for 2 prompts"),
    ({"reward": [letters] * 3}, "reward has 3 entries for 2 prompts"),
    ({"width": 5, "batch_size": 4}, "width=5 is larger than batch_size=4"),
    ({"width": 0}, "width=0 is not allowed"),
    ({"batch_size": 2.5}, "batch_size=2.5"),
    ({"errors": "ignore"}, "errors='ignore'"),
    ({"total_budget": 5}, "total_budget=5"),
    ({"budget": 5}, "budget=5"),
    ({"seed": -1}, "seed=-1"),
    ({"method": MaxEnt}, "is not a method"),
])  # fmt: skip
def test_bad_options_are_named_at_the_call(changes, message):
    def table(ids):
        raise AssertionError("the model was called")

    lm = TableModel(table, 5)
    with pytest.raises(dts.UsageError, match=message):
        dts.decode_many(lm, **{"prompts": [(1,), (2,)], "method": Sampling(2), **SMALL, **changes})


@pytest.mark.parametrize(("rewards", "before", "message"), [
    ([letters], 1, "reward has 1 entries, but prompts has more"),
    ([letters] * 3, 2, "reward has 3 entries for 2 prompts"),
])  # fmt: skip
def test_another_number_of_rewards_than_a_generator_has_prompts_is_named(rewards, before, message):
    results = dts.decode_many(TABLE, iter([(1,), (2,)]), reward=rewards, method=Sampling(2), **SMALL)
    assert len(list(itertools.islice(results, before))) == before
    with pytest.raises(dts.UsageError, match=message):
        next(results)


def test_a_generator_without_prompts_is_named_before_the_model_is_called():
    with pytest.raises(dts.UsageError, match="prompts is empty"):
        list(dts.decode_many(TABLE, iter([]), method=Sampling(2), **SMALL))


# Budgets ------------------------------------------------------------------------------------------------------------


def test_a_budget_holds_for_each_prompt(tiny_lm):
    options = {"method": MaxEnt(50), "reward": letters, "max_new_tokens": 7}
    budget = dts.Budget(tokens=60)
    many = list(dts.decode_many(tiny_lm, ragged(3), budget=budget, batch_size=12, width=3, **options))
    assert_same(many, one_by_one(tiny_lm, ragged(3), budget=budget, **options), 1e-5)
    assert all(r.usage.forwarded_tokens <= 60 for r in many)


def test_a_total_budget_of_tokens_is_never_exceeded(tiny_lm):
    options = {"method": Sampling(4), "max_new_tokens": 7, "batch_size": 8, "width": 4}
    whole = sum(r.usage.forwarded_tokens for r in dts.decode_many(tiny_lm, ragged(6), **options))
    for tokens in (whole // 3, whole // 2, whole):
        found = list(dts.decode_many(tiny_lm, ragged(6), total_budget=dts.Budget(tokens=tokens), **options))
        assert sum(r.usage.forwarded_tokens for r in found) <= tokens
        assert (len(found) == 6) == (tokens == whole)
        assert any(r.partial for r in found) == (tokens < whole)


def test_a_total_budget_of_rollouts_ends_all():
    options = {"method": Sampling(4), "max_new_tokens": 3, "batch_size": 8, "width": 4}
    found = list(dts.decode_many(TABLE, TABLE_PROMPTS, total_budget=dts.Budget(rollouts=9), **options))
    assert 9 <= sum(len(r.rollouts) for r in found) < 9 + 8


# Prompts that share, and memory -------------------------------------------------------------------------------------


def test_a_shared_head_is_sent_and_counted_once(tiny_lm):
    head = random.Random(1).sample(range(5, 250), 40)
    prompts = [head + [5 + i] * (1 + i % 4) for i in range(16)]
    results = list(dts.decode_many(tiny_lm, prompts, method=Sampling(2), max_new_tokens=3, batch_size=64, width=4))
    tails = sum(len(prompt) - 40 for prompt in prompts)
    sent = [r.usage.prompt_tokens - r.usage.cached_tokens for r in results]
    assert sum(sent) == 40 + tails and sent[0] == len(prompts[0])
    assert sum(r.usage.forwarded_tokens for r in results) == sum(r.usage.unique_tokens for r in results)
    alone = one_by_one(tiny_lm, prompts, method=Sampling(2), max_new_tokens=3, width=4)
    assert_same(results, alone, 1e-5)


def test_a_head_is_kept_from_one_prompt_to_the_next(tiny_lm):
    prompts = [[*range(5, 45), 50 + i] for i in range(5)]
    results = list(dts.decode_many(tiny_lm, prompts, method=Sampling(2), max_new_tokens=3, batch_size=2, width=2))
    assert [r.usage.cached_tokens for r in results] == [0, 40, 40, 40, 40]


def test_one_prompt_many_times_is_sent_once(tiny_lm):
    prompt = list(range(5, 25))
    results = list(dts.decode_many(tiny_lm, [prompt, prompt[:12], prompt], method=Sampling(3), **SMALL))
    assert [r.usage.cached_tokens for r in results] == [0, 12, 20]
    assert_same(results, one_by_one(tiny_lm, [prompt, prompt[:12], prompt], method=Sampling(3), max_new_tokens=7), 1e-5)


def test_a_kept_prompt_is_not_sent_again(tiny_lm):
    prompt = list(range(5, 25))
    kept = tiny_lm.prefix(prompt)
    (result,) = dts.decode_many(tiny_lm, [prompt], method=Sampling(3), **SMALL)
    assert result.usage.cached_tokens == len(kept) == 20


def test_new_prompts_are_sent_in_bounded_pieces_between_steps(tiny_lm, monkeypatch):
    from dts.search import many

    monkeypatch.setattr(many, "PROMPT_TOKENS", 6)
    pieces = []
    send = batches.Prefill.send
    monkeypatch.setattr(batches.Prefill, "send", lambda self, tokens: (pieces.append(tokens), send(self, tokens)))
    forward = TreeSession.keep
    monkeypatch.setattr(TreeSession, "keep", lambda self, *args: (pieces.append("step"), forward(self, *args))[1])
    prompts = [[9, 9], list(range(10, 55)), list(range(60, 80))]

    def short(ids, logits):  # the first prompt ends early, so that the third comes in while the second is under way
        return torch.where(torch.arange(logits.shape[-1]) == 0, 50.0, logits) if ids[0, 0] == 9 else logits

    options = {"method": Sampling(2), "max_new_tokens": 30, "logits_processor": short}
    results = list(dts.decode_many(tiny_lm, prompts, batch_size=4, width=2, **options))
    first = pieces.index("step")
    between = [sum(group) for is_step, group in itertools.groupby(pieces[first:], lambda p: p == "step") if not is_step]
    assert between == [6, 6, 6, 2]
    assert_same(results, one_by_one(tiny_lm, prompts, width=2, **options), 1e-5)


def test_a_memory_bound_holds_for_all_together_and_changes_no_result(tiny_lm, monkeypatch):
    kept = tiny_lm.prefix([5, 6])
    token = kept.nbytes // 2
    bound = token * (3 * 3 * 20 * 2)
    held, sessions = [], weakref.WeakSet()
    keep = TreeSession.keep

    def measured(self, *arguments):
        sessions.add(self)
        keep(self, *arguments)
        prefixes = {id(s): s.held.nbytes for tree in sessions if tree.prompt for s in tree.prompt.chain()}
        held.append(sum(prefixes.values()) + sum(tree.cache.bytes() for tree in sessions))

    monkeypatch.setattr(TreeSession, "keep", measured)
    options = {"method": MaxEnt(12), "reward": letters, "max_new_tokens": 21}
    prompts = ragged(6)
    many = list(dts.decode_many(tiny_lm, prompts, max_kv_bytes=bound, batch_size=30, width=3, **options))
    assert 0 < max(held) <= bound
    alone = one_by_one(tiny_lm, prompts, **options)
    for one, other in zip(many, alone, strict=True):
        assert [c.token_ids for c in one.completions] == [c.token_ids for c in other.completions]


def test_a_bound_that_holds_one_prompt_serves_all_one_after_another(tiny_lm):
    token = tiny_lm.prefix([5, 6]).nbytes // 2
    prompts = [[i] * 60 for i in range(5, 9)]
    options = {"method": Sampling(3), "max_new_tokens": 5, "batch_size": 12, "width": 3}
    many = list(dts.decode_many(tiny_lm, prompts, max_kv_bytes=token * 100, **options))
    assert len(many) == 4
    with pytest.raises(dts.UsageError, match=r"prompt 0: max_kv_bytes=\d+ is too small"):
        list(dts.decode_many(tiny_lm, prompts, max_kv_bytes=token * 60, **options))


def test_room_is_shared_out_within_the_bound():
    room = Room(bound=1000, token=1, prompts=4, width=5, lane_length=20)  # 100 of lanes for a tree
    assert room.places == 4
    assert room.take(0, 50) == 70  # its share of what the lanes leave, less the prompt
    assert room.take(1, 400) == 0  # more than its share
    assert room.take(2, 60) is None
    room.give_back(1)
    assert [room.take(key, 60) for key in (1, 2, 3, 4)] == [60, 60, 60, None]


def test_memory_stays_flat_over_200_prompts_even_when_results_are_kept(tiny_lm, monkeypatch):
    prefixes, sessions = weakref.WeakSet(), weakref.WeakSet()
    settle = TreeSession._settle
    monkeypatch.setattr(TreeSession, "_settle", lambda self, prompt: (
        sessions.add(self), prefixes.update(s.held for s in prompt.chain()), settle(self, prompt))[2])  # fmt: skip
    kept, peaks = [], []
    for result in dts.decode_many(
        tiny_lm, ([5 + i, 6, 7] for i in range(200)), method=MaxEnt(3), max_new_tokens=4, batch_size=8, width=2
    ):
        kept.append(result)
        gc.collect(0)
        peaks.append((len(prefixes), sum(tree.cache.bytes() > 0 for tree in sessions)))
    assert max(tokens for tokens, _ in peaks) <= 6 and max(trees for _, trees in peaks) <= 4
    assert all(tree.cache.bytes() == 0 and not len(tree._hidden) for tree in sessions)


def test_a_result_can_be_sampled_after_its_memory_was_freed(tiny_lm):
    prompts = ragged(3)
    options = {"method": MaxEnt(6), "reward": letters, "max_new_tokens": 6}
    many = list(dts.decode_many(tiny_lm, prompts, batch_size=9, width=3, **options))
    for result, other in zip(many, one_by_one(tiny_lm, prompts, **options), strict=True):
        before = result.usage.forwarded_tokens
        drawn = result.sample(20, seed=1)
        assert [c.token_ids for c in drawn] == [c.token_ids for c in other.sample(20, seed=1)]
        assert result.usage.recomputed_tokens >= result.usage.prompt_tokens or result.usage.forwarded_tokens == before


def test_closing_the_generator_frees_everything(tiny_lm, monkeypatch):
    sessions = weakref.WeakSet()
    settle = TreeSession._settle
    monkeypatch.setattr(TreeSession, "_settle", lambda self, prompt: (sessions.add(self), settle(self, prompt))[1])
    results = dts.decode_many(tiny_lm, ragged(9), method=Sampling(3), **SMALL)
    next(results)
    results.close()
    del results
    gc.collect()
    assert not sessions


def test_prefixes_hold_what_is_used_and_cut_where_prompts_part():
    def prefix(ids):
        keys = [torch.tensor(ids, dtype=torch.float32)[None, :, None]]
        return Prefix(tuple(ids), keys, keys, torch.tensor(ids, dtype=torch.float32)[:, None])

    tree, ids = Prefixes(), [1, 2, 3, 4, 5]
    first = tree.add(tree.match(ids), prefix(ids))
    first.users = 1
    upper = tree.match([1, 2, 9])
    assert upper.held.token_ids == (1, 2) and first.held.token_ids == (3, 4, 5) and len(tree) == 5
    assert [(s.start, s.stop) for s in first.chain()] == [(0, 2), (2, 5)]
    assert torch.cat([s.held.hidden for s in first.chain()])[:, 0].tolist() == ids
    second = tree.add(upper, prefix([9]))
    second.users = 1
    assert tree.match([2]) is None
    tree.drop(first)
    assert len(tree) == 3
    tree.drop(second)
    assert len(tree) == 0


# Engine -------------------------------------------------------------------------------------------------------------


def test_one_forward_call_takes_the_paths_of_all_prompts(tiny_lm, monkeypatch):
    rows = []
    begin = batches.Forest._forward_all
    monkeypatch.setattr(batches.Forest, "_forward_all", lambda self, parts: (
        rows.append([len(slots) for _, slots, _ in parts]), begin(self, parts))[1])  # fmt: skip
    list(dts.decode_many(tiny_lm, ragged(4), method=Sampling(3), min_new_tokens=7, **SMALL))
    assert max(map(len, rows)) == 4 and max(map(sum, rows)) > 4


def test_memory_that_runs_out_halves_the_batch_and_changes_nothing(tiny_lm, monkeypatch, caplog):
    begin = batches.Forest._forward_all

    def tight(self, parts):
        if sum(len(slots) for _, slots, _ in parts) > 3:
            begin(self, parts)  # as far as it gets
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        begin(self, parts)

    options = {"method": MaxEnt(6), "reward": letters, "max_new_tokens": 7}
    expected = one_by_one(tiny_lm, ragged(4), **options)
    monkeypatch.setattr(batches.Forest, "_forward_all", tight)
    many = list(dts.decode_many(tiny_lm, ragged(4), batch_size=12, width=3, **options))
    for one, other in zip(many, expected, strict=True):
        assert [c.token_ids for c in one.completions] == [c.token_ids for c in other.completions]
    assert "continuing with" in caplog.text


def test_ctrl_c_ends_the_generator_and_frees_the_batch(tiny_lm):
    def interrupted(text: str) -> float:
        raise KeyboardInterrupt

    rewards = [letters, letters, interrupted, letters]
    finished = []
    with pytest.raises(KeyboardInterrupt):
        for result in dts.decode_many(tiny_lm, ragged(4), reward=rewards, method=BestOfN(2), width=2, batch_size=2):
            finished.append(result)
    assert len(finished) == 2


def first_slow(ids):
    """EOS never after a prompt that begins with 3; at once after others."""
    return [-50.0 if ids[0] == 3 else 50.0, 0.0, 0.0, 0.0]


def stopping(error: BaseException, calls: int):
    """A reward that raises `error` at its call number `calls` + 1."""
    left = [calls]

    def reward(text: str) -> float:
        if not left[0]:
            raise error
        left[0] -= 1
        return 0.5

    return reward


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("no")], ids=["Ctrl-C", "an error"])
def test_results_that_wait_for_their_turn_survive_what_ends_the_iterator(error):
    lm = TableModel(first_slow, 4, eos=0)  # the first prompt is slow, so that the second waits for it
    rewards = [stopping(error, 0), letters]
    results = dts.decode_many(lm, [(3,), (1,)], reward=rewards, method=Sampling(2), max_new_tokens=20, batch_size=4,
                              width=2)  # fmt: skip
    with pytest.raises((KeyboardInterrupt, dts.RewardError)):
        next(results)
    assert list(results.waiting) == [1] and len(results.waiting[1].completions) == 1
    assert list(results) == []


def test_a_result_of_an_interrupted_step_is_not_lost(monkeypatch):
    def interrupted(self, requests):
        raise KeyboardInterrupt  # in a step in which the prompt before it has ended

    lm = TableModel(first_slow, 4, eos=0)
    results = dts.decode_many(lm, [(1,), (3,)], method=Sampling(1), max_new_tokens=9, as_completed=True)
    monkeypatch.setattr(OneByOne, "extend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(results)
    assert list(results.waiting) == [0]


def test_closing_early_leaves_what_was_finished_and_not_yielded():
    results = dts.decode_many(TABLE, [(1,), (1,), (1,)], method=Sampling(1), max_new_tokens=1, as_completed=True)
    index, _ = next(results)
    results.close()
    assert index == 0 and list(results.waiting) == [1, 2]  # all three ended in one step


def test_a_request_has_a_reward_a_seed_a_budget_and_a_name_of_its_own():
    def prompts():
        yield (1, 2)
        yield dts.Request((2,), reward=lambda text: -1.0, seed=77, budget=dts.Budget(rollouts=2))
        yield dts.Request((), name="the empty one")

    options = {"method": MaxEnt(5), "max_new_tokens": 4}
    plain, own, failed = dts.decode_many(TABLE, prompts(), reward=letters, width=3, seed=9, errors="return", **options)
    alone = [dts.decode(TABLE, (1, 2), reward=letters, seed=9, batch_size=3, **options),
             dts.decode(TABLE, (2,), reward=lambda text: -1.0, seed=77, batch_size=3, budget=dts.Budget(rollouts=2),
                        **options)]  # fmt: skip
    assert [one.completions for one in (plain, own)] == [one.completions for one in alone]
    assert len(own.rollouts) == 2 and own.best.reward == -1
    assert str(failed).startswith("the empty one: prompt is empty")


def test_a_bad_seed_or_budget_of_a_request_is_that_prompts_error():
    requests = [dts.Request((1,), budget=3), dts.Request((1,), seed=-1), (1,)]
    first, second, third = dts.decode_many(TABLE, requests, method=Sampling(1), max_new_tokens=2, errors="return")
    assert "prompt 0: budget=3 is not allowed" in str(first) and "prompt 1: seed=-1" in str(second)
    assert third.completions


# Requests with settings of their own ----------------------------------------------------------------------------------


def test_requests_with_methods_and_settings_of_their_own_give_what_they_give_alone():
    own = [
        (MaxEnt(8), {"temperature": 0.5, "max_new_tokens": 3}),
        (BestOfN(5), {"top_k": 2, "batch_size": 2}),
        (Sampling(6), {}),
    ]
    requests = [dts.Request((1, 2), letters, seed=7, method=method, settings=settings) for method, settings in own]
    many = list(dts.decode_many(TABLE, requests, method=MaxEnt(3), max_new_tokens=5, width=3, batch_size=9))
    for (method, settings), result in zip(own, many, strict=True):
        options = {"max_new_tokens": 5, "batch_size": 3, **settings}
        alone = dts.decode(TABLE, (1, 2), reward=letters, method=method, seed=7, **options)
        assert result.method == method.name and [c.token_ids for c in result.completions] == [
            c.token_ids for c in alone.completions
        ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmth": 1}, "'warmth' is unknown; give batch_size, "),
        ({"seed": 1}, "'seed' is unknown"),
        ({"max_new_tokens": 9}, "max_new_tokens=9 of a request is more than the call's 7; raise max_new_tokens"),
        ({"batch_size": 4}, "batch_size=4 of a request is more than the call's 3; raise width"),
        ({"temperature": 0}, "temperature=0 is not allowed"),
    ],
)
def test_settings_of_a_request_that_cannot_be_used_are_named(settings, message):
    requests = [dts.Request((1,), settings=settings), dts.Request((2,))]
    bad, good = dts.decode_many(TABLE, requests, method=Sampling(2), errors="return", **SMALL)
    assert isinstance(bad, dts.UsageError) and message in str(bad) and good.completions


def test_a_request_ends_before_its_next_step_once_it_is_stopped():
    asked = []
    requests = [dts.Request((1,), stopped=lambda: asked.append(1) or len(asked) > 3), (1,)]
    stopped, whole = dts.decode_many(TABLE, requests, method=Sampling(50), **SMALL)
    assert len(asked) == 4 and len(stopped.rollouts) < 50 and stopped.partial and len(whole.rollouts) == 50


def test_prompts_that_come_later_join_those_in_flight():
    told = []

    def prompts():
        yield (1,)
        while len(told) < 5:
            yield LATER  # the first one continues
        yield (2,)
        assert not finished

    finished = []
    found = dts.decode_many(TABLE, prompts(), method=Sampling(40), seed=2, as_completed=True,
                            on_rollout=lambda index, rollout: told.append(index), **SMALL)  # fmt: skip
    for index, result in found:
        alone = dts.decode(
            TABLE, [(1,), (2,)][index], method=Sampling(40), seed=2 + index, max_new_tokens=7, batch_size=3
        )
        assert [r.text for r in result.rollouts] == [r.text for r in alone.rollouts]
        finished.append(index)
    assert sorted(finished) == [0, 1]
    with pytest.raises(dts.UsageError, match="LATER with nothing in flight"):
        list(dts.decode_many(TABLE, [LATER, (1,)], method=Sampling(1), **SMALL))
