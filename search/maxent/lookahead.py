"""A glance one token ahead, without the model: which likely tokens would a monotone reward pay for at once?

The next-token distribution of a node is known when the node was evaluated, and a token-level reward costs no forward
pass. `dts.foresight` says what the gains found are used for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dts.foresight import Gain
from dts.softvalue import SoftValues

if TYPE_CHECKING:
    from dts.search.search import Search

TOLERANCE = 1e-12


def look_ahead(search: Search, values: SoftValues, nodes: Sequence[int], tokens: int) -> None:
    """Tell `values` what the `tokens` likeliest tokens of each of these evaluated nodes gain."""
    if not tokens or not search.reward.monotone or not nodes:
        return
    p, candidates = search.probabilities(nodes).topk(min(tokens, search.lm.vocab_size), dim=-1)  # [B, tokens]
    log_p, chosen = p.log().tolist(), candidates.tolist()
    tries = [(i, j) for i in range(len(nodes)) for j in range(len(chosen[i])) if log_p[i][j] > -700.0]
    promises = search.glance([nodes[i] for i, _ in tries], [chosen[i][j] for i, j in tries])
    gains: list[dict[int, Gain]] = [{} for _ in nodes]
    for (i, j), promise in zip(tries, promises, strict=True):
        gain = promise - search.tree.promise[nodes[i]]
        if abs(gain) > TOLERANCE:
            gains[i][chosen[i][j]] = Gain(log_p[i][j], gain)
    for node, found in zip(nodes, gains, strict=True):
        if found:
            values.foresee(node, found)
