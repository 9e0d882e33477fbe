"""How paths of MaxEnt go down the tree: one step over a list of options, used by the sampler and by the optimiser."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dts.logspace import draw, logsumexp
from dts.results import Estimate
from dts.search import readings
from dts.search.choice import Choice
from dts.search.maxent.branching import Brancher, Nodes, column
from dts.search.maxent.lookahead import LookAhead
from dts.search.maxent.order import Best
from dts.search.maxent.target import tree_estimate
from dts.search.maxent.zestimate import Partition, Trace
from dts.search.paths import Path, Plain
from dts.search.readings import Readings
from dts.softvalue import SoftValues
from dts.tree import NONE, ROOT
from dts.visits import Visits

if TYPE_CHECKING:
    from dts.search.search import Search


GREEDY_AT = 9  # the number of the rollout that is the greedy text, where there are so many


@dataclass(frozen=True, slots=True)
class Option:
    """One way to continue from a node."""

    to: int | Choice  # a child, or EXPAND for what is no child yet
    log_p: float  # log of its p-mass
    log_value: float  # log of p exp F over what is not finished there; -inf: open to paths that follow p only


@dataclass(slots=True)
class Note:
    """What a path of these policies carries."""

    explores: bool  # it follows p instead of the values
    trace: Trace | None = None  # its part in the estimate of Z
    likeliest: bool = False  # it takes the likeliest token at each step
    way: list[int] = field(default_factory=list)  # nodes to a branch point that was chosen, the next one last
    branches: bool = False  # it is to leave the tree at the end of its way


def conserves(search: Search) -> bool:
    """Whether the weights of all that follows a prefix sum to 1."""
    return search.target is None or search.target.conserves


def options(values: SoftValues, node: int, children: Sequence[int], rest: bool, widen: bool) -> list[Option]:
    """The children, and with `rest` what is no child yet; unless `widen`, the rest is for paths that follow p."""
    tree = values.tree
    found = [Option(child, tree.log_p[child], tree.log_p[child] + values.log_open[child]) for child in children]
    log_u = tree.log_unexplored[node]
    if rest and log_u > -math.inf:
        found.append(Option(Choice.EXPAND, log_u, log_u + values.log_rest[node] if widen else -math.inf))
    return found


def open_children(values: SoftValues, node: int) -> list[int]:
    """Children below which something is left to finish."""
    values.grow()
    return [child for child in values.tree.children(node) if values.log_open[child] > -math.inf]


def may_widen(values: SoftValues, node: int, children: Sequence[int], exponent: float) -> bool:
    """Whether a path that follows the values may add a child (progressive widening; Coulom 2007)."""
    tree = values.tree
    if tree.log_unexplored[node] == -math.inf:
        return False
    return not children or tree.n_children[node] < values.visits.entered[node] ** exponent


def pick(found: Sequence[Option], by_p: bool, uniform: float) -> Option:
    """One option, by p or by value."""
    return draw(found, [option.log_p if by_p else option.log_value for option in found], uniform)


def _expanded(
    search: Search, ahead: LookAhead, visits: Visits, paths: Sequence[Path], tilts: Sequence[Mapping[int, float]]
) -> Readings[list[int]]:
    """A child for each path's node: for the path that wants it the likeliest token, new or not; for the others a new
    one by a draw from p times exp(tilt)."""
    children: dict[int, int] = {}
    for path in paths:
        if path.note.likeliest:
            known = len(search.tree)
            child = children[id(path)] = yield from _likeliest(search, path.node)
            if child >= known:
                ahead.value([child])
            else:
                visits.enter(child)
    others = [(path, tilt) for path, tilt in zip(paths, tilts, strict=True) if id(path) not in children]
    if others:
        drawn = yield from _draw(search, ahead, *zip(*others, strict=True))
        children |= {id(path): child for (path, _), child in zip(others, drawn, strict=True)}
    return [children[id(path)] for path in paths]


def _likeliest(search: Search, node: int) -> Readings[int]:
    """The child with the likeliest token, which may be an old one."""
    tree = search.tree
    if tree.n_children[node]:
        ((best, *_),) = yield from readings.top(search, [node], 1)
        if (child := tree.child_with(node, best[0])) != NONE:
            return child
    return (yield from readings.most_likely(search, [node]))[0]


class GreedyPath:
    """When the path is launched that takes the likeliest token at each step: late enough to delay no early success."""

    def __init__(self, wanted: bool, rollouts: int | None) -> None:
        self._paths = 0
        self._at = min(GREEDY_AT, rollouts or GREEDY_AT) if wanted else math.inf

    def launches(self) -> bool:
        """Whether the path that is launched now is the one."""
        self._paths += 1
        if self._paths < self._at:
            return False
        self._at = math.inf
        return True


def _draw(
    search: Search, ahead: LookAhead, paths: Sequence[Path], tilts: Sequence[Mapping[int, float]]
) -> Readings[list[int]]:
    """A new child for each path's node, from p times exp(tilt), valued at once."""
    known = len(search.tree)
    uniforms = [path.rng.random() for path in paths]
    children = yield from readings.draw(search, [path.node for path in paths], uniforms, tilts)
    ahead.value([child for child in dict.fromkeys(children) if child >= known])
    return children


class Sampler(Plain):
    """DTS: follow the estimated target among what is not finished, p(a|s) exp F_open(sa), the rest u(s) exp G(s).

    A share of the paths follows p instead, so that no sequence is left out for a wrong early estimate.
    """

    distinct = True

    def __init__(
        self,
        search: Search,
        reward_scale: float,
        ahead: LookAhead,
        *,
        explore: float,
        widening: float,
        greedy: bool,
        best: Best,
    ) -> None:
        """greedy: one path takes the likeliest token at each step. It is no draw, and no estimate takes it for one."""
        super().__init__(search)
        self._ahead, self._explore, self._widening, self._best = ahead, explore, widening, best
        self._visits = Visits(search.tree)
        limit = search.budget.rollouts
        greedy = greedy and limit != 1  # one rollout is a draw
        self._greedy = GreedyPath(greedy, limit)
        self._values = SoftValues(search.tree, reward_scale, self._visits, conserves=conserves(search))
        draws = limit - 1 if greedy and limit is not None else limit
        shares = (1 - explore, explore)
        self._partition = Partition(search.tree, reward_scale, shares, draws, conserves=conserves(search))

    def arrived(self, nodes: Sequence[int]) -> Readings[None]:
        self._values.arrive(nodes)
        found = yield from self._ahead.gains(nodes)
        for node, gains in found.items():
            self._values.foresee(node, gains)

    def launch(self, path: Path) -> None:
        self._visits.enter(ROOT)
        if self._greedy.launches():
            path.note = Note(explores=True, likeliest=True)
        else:
            path.note = Note(path.rng.random() < self._explore, self._partition.start(path))

    def select(self, path: Path) -> int | Choice:
        node, values, note = path.node, self._values, path.note
        if note.likeliest:
            return Choice.EXPAND
        children = open_children(values, node)
        found = options(values, node, children, True, may_widen(values, node, children, self._widening))
        if not found:
            self._partition.give_up(note.trace)
            return Choice.BLOCKED
        option = pick(found, note.explores, path.rng.random())
        by_value, by_p = (logsumexp(logs) for logs in zip(*((o.log_value, o.log_p) for o in found), strict=True))
        note.trace.chose(option.log_p, [option.log_value - by_value, option.log_p - by_p])
        if not isinstance(option.to, Choice):
            self._visits.enter(option.to)
        return option.to

    def expand(self, paths: Sequence[Path]) -> Readings[list[int]]:
        tilts = [self._values.foresight.tilt(path.node) for path in paths]
        by_token = [{} if path.note.explores else tilt.by_token for path, tilt in zip(paths, tilts, strict=True)]
        known = len(self.search.tree)
        children = yield from _expanded(self.search, self._ahead, self._visits, paths, by_token)
        for path, child, tilt in zip(paths, children, tilts, strict=True):
            if not path.note.likeliest:
                log_factor = tilt.by_token.get(self.search.tree.token[child], 0.0)
                path.note.trace.chose(0.0, [log_factor - tilt.log_mean, 0.0])
            elif child >= known:
                self._values.force(child)
        return children

    def learn(self, path: Path) -> None:
        self._ahead.learn(path.node)
        if self.search.belongs(path.node):
            self._partition.close(path.note.trace, path.node)
        elif path.note.trace:
            self._partition.give_up(path.note.trace)
        if self._visits.close(path.node):
            self._values.learn(path.node)

    def lose(self, path: Path) -> None:
        if path.note.trace:
            self._partition.give_up(path.note.trace)
        if self._visits.close(path.node):
            self._values.learn(path.node)

    def rank(self) -> list[int]:
        """Scored leaves, best first."""
        return self._best.rank()

    def estimate(self) -> Estimate:
        """Of the target: the tree's distribution, and Z by the choices of its paths."""
        exhausted = self._values.log_open[ROOT] == -math.inf
        if exhausted:
            self.search.check_members()
        return tree_estimate(self.search, self._values, self._partition.log_z(exhausted=exhausted), self._ahead)


class Optimiser(Plain):
    """DTS*: the same descent by sharper values, among what can still beat the best reward found; or by the largest
    value plus a confidence bonus. What cannot beat it is closed, as are finished subtrees."""

    distinct = True

    def __init__(
        self,
        search: Search,
        reward_scale: float,
        ahead: LookAhead,
        *,
        explore: float,
        widening: float,
        sharpness: float,
        bonus: float | None,
        brancher: Brancher | None,
        greedy: bool,
        best: Best,
    ) -> None:
        """greedy: one path takes the likeliest token at each step."""
        super().__init__(search)
        self._ahead, self._explore, self._widening = ahead, explore, widening
        self._greedy, self._best = GreedyPath(greedy, search.budget.rollouts), best
        self._bonus, self._brancher = bonus, brancher
        self._visits = Visits(search.tree)
        known = conserves(search)
        self._values = SoftValues(search.tree, reward_scale, self._visits, conserves=known)
        self._guide = SoftValues(search.tree, sharpness * reward_scale, self._visits, conserves=known)
        self._low, self._high = math.inf, -math.inf  # rewards seen

    def arrived(self, nodes: Sequence[int]) -> Readings[None]:
        self._guide.arrive(nodes)
        self._values.arrive(nodes)
        found = yield from self._ahead.gains(nodes)
        for node, gains in found.items():
            self._guide.foresee(node, gains)
            self._values.foresee(node, gains)

    def launch(self, path: Path) -> None:
        self._visits.enter(ROOT)
        if self._greedy.launches():
            path.note = Note(explores=True, likeliest=True)
            return
        path.note = note = Note(path.rng.random() < self._explore)
        if self._brancher and not note.explores:
            self._guide.grow()
            node = self._brancher.choose(self._best.top, self._may_branch, path.rng.random())
            if node is not None:
                note.way, note.branches = self._guide.tree.path(node)[::-1], True

    def _may_branch(self, nodes: Nodes) -> NDArray[np.bool_]:
        """Whether a new child of each node could hold a better text."""
        tree = self._guide.tree
        return np.asarray(
            (column(tree.slot, nodes) != NONE)
            & (column(tree.log_unexplored, nodes) > -math.inf)
            & np.array([self._best.beatable_by_new(node) for node in nodes.tolist()], bool)
            & (column(self._guide.log_open, nodes) > -math.inf)
        )

    def select(self, path: Path) -> int | Choice:
        if path.note.likeliest:
            return Choice.EXPAND
        if not path.note.branches:
            return self._descend(path)
        if path.note.way:
            self._visits.enter(path.note.way[-1])
            return path.note.way.pop()
        path.note.branches = False
        return Choice.EXPAND if self._may_branch(np.array([path.node])).all() else self._descend(path)

    def _descend(self, path: Path) -> int | Choice:
        """By the values, or by p."""
        node, guide = path.node, self._guide
        children = open_children(guide, node)
        if guide.log_open[node] == -math.inf:
            return Choice.BLOCKED
        children = [child for child in children if self._best.beatable(child)]
        promising = self._best.beatable_by_new(node)
        widen = promising and may_widen(guide, node, children, self._widening)
        found = options(guide, node, children, promising, widen)
        if not found:
            guide.close(node)
            return Choice.PRUNED
        if path.note.explores or self._bonus is None:
            choice = pick(found, path.note.explores, path.rng.random()).to
        else:
            choice = self._by_bound(node, found, self._bonus)
        if not isinstance(choice, Choice):
            self._visits.enter(choice)
        return choice

    def _by_bound(self, node: int, found: Sequence[Option], bonus: float) -> int | Choice:
        """PUCT with soft values: V + bonus p sqrt(N(s)) / (1 + N(sa)), in units of the reward range."""
        entered, tree = self._visits.entered, self._guide.tree
        weight = bonus * math.sqrt(entered[node])

        def score(option: Option) -> float:
            if isinstance(option.to, Choice):
                value, times = self._guide.rest(node), tree.n_children[node]
            else:
                value, times = self._guide.value(option.to), entered[option.to]
            return self._scaled(value) + weight * math.exp(option.log_p) / (1 + times)

        open_to_values = [option for option in found if option.log_value > -math.inf]
        return max(open_to_values, key=score).to

    def _scaled(self, value: float) -> float:
        return (value - self._low) / (self._high - self._low) if self._high > self._low else 0.0

    def expand(self, paths: Sequence[Path]) -> Readings[list[int]]:
        foresight = self._guide.foresight
        by_token = [{} if path.note.explores else foresight.tilt(path.node).by_token for path in paths]
        return _expanded(self.search, self._ahead, self._visits, paths, by_token)

    def prunes(self, path: Path) -> bool:
        if self._best.beatable(path.node):
            return False
        self._guide.close(path.node)
        return True

    def learn(self, path: Path) -> None:
        self._ahead.learn(path.node)
        reward = self._guide.tree.reward[path.node]
        if self.search.belongs(path.node):
            self._low, self._high = min(self._low, reward), max(self._high, reward)
            self._best.learn(path.node)
        if self._close(path.node) and self._brancher:
            self._brancher.learn(path.node, path.left_at or 0, self._best.score(path.node))

    def lose(self, path: Path) -> None:
        self._close(path.node)

    def _close(self, node: int) -> bool:
        """Learn from what was finished at a node, once; False where it was known."""
        if not self._visits.close(node):
            return False
        self._guide.learn(node)
        self._values.learn(node)
        return True

    def rank(self) -> list[int]:
        """Scored leaves, best first."""
        return self._best.rank()

    def estimate(self) -> Estimate | None:
        """Of the target, by the same soft values as DTS; of Z nothing, since what was pruned is not in them. None where
        the tree holds another power of the target."""
        if self._guide.log_open[ROOT] == -math.inf:
            self.search.check_members()
        if self._best.order == "target":
            return None
        return tree_estimate(self.search, self._values, None, self._ahead)
