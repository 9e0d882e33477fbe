"""A model's structure copied for one session: the same weights, but nothing else that is shared.

A decode needs other settings than the user's model may have: eval mode, its own attention, rotary frequencies that no
earlier call left. Instead of switching the model, which other threads use and which an exception would leave
switched, each session gets its own modules. They are made by copying every module's `__dict__`, in milliseconds, so
they show the model as it is now: replaced weights, adapters switched on or off, hooks.
"""

from __future__ import annotations

import copy
import functools
import types
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig

_PLAIN = frozenset([int, float, str, bool, type(None), torch.dtype, torch.device, torch.Tensor, nn.Parameter])


class ModelView:
    """A model in eval mode that shares its parameters with the original, and no module and no config.

    model: the copy of what was given. core: the causal model inside adapters. decoder: the core without its head.
    """

    def __init__(self, model: nn.Module) -> None:
        self._copier = _Copier()
        self.model: Any = self._copier.module(getattr(model, "_orig_mod", model))  # not the compiled wrapper
        self.core: Any = core_of(self.model)
        self.decoder: Any = self.core.base_model

    def modules(self) -> list[nn.Module]:
        """Every module of the view."""
        return self._copier.modules()

    def configs(self) -> list[PreTrainedConfig]:
        """Every config that a module of the view reads."""
        return self._copier.configs()

    def attend_with(self, attention: str) -> None:
        """Use another attention implementation, by its name in transformers' registry."""
        for config in self.configs():
            config._attn_implementation = attention

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] from the decoder's last hidden states [B, H]."""
        config = self.core.config.get_text_config()
        logits: torch.Tensor = self.core.get_output_embeddings()(hidden)
        # The two factors and the cap that families put after their head; the self-check would show another one.
        factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1)
        logits = logits if factor == 1 else logits * factor
        cap = getattr(config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits


class Viewable(Protocol):
    """A model that can be looked at."""

    @property
    def device(self) -> torch.device:
        """Where token ids enter the model."""

    def view(self) -> ModelView:
        """The model as it is now, for one session."""


def core_of(model: Any) -> Any:
    """The causal model inside a compiled or PEFT wrapper."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class _Copier:
    """Copies modules, and of everything they hold what refers to modules or configs."""

    def __init__(self) -> None:
        self._modules: dict[int, nn.Module] = {}  # by id of the original
        self._configs: dict[int, Any] = {}
        self._memo: dict[int, Any] = {}  # of deepcopy: configs inside configs stay the same objects

    def modules(self) -> list[nn.Module]:
        return list(self._modules.values())

    def configs(self) -> list[PreTrainedConfig]:
        return list(self._configs.values())

    def module(self, original: nn.Module) -> nn.Module:
        made = self._modules.get(id(original))
        if made is None:
            if isinstance(original, torch.jit.ScriptModule):
                return original  # has no Python attributes to copy, and no config
            made = self._modules[id(original)] = object.__new__(type(original))
            made.__dict__.update({name: self._value(value) for name, value in original.__dict__.items()})
            made.__dict__["training"] = False
            made.__dict__["_compiled_call_impl"] = None  # what `model.compile()` left runs the original
            _start_afresh(made)
        return made

    def _value(self, value: Any) -> Any:
        if type(value) in _PLAIN:  # asked first: nearly all are
            return value
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, PreTrainedConfig):
            return self._config(value)
        if isinstance(value, (dict, list, set)):
            return self._container(value)
        if type(value) is tuple:
            return tuple(map(self._value, value))
        if isinstance(value, types.MethodType):  # such as a `forward` put on the instance
            return types.MethodType(value.__func__, self._value(value.__self__))
        return self._partial(value) if isinstance(value, functools.partial) else value

    def _config(self, config: PreTrainedConfig) -> Any:
        if id(config) not in self._configs:
            self._configs[id(config)] = copy.deepcopy(config, self._memo)
        return self._configs[id(config)]

    def _container(self, value: Any) -> Any:
        made = value.copy()  # three in four are a module's empty dicts of hooks
        if made and not isinstance(made, set):
            for key, held in list(made.items() if isinstance(made, dict) else enumerate(made)):
                if type(held) not in _PLAIN:
                    made[key] = self._value(held)
        return made

    def _partial(self, value: functools.partial[Any]) -> functools.partial[Any]:
        """Where accelerate's hooks keep the module."""
        arguments = {name: self._value(held) for name, held in value.keywords.items()}
        made = functools.partial(self._value(value.func), *map(self._value, value.args), **arguments)
        made.__dict__.update({name: self._value(held) for name, held in value.__dict__.items()})
        return made


def _start_afresh(module: nn.Module) -> None:
    """Undo what earlier calls left in a module, and see to it that the next ones write into no shared tensor."""
    held = module.__dict__
    if any("dynamic" in kind or kind == "longrope" for kind in _rope_types(held.get("rope_type"))):
        for name, buffer in list(module._buffers.items()):  # the frequencies of the last or longest sequence
            if buffer is not None and name.endswith("inv_freq"):
                original = getattr(module, name.replace("inv_freq", "original_inv_freq"), buffer)
                module._buffers[name] = original.to(buffer.device).clone()
        for name in [name for name in held if name.endswith("max_seq_len_cached")]:
            held[name] = held["original_max_seq_len"]
    if held.get("layers_are_rescaled") is False:  # RWKV would divide its weights in place, once for each view
        held["config"].rescale_every = 0


def _rope_types(kinds: Any) -> list[str]:
    """Of a rotary module; some have one for each type of layer."""
    return [str(kind) for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])]
