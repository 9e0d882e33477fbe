"""Metrics: libraries where they exist, exact definitions where they do not. No metric drops an unparsed output."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from dts.results import Rollout
from dts.tree import Tree

UNPARSED = "(unparsed)"  # the predicted label of an output without an answer


# Classification --------------------------------------------------------------------------------------------------


def classification(references: Sequence[str], predictions: Sequence[str | None]) -> dict[str, float]:
    """Accuracy, macro-F1, Cohen's kappa and the share of unparsed outputs, all in [0, 1] but kappa in [-1, 1].

    `None` is an unparsed output: a wrong prediction of no class. Macro-F1 averages over the classes that occur
    among the references.
    """
    from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score

    filled = _filled(references, predictions)
    classes = sorted(set(references))
    # With one class only, agreement by chance is certain and kappa is 0/0: nothing beyond chance was shown.
    undefined = set(references) == set(filled) and len(classes) == 1
    return {
        "accuracy": float(accuracy_score(references, filled)),
        "macro_f1": float(f1_score(references, filled, labels=classes, average="macro", zero_division=0.0)),
        "kappa": 0.0 if undefined else float(cohen_kappa_score(references, filled)),
        "parse_failures": predictions.count(None) / len(predictions),
    }


def confusion(
    references: Sequence[str], predictions: Sequence[str | None], classes: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """Names and counts [names, names], rows true, columns predicted; the last name is `UNPARSED`."""
    from sklearn.metrics import confusion_matrix

    names = [*classes, UNPARSED]
    return names, confusion_matrix(list(references), _filled(references, predictions), labels=names)


def _filled(references: Sequence[str], predictions: Sequence[str | None]) -> list[str]:
    if not references or len(references) != len(predictions):
        raise ValueError(f"{len(references)} references for {len(predictions)} predictions; need as many, at least 1")
    return [UNPARSED if prediction is None else prediction for prediction in predictions]


# Text ------------------------------------------------------------------------------------------------------------


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU in [0, 100], sacrebleu's default (13a tokens, 4-grams)."""
    from sacrebleu.metrics.bleu import BLEU

    return float(BLEU().corpus_score(list(hypotheses), [list(references)]).score)


def rouge_l(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F1 in [0, 1], with stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, hypotheses, strict=True)
    return float(np.mean([scorer.score(reference, text)["rougeL"].fmeasure for reference, text in pairs]))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams divided by all n-grams of lower-cased words, over all texts (Li et al. 2016); 0 without any."""
    grams: list[Hashable] = []
    for text in texts:
        words = text.lower().split()
        grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(text: str, n: int = 3) -> float:
    """Share of a text's n-grams of lower-cased words that stood before in it, in [0, 1]; 0 for a text without any."""
    return 1.0 - distinct_n([text], n) if len(text.split()) >= n else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Mean sentence BLEU of each text against all others, in [0, 100] (Zhu et al. 2018). High means alike."""
    from sacrebleu.metrics.bleu import BLEU

    if len(texts) < 2:
        raise ValueError(f"self_bleu needs at least 2 texts, got {len(texts)}")
    scorer = BLEU(effective_order=True)
    others = [[*texts[:i], *texts[i + 1 :]] for i in range(len(texts))]
    return float(np.mean([scorer.sentence_score(t, rest).score for t, rest in zip(texts, others, strict=True)]))


def perplexity(logprobs: Sequence[float]) -> float:
    """exp(-mean) of log-probabilities per token, in nats; inf beyond e^700."""
    if not logprobs:
        raise ValueError("perplexity needs at least one log-probability")
    mean = math.fsum(logprobs) / len(logprobs)
    return math.exp(-mean) if mean > -700 else math.inf  # no float holds more


def pass_at_k(n: int, correct: int, k: int) -> float:
    """P(at least one of k draws without replacement from n samples is correct): unbiased (Chen et al. 2021)."""
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= correct <= n and 1 <= k <= n, got n={n}, correct={correct}, k={k}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


# Forecasts, as in M4 (Makridakis, Spiliotis & Assimakopoulos 2020) ----------------------------------------------------


def smape_steps(actual: np.ndarray, forecast: np.ndarray) -> np.ndarray:
    """200 |y - f| / (|y| + |f|) per step, in [0, 200]; a missing step (NaN) is 200, and 0/0 is 0."""
    size = np.abs(actual) + np.abs(forecast)
    error = 200.0 * np.abs(actual - forecast) / np.where(size == 0, 1.0, size)
    return np.where(np.isnan(forecast), 200.0, error)


def smape(actual: np.ndarray, forecast: np.ndarray) -> float:
    """Mean of `smape_steps`."""
    return float(smape_steps(np.asarray(actual, float), np.asarray(forecast, float)).mean())


def mase(actual: np.ndarray, forecast: np.ndarray, history: np.ndarray, season: int) -> float:
    """Mean |y - f| over the in-sample mean |x_t - x_(t-season)|.

    A missing step (NaN) counts as a forecast of 0, which is the forecast with the worst sMAPE. Of a history without
    any seasonal change (scale 0) the result is 0 for a perfect forecast, else infinite.
    """
    history = np.asarray(history, float)
    lag = season if len(history) > season else 1
    scale = float(np.abs(history[lag:] - history[:-lag]).mean())
    error = float(np.abs(np.asarray(actual, float) - np.nan_to_num(np.asarray(forecast, float), nan=0.0)).mean())
    return _ratio(error, scale, equal=0.0)


def owa(smape_value: float, mase_value: float, naive2_smape: float, naive2_mase: float) -> float:
    """Overall weighted average: both errors relative to Naive2, each averaged over the series first."""
    return 0.5 * (_ratio(smape_value, naive2_smape, equal=1.0) + _ratio(mase_value, naive2_mase, equal=1.0))


def _ratio(value: float, scale: float, equal: float) -> float:
    if scale > 0:
        return value / scale
    return equal if value == 0 else math.inf


def naive(history: np.ndarray, horizon: int) -> np.ndarray:
    """The last value, `horizon` times."""
    return np.repeat(float(history[-1]), horizon)


def seasonal_naive(history: np.ndarray, horizon: int, season: int) -> np.ndarray:
    """The last season, repeated; the last value where the history is shorter than a season."""
    last = np.asarray(history, float)[-season:] if len(history) >= season else np.asarray(history, float)[-1:]
    return np.resize(last, horizon)


def naive2(history: np.ndarray, horizon: int, season: int) -> np.ndarray:
    """Naive forecast of the seasonally adjusted series, with the last season's factors put back (M4's benchmark).

    The adjustment is classical multiplicative decomposition, where a 90 % autocorrelation test finds a season.
    """
    history = np.asarray(history, float)
    if not is_seasonal(history, season):
        return naive(history, horizon)
    factors = seasonal_factors(history, season)  # [season], the first belongs to history[0]
    phases = np.arange(len(history) + horizon) % season
    adjusted_last = history[-1] / factors[phases[len(history) - 1]]
    return adjusted_last * factors[phases[len(history) :]]


def is_seasonal(history: np.ndarray, season: int) -> bool:
    """M4's test: |autocorrelation at the season| above 1.645 standard errors (Bartlett), with 3 seasons or more."""
    n = len(history)
    if season <= 1 or n < 3 * season or season > 10 * math.log10(n):  # 10 log10(n) is how far R's acf looks
        return False
    centred = history - history.mean()
    variance = float(centred @ centred)
    if variance == 0:
        return False
    acf = np.array([centred[lag:] @ centred[:-lag] for lag in range(1, season + 1)]) / variance
    limit = 1.645 * math.sqrt((1 + 2 * float(np.sum(acf[:-1] ** 2))) / n)
    return abs(float(acf[-1])) > limit


def seasonal_factors(history: np.ndarray, season: int) -> np.ndarray:
    """Multiplicative factors [season] with mean 1: series over centred moving average, averaged by phase."""
    weights = np.ones(season) if season % 2 else np.r_[0.5, np.ones(season - 1), 0.5]
    trend = np.convolve(history, weights / season, mode="valid")
    start = len(weights) // 2
    ratio = history[start : start + len(trend)] / trend
    phase = (start + np.arange(len(trend))) % season
    factors = np.array([ratio[phase == p].mean() for p in range(season)])
    return factors / factors.mean()


# Rollouts --------------------------------------------------------------------------------------------------------


class Monotonicity(NamedTuple):
    """What chance gives: the expected share, and the standard deviation of one run's share."""

    mean: float
    deviation: float


def monotonicity(rewards: Sequence[float]) -> float:
    """Share of rollouts i > 1 with reward_i >= reward_(i-1); NaN for fewer than two rollouts."""
    values = np.asarray(rewards, float)
    return float((values[1:] >= values[:-1]).mean()) if len(values) > 1 else math.nan


def best_so_far(rewards: Sequence[float]) -> list[float]:
    """The running maximum, which cannot fall."""
    return np.maximum.accumulate(np.asarray(rewards, float)).tolist() if len(rewards) else []


def independent_monotonicity(rollouts: int) -> Monotonicity:
    """Monotonicity of independent draws of a continuous reward.

    Ranks are a uniform random permutation, so each transition rises with probability 1/2, and the number of ascents
    of a permutation of n (Eulerian) has variance (n + 1) / 12.
    """
    if rollouts < 2:
        return Monotonicity(math.nan, math.nan)
    return Monotonicity(0.5, math.sqrt((rollouts + 1) / 12) / (rollouts - 1))


def shuffled_monotonicity(rewards: Sequence[float], draws: int = 2000, seed: int = 0) -> Monotonicity:
    """Monotonicity of the same rewards in random order, ties included.

    The mean is exact: 1/2 plus half the share of tied pairs. The deviation comes from `draws` permutations.
    """
    values = np.asarray(rewards, float)
    if len(values) < 2:
        return Monotonicity(math.nan, math.nan)
    shuffled = np.random.default_rng(seed).permuted(np.tile(values, (draws, 1)), axis=1)  # [draws, n]
    shares = (shuffled[:, 1:] >= shuffled[:, :-1]).mean(axis=1)
    return Monotonicity(expected_monotonicity(rewards), float(shares.std()))


def expected_monotonicity(rewards: Sequence[float]) -> float:
    """The mean alone, without permutations; NaN for fewer than two rewards."""
    n = len(rewards)
    if n < 2:
        return math.nan
    counts = np.unique(np.asarray(rewards, float), return_counts=True)[1]
    return 0.5 + 0.5 * float((counts * (counts - 1)).sum()) / (n * (n - 1))


def tokens_reused(tree: Tree, rollouts: Sequence[Rollout]) -> float | None:
    """Share of the rollouts' tokens that an earlier one, or another beside it, has as well: 1 - new / total. None
    without any token."""
    total = sum(rollout.length for rollout in rollouts)
    new = {node for rollout in rollouts for node in tree.path(rollout.leaf)}
    return 1 - len(new) / total if total else None


def branch_depth(rollouts: Sequence[Rollout]) -> float | None:
    """Median share of its text after which a rollout leaves the tree of earlier ones; None without any rollout."""
    return float(np.median([r.start_depth / max(r.length, 1) for r in rollouts])) if rollouts else None
