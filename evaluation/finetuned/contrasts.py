"""Compares fine-tuned models on the same prompts: paired tests, four questions, reward hacking, a verdict.

Every value is a mean over training seeds first; the unit that is resampled and sign-flipped is the cluster of prompts.
So intervals and p-values speak about new prompts for these trained models; how much another training seed changes is
listed beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dts.evaluation.finetuned.replies import Values
from dts.evaluation.measures import statistics

MARGIN = 0.05  # of the reference's mean: a loss of quality below this counts as kept
ALPHA = 0.05
RELATIVE = ("diversity", "words")  # measures whose relative change is reported too
DRIFT = 0.2  # relative change of length from which it is reported
DESCRIPTIVE = (  # reported, but no claim rests on their tests
    "self_bleu", "distinct_1", "words", "train_reward", "repetition", "fluency", "kl",
)  # fmt: skip
HELD_OUT = ("engagement", "judge", "rouge_l", "pass@1")
BANDS = ((0.25, "> 25 %"), (0.15, "15-25 %"), (0.08, "8-15 %"), (-math.inf, "< 8 %"))


@dataclass(frozen=True, slots=True)
class Question:
    """A research question and how it is answered."""

    text: str
    contrasts: tuple[tuple[str, str], ...]  # (model, reference)
    metrics: tuple[str, ...]  # the first at hand decides; "kept" looks at all
    kind: str = "up"  # up: the difference is above 0; kept: it is not below -MARGIN


QUESTIONS = (
    Question("Does polychromic training raise diversity?", (("polychromic", "baseline"),), ("diversity", "distinct_2")),
    Question("Is quality kept?", (("polychromic", "baseline"),),
             ("rouge_l", "valid", "engagement", "pass@1", "judge"), "kept"),
    Question("Does GRPO add to its starting model?",
             (("grpo_baseline", "baseline"), ("grpo_polychromic", "polychromic")), ("pass@1", "engagement", "judge")),
    Question("Does the polychromic warm start help GRPO?", (("grpo_polychromic", "grpo_baseline"),),
             ("pass@10", "pass@5", "pass@1", "engagement", "diversity", "judge")),
)  # fmt: skip


def describe(values: Values, clusters: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Mean, BCa interval over clusters, and the mean of each seed, by metric."""
    return {
        name: {**_interval(statistics.bootstrap(statistics.mean, v.mean(axis=0), clusters=clusters)),
               "seed_means": v.mean(axis=1).tolist()}
        for name, v in values.items()
    }  # fmt: skip


def contrast(own: Values, reference: Values, clusters: Sequence[str]) -> dict[str, dict[str, Any]]:
    """own - reference by metric: interval, tests, effect sizes, and differences by seed."""
    found = {}
    for name in (name for name in own if name in reference):
        a, b = own[name].mean(axis=0), reference[name].mean(axis=0)  # [items]
        seeds = min(len(own[name]), len(reference[name]))
        by_seed = own[name][:seeds].mean(axis=1) - reference[name][:seeds].mean(axis=1)
        found[name] = {
            **_interval(statistics.paired_difference(a, b, clusters=clusters)),
            "reference_mean": float(b.mean()),
            "with_seeds": list(over_seeds(own[name], reference[name], clusters)),
            "p": statistics.sign_flip_test(a, b, clusters=clusters),
            "p_wilcoxon": statistics.wilcoxon(a, b, clusters=clusters),
            "d": statistics.cohens_d(a, b),
            "d_z": statistics.cohens_dz(a, b),
            "by_seed": by_seed.tolist(),
            "seed_deviation": float(by_seed.std(ddof=1)) if seeds > 1 else None,
        }
        if name in RELATIVE:
            found[name]["relative"] = _interval(statistics.bootstrap(_relative, a, b, clusters=clusters))
    return found


def over_seeds(
    own: np.ndarray, reference: np.ndarray, clusters: Sequence[str], count: int = 2000
) -> tuple[float, float]:
    """The 95 % percentile interval of the difference when prompts (whole clusters) and training seeds are drawn with
    replacement, the prompts the same for both models: [seeds, items] each. Too short for two or three seeds, as any
    bootstrap of two or three units is."""
    rng, items = np.random.default_rng(0), own.shape[1]
    rows = statistics.resamples(items, clusters, count=count)
    weights = np.stack([np.bincount(chosen, minlength=items) / len(chosen) for chosen in rows])  # [count, items]

    def means(values: np.ndarray) -> np.ndarray:
        seeds = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=count) / len(values)
        return np.einsum("cs,si,ci->c", seeds, values, weights, optimize=True)

    return statistics.percentiles(means(own) - means(reference))


def _relative(own: np.ndarray, reference: np.ndarray) -> float:
    base = float(np.mean(reference))
    return float(np.mean(own)) / base - 1.0 if base else math.nan


def judged(scores: Sequence[float | None], clusters: Sequence[str]) -> dict[str, Any] | None:
    """A judge's preference for the first model less one half, as a contrast. None where nothing could be read."""
    kept = [(s, c) for s, c in zip(scores, clusters, strict=True) if s is not None]
    if not kept:
        return None
    values, names = [s for s, _ in kept], [c for _, c in kept]
    half = [0.5] * len(values)
    return {
        **_interval(statistics.paired_difference(values, half, clusters=names)),
        "reference_mean": 0.5,
        "p": statistics.sign_flip_test(values, half, clusters=names),
        "p_wilcoxon": statistics.wilcoxon(values, half, clusters=names),
        "d_z": statistics.cohens_dz(values, half),
        "pairs": len(values),
        "unread": len(scores) - len(values),
    }


def _interval(found: statistics.Interval) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


def adjust(contrasts: Mapping[str, dict[str, dict[str, Any]]]) -> None:
    """Put `p_holm` beside the p-values, adjusted over all contrasts and measures together but the descriptive ones."""
    raw = {
        f"{pair}\0{name}": entry["p"]
        for pair, found in contrasts.items()
        for name, entry in found.items()
        if name not in DESCRIPTIVE
    }
    for key, value in statistics.holm(raw).items():
        pair, name = key.split("\0")
        contrasts[pair][name]["p_holm"] = value


def pair_name(pair: tuple[str, str]) -> str:
    return f"{pair[0]} vs {pair[1]}"


# Questions ---------------------------------------------------------------------------------------------------------


def answer(question: Question, contrasts: Mapping[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """`answer` is yes, no, not shown or not evaluated; `evidence` lists what it rests on."""
    pairs = [pair_name(pair) for pair in question.contrasts if pair_name(pair) in contrasts]
    if not pairs:
        needed = ", ".join(sorted({name for pair in question.contrasts for name in pair}))
        return {"question": question.text, "answer": "not evaluated", "why": f"needs the models {needed}",
                "evidence": []}  # fmt: skip
    judge = _kept if question.kind == "kept" else _up
    answers, evidence = [], []
    for pair in pairs:
        found = {name: contrasts[pair][name] for name in question.metrics if name in contrasts[pair]}
        used = found if question.kind == "kept" else dict(list(found.items())[:1])
        answers.append(judge(used))
        evidence += [_evidence(pair, name, entry, name in used) for name, entry in found.items()]
    distinct = set(answers)
    return {
        "question": question.text,
        "answer": answers[0] if len(distinct) == 1 else "; ".join(map(": ".join, zip(pairs, answers, strict=True))),
        "why": _RULES[question.kind],
        "evidence": evidence,
    }


_RULES = {
    "up": f"decided by the first measure alone: Holm-adjusted sign-flip p < {ALPHA}, else not shown",
    "kept": f"yes if every interval ends above -{MARGIN:.0%} of the reference, no if one lies wholly below it",
}


def _up(found: Mapping[str, dict[str, Any]]) -> str:
    entry = next(iter(found.values()), None)
    if entry is None or entry["p_holm"] >= ALPHA:
        return "not shown"
    return "yes" if entry["value"] > 0 else "no: it falls"


def _kept(found: Mapping[str, dict[str, Any]]) -> str:
    limits = [(entry, -MARGIN * abs(entry["reference_mean"])) for entry in found.values()]
    if any(entry["high"] < limit for entry, limit in limits):
        return "no"
    return "yes" if limits and all(entry["low"] > limit for entry, limit in limits) else "not shown"


def _evidence(pair: str, name: str, entry: Mapping[str, Any], decides: bool) -> dict[str, Any]:
    keys = ("value", "low", "high", "p", "p_holm", "d_z")
    return {"contrast": pair, "measure": name, "decides": decides, **{key: entry[key] for key in keys}}


# Reward hacking and the verdict --------------------------------------------------------------------------------------


def hacking(found: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Whether the training reward rose while nothing held out did, and whether length drifted."""
    if "train_reward" not in found:
        return None
    held_out = {name: found[name] for name in HELD_OUT if name in found}
    rose = found["train_reward"]["low"] > 0
    flat = bool(held_out) and not any(entry["low"] > 0 for entry in held_out.values())
    words = found["words"]
    drifted = abs(words["relative"]["value"]) > DRIFT and not words["low"] <= 0 <= words["high"]
    return {
        "suspected": rose and flat,
        "length_drift": drifted,
        "train_reward": _short(found["train_reward"]),
        "held_out": {name: _short(entry) for name, entry in held_out.items()},
        "words_relative": words["relative"],
        "rule": "suspected where the interval of the training reward lies above 0 and that of no held-out measure does",
    }


def _short(entry: Mapping[str, Any]) -> dict[str, float]:
    return {key: entry[key] for key in ("value", "low", "high")}


def verdict(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Relative gain in diversity with its interval, its band, the largest gain there could be, and whether quality was
    kept."""
    gain, base = found["diversity"]["relative"], found["diversity"]["reference_mean"]
    quality = {name: found[name] for name in ("rouge_l", "valid", "pass@1") if name in found}
    return {
        "improvement": gain,
        "band": band(gain["value"]),
        "band_of_interval": [band(gain["low"]), band(gain["high"])],
        "ceiling": 1.0 / base - 1.0 if base > 0 else math.nan,  # diversity ends at 1
        "p_holm": found["diversity"]["p_holm"],
        "quality_kept": _kept(quality),
    }


def band(gain: float) -> str:
    """The row of the verdict table that a relative gain falls into."""
    if math.isnan(gain):
        return "unknown"
    return next(name for limit, name in BANDS if gain > limit)
