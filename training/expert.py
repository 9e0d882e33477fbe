"""Expert iteration: find samples of the reward-tilted distribution pi* by tree search, and fine-tune on them.

With V(prompt) = (1/lambda) log E_pi[exp(lambda r)], the gradient of V is (1/lambda) E_pi*[grad log pi(y)]: supervised
fine-tuning on draws from pi* is gradient ascent on the soft value that the search estimates. The sequences that a
search finished, weighted by `Result.shares`, are its sample of pi*; drawing from them costs no further token.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import dts
from dts.errors import UsageError
from dts.lm import LanguageModel
from dts.rewards import Reward
from dts.search import MaxEnt
from dts.training.checkpoints import AUTO, check_run
from dts.training.config import TrainConfig
from dts.training.data import Row
from dts.training.grpo import distinct_prompts
from dts.training.kept import kept
from dts.training.run import SETTINGS, prepare, train
from dts.training.sampling import stream

log = logging.getLogger(__name__)

DRAWN = "drawn.jsonl"  # in a round's folder: the draws of each prompt


def draw_rows(
    lm: LanguageModel,
    prompts: Sequence[list[dict[str, str]]],
    reward: Reward | Callable[..., Any],
    method: MaxEnt,
    *,
    per_prompt: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    first: int = 0,
) -> Iterator[dict[str, Any]]:
    """`per_prompt` draws, with replacement, from each search's finished sequences by their shares: rows with prompt,
    response, whether it was cut at `max_new_tokens`, the reward, and the tokens forwarded for the prompt. The searches
    share a batch. first: index of the first prompt, which its seed depends on."""
    requests = (dts.Request(prompt, seed=stream(seed, index)) for index, prompt in enumerate(prompts, first))
    results = dts.decode_many(
        lm, requests, reward=reward, method=method, width=method.batch_size(), max_new_tokens=max_new_tokens,
        temperature=temperature,
    ) if prompts else ()  # fmt: skip
    for index, (prompt, result) in enumerate(zip(prompts, results, strict=True), first):
        found = {completion.token_ids: completion for completion in result.completions}
        shares = result.shares
        for leaf in np.random.default_rng((seed, index)).choice(list(shares), per_prompt, p=list(shares.values())):
            draw = found[result.tree.tokens(leaf)]
            yield {
                "prompt": prompt, "response": draw.text, "cut": draw.finished_by == "length",
                "reward": draw.reward, "forwarded_tokens": result.usage.forwarded_tokens,
            }  # fmt: skip


def expert_iteration(
    config: TrainConfig,
    reward: Reward | Callable[..., Any],
    *,
    rounds: int = 2,
    resume: str | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """`rounds` times: search with the model so far, then continue with SFT on draws of what it found.

    Returns the rounds' folders; the draws stand in them as draws.jsonl. Search, lengths and temperature are those of
    `config.grpo`. The method of every round is sft, whatever the config says. resume: "auto" to continue where a run
    was interrupted: finished rounds are left, and draws that were made are not made again.
    """
    if resume not in (None, AUTO):
        raise UsageError(f"--resume-from-checkpoint {resume} is not allowed: rounds have several folders; give auto")
    if config.run_folder is not None:
        raise UsageError(f"run_folder={config.run_folder!r} is not allowed here: every round has a folder; give output")
    if config.grpo.temperature != 1:
        log.warning("grpo.temperature=%g: draws are those of a sharper or flatter model than is fine-tuned on them; "
                    "rounds are steps up the soft value at 1 only", config.grpo.temperature)  # fmt: skip
    rows = prepare(
        replace(config, method="grpo", name=f"{config.name}_round1"), resume=None, overwrite=overwrite or bool(resume)
    )
    folders: list[Path] = []
    warm = config.warm_start
    for number in range(1, rounds + 1):
        name = f"{config.name}_round{number}"
        step = replace(config, name=name, method="sft", checkpoint_path=warm, max_rows=None)
        draws = Path(step.folder) / "draws.jsonl"
        step = replace(step, data=(str(draws),))
        draws.parent.mkdir(parents=True, exist_ok=True)
        if resume and (draws.parent / "trainer_state.json").exists():  # the last file of a run
            check_run(draws.parent / SETTINGS, step)
            folders.append(draws.parent)
        else:
            found = _kept_draws(config, warm, rows, reward, number, draws.with_name(DRAWN), anew=not resume)
            _write(found, draws, number)
            folders.append(train(step, resume=resume, overwrite=overwrite))
        warm = str(folders[-1])
    return folders


def _write(found: Sequence[Mapping[str, Any]], file: Path, number: int) -> None:
    """The draws of a round as training data, which has no empty responses."""
    taught = [row for row in found if row["response"].strip()]
    file.write_text("".join(json.dumps(row) + "\n" for row in taught), encoding="utf-8")
    mean = sum(row["reward"] for row in found) / len(found) if found else float("nan")
    tokens = sum({json.dumps(row["prompt"]): row["forwarded_tokens"] for row in found}.values())
    log.info("round %d: %d draws of mean reward %.4g for %d tokens", number, len(found), mean, tokens)


def _kept_draws(
    config: TrainConfig,
    warm: str | None,
    rows: Sequence[Row],
    reward: Reward | Callable[..., Any],
    number: int,
    file: Path,
    *,
    anew: bool,
) -> list[dict[str, Any]]:
    """The draws of a round, kept in a file as they come."""
    settings, prompts, lm = config.grpo, distinct_prompts(rows), dts.load(warm or config.model)

    def make(indices: range) -> Iterator[list[dict[str, Any]]]:
        found = draw_rows(
            lm, [prompts[index] for index in indices], reward,
            MaxEnt(settings.search_rollouts, settings.search_reward_scale), per_prompt=settings.n_generations,
            max_new_tokens=settings.max_completion_length, temperature=settings.temperature,
            seed=stream(config.seed, number), first=indices.start,
        )  # fmt: skip
        while group := list(itertools.islice(found, settings.n_generations)):
            yield group

    if anew:
        file.unlink(missing_ok=True)
    whole = config.as_dict()
    about = {key: whole[key] for key in ("model", "data", "max_rows", "seed", "grpo")}
    return [row for group in kept(file, {**about, "start": warm, "round": number}, len(prompts), make) for row in group]
