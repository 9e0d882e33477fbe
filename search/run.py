"""The one search loop: forward what the run asks for until it has enough or the budget is used up."""

from __future__ import annotations

from dts.results import Result
from dts.search.method import Method, Outcome
from dts.search.search import Search


def run(search: Search, method: Method) -> Result:
    """One search from its start to its result."""
    under_way = method.start(search)
    while (nodes := under_way.ask()) is not None:
        if search.exhausted(next_tokens=len(nodes)):
            break
        search.evaluate(nodes)
    return conclude(search, under_way.outcome(), method.name)


def conclude(search: Search, outcome: Outcome, name: str) -> Result:
    """The result of a search, by what its run made of it."""
    search.usage.seconds = search.seconds
    completions = [search.completion(leaf) for leaf in outcome.ranked]
    search.forget()
    return Result(completions, search.rollouts, search.usage, search.tree, name, outcome.cut_short, outcome.estimate)
