"""One training run from settings to a folder: checks first, then the model, the trainer, and what is written."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dts.errors import UnavailableError, UsageError
from dts.memory import is_out_of_memory
from dts.models.loading import check_available, pick_device
from dts.rewards import Reward
from dts.training.adapters import (
    ADAPTER,
    check_warm_start,
    drop_reference,
    hide_base,
    load_for_training,
    name_base,
)
from dts.training.checkpoints import check_run, to_continue
from dts.training.config import TrainConfig
from dts.training.data import Row, read_rows
from dts.training.diversity import DISTANCES, GATES, named
from dts.training.extra import require_train_extra
from dts.training.kept import TREES
from dts.training.parts import Parts
from dts.training.rewards import check_prompts, find_reward

log = logging.getLogger(__name__)

SETTINGS = "training_config.json"


def prepare(config: TrainConfig, *, resume: str | None = None, overwrite: bool = False) -> list[Row]:
    """The rows of a run, once everything that can be checked without a model has been. Raises `DTSError`."""
    require_train_extra()
    need = ("prompt",) if config.rewarded else ("prompt", "response")
    if not config.data:
        raise UsageError("no training data: give --data FILE, or the key data in the config")
    rows = read_rows(config.data, need=need)
    if config.max_rows is not None and len(rows) > config.max_rows:
        rows = random.Random(0).sample(rows, config.max_rows)  # the same rows for every seed of a comparison
    if config.method == "polychromic":
        named(config.polychromic.distance, DISTANCES, "polychromic.distance")
        named(config.polychromic.gate, GATES, "polychromic.gate")
    if config.rewarded and ":" in config.reward:
        option = f"{config.method}.reward"
        check_prompts(named(config.reward, {}, option), rows, f"{option}={config.reward}")
    check_warm_start(config)
    check_folder(config, resume, overwrite)
    return rows


def train(
    config: TrainConfig,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    report_to: Sequence[str] = (),
    progress: bool = False,
    model: tuple[Any, Any] | None = None,
    reward: Reward | Callable[..., Any] | None = None,
    callbacks: Sequence[Any] = (),
) -> Path:
    """Run `config` and return the run's folder: adapter, tokenizer, trainer_state.json, training_args.bin, settings.

    resume: "auto" for the newest whole checkpoint of the folder (from the start if there is none), or a checkpoint.
    overwrite: replace a run that is in the folder. model: a (model, tokenizer) pair in place of `config.model`; it is
    changed. reward: for grpo and distill, in place of the one the config names. callbacks: of `transformers`, added to
    our own.
    """
    rows = prepare(config, resume=resume, overwrite=overwrite)
    if model is None:
        check_available(config.model)
    folder = Path(config.folder)
    checkpoint = _checkpoint(config, resume)
    if overwrite and checkpoint is None:
        _clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(config.as_dict(), indent=2) + "\n", encoding="utf-8")
    trainer = None
    try:
        trainer = _build(config, rows, model, reward, _arguments(config, report_to, progress))
        for callback in callbacks:
            trainer.add_callback(callback)
        _show_progress(trainer, progress)
        hide_base(trainer.model)
        if checkpoint is not None:
            _restore_token_count(trainer, checkpoint)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        where = "before the first step" if trainer is None else f"at step {trainer.state.global_step + 1}"
        raise UnavailableError(
            f"out of memory {where} of {config.name}: lower {config.memory_advice}, and start again with --overwrite"
        ) from error
    drop_reference(trainer.model)
    trainer.save_model()  # with the tokenizer and training_args.bin
    name_base(folder, config.model, trainer.model)
    trainer.save_state()
    return folder


def _build(
    config: TrainConfig,
    rows: list[Row],
    given: tuple[Any, Any] | None,
    reward: Reward | Callable[..., Any] | None,
    arguments: dict[str, Any],
) -> Any:
    from transformers import set_seed

    if config.method == "grpo":
        from dts.training.grpo import build_grpo, check_groups, prompts_of

        check_groups(config, len(prompts_of(config, rows)))
    if config.rewarded and reward is None:
        guides = config.method == "distill" or config.grpo.groups != "sample"
        reward = find_reward(config.reward, rows, search=guides, option=f"{config.method}.reward")
    set_seed(config.seed)  # a new adapter is random
    model, tokenizer, lora = load_for_training(config, given)
    parts = Parts(config, rows, model, tokenizer, lora, arguments, reward)
    if config.method == "grpo":
        if config.grpo.groups == "tree":
            from dts.training.treegroups import build_tree_grpo

            return build_tree_grpo(parts)
        return build_grpo(parts)
    if config.method == "distill":
        from dts.training.distill import build_distill

        return build_distill(parts)
    if config.method == "polychromic":
        from dts.training.polychromic import build_polychromic

        return build_polychromic(parts)
    from dts.training.sft import build_sft

    return build_sft(parts)


def _arguments(config: TrainConfig, report_to: Sequence[str], progress: bool) -> dict[str, Any]:
    """Of `transformers.TrainingArguments`. Every step is logged, so that no figure is lost between checkpoints."""
    cpu = pick_device(None).type == "cpu"
    return {
        "output_dir": config.folder,
        "run_name": f"{config.name}-seed{config.seed}",
        "seed": config.seed,
        "data_seed": config.seed,
        "num_train_epochs": config.epochs,
        "max_steps": -1 if config.max_steps is None else config.max_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": config.warmup_ratio,  # below 1: a share of all steps
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "save_strategy": "epoch" if config.save_steps is None else "steps",
        "save_steps": config.save_steps or 500,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": list(report_to) or "none",
        "disable_tqdm": not progress,
        "use_cpu": cpu,
        "bf16": not cpu,
        "gradient_checkpointing": not cpu,
        "dataloader_pin_memory": not cpu,
    }


def check_folder(config: TrainConfig, resume: str | None, overwrite: bool) -> None:
    """Raise `UsageError` where the run's folder holds a run that is neither gone on with nor replaced."""
    folder = Path(config.folder)
    if resume is not None:
        _checkpoint(config, resume)
    elif not overwrite and ((folder / ADAPTER).exists() or any(folder.glob("checkpoint-*"))):
        raise UsageError(
            f"{folder} holds a run already: give --resume-from-checkpoint auto, --overwrite, or another --output"
        )


def _checkpoint(config: TrainConfig, resume: str | None) -> Path | None:
    """The checkpoint to continue from, with its settings compared."""
    checkpoint = to_continue(Path(config.folder), resume)
    if checkpoint is not None:
        check_run(checkpoint.parent / SETTINGS, config)
    return checkpoint


def _restore_token_count(trainer: Any, checkpoint: Path) -> None:
    """TRL's SFT counts `num_tokens` from 0 again after a resume; everything else it restores itself."""
    if hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = read_history(checkpoint)[-1].get("num_tokens", 0)


def _clear(folder: Path) -> None:
    for old in folder.glob("checkpoint-*"):
        shutil.rmtree(old)
    for name in (ADAPTER, "trainer_state.json", TREES):
        (folder / name).unlink(missing_ok=True)


def _show_progress(trainer: Any, progress: bool) -> None:
    """A bar of our own, or none: without one `transformers` prints every log line, and ours goes through `logging`."""
    from transformers import PrinterCallback, ProgressCallback

    from dts.training.progress import Bar

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if progress:
        trainer.add_callback(Bar())


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The logged optimizer steps of a finished run. Raises `UnavailableError` where there is none."""
    file = Path(folder) / "trainer_state.json"
    try:
        history = json.loads(file.read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, KeyError) as error:
        raise UnavailableError(f"{file} cannot be read: {error}; train the run to its end first") from error
    return [record for record in history if "loss" in record]
