"""Models to train: a base model with a new LoRA adapter, or with a trained one to continue from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dts.errors import UsageError
from dts.models.loading import load_pretrained
from dts.models.registry import resolve
from dts.training.config import LoraSettings, TrainConfig

ADAPTER = "adapter_model.safetensors"


def check_warm_start(config: TrainConfig) -> None:
    """Raise `UsageError` unless `checkpoint_path` is a LoRA folder that was trained on the config's model."""
    if config.warm_start is None:
        return
    folder = Path(config.warm_start)
    if not (folder / ADAPTER).is_file():
        raise UsageError(
            f"checkpoint_path={str(folder)!r} holds no {ADAPTER}: train that run first, or give the folder of another "
            "with --set checkpoint_path=FOLDER"
        )
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        same = resolve(str(base)).source == resolve(config.model).source
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"checkpoint_path={str(folder)!r}: adapter_config.json cannot be used: {error}") from error
    if not same:
        raise UsageError(
            f"checkpoint_path={str(folder)!r} was trained on {base}, but model is {config.model}; set model={base} or "
            "give another checkpoint"
        )


def load_for_training(config: TrainConfig, given: tuple[Any, Any] | None) -> tuple[Any, Any, Any]:
    """Model, tokenizer, and the configuration of a new adapter (None for a warm start, whose adapter is in place).

    given: a (model, tokenizer) pair to use in place of `config.model`; it is changed.
    """
    model, tokenizer = given if given is not None else load_pretrained(config.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.warm_start is None:
        return model, tokenizer, _lora(config.lora)
    from peft import PeftModel

    warm = PeftModel.from_pretrained(model, config.warm_start, is_trainable=True, local_files_only=True)
    return warm, tokenizer, None


def _lora(settings: LoraSettings) -> Any:
    from peft import LoraConfig

    modules = settings.target_modules
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=modules if modules == "all-linear" else [name.strip() for name in modules.split(",")],
        task_type="CAUSAL_LM",
    )


def hide_base(model: Any) -> None:
    """While training, the adapter names no base model: peft would ask the hub about it at every save."""
    for adapter in model.peft_config.values():
        adapter.base_model_name_or_path = ""


def name_base(folder: Path, name: str, model: Any) -> None:
    """Have a saved adapter say which model it belongs to, by the name that the run was given and not by the folder
    that it was loaded from."""
    for file in [folder / "adapter_config.json", *folder.glob("*/adapter_config.json")]:
        if file.is_file():
            settings = {**json.loads(file.read_text(encoding="utf-8")), "base_model_name_or_path": name}
            file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    card, loaded_from = folder / "README.md", str(getattr(model.config, "_name_or_path", ""))
    if loaded_from and card.is_file():
        card.write_text(card.read_text(encoding="utf-8").replace(loaded_from, name), encoding="utf-8")


def drop_reference(model: Any) -> None:
    """Leave out of what is saved the frozen copy that GRPO keeps of a warm start."""
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
