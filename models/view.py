"""A model's structure copied for one session: the same weights, but nothing else that is shared.

A decode needs other settings than the user's model may have: eval mode, its own attention, rotary frequencies that no
earlier call left. Instead of switching the model, which other threads use and which an exception would leave
switched, each session gets its own modules. They are made by copying every module's `__dict__`, in milliseconds, so
they show the model as it is now: replaced weights, adapters switched on or off, hooks.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, cache_utils
from transformers.cache_utils import Cache

_PLAIN = frozenset([int, float, str, bool, type(None), torch.dtype, torch.device, torch.Tensor, nn.Parameter])


@dataclass(frozen=True)
class Way:
    """How a family's code is used; the self-check finds out which one gives right numbers.

    own_head: logits come from the model's own forward, which does more to hidden states than the plain head.
    own_attention: keys and values are gathered for each path, for attention code that takes no other.
    whole_prompts: a prompt goes in one call, because a recurrence ignores what came before a longer piece.
    """

    own_head: bool = False
    own_attention: bool = False
    whole_prompts: bool = False


class ModelView:
    """A model in eval mode that shares its parameters with the original, and no module and no config.

    model: the copy of what was given. core: the causal model inside adapters. decoder: the core without its head.
    """

    def __init__(self, model: nn.Module, way: Way = Way()) -> None:
        self.way = way
        self._copier = _Copier()
        self.model: Any = self._copier.module(getattr(model, "_orig_mod", model))  # not the compiled wrapper
        self.core: Any = core_of(self.model)
        self.decoder: Any = self.core.base_model
        if self.decoder is self.core:  # the family's prefix is that of another class
            self.decoder = getattr(self.core, "model", self.core)

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

    @functools.cached_property
    def _arguments(self) -> Mapping[str, inspect.Parameter]:
        """What the decoder's call takes, by name."""
        return inspect.signature(getattr(self.decoder, "forward", self.decoder)).parameters

    def hidden(
        self, ids: torch.Tensor, cache: Cache, positions: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Last hidden states [B, T, H] of ids [B, T] at these positions, after what the cache holds. mask: [B, K],
        of keys that are padding."""
        named: dict[str, Any] = {"cache_params" if "cache_params" in self._arguments else "past_key_values": cache}
        if self._takes_positions:
            named["position_ids"] = positions
        if mask is not None:
            named["attention_mask"] = mask
        hidden: torch.Tensor = self.decoder(input_ids=ids, use_cache=True, **named).last_hidden_state
        return hidden

    @functools.cached_property
    def _takes_positions(self) -> bool:
        any_name = any(argument.kind is argument.VAR_KEYWORD for argument in self._arguments.values())
        return any_name or "position_ids" in self._arguments

    @functools.cached_property
    def recurrent(self) -> bool:
        """Whether calls leave more behind than keys and values."""
        return getattr(self.core, "_is_stateful", False) or any(map(_is_recurrent, self.cache().layers))

    def cache(self) -> DynamicCache:
        """An empty cache that keeps the keys and values of all tokens, also those outside of windows."""
        try:
            layers = DynamicCache(config=self.core.config).layers
        except (AttributeError, KeyError, TypeError, ValueError):  # a config without what the caches of layers need
            layers = []
        made = DynamicCache()
        if any(map(_is_recurrent, layers)):
            made.layers, made.layer_class_to_replicate = [_with_all_keys(layer) for layer in layers], None
        return made

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] from the decoder's last hidden states [B, H]."""
        if self.way.own_head:
            return self._own_head(hidden)
        config = self.core.config.get_text_config()
        logits: torch.Tensor = self.core.get_output_embeddings()(hidden)
        # The two factors and the cap that families put after their head; the self-check would show another one.
        factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1)
        logits = logits if factor == 1 else logits * factor
        cap = getattr(config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def _own_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's own forward, with these hidden states instead of its decoder's."""
        held = vars(self.decoder)  # its class keeps its forward; hooks may have put another one here
        before = {name: held[name] for name in ("forward",) if name in held}
        held["forward"] = lambda *_, **__: _Output(hidden[None])
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            logits: torch.Tensor = self.core(input_ids=ids, use_cache=False).logits[0]
            return logits
        finally:
            del held["forward"]
            held.update(before)


class _Output:
    """A decoder's output that has hidden states, and nothing of what else a family may ask for."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class Viewable(Protocol):
    """A model that can be looked at."""

    @property
    def device(self) -> torch.device:
        """Where token ids enter the model."""

    def view(self) -> ModelView:
        """The model as it is now, for one session."""


def entry_device(core: Any) -> torch.device:
    """Where token ids enter a model."""
    embeddings = core.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    # A layer that accelerate keeps elsewhere says where it computes.
    return torch.device(embeddings._hf_hook.execution_device) if device.type == "meta" else device


def core_of(model: Any) -> Any:
    """The causal model inside a compiled or PEFT wrapper."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_recurrent(layer: Any) -> bool:
    return hasattr(layer, "conv_states") or hasattr(layer, "recurrent_states")


def _with_all_keys(layer: Any) -> Any:
    """A layer like this one that keeps keys outside of windows."""
    if not getattr(layer, "is_sliding", False):
        return layer
    if not _is_recurrent(layer):
        return cache_utils.DynamicLayer()
    return cache_utils.LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)


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
