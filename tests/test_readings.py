"""What searches read of the model's distributions: how often the host waits for a device, and that company changes
nothing."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import pytest
import torch
from families import ByteTokenizer, random_model
from torch.utils._python_dispatch import TorchDispatchMode

import dts
from dts.models.forest import Forest
from dts.models.huggingface import HFModel
from dts.models.table import TableModel, random_logits
from dts.search import METHODS, BestOfN, Greedy, MaxEnt, ParticleFilter, Sampling, readings

WAITS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default"}
TO_HOST = ("tolist", "cpu", "numpy")


class Transfers(TorchDispatchMode):
    """Counts what would make the host wait for a device: reads of tensors by Python, and operators that need a number
    of a tensor. A device is not needed to count them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        for name in TO_HOST:
            read = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, self._counted(read))

    def _counted(self, read):
        def counting(tensor, *args, **kwargs):
            self.count += 1
            return read(tensor, *args, **kwargs)

        return counting

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func) in WAITS or (func.overloadpacket is torch.ops.aten.index and _has_mask(args[1]))
        return func(*args, **(kwargs or {}))


def _has_mask(indices) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


def monotone(text: str) -> float:
    return len(set(text)) / 100


@pytest.fixture(scope="module")
def lm():
    model = HFModel(random_model("llama"), ByteTokenizer())
    model.open([5], batch_size=1, max_new_tokens=1)  # with the self-check
    return model


def counted(lm, monkeypatch, searches, **options) -> list[int]:
    """Transfers before each forward call, and after the last one, while so many searches are decoded together."""
    before = []
    forward = Forest._forward_all
    prompts = [[5 + 7 * i, 6, 7, 8] for i in range(searches)]
    with monkeypatch.context() as patch, Transfers(patch) as transfers:
        patch.setattr(Forest, "_forward_all", lambda self, parts: (before.append(transfers.count),
                                                                   forward(self, parts))[1])  # fmt: skip
        list(dts.decode_many(lm, prompts, batch_size=4 * searches, width=4, max_new_tokens=9, min_new_tokens=9,
                             reward=monotone, **options))  # fmt: skip
    return [now - last for last, now in itertools.pairwise([0, *before, transfers.count])]


def test_the_counter_sees_what_makes_the_host_wait(monkeypatch):
    with monkeypatch.context() as patch, Transfers(patch) as transfers:
        tensor = torch.tensor([0.0, 1.0])
        reads = [tensor.tolist, tensor[0].item, tensor.any().__bool__, tensor.nonzero, tensor[1].__float__, tensor.cpu,
                 tensor.numpy, lambda: tensor[tensor > 0]]  # fmt: skip
        for number, read in enumerate(reads, start=1):
            read()
            assert transfers.count == number


@pytest.mark.parametrize("searches", [1, 2, 8])
@pytest.mark.parametrize("method", [Sampling(4), BestOfN(4), Greedy(), ParticleFilter(4)], ids=lambda m: m.name)
def test_the_host_waits_once_a_step_for_any_number_of_searches(method, searches, lm, monkeypatch):
    assert counted(lm, monkeypatch, searches, method=method) == [1] * 9


@pytest.mark.parametrize("search", ["sample", "best"])
@pytest.mark.parametrize("searches", [1, 8])
def test_look_ahead_adds_one_wait_a_step_for_any_number_of_searches(search, searches, lm, monkeypatch):
    """The likeliest tokens are read before the reward can say which to draw more often. Paths at one node wait for each
    other, so the first tokens take up to one more for each path."""
    method = MaxEnt(4, search=search, values="online", greedy=False)
    first, second, *later = counted(lm, monkeypatch, searches, method=method)
    assert first <= 1 + 4 and max([second, *later]) <= 3
    assert later[1:] == [2] * 6


@pytest.mark.parametrize("search", ["sample", "best"])
@pytest.mark.parametrize("searches", [1, 8])
def test_the_greedy_path_adds_at_most_one_wait_to_a_step(search, searches, lm, monkeypatch):
    method = MaxEnt(4, search=search, values="online")
    first, second, *later = counted(lm, monkeypatch, searches, method=method)
    assert first <= 1 + 4 + 1 and second <= 1 + 4
    assert later == [3] * 7


# Company changes nothing ----------------------------------------------------------------------------------------------


def test_rows_of_one_softmax_are_what_each_search_computes_alone():
    table = TableModel(random_logits(300, 5), 300, eos=0)
    prompts = [(1, 2), (3,), (4, 4, 4), (2, 1)]
    options = {"method": MaxEnt(8, values="online"), "max_new_tokens": 4, "reward": monotone, "top_p": 0.9}
    many = list(dts.decode_many(table, prompts, batch_size=16, width=4, **options))
    alone = [dts.decode(table, p, batch_size=4, seed=i, **options) for i, p in enumerate(prompts)]
    for one, other in zip(many, alone, strict=True):
        assert one.tree.to_dict() == other.tree.to_dict()


def test_what_is_read_does_not_depend_on_how_many_rows_are_worked_on_at_a_time(monkeypatch):
    table = TableModel(random_logits(30, 5), 30, eos=0)
    options = {"method": MaxEnt(8), "max_new_tokens": 4, "batch_size": 16, "width": 4}
    whole = [r.tree.to_dict() for r in dts.decode_many(table, [(1,), (2,), (3,)], **options)]
    sizes = []
    columns = readings._columns
    monkeypatch.setattr(readings, "_columns", lambda part, p: (sizes.append(len(part)), columns(part, p))[1])
    monkeypatch.setattr(readings, "AT_ONCE", 30)
    assert [r.tree.to_dict() for r in dts.decode_many(table, [(1,), (2,), (3,)], **options)] == whole
    assert set(sizes) == {1}


def test_logits_that_are_no_distribution_are_the_error_of_their_prompt(monkeypatch):
    table = random_logits(5, 3)
    lm = TableModel(lambda ids: table(ids) * (math.nan if ids[0] == 2 and len(ids) > 1 else 1.0), 5, eos=0)
    options = {"method": MaxEnt(6), "max_new_tokens": 4}
    one, error, other = dts.decode_many(lm, [(1,), (2,), (3,)], errors="return", batch_size=9, width=3, **options)
    assert isinstance(error, dts.ModelError) and "prompt 1: table gave logits with NaN" in str(error)
    for seed, result in ((0, one), (2, other)):
        assert result.completions == dts.decode(lm, (seed + 1,), batch_size=3, seed=seed, **options).completions


def test_a_shared_reading_that_fails_is_read_one_by_one(monkeypatch):
    """As where memory does not allow all at once."""
    columns = readings._columns

    def tight(part, p):
        if len(part) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return columns(part, p)

    table = TableModel(random_logits(5, 3), 5, eos=0)
    options = {"method": MaxEnt(6), "max_new_tokens": 4, "batch_size": 9, "width": 3}
    expected = [r.completions for r in dts.decode_many(table, [(1,), (2,), (3,)], **options)]
    monkeypatch.setattr(readings, "_columns", tight)
    assert [r.completions for r in dts.decode_many(table, [(1,), (2,), (3,)], **options)] == expected


@pytest.mark.parametrize("name", METHODS)
def test_a_run_driven_by_hand_asks_for_nodes_only(name):
    """`reading` is for those who drive several runs at once; nobody has to know of it."""
    asked = []

    class ByHand:
        def __init__(self, method):
            self.method, self.name, self.budget, self.batch_size = method, name, method.budget, method.batch_size

        def start(self, search):
            run = self.method.start(search)
            ask, run.ask = run.ask, lambda: (asked.append(ask()), asked[-1])[1]
            return run

    table = TableModel(random_logits(5, 3), 5, eos=0)
    options = {"max_new_tokens": 4, "batch_size": 3, "reward": monotone}
    by_hand = dts.decode(table, (1,), method=ByHand(METHODS[name](6, 2.0)), **options)
    assert asked.pop() is None or by_hand.partial
    assert asked and all(isinstance(node, int) for nodes in asked for node in nodes)
    assert by_hand.completions == dts.decode(table, (1,), method=METHODS[name](6, 2.0), **options).completions


# Draws --------------------------------------------------------------------------------------------------------------


def test_tilts_that_overflow_or_vanish_are_drawn_from_in_logs():
    mass = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.5, 0.25, 0.25, 0.0], [0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    tilted = readings._tilted(mass, [{1: 1000.0, 2: 999.0}, {0: -math.inf, 3: 800.0}, {}])
    share = tilted / tilted.sum(-1, keepdim=True)
    assert share[0].tolist() == pytest.approx([0.0, 1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0.0], abs=1e-12)
    assert share[1].tolist() == pytest.approx([0.0, 0.5, 0.5, 0.0], abs=1e-15)
    assert tilted[2].tolist() == mass[2].tolist()
    gone = readings._tilted(torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64), [{1: -1e8, 2: -1e8 + math.log(3.0)}])
    assert (gone[0] / gone.sum()).tolist() == pytest.approx([0.0, 0.25, 0.75])


def test_several_draws_from_a_node_leave_the_mass_outside_all_of_them():
    lm = TableModel(lambda ids: [math.log(p) for p in (0.1, 0.2, 0.3, 0.4)], 4)
    outside = []

    class Twice:
        name = "twice"

        def budget(self):
            return dts.Budget(rollouts=1)

        def batch_size(self):
            return 4

        def start(self, search):
            def steps():
                children = search.draw([0, 0, 0], [0.05, 0.95, 0.2])
                outside.append((children, list(map(search.tree.token.__getitem__, children)),
                                math.exp(search.tree.log_unexplored[0])))  # fmt: skip
                search.record(children[:1], [0])
                yield from ()

            return dts.search.GeneratorRun(search, steps())

    dts.decode(lm, (1,), method=Twice(), max_new_tokens=1)
    assert outside == [([1, 2, 3], [0, 3, 1], pytest.approx(0.3))]


def test_many_draws_from_one_node_take_memory_in_proportion_to_their_number():
    """3,000 particles that begin at the root: each is no row of all the others."""
    lm = TableModel(random_logits(6, seed=0), 6, eos=0)
    tracemalloc.start()
    try:
        result = dts.decode(lm, (1,), reward=lambda text: 0.0, method=ParticleFilter(3000), max_new_tokens=2)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(result.rollouts) == 3000
    assert most < 30e6
