"""Settings of one training run: values and their allowed ranges, no input or output."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from dts.errors import UsageError
from dts.yamlfile import parse_yaml

METHODS = ("sft", "polychromic", "grpo", "distill")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _check(owner: str, name: str, value: Any, allowed: Callable[[Any], Any], wanted: str) -> None:
    if not allowed(value):
        raise UsageError(f"{owner}{name}={value!r} is not allowed; give {wanted}")


def _at_least_one(settings: Any, owner: str, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None:
            _check(owner, name, value, lambda v: v >= 1, "a whole number >= 1")


def _one_of(settings: Any, owner: str, name: str, options: Sequence[str]) -> None:
    _check(owner, name, getattr(settings, name), lambda v: v in options, ", ".join(options))


def _finite(settings: Any, owner: str, *names: str) -> None:
    for name in names:
        _check(owner, name, getattr(settings, name), lambda v: 0 <= v < math.inf, "a finite number >= 0")


def _above_zero(settings: Any, owner: str, *names: str) -> None:
    for name in names:
        _check(owner, name, getattr(settings, name), lambda v: 0 < v < math.inf, "a finite number > 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """The adapter (Hu et al. 2021). A warm start keeps the adapter's own shape."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str = "all-linear"  # or names, separated by commas

    def __post_init__(self) -> None:
        _at_least_one(self, "lora.", "r", "alpha")
        _check("lora.", "dropout", self.dropout, lambda v: 0 <= v < 1, "a number in [0, 1)")
        _check("lora.", "target_modules", self.target_modules, bool, "all-linear, or module names with commas")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolychromicSettings:
    """The diversity term: -weight * sum_i A_i log pi(y_i), averaged over the prompts it is estimated on."""

    weight: float = 1.0  # lambda
    n_samples: int = 4  # completions drawn per prompt
    prompts: int = 1  # prompts per forward pass that samples are drawn for
    max_new_tokens: int = 48
    temperature: float = 1.0
    distance: str = "bleu"  # a name of dts.training.diversity.DISTANCES, or module:function
    gate: str = "well_formed"  # a name of dts.training.diversity.GATES, or module:function

    def __post_init__(self) -> None:
        owner = "polychromic."
        _finite(self, owner, "weight")
        _check(owner, "n_samples", self.n_samples, lambda v: v >= 3, "a whole number >= 3")
        _at_least_one(self, owner, "prompts", "max_new_tokens")
        _above_zero(self, owner, "temperature")
        _check(owner, "distance", self.distance, bool, "the name of a distance or module:function")
        _check(owner, "gate", self.gate, bool, "the name of a gate or module:function")


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOSettings:
    """Group-relative policy optimisation (Shao et al. 2024)."""

    kl_coeff: float = 0.1
    temperature: float = 0.8
    n_generations: int = 4  # completions per prompt: the group
    max_completion_length: int = 64
    reward: str = "heuristic"  # heuristic, a reward model's folder or file, or module:function
    loss_type: str = "dapo"  # dapo or dr_grpo
    scale_rewards: str = "group"  # group: advantages divided by the group's standard deviation; none: not
    prompts: str = "distinct"  # distinct: each different prompt once an epoch, shuffled; file: every line, in order
    examples: str = "train"  # earlier turns of a prompt. train: part of it; draw: only seen by half of a group's draws
    groups: str = "sample"  # sample: drawn from the policy; tree: with shared beginnings; search: from a tree search
    search_rollouts: int = 16  # groups: search; finished paths of the search before the group is drawn
    search_reward_scale: float = 4.0  # groups: search; lambda of the distribution that is drawn from
    tree_roots: int = 4  # groups: tree; draws after the prompt, each of which is split until there are n_generations
    tree_segment: int = 8  # groups: tree; tokens between splits in two
    diversity_weight: float = 0.0  # lambda of a diversity term beside the reward

    def __post_init__(self) -> None:
        owner = "grpo."
        _finite(self, owner, "kl_coeff", "search_reward_scale", "diversity_weight")
        _above_zero(self, owner, "temperature")
        _check(owner, "n_generations", self.n_generations, lambda v: v >= 2, "a whole number >= 2")
        _at_least_one(self, owner, "max_completion_length", "search_rollouts")
        _check(owner, "reward", self.reward, bool, "heuristic, a reward model's path, or module:function")
        _one_of(self, owner, "loss_type", ("dapo", "dr_grpo"))
        _one_of(self, owner, "scale_rewards", ("group", "none"))
        _one_of(self, owner, "prompts", ("distinct", "file"))
        _one_of(self, owner, "examples", ("train", "draw"))
        _one_of(self, owner, "groups", ("sample", "search", "tree"))
        _at_least_one(self, owner, "tree_segment")
        if self.groups == "tree":
            self._check_tree()
        if self.diversity_weight > 0 and (self.loss_type, self.scale_rewards) != ("dr_grpo", "none"):
            raise UsageError(
                f"grpo.diversity_weight={self.diversity_weight} needs grpo.loss_type=dr_grpo and "
                "grpo.scale_rewards=none; with other settings its gradient is not that of the diversity"
            )
        if self.diversity_weight > 0 and (self.n_generations < 3 or self.groups != "sample"):
            raise UsageError(
                f"grpo.diversity_weight={self.diversity_weight} needs grpo.n_generations >= 3 and grpo.groups=sample"
            )

    @property
    def tree_splits(self) -> int:
        """How often a path is split in two."""
        return int(math.log2(self.n_generations / self.tree_roots))

    def _check_tree(self) -> None:
        roots, group = self.tree_roots, self.n_generations
        if roots < 2 or roots > group or roots * 2**self.tree_splits != group:
            raise UsageError(
                f"grpo.tree_roots={roots} is not allowed; give a number >= 2 that doubles to n_generations={group}"
            )
        last = self.tree_segment * self.tree_splits
        if last >= self.max_completion_length:
            raise UsageError(
                f"grpo.tree_segment={self.tree_segment} splits paths at {last} tokens, and they end at "
                f"max_completion_length={self.max_completion_length}; lower it, or raise grpo.tree_roots"
            )
        if (self.prompts, self.examples) != ("distinct", "train"):
            raise UsageError("grpo.groups=tree needs grpo.prompts=distinct and grpo.examples=train")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings:
    """Node targets: the searches that they come from. The training itself has the settings of every run."""

    reward: str = "heuristic"  # heuristic, a reward model's folder or file, or module:function
    rollouts: int = 8  # finished sequences of each prompt's search
    reward_scale: float = 8.0  # lambda: 1 / the coefficient of the KL to the start in what is optimised
    max_new_tokens: int = 64
    temperature: float = 1.0  # of the start, of the searches and of the policy that is taught
    trees: str = "start"  # start: searched with the model that the run starts from; policy: anew for every step
    kl_coeff: float = 0.0  # coefficient of the KL to the start, beside the 1 / reward_scale of what a tree teaches

    def __post_init__(self) -> None:
        owner = "distill."
        _check(owner, "reward", self.reward, bool, "heuristic, a reward model's path, or module:function")
        _at_least_one(self, owner, "rollouts", "max_new_tokens")
        _finite(self, owner, "reward_scale", "kl_coeff")
        _one_of(self, owner, "trees", ("start", "policy"))
        _above_zero(self, owner, "temperature")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run. Field names are the keys of the YAML files."""

    name: str
    method: str  # sft, polychromic, grpo or distill
    model: str = "Qwen/Qwen3-8B"  # registry name, hub id or local folder
    data: tuple[str, ...] = ()  # JSON Lines files or patterns
    checkpoint_path: str | None = None  # a LoRA folder to start from; {seed} stands for the seed
    output: str = "output/experiments"  # the run is written to output/name/seed_N
    run_folder: str | None = None  # the run is written here instead
    seed: int = 42
    epochs: float = 3.0
    max_steps: int | None = None  # optimizer steps; instead of epochs
    max_rows: int | None = None  # use the first rows of a seeded shuffle only
    learning_rate: float = 2e-4
    schedule: str = "cosine"  # a scheduler name of transformers
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 4  # sequences (distill: trees) per forward and backward pass
    accumulation: int = 4  # passes per optimizer step; GRPO raises it until groups fit
    max_length: int = 512  # tokens of prompt and response together; longer responses are cut
    completion_only_loss: bool = True  # sft: the loss is of the response; false: of the prompt too
    save_steps: int | None = None  # optimizer steps between checkpoints; None: one each epoch
    lora: LoraSettings = field(default_factory=LoraSettings)
    polychromic: PolychromicSettings = field(default_factory=PolychromicSettings)
    grpo: GRPOSettings = field(default_factory=GRPOSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)

    def __post_init__(self) -> None:
        _check("", "name", self.name, _NAME.fullmatch, "letters, digits, '.', '_' and '-' only")
        _one_of(self, "", "method", METHODS)
        _check("", "seed", self.seed, lambda v: 0 <= v < 2**32, "a whole number from 0 to 4294967295")
        _above_zero(self, "", "epochs", "learning_rate", "max_grad_norm")
        _finite(self, "", "weight_decay")
        _check("", "warmup_ratio", self.warmup_ratio, lambda v: 0 <= v < 1, "a number in [0, 1)")
        _at_least_one(self, "", "batch_size", "accumulation", "max_length", "max_steps", "max_rows", "save_steps")
        _one_of(self, "", "schedule", SCHEDULES)
        if not self.completion_only_loss and self.method != "sft":
            raise UsageError(f"completion_only_loss=false is for method: sft, not {self.method}; leave it out")

    @property
    def rewarded(self) -> bool:
        """Whether the method draws its own completions and has a reward judge them."""
        return self.method in ("grpo", "distill")

    @property
    def reward(self) -> str:
        """The reward that such a method names."""
        return self.distill.reward if self.method == "distill" else self.grpo.reward

    @property
    def memory_advice(self) -> str:
        """The three settings that help most where memory is short, with their values."""
        sizes = {
            "sft": {"max_length": self.max_length},
            "polychromic": {"polychromic.n_samples": self.polychromic.n_samples, "max_length": self.max_length},
            "grpo": {
                "grpo.n_generations": self.grpo.n_generations,
                "grpo.max_completion_length": self.grpo.max_completion_length,
            },
            "distill": {
                "distill.rollouts": self.distill.rollouts, "distill.max_new_tokens": self.distill.max_new_tokens,
            },
        }[self.method]  # fmt: skip
        named = {"batch_size": self.batch_size, **sizes}
        if len(named) < 3:
            named["lora.r"] = self.lora.r
        first, second, third = (f"{name}={value}" for name, value in named.items())
        return f"{first} (a higher accumulation makes up for it), {second} or {third}"

    @property
    def warm_start(self) -> str | None:
        """`checkpoint_path` with the seed put in."""
        return None if self.checkpoint_path is None else self.checkpoint_path.replace("{seed}", str(self.seed))

    @property
    def folder(self) -> str:
        """Where the run is written."""
        return self.run_folder or f"{self.output}/{self.name}/seed_{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in a YAML file."""
        return {**dataclasses.asdict(self), "data": list(self.data)}


# What `--smoke` changes: a few steps of the embedded model, minutes on two CPU cores.
SMOKE: dict[str, Any] = {
    "model": "smollm2-135m",
    "data": ["configs/data/smoke.jsonl"],
    "run_folder": None,  # never where a config keeps a model in use
    "checkpoint_path": None,  # a warm start is of another model, or not trained yet
    "max_steps": 4,
    "warmup_ratio": 0.0,
    "max_rows": 64,
    "batch_size": 2,
    "accumulation": 1,
    "max_length": 128,
    "save_steps": 2,
    "lora": {"r": 4, "alpha": 8},
    "polychromic": {"n_samples": 3, "max_new_tokens": 16},
    "grpo": {"n_generations": 4, "max_completion_length": 16, "search_rollouts": 8},
    "distill": {"rollouts": 8, "max_new_tokens": 16},
}


def smoke_layer(*layers: Mapping[str, Any], rewarded: bool) -> dict[str, Any]:
    """`SMOKE` for a config. rewarded: a reward scores its prompts; one of the user's own needs the config's data."""
    given = _merge(layers)
    section = "distill" if given.get("method") == "distill" else "grpo"
    own = rewarded and ":" in str(given.get(section, {}).get("reward", "")) and given.get("data")
    return {**SMOKE, "data": given["data"], "max_rows": 16} if own else SMOKE


def from_mapping(*layers: Mapping[str, Any]) -> TrainConfig:
    """A config from nested mappings, later ones over earlier ones. Raises `UsageError` for unknown keys and values."""
    return _build(TrainConfig, _merge(layers), "")


def derive_accumulation(batch_size: int, num_generations: int, accumulation: int = 1) -> int:
    """The least number of passes >= `accumulation` whose completions fill whole groups: it always exists."""
    unit = num_generations // math.gcd(batch_size, num_generations)
    return unit * math.ceil(accumulation / unit)


def assignment(text: str) -> dict[str, Any]:
    """`"lora.r=8"` as `{"lora": {"r": 8}}`; the value is YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {text!r} is no assignment; write key=value, such as lora.r=8")
    try:
        result: Any = parse_yaml(value)
    except ValueError as error:
        raise UsageError(f"--set {text!r}: the value is not valid YAML; quote it") from error
    for part in reversed(key.split(".")):
        result = {part: result}
    return dict(result)


def _merge(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for layer in layers:
        whole = merged(whole, layer)
    return whole


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of both, at every level; where both have one, that of `above`."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _build(cls: Any, values: Any, owner: str) -> Any:
    if not isinstance(values, Mapping):
        raise UsageError(f"{owner.rstrip('.') or 'the config'} is {values!r}; give keys and values")
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {owner}{near[0]}?" if near else f"known keys are {', '.join(hints)}"
            raise UsageError(f"unknown config key {owner}{key}; {hint}")
    needed = [f.name for f in dataclasses.fields(cls)
              if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]  # fmt: skip
    if missing := [name for name in needed if name not in values]:
        raise UsageError(f"the config has no {owner}{missing[0]}; add it")
    return cls(**{key: _convert(value, hints[key], f"{owner}{key}") for key, value in values.items()})


def _convert(value: Any, kind: Any, key: str) -> Any:
    """`value` as the type a field declares; YAML reads 2e-4 as text, so numbers in text are taken."""
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, f"{key}.")
    if get_origin(kind) is types.UnionType:
        return None if value is None else _convert(value, get_args(kind)[0], key)
    if get_origin(kind) is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, Sequence) and all(isinstance(item, str) for item in items):
            return tuple(items)
        raise UsageError(f"{key}={value!r} is not allowed; give text or a list of texts")
    if (kind is str and isinstance(value, str)) or (kind is bool and isinstance(value, bool)):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    names = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    raise UsageError(f"{key}={value!r} is not allowed; give {names[kind]}")
