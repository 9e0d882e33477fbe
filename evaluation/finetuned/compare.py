"""The protocol of a comparison: same prompts, same sampling seeds, one model in memory at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dts.errors import UnavailableError, UsageError
from dts.evaluation.finetuned import contrasts as comparison
from dts.evaluation.finetuned.generations import Sampled, Source, sample_models
from dts.evaluation.finetuned.judge import Judge
from dts.evaluation.finetuned.replies import (
    CODING,
    CODING_ALL,
    CrossFitted,
    Item,
    Reply,
    Values,
    Yardstick,
    failures,
    read_items,
    table,
)
from dts.evaluation.finetuned.report import write_report
from dts.evaluation.tasks.oracle import is_oracle
from dts.rewards import as_reward
from dts.training.data import read_rows
from dts.training.diversity import named
from dts.training.heuristic_reward import heuristic_reward, prompt_text
from dts.training.run import read_history

log = logging.getLogger(__name__)

FOUR_WAY = {
    "baseline": "SFT",
    "polychromic": "polychromic SFT",
    "grpo_baseline": "GRPO after SFT",
    "grpo_polychromic": "GRPO after polychromic SFT",
    "grpo": "GRPO without a warm start",
}
THREE = {"baseline": "SFT", "moderate": "polychromic, lambda 1", "aggressive": "polychromic, lambda 2"}
EXAMPLES = 3  # replies shown per failure mode
SCREEN = (0.1, 0.6)  # pass@10 of the prompts that a screen keeps: neither at the floor nor solved anyway


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareSettings:
    """How models are compared. The same prompts and sampling seeds for all."""

    test_data: str  # a file, "coding" or "coding-all"
    train_data: str | None = None  # the GRPO phase's rows, on which the heuristic reward was fitted
    max_examples: int = 50  # prompts
    samples: int = 10  # replies per prompt
    max_tokens: int = 48
    temperature: float = 1.0
    seed: int = 0
    judge_items: int = 50  # prompts per contrast that a judge sees
    dashboard: bool = False  # also score the replies with the first baseline, and write the page on reward hacking
    tokens: tuple[int, ...] = ()  # also compare the checkpoints nearest to so many drawn tokens
    checks: tuple[str, ...] = ()  # module:function, rewards in [0, 1]; success is 1 of each, without human replies
    screen: str | None = None  # only prompts with a pass@10 of this model within SCREEN, on samples of their own

    def __post_init__(self) -> None:
        for name in ("max_examples", "max_tokens", "judge_items"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', '-')}={getattr(self, name)} is not allowed; give 1 or more")
        if self.samples < 2:
            raise UsageError(f"samples={self.samples} is not allowed; diversity needs 2 or more")
        if not self.temperature > 0:
            raise UsageError(f"temperature={self.temperature} is not allowed; give a number > 0")
        if self.screen is not None and self.samples < 10:
            raise UsageError(f"samples={self.samples} is not allowed with screen, which needs pass@10; give 10 or more")


def compare_models(
    models: Mapping[str, Sequence[Source]],
    settings: CompareSettings,
    output: str | Path,
    judge: Judge | None = None,
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """The whole comparison: replies, measures, tests, report. Returns what `summary.json` holds.

    models: by the names of `FOUR_WAY` or others, one source per training seed; `baseline` must be there, and others are
    compared with it. Writes `generations.jsonl` as replies come; resume: takes what is there already.
    """
    models = {**models, **checkpoints_at(models, settings.tokens)}
    asked = dict.fromkeys(pair for question in comparison.QUESTIONS for pair in question.contrasts)
    contrasts = [
        *asked,
        *((name, "baseline") for name in models if (name, "baseline") not in asked and name != "baseline"),
    ]
    folder = Path(output)
    items, yardstick, about = _ready(models, settings, folder, resume)
    sampled = _sample(models, items, settings, folder, resume)
    known = _scored(models["baseline"][0], sampled, items, settings) if settings.dashboard else {}
    summary = _analyse(sampled, items, yardstick, contrasts, judge, settings, known)
    summary |= {"settings": asdict(settings), "models": _named(models, summary["models"]), **about}
    if settings.dashboard:
        _write_dashboard(_plain(summary), sampled, items, yardstick, folder)
    summary["questions"] = [comparison.answer(q, summary["contrasts"]) for q in comparison.QUESTIONS]
    write_report(_plain(summary), folder)
    return summary


def checkpoints_at(models: Mapping[str, Sequence[Source]], tokens: Sequence[int]) -> dict[str, Sequence[Source]]:
    """By `NAME@N`: for every seed of a model the checkpoint nearest to N drawn tokens; none for models without any."""
    found: dict[str, Sequence[Source]] = {}
    for name, sources in models.items():
        curves = [drawn_by(source) if isinstance(source, str) else {} for source in sources]
        if all(curves):
            for count in tokens:
                nearest = [min(curve, key=lambda folder: abs(curve[folder] - count)) for curve in curves]
                log.info("%s@%d: %s", name, count,
                         ", ".join(f"{folder} ({curve[folder]:.0f} tokens)"
                                   for folder, curve in zip(nearest, curves, strict=True)))  # fmt: skip
                found[f"{name}@{count}"] = nearest
    if tokens and not found:
        raise UsageError(f"--tokens {tokens[0]}: no model has checkpoints of a run that drew completions; leave it out")
    return found


def drawn_by(folder: str) -> dict[str, float]:
    """Tokens drawn up to each checkpoint of a run, its end not counted; empty for what is no run that drew."""
    found = {}
    for checkpoint in Path(folder).glob("checkpoint-*"):
        drawn = [record["sampled_tokens"] for record in read_history(checkpoint) if "sampled_tokens" in record]
        if drawn:
            found[str(checkpoint)] = math.fsum(drawn)
    return found


def compare_three(
    models: Mapping[str, Sequence[Source]], settings: CompareSettings, output: str | Path, *, resume: bool = False
) -> dict[str, Any]:
    """Baseline against moderate and against aggressive, each in `baseline_vs_<name>/summary.json`; returns both."""
    items, yardstick, about = _ready(models, settings, Path(output), resume)
    sampled = _sample(models, items, settings, Path(output), resume)
    found = {}
    for name in (name for name in models if name != "baseline"):
        two = {key: sampled[key] for key in ("baseline", name)}
        summary = _analyse(two, items, yardstick, [(name, "baseline")], None, settings)
        summary |= {"settings": asdict(settings), "models": _named(models, summary["models"]), **about}
        write_report(_plain(summary), Path(output) / f"baseline_vs_{name}")
        found[name] = summary
    return found


def _ready(
    models: Mapping[str, Sequence[Source]], settings: CompareSettings, folder: Path, resume: bool
) -> tuple[list[Item], Yardstick, dict[str, Any]]:
    """`_prepare`, with the items that a screen keeps."""
    items, yardstick, about = _prepare(models, settings)
    if settings.screen is not None:
        items = _screened(settings.screen, items, yardstick, settings, folder / "screen", resume)
        about |= _size(items)
    return items, yardstick, about


def _prepare(
    models: Mapping[str, Sequence[Source]], settings: CompareSettings
) -> tuple[list[Item], Yardstick, dict[str, Any]]:
    """Items, what to measure with, and what the report says about it. Checks models before any of them is loaded."""
    if "baseline" not in models or len(models) < 2:
        raise UsageError(f"a comparison needs --baseline-lora and one more model, got {', '.join(models) or 'none'}")
    if any(not sources for sources in models.values()):
        raise UsageError("every model needs a folder for at least one seed")
    from dts.models.loading import check_available

    named_models = [source for sources in models.values() for source in sources if isinstance(source, str)]
    for source in (*named_models, *([] if settings.screen is None else [settings.screen])):
        check_available(source)
    checks = tuple(as_reward(named(name, {}, "--checks")) for name in settings.checks)
    need = ("prompt",) if checks else ("prompt", "response")
    items, rows = read_items(settings.test_data, settings.max_examples, settings.seed, need)
    about: dict[str, Any] = _size(items)
    if settings.test_data in (CODING, CODING_ALL):
        about["success"] = "the answer passes every test, public and hidden"
        about["train_reward"] = "share of the public examples passed"
        return items, Yardstick(None, None, 0.0), about
    if checks:
        yardstick = Yardstick(None, None, 0.0, checks)
        return items, yardstick, about | {"success": yardstick.predicate, "train_reward": "not computed",
                                  "checks": [check.name for check in checks],
                                  "oracles": [check.name for check in checks if is_oracle(check)]}  # fmt: skip
    train = read_rows(settings.train_data) if settings.train_data else []
    known = [row for row in rows if row.engagement is not None]
    scorer = CrossFitted(known, settings.seed) if len(known) > 50 else None
    yardstick = Yardstick(heuristic_reward(train).for_search(), scorer, scorer.human_median if scorer else 0.0)
    about["success"] = yardstick.predicate
    about["train_reward"] = "heuristic reward without its diversity part, " + (
        "fitted on the training data" if train else "not fitted: its engagement part is a proxy"
    )
    if scorer is not None:
        about["scorer"] = {
            "kind": "TF-IDF ridge, cross-fitted on the test threads",
            "rank_correlation_with_engagement": _interval(scorer.validity),
        }
    return items, yardstick, about


def _size(items: Sequence[Item]) -> dict[str, int]:
    return {"items": len(items), "clusters": len({item.cluster for item in items})}


def _screened(
    model: str, items: Sequence[Item], yardstick: Yardstick, settings: CompareSettings, folder: Path, resume: bool
) -> list[Item]:
    """The items that the model solves sometimes. Its samples have another seed than those that are compared, because
    what was chosen for its score has a lower one in the next sample."""
    own = replace(settings, seed=settings.seed + 1)
    ((replies,),) = _sample({"screen": [model]}, items, own, folder, resume).values()
    rates = [yardstick.measure(item, drawn)["pass@10"] for item, drawn in zip(items, replies, strict=True)]
    kept = [item for item, rate in zip(items, rates, strict=True) if SCREEN[0] <= rate <= SCREEN[1]]
    log.info("screen: %d of %d prompts have a pass@10 of %s from %g to %g", len(kept), len(items), model, *SCREEN)
    if len(kept) < 2:
        raise UsageError(
            f"screen={model!r} keeps {len(kept)} of {len(items)} prompts; give more prompts, or compare without it"
        )
    return kept


def _interval(found: Any) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


def _named(models: Mapping[str, Sequence[Source]], found: dict[str, Any]) -> dict[str, Any]:
    titles = {**FOUR_WAY, **THREE}
    return {
        name: {"title": titles.get(name, name), "seeds": [s if isinstance(s, str) else s.name for s in models[name]],
               "measures": measures}
        for name, measures in found.items()
    }  # fmt: skip


def _sample(
    models: Mapping[str, Sequence[Source]], items: Sequence[Item], settings: CompareSettings, folder: Path, resume: bool
) -> Sampled:
    return sample_models(
        models, items, folder, samples=settings.samples, max_tokens=settings.max_tokens,
        temperature=settings.temperature, seed=settings.seed, resume=resume,
    )  # fmt: skip


def _analyse(
    sampled: Sampled,
    items: Sequence[Item],
    yardstick: Yardstick,
    pairs: Sequence[tuple[str, str]],
    judge: Judge | None,
    settings: CompareSettings,
    known: Mapping[str, Values] | None = None,
) -> dict[str, Any]:
    """known: more measures by model."""
    clusters = [item.cluster for item in items]
    values: dict[str, Values] = {}
    for name, seeds in sampled.items():
        log.info("measuring %s", name)
        values[name] = table([[yardstick.measure(i, r) for i, r in zip(items, own, strict=True)] for own in seeds])
        values[name] = {**values[name], **(known or {}).get(name, {})}
    pairs = [pair for pair in pairs if set(pair) <= set(sampled)]
    contrasts = {comparison.pair_name((a, b)): comparison.contrast(values[a], values[b], clusters) for a, b in pairs}
    judging = _judge(judge, sampled, items, pairs, contrasts, settings.judge_items)
    comparison.adjust(contrasts)
    models = {name: comparison.describe(own, clusters) for name, own in values.items()}
    return {
        "models": models,
        "diversity": {name: {k: own["diversity"][k] for k in ("value", "low", "high")} for name, own in models.items()},
        "contrasts": contrasts,
        "verdicts": {name: comparison.verdict(found) for name, found in contrasts.items()},
        "reward_hacking": {name: comparison.hacking(found) for name, found in contrasts.items() if "grpo" in name},
        "failures": {name: _failures(items, seeds) for name, seeds in sampled.items()},
        "judge": judging,
    }


def _scored(source: Source, sampled: Sampled, items: Sequence[Item], settings: CompareSettings) -> dict[str, Values]:
    """What the start model says of everyone's replies, by model: [seeds, items] each."""
    import dts
    from dts.evaluation.finetuned.hacking import likelihoods

    start = dts.load(source) if isinstance(source, str) else source
    found: dict[str, Values] = {}
    for name, seeds in sampled.items():
        log.info("scoring %s with %s", name, start.name)
        rows = list(likelihoods(start, items, seeds, settings.temperature))
        found[name] = {measure: np.stack([row[measure] for row in rows]) for measure in rows[0]}
    return found


def _write_dashboard(
    summary: dict[str, Any], sampled: Sampled, items: Sequence[Item], yardstick: Yardstick, folder: Path
) -> None:
    from dts.evaluation.finetuned import hacking

    reward, shown = yardstick.checks[0].name if yardstick.checks else "train_reward", {}
    for pair in summary["contrasts"]:
        one, _, other = pair.partition(" vs ")
        before, after = sampled[other][0], sampled[one][0]
        worth = [
            [yardstick.measure(item, replies).get(reward, math.nan) for item, replies in zip(items, own, strict=True)]
            for own in (before, after)
        ]
        shown[pair] = hacking.examples(items, before, after, np.subtract(worth[1], worth[0]))
    log.info("dashboard: %s", hacking.write_page(folder, hacking.page(summary, shown, reward)))


def _judge(
    judge: Judge | None,
    sampled: Sampled,
    items: Sequence[Item],
    pairs: Sequence[tuple[str, str]],
    contrasts: dict[str, dict[str, Any]],
    count: int,
) -> dict[str, Any] | None:
    """Adds the judge's preference to the contrasts. Where the endpoint fails, says so and continues without."""
    if judge is None:
        return None
    error = None
    try:
        for a, b in pairs:
            scores = [
                judge.compare(prompt_text(item.prompt), first[0].text, second[0].text).score
                for item, first, second in zip(items[:count], sampled[a][0], sampled[b][0], strict=False)
            ]
            found = comparison.judged(scores, [item.cluster for item in items[:count]])
            if found is not None:
                contrasts[comparison.pair_name((a, b))]["judge"] = found
    except UnavailableError as problem:
        error = str(problem)
        log.error("%s", error)
    return {"model": judge.model, **asdict(judge.tally), "error": error}


def _failures(items: Sequence[Item], seeds: Sequence[Sequence[Sequence[Reply]]]) -> dict[str, dict[str, Any]]:
    """Share of replies with each failure mode, and the first examples."""
    total = 0
    found: dict[str, dict[str, Any]] = {}
    for own in seeds:
        for item, replies in zip(items, own, strict=True):
            for reply, modes in zip(replies, failures(item, replies), strict=True):
                total += 1
                for mode in modes:
                    entry = found.setdefault(mode, {"share": 0.0, "count": 0, "examples": []})
                    entry["count"] += 1
                    if len(entry["examples"]) < EXAMPLES:
                        entry["examples"].append({"prompt": prompt_text(item.prompt)[:300], "reply": reply.text[:300]})
    for entry in found.values():
        entry["share"] = entry["count"] / total
    return dict(sorted(found.items(), key=lambda pair: -pair[1]["count"]))


def _plain(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
