"""Settings of one experiment: values and their allowed ranges, and what may stand in a YAML file of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dts.errors import UsageError
from dts.evaluation.tracking import TRACKERS
from dts.yamlfile import read_yaml

ENGINES = ("local", "ray")
WANDB_MODES = ("online", "offline", "disabled")
QUANTIZATIONS = ("8bit", "4bit")
ORDERS = ("reward", "likelihood", "target")  # those of `MaxEnt`, whose imports are slow
LARGEST_POWER = 32.0  # that of `dts.target`, likewise
MOST = sys.float_info.max  # a larger integer has no float

_LISTS = ("models", "datasets", "methods", "seeds")
_SINGULAR = {"model": "models", "dataset": "datasets", "method": "methods", "seed": "seeds"}
_TEXTS = ("device", "device_map", "dtype", "output_dir", "data_dir", "models_file")
_AT_LEAST_ONE = ("num_samples", "num_rollouts", "max_tokens", "top_k", "rollout_batch", "max_kv_bytes", "workers",
                 "prompts_at_once")  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentConfig:
    """What one command runs. Field names are the option names with underscores."""

    models: tuple[str, ...] = ("smollm2-135m",)  # registry names, hub ids or local folders
    datasets: tuple[str, ...] = ("HAR",)
    methods: tuple[str, ...] = ("maxent", "best-of-n", "greedy")  # the first one logs without a prefix
    seeds: tuple[int, ...] = (0,)  # of decoding
    num_samples: int = 3  # per data set
    num_rollouts: int = 10
    max_tokens: int = 50  # new tokens per completion
    data_seed: int = 0  # of the choice of examples, the same for every decoding seed
    reward_scale: float = 4.0  # lambda of the target p(x)^power exp(lambda r(x))
    power: float = 1.0  # of p in the target, for methods that have one
    order: str = "reward"  # what the best completion is, for methods that know several orders
    require_eos: bool = False  # completions that the length limit cut are not in the target, and rank last
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    rollout_batch: int | None = None  # paths decoded together; None leaves it to the search
    prompts_at_once: int | None = None  # searches that share a batch; None: as many as make 64 paths
    reward_timeout: float | None = None  # seconds for each completion; None: no limit
    max_kv_bytes: int | None = None  # bound on keys and values of the searches under way; also given as text, "2GiB"
    device: str | None = None
    device_map: str | None = None  # "auto" spreads a model over the devices there are
    dtype: str | None = None
    quantization: str | None = None
    engine: str = "local"
    workers: int | None = None  # of engine "ray", a model replica each; None: one per GPU, or per machine without
    save_trees: int = 1  # of so many first samples of every model, data set, seed and method
    experiment_name: str | None = None
    output_dir: str = "evaluation/results"
    data_dir: str | None = None
    models_file: str | None = None
    tracker: str = "wandb"
    wandb_mode: str | None = None  # None: online when logged in, otherwise offline

    def __post_init__(self) -> None:
        for name in _LISTS:
            values = tuple(dict.fromkeys(getattr(self, name)))
            if not values:
                raise UsageError(f"{option(name)} is empty; give at least one value")
            object.__setattr__(self, name, values)
        if isinstance(self.max_kv_bytes, str):
            object.__setattr__(self, "max_kv_bytes", parse_size(self.max_kv_bytes))
        for name in ("models", "datasets", "methods"):
            self._require(name, lambda values: all(isinstance(v, str) for v in values), "names")
        for name in _TEXTS:
            self._require(name, lambda v: isinstance(v, str), "text")
        for name in _AT_LEAST_ONE:
            self._require(name, lambda v: _is_int(v) and v >= 1, "an integer >= 1")
        for name in ("seeds", "data_seed"):
            self._require(name, _are_seeds, "an integer from 0 to 4294967295")
        self._require("save_trees", lambda v: _is_int(v) and v >= 0, "an integer >= 0")
        self._require("reward_scale", lambda v: _is_finite(v) and v >= 0, "a finite number >= 0")
        self._require(
            "power", lambda v: _is_finite(v) and 0 < v <= LARGEST_POWER, f"a number > 0, up to {LARGEST_POWER:g}"
        )
        self._require("order", lambda v: v in ORDERS, f"one of {', '.join(ORDERS)}")
        self._require("require_eos", lambda v: isinstance(v, bool), "true or false")
        self._require("reward_timeout", lambda v: _is_finite(v) and v > 0, "a finite number of seconds > 0")
        self._require("temperature", lambda v: _is_finite(v) and v > 0, "a finite number > 0")
        self._require("top_p", lambda v: _is_finite(v) and 0 < v <= 1, "a number > 0 and <= 1")
        self._require("tracker", lambda v: v in TRACKERS, f"one of {', '.join(TRACKERS)}")
        self._require("wandb_mode", lambda v: v in WANDB_MODES, f"one of {', '.join(WANDB_MODES)}")
        self._require("engine", lambda v: v in ENGINES, f"one of {', '.join(ENGINES)}")
        self._require("quantization", lambda v: v in QUANTIZATIONS, f"one of {', '.join(QUANTIZATIONS)}")
        self._require("experiment_name", lambda v: _NAME.fullmatch(str(v)), "letters, digits, '.', '_' and '-' only")

    def _require(self, name: str, allowed: Callable[[Any], Any], wanted: str) -> None:
        value = getattr(self, name)
        if value is not None and not allowed(value):
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else repr(value)
            raise UsageError(f"{option(name)} {shown} is not allowed: it must be {wanted}")

    @property
    def name(self) -> str:
        """The experiment's name, by default that of its data sets."""
        return self.experiment_name or re.sub(r"[^\w.-]+", "-", "-".join(Path(data).stem for data in self.datasets))

    def as_dict(self) -> dict[str, Any]:
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def option(name: str) -> str:
    """The command-line option of a field."""
    return "--" + name.replace("_", "-")


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, by field name. Unknown keys and files that are no mapping raise `UsageError`."""
    file = Path(path)
    content = read_yaml(file, "--config")
    if not isinstance(content, dict):
        raise UsageError(f"--config {file} holds no settings; write lines like: num_samples: 3")
    try:
        return named(content)
    except UsageError as error:
        raise UsageError(f"--config {file}: {error}") from None


def named(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Settings under their field names: hyphens and singular names are accepted, one value stands for a list of it,
    and null for the default."""
    known = [f.name for f in fields(ExperimentConfig)]
    settings: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        name = _SINGULAR.get(name, name)
        if name not in known:
            raise UsageError(f"unknown key {key!r}; allowed are {', '.join(known)}")
        if name in settings:
            raise UsageError(f"key {key!r} sets {name} a second time; give it once")
        if name in _LISTS:
            value = tuple(value) if isinstance(value, list | tuple) else (value,)
        if any(isinstance(item, list | dict | set) for item in (value if isinstance(value, tuple) else (value,))):
            raise UsageError(f"key {key!r} holds {values[key]!r}; give one value")
        settings[name] = value
    return {name: value for name, value in settings.items() if value not in (None, (None,))}


def parse_size(text: str) -> int:
    """Bytes in "512MiB", "2GB" or "1000000"."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"size {text!r} is not understood; give bytes, or a number with KiB, MiB, GiB, KB, MB or GB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -MOST <= value <= MOST


def _are_seeds(value: Any) -> bool:
    return all(_is_int(v) and 0 <= v < 2**32 for v in (value if isinstance(value, tuple) else (value,)))
