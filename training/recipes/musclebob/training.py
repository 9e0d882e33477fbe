"""The run: validation of the base model, GRPO, validation of what came out. All files lie in one folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import dts
from dts.errors import UsageError
from dts.models.loading import check_available
from dts.training.recipes.musclebob.questions import Question, choose_questions, other_questions, training_prompts
from dts.training.recipes.musclebob.reward import SCHEMES, NameReward
from dts.training.recipes.musclebob.settings import PROMPTS, Settings, recipe_dict, train_config
from dts.training.recipes.musclebob.validation import Validation, validate
from dts.training.run import SETTINGS, check_folder, prepare, train

log = logging.getLogger(__name__)

HISTORY = "reward_history.json"
BASELINE = "baseline_validation.json"
FINAL = "final_validation.json"

Step = dict[str, float]  # step, mean_reward, epoch


def run_recipe(
    settings: Settings,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    num_prompts: int | None = None,
    on_step: Callable[[Step], None] | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> tuple[Validation, Validation]:
    """Validations before and after. resume, overwrite and callbacks are those of `dts.training.run.train`.

    num_prompts: validation questions; all if not given. on_step: called after each optimizer step, also with the steps
    of before a resume.
    """
    config = train_config(settings)
    if resume is not None:
        _check_resume(settings)
    check_folder(config, resume, overwrite)
    check_available(settings.model)
    _write_prompts(settings)
    prepare(config, resume=resume, overwrite=overwrite)
    questions = choose_questions(num_prompts)
    options: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens, "temperature": settings.temperature, "seed": settings.seed,
    }  # fmt: skip

    base = dts.load(settings.model)
    before = _saved_baseline(settings, questions) if resume is not None else None
    if before is None:
        log.info("validating %s on %d questions", settings.model, len(questions))
        before = validate(base, base, questions, **options)
        _write(settings.folder / BASELINE, before.as_dict())
    recorder = Recorder(settings, on_step)
    reward = NameReward(SCHEMES[settings.reward], other_questions())
    folder = train(config, resume=resume, overwrite=overwrite, reward=reward, callbacks=[recorder, *callbacks])
    log.info("validating the trained model")
    after = validate(dts.load(str(folder)), base, questions, reference=before, **options)
    _write(settings.folder / FINAL, after.as_dict())
    return before, after


def _saved_baseline(settings: Settings, questions: Sequence[Question]) -> Validation | None:
    """The baseline of an interrupted run, if its settings are known to be ours and it asked the same questions."""
    try:
        recipe = json.loads((settings.folder / SETTINGS).read_text(encoding="utf-8"))["recipe"]
        found = Validation.from_dict(json.loads((settings.folder / BASELINE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is made anew
    same = [answer.question for answer in found.answers] == [question.text for question in questions]
    return found if same and recipe == recipe_dict(settings) else None


class Recorder(TrainerCallback):
    """Keeps reward_history.json up to date with every step, and adds the recipe's settings to training_config.json."""

    def __init__(self, settings: Settings, on_step: Callable[[Step], None] | None = None) -> None:
        self._settings, self._on_step = settings, on_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        file = self._settings.folder / SETTINGS
        config = json.loads(file.read_text(encoding="utf-8"))
        _write(file, {**config, "recipe": recipe_dict(self._settings)})
        for step in self._history(state):
            self._tell(step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        history = self._history(state)
        if history and "loss" in state.log_history[-1]:
            _write(self._settings.folder / HISTORY, history)
            self._tell(history[-1])

    def _history(self, state: Any) -> list[Step]:
        return [
            {
                "step": record["step"],
                "mean_reward": record["reward"],
                "epoch": round(record["step"] / self._settings.steps.per_epoch, 4),
            }
            for record in state.log_history
            if "loss" in record
        ]

    def _tell(self, step: Step) -> None:
        if self._on_step is not None:
            self._on_step(step)


def _check_resume(settings: Settings) -> None:
    """Raise `UsageError` where the folder's run was begun with other settings of the recipe."""
    file = settings.folder / SETTINGS
    if not file.is_file() or not any(settings.folder.glob("checkpoint-*")):
        return
    before = json.loads(file.read_text(encoding="utf-8")).get("recipe", {})
    now = recipe_dict(settings)
    if changed := [key for key in now if before.get(key) != now[key]]:
        key = changed[0]
        raise UsageError(
            f"cannot resume with another --{key.replace('_', '-')}: the run in {settings.folder} has "
            f"{before.get(key)}, now it is {now[key]}; use the same settings, or start anew with --overwrite"
        )


def _write_prompts(settings: Settings) -> None:
    steps = settings.steps
    prompts = training_prompts(
        settings.epochs,
        steps.per_epoch * steps.prompts,
        ratio=settings.fewshot_ratio,
        anneal=settings.fewshot_anneal,
        shots=settings.fewshot_examples,
        seed=settings.seed,
        other=settings.other_ratio,
    )
    settings.folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": messages}) + "\n" for messages in prompts]
    (settings.folder / PROMPTS).write_text("".join(lines), encoding="utf-8")


def _write(file: Path, content: Any) -> None:
    """Write JSON as a whole or not at all."""
    new = file.with_name(file.name + ".new")
    new.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(file)
