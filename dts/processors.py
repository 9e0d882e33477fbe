"""Logits processors inside a tree.

`generate` calls a processor once a token along one sequence, so a processor may remember where it is (a grammar's
state, a count). A search goes along many paths in turn. A processor that remembers has therefore a state per path:

- Functions, and the processors of `transformers` in `STATELESS`, depend on their arguments alone and are called as
  they are. So is an object with an attribute `stateless = True`.
- Any other object is copied (`copy.deepcopy`) where a path continues, so that each copy has seen the tokens of one path
  and no others. Models and tokenizers inside it are shared. Each evaluated node keeps a copy.
- A function or class that takes no arguments is a factory: it makes a processor for a new path. What it makes is
  copied where that is possible. Otherwise it is made anew at each branch and called along the path again, with
  logits of 0 (a processor whose state depends on logits has to allow copies).
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dts.errors import DTSError, ModelError, UsageError, shown
from dts.memory import first_line, is_out_of_memory
from dts.tree import ROOT, Tree

Processor = Callable[..., Any]

MODULE = "transformers.generation.logits_process"
STATELESS = frozenset(
    ["MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "TemperatureLogitsWarper",
     "RepetitionPenaltyLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor", "TopPLogitsWarper",
     "TopKLogitsWarper", "TopHLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper", "EpsilonLogitsWarper",
     "EtaLogitsWarper", "NoRepeatNGramLogitsProcessor", "EncoderNoRepeatNGramLogitsProcessor",
     "SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor", "PrefixConstrainedLogitsProcessor",
     "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor",
     "ExponentialDecayLengthPenalty", "LogitNormalization", "SuppressTokensAtBeginLogitsProcessor",
     "SuppressTokensLogitsProcessor", "WatermarkLogitsProcessor"]
)  # fmt: skip
# They need a second forward pass, an encoder or audio tokens, none of which a search has.
UNSUITED = frozenset(
    ["WhisperTimeStampLogitsProcessor", "WhisperNoSpeechDetection", "ClassifierFreeGuidanceLogitsProcessor",
     "AlternatingCodebooksLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor",
     "BarkEosPrioritizerLogitsProcessor", "DiaClassifierFreeGuidanceLogitsProcessor",
     "DiaEOSChannelFilterLogitsProcessor", "DiaEOSDelayPatternLogitsProcessor"]
)  # fmt: skip
REMEDY = (
    "give a function without arguments that makes one, such as logits_processor=lambda: {0}(...), or set its attribute "
    "stateless to True if it keeps no state"
)


def is_stateless(processor: Processor) -> bool:
    """Whether this processor may be called on all paths in turn."""
    kind = type(processor)
    if kind.__module__ == MODULE:
        return kind.__name__ in STATELESS
    return isinstance(processor, (types.FunctionType, types.BuiltinFunctionType)) or (
        getattr(processor, "stateless", False) is True
    )


def name_of(processor: Processor) -> str:
    return str(getattr(processor, "__name__", type(processor).__name__))


def members(given: Any) -> Sequence[Processor]:
    """The processors of a list of them, or the only one."""
    return given if isinstance(given, (list, tuple)) else (given,)


def check_processor(given: Any) -> None:
    """Raise `UsageError` for what is no processor, or has a state that cannot be kept per path."""
    for processor in members(given):
        path_state(processor)


class Processors:
    """The processors of one search, in their order."""

    def __init__(self, given: Any) -> None:
        self._states = [path_state(processor) for processor in members(given)]

    def copy(self) -> Processors:
        """The same, for a tree that grows apart from here on."""
        other = copy.copy(self)
        other._states = [state.copy() for state in self._states]
        return other

    def __call__(self, tree: Tree, prompt_ids: Sequence[int], nodes: Sequence[int], logits: torch.Tensor) -> Any:
        """The logits [B, V] of these nodes as the processors leave them, row by row."""
        rows = []
        for node, row in zip(nodes, logits.split(1), strict=True):
            ids = torch.tensor([[*prompt_ids, *tree.tokens(node)]], device=logits.device)
            path, row = [ROOT, *tree.path(node)], row.clone()  # a processor may write to its arguments
            for state in self._states:
                row = state(path, ids.clone(), row)
            rows.append(row)
        return torch.cat(rows)


class Stateless:
    """A processor that every path may call."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor

    def copy(self) -> Stateless:
        return self

    def __call__(self, path: Sequence[int], ids: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return called(self._processor, ids, row)


class PerPath:
    """A processor with a state for each evaluated node: what it remembers after the path up to there."""

    def __init__(self, make: Callable[[], Processor], copies: bool) -> None:
        self._make, self._copies = make, copies
        self._after: dict[int, Processor] = {}  # by node

    def copy(self) -> PerPath:
        other = PerPath(self._make, self._copies)
        if self._copies:  # one that cannot be copied is handed on along its path, so it is made anew
            other._after = dict(self._after)
        return other

    def __call__(self, path: Sequence[int], ids: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """path: nodes from the root to the one that `ids` [1, T] ends with, whose logits are `row` [1, V]."""
        processor, seen = self._nearest(path)
        prompt = ids.shape[1] - len(path) + 1
        for depth in range(seen, len(path) - 1):
            called(processor, ids[:, : prompt + depth].clone(), torch.zeros_like(row))
        row = called(processor, ids, row)
        self._after[path[-1]] = processor
        return row

    def _nearest(self, path: Sequence[int]) -> tuple[Processor, int]:
        """A processor that has seen the first nodes of the path, as many as possible but the last, and their number."""
        for seen in range(len(path) - 1, 0, -1):
            if path[seen - 1] in self._after:
                if self._copies:
                    return copied(self._after[path[seen - 1]]), seen
                return self._after.pop(path[seen - 1]), seen
        return self._make(), 0


def path_state(processor: Any) -> Stateless | PerPath:
    """How this processor is called. Raises `UsageError`."""
    if isinstance(processor, type) or not _takes(processor, 2):
        return _from_factory(processor)
    kind = type(processor)
    if kind.__module__ == MODULE and kind.__name__ in UNSUITED:
        raise UsageError(f"logits processor {kind.__name__} needs more than ids and logits; a search cannot use it")
    if is_stateless(processor):
        return Stateless(processor)
    start = copied(processor)  # what the caller does with his own changes nothing here
    return PerPath(lambda: copied(start), copies=True)


def _from_factory(factory: Any) -> Stateless | PerPath:
    if not callable(factory):
        raise UsageError(f"logits_processor={shown(factory)} is not callable; give (ids, logits) -> logits")
    if not _takes(factory, 0):
        raise UsageError(
            f"logits_processor: {name_of(factory)} takes neither (ids, logits) nor, as a maker of processors, nothing"
        )
    made = _made(factory)
    if is_stateless(made):
        return Stateless(made)
    return PerPath(lambda: _made(factory), _can_be_copied(made))


def _made(factory: Callable[[], Any]) -> Processor:
    try:
        made = factory()
    except Exception as error:
        raise UsageError(
            f"logits_processor: {name_of(factory)}() raised {type(error).__name__}: {first_line(error)}"
        ) from error
    if isinstance(made, type) or not callable(made):
        raise UsageError(f"logits_processor: {name_of(factory)}() made {shown(made)}, which is not callable")
    return made


def _takes(function: Any, count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # built in: its signature is not known
        return count == 2
    return True


def _can_be_copied(processor: Processor) -> bool:
    try:
        copied(processor)
    except UsageError:
        return False
    return True


def copied(processor: Processor) -> Processor:
    """A copy with a state of its own. Raises `UsageError` that names the class where that is not possible."""
    try:
        return copy.deepcopy(processor, {id(part): part for part in _shared(processor)})
    except Exception as error:
        name = name_of(processor)
        raise UsageError(
            f"logits processor {name} keeps a state and cannot be copied for each path ({first_line(error)}); "
            + REMEDY.format(name)
        ) from error


def _shared(value: Any, depth: int = 3) -> list[Any]:
    """The models and tokenizers inside an object, which are too large to copy and do not change."""
    if isinstance(value, torch.nn.Module) or hasattr(value, "convert_ids_to_tokens"):
        return [value]
    return [part for one in _parts(value) for part in _shared(one, depth - 1)] if depth else []


def _parts(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__]
    return list((value if isinstance(value, Mapping) else getattr(value, "__dict__", {})).values())


def called(processor: Processor, ids: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """What the processor makes of the logits `row` [1, V]. Raises `ModelError` that names it for an exception of its
    own, and for an answer that is no [1, V] of floating-point numbers."""
    try:
        answer = processor(ids, row)
    except DTSError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"logits processor {name_of(processor)} raised {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(answer, torch.Tensor) or answer.shape != row.shape or not answer.is_floating_point():
        got = f"{answer.dtype} {list(answer.shape)}" if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise ModelError(
            f"logits processor {name_of(processor)} returned {got}; it has to return logits of shape {list(row.shape)}"
        )
    return answer.to(row.device)
