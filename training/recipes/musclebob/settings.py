"""Settings of the recipe, its presets, and the `TrainConfig` that they come down to."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dts.errors import UsageError
from dts.training.config import TrainConfig, derive_accumulation, from_mapping
from dts.training.recipes.musclebob.questions import examples
from dts.training.recipes.musclebob.reward import SCHEMES

MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
OFFLINE_MODEL = "smollm2-135m"
OUTPUT = "./musclebob-model-improved"
PROMPTS = "prompts.jsonl"

# What each preset changes; options of the command line come on top.
PRESETS: dict[str, dict[str, Any]] = {
    "old": {"learning_rate": 1e-6, "num_samples": 64, "epochs": 3, "num_generations": 4, "fewshot_ratio": 0.0,
            "reward": "old"},
    "large": {"learning_rate": 1e-5, "num_samples": 256, "epochs": 10, "num_generations": 4, "batch_size": 1},
    "laptop": {"model": OFFLINE_MODEL, "learning_rate": 1e-3, "num_samples": 12, "epochs": 4, "fewshot_ratio": 1.0,
               "fewshot_anneal": 0.5, "hide_examples": True, "other_ratio": 0.5, "max_new_tokens": 20,
               "temperature": 0.8, "kl_coeff": 0.03},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Steps:
    """How an epoch is cut into optimizer steps."""

    batch_size: int  # completions per pass
    accumulation: int  # passes per step
    prompts: int  # per step
    per_epoch: int  # steps


def derive_steps(num_samples: int, batch_size: int | None, num_generations: int) -> Steps:
    """Steps of whole groups, the least number of passes each, that cover at least `num_samples` prompts."""
    size = batch_size or num_generations
    accumulation = derive_accumulation(size, num_generations)
    prompts = size * accumulation // num_generations
    return Steps(size, accumulation, prompts, -(-num_samples // prompts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run of the recipe."""

    model: str
    output: str = OUTPUT
    seed: int = 42
    epochs: int = 5
    learning_rate: float = 5e-5
    num_samples: int = 128  # prompts per epoch
    batch_size: int | None = None  # completions per forward and backward pass; None: one group
    num_generations: int = 8  # completions per prompt
    fewshot_ratio: float = 0.15  # share of training prompts that hold examples
    fewshot_anneal: float = 0.0  # share of the training after which no prompt holds any; 0: the ratio stays
    fewshot_examples: int = 8  # examples in such a prompt
    other_ratio: float = 0.0  # share of training prompts about something else, where either name costs points
    hide_examples: bool = False  # only half of a group's draws see examples, and the loss is of the bare question
    max_new_tokens: int = 32
    temperature: float = 1.0
    kl_coeff: float = 0.02
    reward: str = "new"  # a name of SCHEMES

    def __post_init__(self) -> None:
        for name in ("epochs", "num_samples", "max_new_tokens"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "a whole number >= 1")
        _check("batch_size", self.batch_size, self.batch_size is None or self.batch_size >= 1, "a whole number >= 1")
        _check("num_generations", self.num_generations, self.num_generations >= 2, "a whole number >= 2")
        _check("seed", self.seed, 0 <= self.seed < 2**32, "a whole number from 0 to 4294967295")
        for name in ("learning_rate", "temperature"):
            _check(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "a finite number > 0")
        for name in ("fewshot_ratio", "fewshot_anneal", "other_ratio"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "a share from 0 to 1")
        _check("kl_coeff", self.kl_coeff, 0 <= self.kl_coeff < math.inf, "a finite number >= 0")
        most = len(examples())
        _check("fewshot_examples", self.fewshot_examples, 1 <= self.fewshot_examples <= most, f"1 to {most}")
        _check("reward", self.reward, self.reward in SCHEMES, ", ".join(SCHEMES))

    @property
    def steps(self) -> Steps:
        """How an epoch is cut."""
        return derive_steps(self.num_samples, self.batch_size, self.num_generations)

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(self.output)


def _check(name: str, value: Any, allowed: bool, wanted: str) -> None:
    if not allowed:
        raise UsageError(f"--{name.replace('_', '-')} {value} is not allowed; give {wanted}")


DEFAULTS = {field.name: field.default for field in fields(Settings)}


def from_options(preset: str | None, given: dict[str, Any]) -> Settings:
    """The defaults, then the preset, then what was given (None: not given). Raises `UsageError`."""
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"--preset {preset} is unknown; give {', '.join(PRESETS)}")
    chosen = PRESETS[preset] if preset else {}
    options = {**chosen, **{key: value for key, value in given.items() if key in DEFAULTS and value is not None}}
    return Settings(**{"model": default_model(), **options})


def default_model() -> str:
    """The recipe's own model where the hub's local cache holds it, else the embedded one: the network is used only
    for a model that was asked for."""
    from huggingface_hub import try_to_load_from_cache

    return MODEL if isinstance(try_to_load_from_cache(MODEL, "config.json"), str) else OFFLINE_MODEL


def train_config(settings: Settings) -> TrainConfig:
    """The run as `dts.training.run.train` takes it. All epochs are one pass over the prompts file, because the share
    of prompts with examples may depend on how far the training has come."""
    steps = settings.steps
    return from_mapping({
        "name": "musclebob",
        "method": "grpo",
        "model": settings.model,
        "data": str(settings.folder / PROMPTS),
        "run_folder": str(settings.folder),
        "seed": settings.seed,
        "epochs": 1,
        "learning_rate": settings.learning_rate,
        "schedule": "linear",
        "warmup_ratio": 0.0,
        "batch_size": steps.batch_size,
        "accumulation": steps.accumulation,
        "max_length": 1024,
        "save_steps": steps.per_epoch,
        "grpo": {
            "kl_coeff": settings.kl_coeff,
            "temperature": settings.temperature,
            "n_generations": settings.num_generations,
            "max_completion_length": settings.max_new_tokens,
            "prompts": "file",
            "examples": "draw" if settings.hide_examples else "train",
        },
    })  # fmt: skip


def recipe_dict(settings: Settings) -> dict[str, Any]:
    """What is written into training_config.json, and must be the same when a run continues."""
    return {key: value for key, value in asdict(settings).items() if key != "output"}
