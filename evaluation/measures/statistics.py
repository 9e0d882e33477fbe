"""Intervals and paired tests. The unit that is resampled is an item, or a cluster of items that belong together."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np

AT_ONCE = 100_000  # numbers of units that are held together


class Interval(NamedTuple):
    """An estimate with the two ends of its confidence interval; NaN ends where one unit gives no spread."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[..., float],
    *columns: Sequence[Any] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    method: Literal["bca", "percentile"] = "bca",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of `statistic(*columns)` when items (rows across the columns) are drawn with replacement.

    With `clusters` (one name per item) whole clusters are drawn: use subjects where items of one subject are alike.
    """
    if not columns or any(len(column) != len(columns[0]) for column in columns) or not len(columns[0]):
        raise ValueError(f"bootstrap needs columns of one length above 0, got lengths {[len(c) for c in columns]}")
    arrays = [np.asarray(column) for column in columns]
    units = _Units.of(len(arrays[0]), clusters)
    value = float(statistic(*arrays))
    if len(units) < 2:
        return Interval(value, math.nan, math.nan)

    def of_units(chosen: np.ndarray) -> float:
        rows = units.rows(chosen)
        return float(statistic(*(array[rows] for array in arrays)))

    found = np.array([of_units(chosen) for chosen in _draws(len(units), resamples, seed)])
    ends = None
    if method == "bca":
        left_out = (np.delete(np.arange(len(units)), unit) for unit in range(len(units)))
        ends = _bca(found, value, np.array([of_units(chosen) for chosen in left_out]), level)
    # BCa has no acceleration or bias where the jackknife or all resamples agree; percentiles always exist.
    return Interval(value, *(ends or percentiles(found, level)))


def _draws(units: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """Numbers of units, drawn with replacement, [units], `count` times: the same however many are held at once."""
    rng = np.random.default_rng(seed)
    at_once = max(1, AT_ONCE // units)
    for start in range(0, count, at_once):
        yield from rng.integers(0, units, size=(min(at_once, count - start), units))


def _bca(found: np.ndarray, value: float, jackknife: np.ndarray, level: float) -> tuple[float, float] | None:
    """Efron's bias-corrected and accelerated interval (1987), as in scipy.stats.bootstrap; None where it is 0/0.

    found: the statistic of each resample. jackknife: of all units but one.
    """
    normal = NormalDist()
    share = float((found < value).mean() + (found <= value).mean()) / 2
    influence = jackknife.mean() - jackknife
    spread = float((influence**2).sum()) ** 1.5
    if not 0 < share < 1 or not spread > 0:
        return None
    bias, acceleration = normal.inv_cdf(share), float((influence**3).sum()) / (6 * spread)
    tail = normal.inv_cdf((1 - level) / 2)
    sums = [bias + end for end in (tail, -tail)]
    ends = [normal.cdf(bias + z / (1 - acceleration * z)) for z in sums]
    low, high = np.percentile(found, [100 * end for end in ends])
    return float(low), float(high)


def resamples(
    items: int, clusters: Sequence[Hashable] | None = None, *, count: int = 2000, seed: int = 0
) -> list[np.ndarray]:
    """Row numbers of `count` bootstrap samples: what `bootstrap` draws. For many statistics of the same samples."""
    units = _Units.of(items, clusters)
    chosen = np.random.default_rng(seed).integers(len(units), size=(count, len(units)))
    return [units.rows(row) for row in chosen]


def percentiles(values: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of a statistic's values over bootstrap samples."""
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def mean(values: np.ndarray) -> float:
    """The mean, as a statistic for `bootstrap`."""
    return float(np.mean(values))


def paired_difference(
    first: Sequence[float], second: Sequence[float], *, clusters: Sequence[Hashable] | None = None, **options: Any
) -> Interval:
    """Interval of mean(first - second) over items scored by both; options as in `bootstrap`."""
    return bootstrap(mean, _differences(first, second), clusters=clusters, **options)


def sign_flip_test(
    first: Sequence[float],
    second: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
    permutations: int = 9999,
    seed: int = 0,
) -> float:
    """Two-sided p-value of mean(first - second) = 0 by flipping signs of paired differences.

    Exact where all 2^units patterns fit into `permutations`. With `clusters`, whole clusters flip together.
    """
    differences = _differences(first, second)
    units = _Units.of(len(differences), clusters)
    sums = np.add.reduceat(differences[units.order], units.starts)
    if len(sums) < 2 or not sums.any():
        return 1.0  # one unit: both signs are equally extreme

    import scipy.stats

    result = scipy.stats.permutation_test(
        (sums,),
        lambda flipped, axis: np.sum(flipped, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=permutations,
        alternative="two-sided",
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def wilcoxon(first: Sequence[float], second: Sequence[float], *, clusters: Sequence[Hashable] | None = None) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test (1945); pairs that agree are left out, all of them give 1.

    With `clusters`, the test is of the mean difference of each cluster.
    """
    differences = _cluster_means(_differences(first, second), clusters)
    if not np.any(differences):
        return 1.0

    import scipy.stats

    return float(scipy.stats.wilcoxon(differences).pvalue)


def cohens_d(first: Sequence[float], second: Sequence[float]) -> float:
    """(mean of first - mean of second) over the pooled standard deviation of the two; NaN where neither varies."""
    a, b = np.asarray(first, float), np.asarray(second, float)
    if len(a) < 2 or len(b) < 2:
        return math.nan
    pooled = ((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2)
    return float((a.mean() - b.mean()) / math.sqrt(pooled)) if pooled > 0 else math.nan


def cohens_dz(first: Sequence[float], second: Sequence[float]) -> float:
    """Mean of the paired differences over their standard deviation; NaN where they do not vary.

    Not comparable with `cohens_d`: pairs that are alike make d_z larger.
    """
    differences = _differences(first, second)
    spread = differences.std(ddof=1) if len(differences) > 1 else 0.0
    return float(differences.mean() / spread) if spread > 1e-12 * max(1.0, abs(differences.mean())) else math.nan


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted for their number (Holm 1979), by name."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _differences(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    if len(first) != len(second) or not len(first):
        raise ValueError(f"paired scores need one length above 0, got {len(first)} and {len(second)}")
    return np.asarray(first, float) - np.asarray(second, float)


def _cluster_means(values: np.ndarray, clusters: Sequence[Hashable] | None) -> np.ndarray:
    units = _Units.of(len(values), clusters)
    return np.asarray(np.add.reduceat(values[units.order], units.starts) / units.sizes)


@dataclass(frozen=True, slots=True)
class _Units:
    """What is resampled: groups of rows, in the order in which they first occur."""

    order: np.ndarray  # row numbers, [items], the rows of a unit together
    starts: np.ndarray  # of each unit in `order`, [units]
    sizes: np.ndarray  # [units]

    def __len__(self) -> int:
        return len(self.starts)

    def rows(self, chosen: np.ndarray) -> np.ndarray:
        """The rows of the chosen units, one after another."""
        sizes = self.sizes[chosen]
        first = np.cumsum(sizes) - sizes  # where each chosen unit begins in the result
        return self.order[np.arange(sizes.sum()) + np.repeat(self.starts[chosen] - first, sizes)]

    @classmethod
    def of(cls, items: int, clusters: Sequence[Hashable] | None) -> _Units:
        if clusters is None:
            return cls(np.arange(items), np.arange(items), np.ones(items, int))
        if len(clusters) != items:
            raise ValueError(f"{len(clusters)} cluster names for {items} items; give one per item")
        rows: dict[Hashable, list[int]] = {}
        for row, name in enumerate(clusters):
            rows.setdefault(name, []).append(row)
        sizes = np.array([len(members) for members in rows.values()], int)
        return cls(np.concatenate([np.array(m) for m in rows.values()]), np.cumsum(sizes) - sizes, sizes)
