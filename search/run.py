"""The one search loop: forward what the run asks for until it has enough or the budget is used up."""

from __future__ import annotations

from collections.abc import Sequence

from dts.results import Result
from dts.search.method import Method, Outcome, Run
from dts.search.scoring import BudgetSpent
from dts.search.search import Search


def run(search: Search, method: Method) -> Result:
    """One search from its start to its result."""
    under_way = method.start(search)
    while (nodes := next_nodes(search, under_way)) is not None:
        search.evaluate(nodes)
    return conclude(search, under_way.outcome(), method.name)


def next_nodes(search: Search, run: Run) -> Sequence[int] | None:
    """The nodes that the run asks for; None where it is over or a budget ends it."""
    try:
        nodes = run.ask()
    except BudgetSpent:
        return None
    return None if nodes is None or search.exhausted(next_tokens=len(nodes)) else nodes


def conclude(search: Search, outcome: Outcome, name: str) -> Result:
    """The result of a search, by what its run made of it."""
    search.usage.seconds = search.seconds
    completions = [search.completion(leaf) for leaf in outcome.ranked]
    search.end()
    return Result(
        completions, search.rollouts, search.usage, search.tree, name, outcome.cut_short, outcome.estimate,
        tuple(outcome.cut), search.target,
    )  # fmt: skip
