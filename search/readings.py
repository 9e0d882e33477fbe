"""What searches read of next-token distributions: draws, and the likeliest tokens.

On a device the host waits for each transfer. A run therefore asks for its readings, and those of all searches under way
are answered together, by one softmax and one transfer, whatever their number. No row depends on another, so a search
reads the same numbers in company as alone.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from dts.errors import ModelError
from dts.lm import LanguageModel
from dts.search.weights import Members, weigh
from dts.settings import Decoding
from dts.tree import NONE, Tree

T = TypeVar("T")
Readings = Generator["Reading", None, T]  # yields what it has to read before it continues

DUST = 1e-12  # of probability: what rounding leaves of q - p where q is p
AT_ONCE = 2**24  # probabilities that are worked on at a time: 128 MiB for each temporary tensor


class Readable(Protocol):
    """What a reading needs of its search."""

    lm: LanguageModel
    decoding: Decoding
    tree: Tree
    members: Members | None  # of the constraint
    weighs: bool  # whether its rows are weights other than p (`dts.search.weights`)
    masks: bool  # whether rows are normalised after a constraint took tokens out

    def logits(self, nodes: Sequence[int]) -> torch.Tensor:
        """What the model and the logits processors say after these evaluated nodes, [len(nodes), V]."""

    def unread(self, nodes: Sequence[int]) -> list[int]:
        """Those of these nodes whose p is not kept, each once."""

    def keep(self, nodes: Sequence[int], p: torch.Tensor, first: int, log_kept: torch.Tensor | None) -> None:
        """Keep p of these nodes: rows of `p` [B, V], from `first` on; with `log_kept` [B], see `weigh`."""

    def log_kept(self, nodes: Sequence[int]) -> torch.Tensor:
        """See `weigh`; zeros where rows are not normalised, [len(nodes)]."""

    def measured(self, nodes: Sequence[int], masses: Sequence[Sequence[float]]) -> None:
        """What a `Measure` read."""

    def read(self, nodes: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        """Where p of these nodes is kept: a tensor [B, V] and a row of it."""

    def too_early(self, nodes: Sequence[int]) -> list[int]:
        """The rows in which EOS must not come yet."""

    def grow(
        self, nodes: Sequence[int], tokens: Sequence[int], log_p: Sequence[float], rest: Sequence[float]
    ) -> list[int]:
        """The children of `nodes` with these new tokens."""

    def no_distribution(self, node: int) -> ModelError:
        """What to raise where p is NaN."""

    def drafts(self, nodes: Sequence[int]) -> Sequence[int]:
        """What an engine has drawn after these nodes already, see `dts.lm.Stored`; NONE where it has not."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A token that was no child before, from p by inverse transform of `uniforms`, one for each node. `tilts` are logs
    of factors on p by token. `drafts`: draws from p that are there already, one for each node or none at all. Read: the
    token, its p, and the p-mass that stays outside the children."""

    uniforms: Sequence[float]
    tilts: Sequence[Mapping[int, float]] = ()
    drafts: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Likeliest:
    """The likeliest token that was no child before. Read: the same as for a draw."""


@dataclass(frozen=True, slots=True)
class Top:
    """The `count` likeliest tokens. Read: their log p, then the tokens."""

    count: int


@dataclass(frozen=True, slots=True)
class Measure:
    """The sum of the weights. Read: its log, and the log of the p-mass that a mask kept."""


@dataclass(slots=True, eq=False)
class Reading:
    """What one search asks of p after some evaluated nodes. `answer` fills it in."""

    search: Readable
    nodes: Sequence[int]
    wanted: Draw | Likeliest | Top | Measure
    rows: list[list[float]] | None = None  # by node
    error: Exception | None = None

    @property
    def answered(self) -> bool:
        return self.rows is not None or self.error is not None

    def result(self) -> list[list[float]]:
        """The rows read. Raises what went wrong, and `ModelError` where p is no distribution."""
        if self.error is not None:
            raise self.error
        assert self.rows is not None
        for node, row in zip(self.nodes, self.rows, strict=True):
            if any(map(math.isnan, row)):
                raise self.search.no_distribution(node)
        return self.rows


def draw(
    search: Readable, nodes: Sequence[int], uniforms: Sequence[float], tilts: Sequence[Mapping[int, float]] = ()
) -> Readings[list[int]]:
    """A new child for each of these evaluated nodes, as `Search.draw`."""
    return (yield from _grown(Reading(search, nodes, Draw(uniforms, tilts, search.drafts(nodes)))))


def most_likely(search: Readable, nodes: Sequence[int]) -> Readings[list[int]]:
    """A new child for each of these evaluated nodes, as `Search.most_likely`."""
    return (yield from _grown(Reading(search, nodes, Likeliest())))


def _grown(reading: Reading) -> Readings[list[int]]:
    yield reading
    tokens, log_p, rest = zip(*reading.result(), strict=True)
    return reading.search.grow(reading.nodes, [int(token) for token in tokens], log_p, rest)


def top(search: Readable, nodes: Sequence[int], count: int) -> Readings[list[list[tuple[int, float]]]]:
    """The likeliest tokens after each of these nodes with their log p, likeliest first."""
    reading = Reading(search, nodes, Top(min(count, search.lm.vocab_size)))
    yield reading
    return [[(int(token), log) for log, token in zip(row[: len(row) // 2], row[len(row) // 2 :], strict=True)]
            for row in reading.result()]  # fmt: skip


def measure(search: Readable, nodes: Sequence[int]) -> Readings[None]:
    """Note in the tree what the weights after these nodes, which were just evaluated, sum to."""
    reading = Reading(search, nodes, Measure())
    yield reading
    search.measured(nodes, reading.result())


def alone(steps: Readings[T]) -> T:
    """Run to the end, with each reading answered by itself."""
    while True:
        try:
            reading = next(steps)
        except StopIteration as end:
            return end.value
        answer([reading])


def answer(readings: Sequence[Reading]) -> None:
    """Answer all of them with one transfer. What goes wrong with one of them stays with that one."""
    try:
        _answer(readings)
    except Exception as error:
        if len(readings) == 1:
            readings[0].error = error
            return
        for reading in readings:
            answer([reading])


def _answer(readings: Sequence[Reading]) -> None:
    kinds: dict[tuple[Likeliest | Top | Measure | type[Draw], Hashable], list[Reading]] = {}
    for reading in readings:
        kind = Draw if isinstance(reading.wanted, Draw) else reading.wanted
        kinds.setdefault((kind, _shape(reading.search)), []).append(reading)
    parts = [part for group in kinds.values() for part in _parts(group)]
    columns = [_columns(part, distributions([(reading.search, reading.nodes) for reading in part])) for part in parts]
    numbers = (columns[0] if len(columns) == 1 else torch.cat([c.flatten() for c in columns])).flatten().tolist()
    place = 0
    for part, tensor in zip(parts, columns, strict=True):
        for reading in part:
            starts = [place + index * tensor.shape[1] for index in range(len(reading.nodes))]
            reading.rows = [numbers[start : start + tensor.shape[1]] for start in starts]
            place += len(starts) * tensor.shape[1]


def _shape(search: Readable) -> Hashable:
    """What makes rows of p, or of weights, out of logits: searches that have it in common are worked on together."""
    decoding = search.decoding
    return decoding.temperature, decoding.top_k, decoding.top_p, search.tree.power, search.masks


def _parts(group: Sequence[Reading]) -> Iterator[list[Reading]]:
    """Readings that are worked on together."""
    part: list[Reading] = []
    rows, most = 0, max(1, AT_ONCE // group[0].search.lm.vocab_size)
    for reading in group:
        if part and rows + len(reading.nodes) > most:
            yield part
            part, rows = [], 0
        part.append(reading)
        rows += len(reading.nodes)
    yield part


def distributions(asked: Sequence[tuple[Readable, Sequence[int]]]) -> torch.Tensor:
    """p in float64 after these evaluated nodes of each search, or their weights, [B, V]; not to be written to. All
    have the same `_shape`."""
    missing = [(search, new) for search, nodes in asked if (new := search.unread(nodes))]
    if missing:
        _softmax(missing)
    kept = [row for search, nodes in asked for row in search.read(nodes)]
    p, rows = kept[0][0], [row for _, row in kept]
    if any(other is not p for other, _ in kept):
        return torch.stack([other[row] for other, row in kept])
    return p if rows == list(range(len(p))) else p[torch.tensor(rows, device=p.device)]


def _softmax(missing: Sequence[tuple[Readable, Sequence[int]]]) -> None:
    """Let searches keep p of nodes."""
    logits = [search.logits(nodes) for search, nodes in missing]
    early: list[int] = []
    first = 0
    for search, nodes in missing:
        early += [first + row for row in search.too_early(nodes)]
        first += len(nodes)
    some = missing[0][0]
    forbidden = early, sorted(some.lm.eos_ids)
    p = some.decoding.probabilities(logits[0] if len(logits) == 1 else torch.cat(logits), forbidden)
    p, log_kept = weigh(p, missing) if any(search.weighs for search, _ in missing) else (p, None)
    first = 0
    for search, nodes in missing:
        search.keep(nodes, p, first, log_kept)
        first += len(nodes)


# -- columns that are read ---------------------------------------------------------------------------------------------


def _columns(readings: Sequence[Reading], p: torch.Tensor) -> torch.Tensor:
    """What these readings of one kind ask of p [B, V]: float64 [B, columns]."""
    wanted, vocab = readings[0].wanted, readings[0].search.lm.vocab_size
    if isinstance(wanted, Top):
        values, tokens = p[:, :vocab].topk(wanted.count, dim=-1)
        return torch.cat([values.log(), tokens.double()], dim=-1)
    if isinstance(wanted, Measure):
        kept = torch.cat([reading.search.log_kept(reading.nodes) for reading in readings])
        return torch.stack([p.sum(-1).log(), kept.to(p.device)], dim=-1)
    mass = _outside(readings, p)
    if isinstance(wanted, Likeliest):
        return _chosen(readings, p, mass, _listed_first(mass, vocab).argmax(-1, keepdim=True))
    draws = [reading.wanted for reading in readings if isinstance(reading.wanted, Draw)]
    uniforms = [uniform for draw in draws for uniform in draw.uniforms]
    tilts = [tilt for draw, r in zip(draws, readings, strict=True) for tilt in draw.tilts or [{}] * len(r.nodes)]
    drafts = [draft for draw, r in zip(draws, readings, strict=True) for draft in draw.drafts or [NONE] * len(r.nodes)]
    weights = _tilted(mass, tilts) if any(tilts) else mass
    numbers = torch.tensor(uniforms, dtype=mass.dtype, device=mass.device)[:, None]
    if any(draft != NONE for draft in drafts):
        tokens = _after_drafts(p, weights, numbers, torch.tensor(drafts, device=p.device)[:, None])
    else:
        tokens = _inverse(weights, numbers)
    return _chosen(readings, p, mass, tokens)


def _inverse(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draws [B, 1] from rows of weights [B, V] by uniforms [B, 1]."""
    cumulative = weights.cumsum(-1)
    found = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    return found.clamp(max=weights.shape[-1] - 1)


def _outside(readings: Sequence[Reading], p: torch.Tensor) -> torch.Tensor:
    """p [B, V] with 0 for tokens that are children."""
    known = [reading.search.tree.children(node) for reading in readings for node in reading.nodes]
    trees = [reading.search.tree for reading in readings for _ in reading.nodes]
    held = [(row, tree.token[child]) for row, (tree, children) in enumerate(zip(trees, known, strict=True))
            for child in children]  # fmt: skip
    if not held:
        return p
    return p.index_put(tuple(torch.tensor(held, device=p.device).T), p.new_zeros(()))


def _listed_first(mass: torch.Tensor, vocab: int) -> torch.Tensor:
    """Mass [B, V or V + 1] without that of the column of unlisted tokens, unless nothing else is left in a row."""
    if mass.shape[-1] == vocab:
        return mass
    listed = mass.clone()
    listed[:, vocab] = torch.where(mass[:, :vocab].sum(-1) > 0, 0.0, mass[:, vocab])
    return listed


def _after_drafts(p: torch.Tensor, weights: torch.Tensor, uniforms: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
    """Draws [B, 1] from rows of weights [B, V] that keep drafts [B, 1], draws from p, as often as can be.

    With q the normalised weights, a draft a is kept with probability min(1, q(a) / p(a)); else the draw is from
    max(q - p, 0). Together that is a draw from q (speculative sampling; Leviathan et al., arXiv 2211.17192). Most
    drafts are kept, so only the other rows are looked at as a whole.
    """
    at, total = drafts.clamp(min=0), weights.sum(-1, keepdim=True)
    chance = weights.gather(-1, at) / total / p.gather(-1, at)
    tokens = at.clone()
    rows = ((drafts == NONE) | (uniforms >= chance))[:, 0].nonzero()[:, 0]  # the others are kept
    if not len(rows):
        return tokens
    given, u, chance = drafts[rows] != NONE, uniforms[rows], chance[rows]
    short = (weights[rows] / total[rows] - p[rows]).clamp(min=0)
    replaced = given & (short.sum(-1, keepdim=True) > DUST)
    drawn = _inverse(torch.where(replaced, short, weights[rows]), torch.where(replaced, (u - chance) / (1 - chance), u))
    tokens[rows] = torch.where(given & ~replaced, at[rows], drawn)
    return tokens


def _chosen(readings: Sequence[Reading], p: torch.Tensor, mass: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [B, 1], their log p, and the log of the mass outside them and outside all tokens drawn after the same
    node."""
    group, first = _by_node(readings)
    if len(first) == len(group):
        rest = mass.scatter(-1, tokens, 0.0).sum(-1, keepdim=True)
    else:
        of_row = torch.tensor(group, device=p.device)
        left = mass[torch.tensor(first, device=p.device)].index_put((of_row, tokens[:, 0]), mass.new_zeros(()))
        rest = left.sum(-1, keepdim=True)[of_row]
    return torch.cat([tokens.double(), p.gather(-1, tokens).log(), rest.log()], dim=-1)


def _by_node(readings: Sequence[Reading]) -> tuple[list[int], list[int]]:
    """The node of each row, as its place among the distinct ones, and the first row of each of these."""
    place: dict[tuple[int, int], int] = {}
    first: list[int] = []
    group = []
    for row, key in enumerate((index, node) for index, reading in enumerate(readings) for node in reading.nodes):
        if key not in place:
            place[key] = len(first)
            first.append(row)
        group.append(place[key])
    return group, first


def _tilted(mass: torch.Tensor, tilts: Sequence[Mapping[int, float]]) -> torch.Tensor:
    """Rows of `mass` [B, V] times exp(tilt), up to a factor for each row, so that no tilt overflows."""
    most = max(map(len, tilts))
    padded = [[*tilt.items(), *[next(iter(tilt.items()), (0, 0.0))] * (most - len(tilt))] for tilt in tilts]
    tokens = torch.tensor([[token for token, _ in row] for row in padded], device=mass.device)  # [B, most]
    tilt = torch.tensor([[log for _, log in row] for row in padded], dtype=mass.dtype, device=mass.device)
    before = mass.gather(-1, tokens)
    others = mass.scatter(-1, tokens, 0.0)
    largest = torch.maximum((before.log() + tilt).amax(-1, keepdim=True), others.amax(-1, keepdim=True).log())
    largest = torch.where((largest > -700.0) & (largest < 0.0), 0.0, largest)  # floats hold these as they are
    after = torch.where(before > 0, (before.log() + tilt - largest).exp(), 0.0)
    factor = (-largest).clamp(max=700.0).exp()  # below e^-700 the others are 0
    return (others * factor).scatter(-1, tokens, after)
