"""A search tree as plain lists for a file: what the report's viewer draws.

Row i of every column is one node; parents come before their children and rows are in the order of creation, so the
tree as it was after rollout k is the rows with `created` below that rollout's `nodes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dts.results import Result
from dts.text import TextState, advance, flush
from dts.tree import NONE, ROOT, Tree

Record = dict[str, Any]


def tree_record(result: Result, decode: Callable[[Sequence[int]], str], *, max_nodes: int = 20_000) -> Record:
    """The tree and the rollouts of `result`, ready for JSON.

    Columns, one entry per node, None where nothing is known: `created` (node id in the search), `parent` (row),
    `text` (what the token adds to the completion; "" for a special token or a part of a character), `log_p` (nats),
    `terminal`, `unexplored` (share of the tokens that are not children in what a draw
    chooses from), `reward`, `earned`, `upper`, and, where
    the method keeps soft values, `value`, `visits`, `entered`. `rollouts` name their `leaf` by row.

    A tree above `max_nodes` is cut to the paths of its best rollouts; `nodes` and `rollouts_kept` say what is left.
    """
    tree, values = result.tree, result.values
    nodes = _kept(result, max_nodes)
    row = {node: i for i, node in enumerate(nodes)}
    record: Record = {
        "method": result.method,
        "reward_scale": values.reward_scale if values else None,
        "nodes": {"kept": len(nodes), "total": len(tree)},
        "created": nodes,
        "parent": [row.get(tree.parent[node], NONE) for node in nodes],
        "text": _pieces(tree, nodes, decode),
        "log_p": _rounded(map(tree.own_log_p, nodes)),
        "terminal": [tree.terminal[node] for node in nodes],
        "unexplored": _rounded(math.exp(tree.log_unexplored[node] - tree.log_mass[node]) for node in nodes),
        "reward": _rounded(tree.reward[node] for node in nodes),
        "earned": _rounded(tree.earned[node] for node in nodes),
        "upper": _rounded(tree.upper[node] for node in nodes),
        "value": None,
        "visits": None,
        "entered": None,
        "rollouts": [
            {
                "index": rollout.index,
                "reward": _short(rollout.reward),
                "best_so_far": _short(rollout.best_so_far),
                "nodes": rollout.nodes,
                "start_depth": rollout.start_depth,
                "leaf": row.get(rollout.leaf),
            }
            for rollout in result.rollouts
        ],
    }
    if values:
        record["value"] = _rounded(values.value(node) for node in nodes)
        record["visits"] = [values.visits.finished[node] for node in nodes]
        record["entered"] = [values.visits.entered[node] for node in nodes]
    record["rollouts_kept"] = sum(rollout["leaf"] is not None for rollout in record["rollouts"])
    return record


def _kept(result: Result, max_nodes: int) -> list[int]:
    """All nodes where they fit, otherwise those on the paths of the best rollouts, in the order of creation."""
    tree = result.tree
    if len(tree) <= max_nodes:
        return list(range(len(tree)))
    kept = {ROOT}
    for rollout in sorted(result.rollouts, key=lambda rollout: -rollout.reward):
        with_path = kept.union(tree.path(rollout.leaf))
        if len(with_path) > max_nodes:
            break
        kept = with_path
    return sorted(kept)


def _pieces(tree: Tree, nodes: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each node adds to that of its parent."""
    states = {ROOT: TextState()}
    pieces = [""]
    for node in nodes[1:]:
        states[node], piece = advance(decode, states[tree.parent[node]], tree.token[node])
        if not tree.n_children[node]:
            piece += flush(decode, states[node])
        pieces.append(piece)
    return pieces


def _rounded(values: Iterable[float]) -> list[float | None]:
    return [_short(value) for value in values]


def _short(value: float) -> float | None:
    """Six significant digits; None for what is not a finite number."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
