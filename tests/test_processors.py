"""Logits processors with a state: one per path, however the search jumps between paths."""

from __future__ import annotations

import copy
import functools
import inspect
import threading

import numpy as np
import pytest
import torch
import transformers
from transformers import LogitsProcessorList, SequenceBiasLogitsProcessor, TemperatureLogitsWarper
from transformers.generation import logits_process

import dts
from dts.models.table import TableModel, random_logits
from dts.processors import MODULE, STATELESS, UNSUITED
from dts.search import METHODS, BestOfN, Greedy, MaxEnt, Sampling

VOCAB = 4
LM = TableModel(random_logits(VOCAB, 0), VOCAB)


class Alternates:
    """A toy grammar: no token twice in a row. As xgrammar's, it reads the newest token at each call after the first; it
    fails where that token belongs to another path."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.prompt: int | None = None

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if self.prompt is None:
            self.prompt = ids.shape[1]
        else:
            self.seen.append(int(ids[0, -1]))
        assert self.seen == ids[0, self.prompt :].tolist(), "tokens of another path"
        if self.seen:
            logits[:, self.seen[-1]] = -torch.inf
        return logits


class Locked(Alternates):
    """As `Alternates`, but of a kind that cannot be copied, such as a compiled grammar."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def without_state(ids, logits):
    if ids.shape[1] > 1:
        logits[:, ids[0, -1]] = -torch.inf
    return logits


def letters(text: str) -> float:
    return text.count("2") / 4


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("given", [Alternates(), Alternates, Locked, lambda: Locked(), [Alternates(), Locked]])
def test_a_state_belongs_to_one_path(name, given):
    """The same completions as from a function of the ids."""
    options = {"reward": letters, "max_new_tokens": 5, "seed": 1}
    expected = dts.decode(LM, (1,), method=METHODS[name](12, 2.0), logits_processor=without_state, **options)
    result = dts.decode(LM, (1,), method=METHODS[name](12, 2.0), logits_processor=given, **options)
    assert result.completions == expected.completions and len(result.rollouts) == len(expected.rollouts)
    for completion in result.completions:
        assert all(a != b for a, b in zip(completion.token_ids, completion.token_ids[1:], strict=False))


def test_draws_from_the_tree_keep_the_state():
    result = dts.decode(LM, (1,), method=MaxEnt(4), reward=letters, max_new_tokens=6, logits_processor=Alternates())
    for drawn in result.sample(30):
        assert all(a != b for a, b in zip(drawn.token_ids, drawn.token_ids[1:], strict=False))


def test_the_callers_object_is_left_as_it_is():
    processor = Alternates()
    for _ in range(2):
        dts.decode(LM, (1,), method=BestOfN(6), max_new_tokens=4, logits_processor=processor)
    assert processor.seen == [] and processor.prompt is None


class Counts:
    """Allows token 0 only at the third call, by a count that the ids do not show."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ids, logits):
        self.calls += 1
        logits[:, 0] = 100.0 if self.calls == 3 else -torch.inf
        return logits


def test_a_counting_processor_counts_along_each_path():
    result = dts.decode(LM, (1,), method=Sampling(30), max_new_tokens=4, logits_processor=Counts(), batch_size=3)
    assert len(result.completions) > 3
    assert all(c.token_ids[2] == 0 and c.token_ids.count(0) == 1 for c in result.completions)


class Thinks(torch.nn.Linear):
    def __deepcopy__(self, memo):
        raise AssertionError("a model was copied")


class Guided(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.inner = {"model": Thinks(2, 2)}


def test_a_model_inside_a_processor_is_shared():
    result = dts.decode(LM, (1,), method=Sampling(5), max_new_tokens=3, logits_processor=Guided())
    assert all(c.token_ids[2] == 0 for c in result.completions)
    bound = functools.partial(lambda model, ids, logits: logits, Thinks(2, 2))
    assert dts.decode(LM, (1,), method=Greedy(), max_new_tokens=2, logits_processor=bound).completions


class Fixed:
    """Says that it keeps no state."""

    stateless = True

    def __deepcopy__(self, memo):
        raise AssertionError("copied")

    def __call__(self, ids, logits):
        return without_state(ids, logits)


def test_processors_without_a_state_are_never_copied(monkeypatch):
    expected = dts.decode(LM, (1,), method=MaxEnt(8), reward=letters, max_new_tokens=4, logits_processor=without_state)
    given = LogitsProcessorList([Fixed(), TemperatureLogitsWarper(1.5), SequenceBiasLogitsProcessor([[[0], -1.0]])])
    plain = dts.decode(LM, (1,), method=MaxEnt(8), reward=letters, max_new_tokens=4, logits_processor=Fixed())
    assert plain.completions == expected.completions
    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("copied"))
    assert dts.decode(LM, (1,), method=MaxEnt(8), reward=letters, max_new_tokens=4, logits_processor=given).completions


def test_a_processor_that_cannot_be_copied_is_named_before_the_search():
    lm = TableModel(lambda prefix: pytest.fail("the search began"), VOCAB)
    with pytest.raises(dts.UsageError, match=r"Locked keeps a state and cannot be copied.*lambda: Locked"):
        dts.decode(lm, (1,), method=Greedy(), max_new_tokens=2, logits_processor=Locked())


class Raises:
    stateless = True

    def __init__(self, error):
        self.error = error

    def __call__(self, ids, logits):
        raise self.error


@pytest.mark.parametrize(("error", "said"), [(AssertionError(), "AssertionError"), (KeyError("x"), "KeyError: 'x'"),
                                             (RuntimeError("size 3\nto match"), "RuntimeError: size 3$")])  # fmt: skip
def test_an_exception_of_a_processor_is_named(error, said):
    with pytest.raises(dts.ModelError, match=f"logits processor Raises raised {said}"):
        dts.decode(LM, (1,), method=Greedy(), max_new_tokens=2, logits_processor=Raises(error))


@pytest.mark.parametrize(("answer", "said"), [
    (lambda ids, row: None, "returned NoneType"),
    (lambda ids, row: row[0], r"returned torch.float64 \[4\].*shape \[1, 4\]"),
    (lambda ids, row: row[:, :2], r"\[1, 2\]"),
    (lambda ids, row: torch.cat([row, row]), r"\[2, 4\]"),
    (lambda ids, row: row > 0, "torch.bool"),
    (lambda ids, row: row.numpy(), "ndarray"),
])  # fmt: skip
def test_an_answer_of_another_shape_is_refused(answer, said):
    with pytest.raises(dts.ModelError, match=said):
        dts.decode(LM, (1,), method=BestOfN(2), max_new_tokens=2, logits_processor=answer)


@pytest.mark.parametrize(("given", "said"), [
    (3, "logits_processor=3 is not callable"), ("x", "not callable"), ([3], "not callable"),
    (lambda ids: ids, "takes neither"), (Raises, "Raises takes neither"), (lambda: 3, "made 3"),
    (lambda: 1 / 0, "raised ZeroDivisionError"), (lambda: Alternates, "made <class"),
])  # fmt: skip
def test_what_is_no_processor_is_refused(given, said):
    with pytest.raises(dts.UsageError, match=said):
        dts.decode(LM, (1,), method=Greedy(), max_new_tokens=2, logits_processor=given)


def test_every_processor_of_transformers_was_looked_at():
    """Those that are in no list are copied for each path, which is right and slow."""
    kinds = {name for name, kind in vars(logits_process).items() if inspect.isclass(kind) and kind.__module__ == MODULE}
    watermark = {"SynthIDTextWatermarkLogitsProcessor"}  # keeps a state
    others = {"LogitsProcessor", "LogitsProcessorList", "SynthIDTextWatermarkState"}
    assert kinds - STATELESS - UNSUITED == watermark | others, transformers.__version__


def test_processors_that_need_more_than_logits_are_refused(tiny_lm):
    guided = logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, tiny_lm.model)
    with pytest.raises(dts.UsageError, match="UnbatchedClassifierFreeGuidanceLogitsProcessor"):
        dts.decode(tiny_lm, "Once", method=Greedy(), max_new_tokens=2, logits_processor=guided)


def test_a_list_is_applied_in_its_order():
    def add(ids, logits):
        return logits + torch.arange(VOCAB)

    def negate(ids, logits):
        return -logits

    table = TableModel(lambda prefix: np.zeros(VOCAB), VOCAB)
    best = [
        dts.decode(table, (1,), method=Greedy(), max_new_tokens=1, logits_processor=order).best.token_ids
        for order in ([add, negate], (negate, add))
    ]
    assert best == [(0,), (3,)]
