"""Attention of one step over spans, lanes and sinks, against attention of one path at a time."""

from __future__ import annotations

import itertools

import pytest
import torch

from dts.models.attention import LayerView, Span, Step, tree_attention

HEADS, GROUPS, DIM = 2, 3, 8
LANES, LENGTHS = [2, 3, 4, 6, 7], [1, 4, 2, 3, 4]  # lane 5 is idle
SPANS = [Span(0, 5, [2, 3, 6, 7]), Span(5, 9, [2, 3]), Span(0, 3, [4, 5])]  # the first is read by two blocks
PREFIXES = [9, 9, 3, 5, 5]


def step() -> Step:
    return Step(LANES, LENGTHS, PREFIXES, SPANS)


def test_blocks_are_lanes_that_read_the_same_spans():
    made = step()
    assert [(block.start, block.stop, block.parts) for block in made.blocks] == [
        (0, 2, [(0, 0), (1, 0)]), (2, 4, [(2, 0)]), (4, 6, [(0, 2)]),
    ]  # fmt: skip
    assert made.readers == [[(0, 2), (4, 6)], [(0, 2)], [(2, 4)]]


def test_neighbours_that_read_a_span_are_one_range():
    made = Step([0, 1, 2], [1, 1, 1], [6, 6, 4], [Span(0, 4, [0, 1, 2]), Span(4, 6, [0, 1])])
    assert made.readers == [[(0, 3)], [(0, 2)]]
    assert [block.parts for block in made.blocks] == [[(0, 0), (1, 0)], [(0, 2)]]


def one_path(query, keys, values, *, window, softcap, sinks):
    """[query heads, dim] of one query over all keys [heads, T, dim] of its path, the last being its own."""
    keys, values = (t.repeat_interleave(GROUPS, 0) for t in (keys, values))
    scores = torch.einsum("hd,htd->ht", query * 0.3, keys)
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    if window is not None:
        scores[:, : max(scores.shape[1] - window, 0)] = -torch.inf
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None]], dim=1)
    return torch.einsum("ht,htd->hd", scores.softmax(-1)[:, : values.shape[1]], values)


@pytest.mark.parametrize("by_row", [False, True], ids=["one row of paths", "a row for each path"])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(("window", "softcap"), list(itertools.product([None, 3, 6, 50], [None, 2.0])))
def test_a_step_is_what_each_path_gets_alone(window, softcap, sink, by_row):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    lanes = [random(9, HEADS, 6, DIM) for _ in range(2)]
    spans = [[random(HEADS, span.stop - span.start, DIM) for span in SPANS] for _ in range(2)]
    query, sinks = random(1, HEADS * GROUPS, len(LANES), DIM), random(HEADS * GROUPS) if sink else None
    view = LayerView(*spans, *lanes, step())
    options = {"scaling": 0.3, "sliding_window": window, "softcap": softcap, "s_aux": sinks}
    output, _ = tree_attention(None, query.transpose(0, 2) if by_row else query, view, view, None, **options)
    rows = output.reshape(len(LANES), HEADS * GROUPS, DIM)
    assert output.shape[:2] == ((len(LANES), 1) if by_row else (1, len(LANES)))
    for row, (lane, length) in enumerate(zip(LANES, LENGTHS, strict=True)):
        held = [index for index, span in enumerate(SPANS) if lane in span.lanes]
        keys, values = (torch.cat([*(spans[kind][index] for index in held), lanes[kind][lane, :, :length]], dim=1)
                        for kind in range(2))  # fmt: skip
        expected = one_path(query[0, :, row], keys, values, window=window, softcap=softcap, sinks=sinks)
        assert torch.allclose(rows[row], expected, atol=1e-5)
