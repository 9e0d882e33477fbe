"""Model names: what each stands for, and the colour it has in every chart."""

from __future__ import annotations

import difflib
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dts.errors import UsageError
from dts.yamlfile import read_yaml

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ENGINES = ("vllm:", "http://", "https://")  # what the address of an engine begins with
COLOR = re.compile(r"#[0-9A-Fa-f]{6}")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A named model and where its weights are."""

    name: str
    kind: Literal["package", "hub", "folder", "engine"]
    source: str  # an item of `dts.fetch`, a hub id, a folder, or the address of an engine
    color: str  # "#RRGGBB"
    options: tuple[tuple[str, Any], ...] = ()  # of an engine (`dts.load`)


# name: (source, colour). The first five are the names and colours of earlier systems; hub ids have a slash.
_MODELS = {
    "llama-7b": ("meta-llama/Llama-2-7b-hf", "#FF6B6B"),
    "llama-13b": ("meta-llama/Llama-2-13b-hf", "#4ECDC4"),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", "#95E1D3"),
    "phi-2": ("microsoft/phi-2", "#F38181"),
    "gemma-7b": ("google/gemma-7b", "#AA96DA"),
    "smollm2-135m": ("smollm2-135m", "#2A6FDB"),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", "#1B3A6B"),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "#5BC0EB"),
    "smollm3-3b": ("HuggingFaceTB/SmolLM3-3B", "#0B7A75"),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B-Instruct", "#F9A03F"),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", "#C97B12"),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", "#8C4F00"),
    "qwen3-8b": ("Qwen/Qwen3-8B", "#E3C21B"),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B-Instruct", "#B3001B"),
    "gemma-3-270m": ("google/gemma-3-270m-it", "#6A4C93"),
    "gemma-3-1b": ("google/gemma-3-1b-it", "#D65DB1"),
    "phi-4-mini": ("microsoft/Phi-4-mini-instruct", "#5F8D2F"),
}
MODEL_CONFIGS: dict[str, ModelSpec] = {
    name: ModelSpec(name, "hub" if "/" in source else "package", source, color)
    for name, (source, color) in _MODELS.items()
}

# For models that nobody gave a colour: none of these is in the registry.
PALETTE = (
    "#1F77B4", "#FF7F0E", "#2CA02C", "#9467BD", "#8C564B", "#17BECF", "#BCBD22", "#7F7F7F",
    "#E15759", "#76B7B2", "#59A14F", "#EDC948", "#B07AA1", "#FF9DA7", "#9C755F", "#4E79A7",
)  # fmt: skip


def color_for(name: str) -> str:
    """The registry's colour, else one of the palette that depends on the name alone."""
    if name in MODEL_CONFIGS:
        return MODEL_CONFIGS[name].color
    return PALETTE[zlib.crc32(name.encode()) % len(PALETTE)]


def resolve(name: str, models_file: str | Path | None = None) -> ModelSpec:
    """What a name stands for: an entry of the models file, a registry name, a local folder, or a hub id.

    Looks at nothing but names and folders; `dts.models.loading.check_available` looks at the model itself.
    """
    known = MODEL_CONFIGS | (read_models_file(models_file) if models_file is not None else {})
    if name in known:
        return known[name]
    if name and os.path.isdir(os.path.expanduser(name)):  # False, where Path raises, for names that are too long
        return ModelSpec(name, "folder", str(Path(name).expanduser()), color_for(name))
    if name.startswith(ENGINES):
        return ModelSpec(name, "engine", name, color_for(name))
    if HUB_ID.fullmatch(name) and not name.startswith("."):
        return ModelSpec(name, "hub", name, color_for(name))
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"known names are {', '.join(known)};"
    raise UsageError(f"unknown model {name!r}: {hint} A hub id (owner/name) or a local folder is accepted too")


def read_models_file(path: str | Path) -> dict[str, ModelSpec]:
    """Reads a YAML file of `name: {path: FOLDER or hub: OWNER/NAME, color: "#RRGGBB"}`, or of engines, `name: {engine:
    ADDRESS, color: ..., OPTION: VALUE}` with the options that `dts.load` has for them.

    Folders are relative to the file. Without a colour, a name keeps the registry's.
    """
    file = Path(path).expanduser()
    content = read_yaml(file, "models file")
    if not isinstance(content, dict) or not content:
        raise UsageError(f"models file {file} holds no models; write lines like: llama-7b: {{path: ./my-llama}}")
    return {str(name): _entry(file, str(name), value) for name, value in content.items()}


def _entry(file: Path, name: str, value: Any) -> ModelSpec:
    def wrong(problem: str) -> UsageError:
        return UsageError(f"models file {file}, entry {name!r}: {problem}")

    if not isinstance(value, dict):
        raise wrong(f"{value!r} is not a mapping; write {{path: FOLDER}} or {{hub: OWNER/NAME}}")
    if "engine" in value:
        return _engine(name, value, wrong)
    if unknown := [str(key) for key in value if key not in ("path", "hub", "color")]:
        raise wrong(f"unknown key {', '.join(unknown)}; allowed are path, hub and color")
    if ("path" in value) == ("hub" in value):
        raise wrong("give exactly one of path and hub")
    key: Literal["path", "hub"] = "path" if "path" in value else "hub"
    source, color = value[key], _color(name, value, wrong)
    if not isinstance(source, str) or not source:
        raise wrong(f"{key} is {source!r}; give a piece of text")
    if key == "hub" and not HUB_ID.fullmatch(source):
        raise wrong(f"hub is {source!r}; give an id of the form OWNER/NAME")
    if key == "hub":
        return ModelSpec(name, "hub", source, color)
    return ModelSpec(name, "folder", str(file.parent / Path(source).expanduser()), color)


def _engine(name: str, value: dict[Any, Any], wrong: Callable[[str], UsageError]) -> ModelSpec:
    source = value["engine"]
    if not isinstance(source, str) or not source.startswith(ENGINES):
        raise wrong(f"engine is {source!r}; give an address that begins with one of {', '.join(ENGINES)}")
    options = tuple((str(key), held) for key, held in value.items() if key not in ("engine", "color"))
    return ModelSpec(name, "engine", source, _color(name, value, wrong), options)


def _color(name: str, value: dict[Any, Any], wrong: Callable[[str], UsageError]) -> str:
    color = value.get("color", color_for(name))
    if not isinstance(color, str) or not COLOR.fullmatch(color):
        raise wrong(f'color is {color!r}; give six hexadecimal digits in quotes, such as "#FF6B6B"')
    return color


def list_models(models_file: str | Path | None = None) -> str:
    """A table of all known names, one a line."""
    known = MODEL_CONFIGS | (read_models_file(models_file) if models_file is not None else {})
    lines = [("name", "kind", "source", "colour"), *((s.name, s.kind, s.source, s.color) for s in known.values())]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)  # fmt: skip
