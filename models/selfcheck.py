"""Whether a model's numbers can be trusted: through the tree cache, and by recomputation.

Both checks send a few tokens. What a model does only to long sequences (windows, chunks, sparse attention, scales that
grow with the position) is made to happen within them: a second check runs on a view whose limits are a few tokens.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dts.errors import UsageError
from dts.lm import PROMPT_SLOT
from dts.memory import first_line, is_out_of_memory
from dts.models.forest import Forest
from dts.models.prefixes import Segment
from dts.models.rope import rope_limits
from dts.models.sessions import TreeSession, prefill, whole_logits
from dts.models.treecache import Place
from dts.models.view import ModelView, Way

# In logits. A SmolLM2 after some training is apart by 5e-3 in float32 and by 2e-4 in float64 (its norms are computed in
# float32): large activations amplify rounding.
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-3}
LOW_PRECISION_TOLERANCE = 0.25
PROMPT, TAIL, PIECE = 3, 3, 2  # tokens of the check's prompt, of each of its two branches, of a piece of the prompt
WAYS = [Way(), Way(own_head=True), Way(own_attention=True), Way(own_head=True, own_attention=True)]  # the best first
SHORT = 3  # what a limit becomes in the second check
# Names in configs and modules of what begins to act at some length.
LIMITS = re.compile(
    r"(sliding_window|window)(_size|s)?|attention_window(_size)?|attention_chunk_size|local_window|index_topk(_blocks)?|"
    r"floor_scale|log_scaling_n_floor|((lsh|local)_attn_)?chunk_length"
)
ROPE_LIMIT = "original_max_position_embeddings"  # in rope parameters: some families scale queries by the position


def tree_way(view: Callable[[], ModelView], vocab_size: int, device: torch.device) -> Way | str:
    """How the tree cache serves an architecture with the logits of plain calls, or why it cannot."""
    one = view()
    ids = check_ids(one.core.config, vocab_size, PROMPT + 1 + 2 * TAIL)
    ways = [*WAYS, *(replace(way, whole_prompts=True) for way in WAYS)] if one.recurrent else WAYS
    problems = []
    for way in ways:
        problem = _tree_problem(functools.partial(_with, view, way), ids, device)
        if problem is None:
            return way
        problems.append(problem)
    return problems[0]


def tree_problem(view: Callable[[], ModelView], vocab_size: int, device: torch.device) -> str | None:
    """Why the tree cache cannot serve an architecture as it is, by keys and values alone; None where it can."""
    one = view()
    if one.recurrent:
        return "it has a recurrent state"
    return _tree_problem(view, check_ids(one.core.config, vocab_size, PROMPT + 1 + 2 * TAIL), device)


def _with(view: Callable[[], ModelView], way: Way) -> ModelView:
    made = view()
    made.way = way
    return made


def _tree_problem(view: Callable[[], ModelView], ids: list[int], device: torch.device) -> str | None:
    for make in _views(view):
        try:
            problem = _difference(make, ids, device)
        except Exception as error:  # what it meant for tensors and caches of its own can fail in any way
            if is_out_of_memory(error):
                raise
            problem = f"its code cannot use it: {first_line(error)}"
        if problem is not None:
            return problem
    return None


def _difference(make: Callable[[], ModelView], ids: list[int], device: torch.device) -> str | None:
    """Two branches after one prompt and, in the same calls, one after a shorter prompt."""
    view = make()
    size = PROMPT + view.recurrent  # a recurrence that continues with a piece of two tokens
    branches = ids[size : size + TAIL], ids[size + TAIL : size + 2 * TAIL]
    paths = [(ids[:size], branches[0]), (ids[:size], branches[1]), (ids[: size - 1], branches[0])]
    direct = torch.cat([whole_logits(make(), prompt + tail, device)[:, -1] for prompt, tail in paths])
    long, short = (prefill(view, prompt, device, chunk=PIECE) for prompt, _ in paths[1:])
    forest = Forest(view, long, device=device, lanes=3, max_length=TAIL)
    two, one = (TreeSession(forest, Segment(prefix), Place(first, count, None, 8))
                for prefix, first, count in [(long, 0, 2), (short, 2, 1)])  # fmt: skip
    slots = [[PROMPT_SLOT, PROMPT_SLOT], [PROMPT_SLOT]]
    for tokens in zip(*(tail for _, tail in paths), strict=True):
        slots = forest.extend([(two, slots[0], tokens[:2]), (one, slots[1], tokens[2:])])
    tree = torch.cat([two.logits(slots[0]), one.logits(slots[1])])
    error = (tree.float() - direct.float()).abs().max().item()
    return None if error <= tolerance(direct) else f"its logits differ by {error:.3g}"


def state_bytes(view: Callable[[], ModelView], vocab_size: int, device: torch.device) -> int:
    """Bytes of one recurrent state; 0 for other models."""
    one = view()
    if not one.recurrent:
        return 0
    state = prefill(one, check_ids(one.core.config, vocab_size, PROMPT), device, chunk=PROMPT).state
    return state.nbytes if state else 0


def refuse_unless_causal(view: Callable[[], ModelView], vocab_size: int, device: torch.device) -> None:
    """Raises `UsageError` where plain calls of a model give no probability of the next token."""
    core, problem = view().core, None
    for make in _views(view):
        try:
            problem = problem or _recompute_problem(make, vocab_size, device)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if make is view:
                problem = f"it gives no logits for token ids alone ({first_line(error)})"
    if problem is not None:
        decoder = getattr(core.config, "is_decoder", None) is False
        remedy = "; if it was trained as a decoder, load it with is_decoder=True in its config" if decoder else ""
        raise UsageError(f"{type(core).__name__} cannot be used as a causal language model: {problem}{remedy}")


def _recompute_problem(view: Callable[[], ModelView], vocab_size: int, device: torch.device) -> str | None:
    ids = check_ids(view().core.config, vocab_size, PROMPT + 2 * TAIL + 1)
    last, other = ids[:-1], ids[:-2] + ids[-1:]  # sequences that differ in their last token
    one, again, two = (whole_logits(view(), tokens, device).float() for tokens in (last, last, other))
    wanted = (1, len(last), vocab_size)
    if one.shape != wanted:
        return f"its logits for {len(last)} tokens have the shape {tuple(one.shape)} instead of {wanted}"
    if _apart(one, again):
        return "two calls with the same tokens give different logits"
    if _apart(one[:, :-1], two[:, :-1]):
        return "the logits after a token change with later tokens, so they are no probabilities of the next one"
    return None


def _apart(one: torch.Tensor, two: torch.Tensor) -> bool:
    return bool((one - two).abs().max() > tolerance(one))


def tolerance(logits: torch.Tensor) -> float:
    """What rounding may change: a trained model's logits reach 30 and more, and the errors grow with them."""
    size = max(1.0, logits.abs().max().item() / 10)
    return size * TOLERANCE.get(logits.dtype, LOW_PRECISION_TOLERANCE)


def check_ids(config: Any, vocab_size: int, count: int) -> list[int]:
    """Different ids, none of which some families give a position of its own."""
    given = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    special = {token for ids in given for token in (ids if isinstance(ids, list) else [ids])}
    usual = [token for token in range(1, min(vocab_size, count + 8)) if token not in special] or [0]
    return [usual[i % len(usual)] for i in range(count)]


def _views(view: Callable[[], ModelView]) -> list[Callable[[], ModelView]]:
    """Views as they are and, for models with limits on lengths, shortened ones."""
    return [view, lambda: shorten(view())] if _limits(view()) else [view]


def shorten(view: ModelView) -> ModelView:
    """Set every limit on lengths to a few tokens."""
    for held, name in _limits(view):
        held[name] = _short(held[name])
    return view


def _limits(view: ModelView) -> list[tuple[dict[str, Any], str]]:
    """Where a view's configs and modules keep limits that are longer than the check, and under which names."""
    holders = [vars(holder) for holder in (*view.configs(), *view.modules())]
    places = [(held, name) for held in holders for name in held if LIMITS.fullmatch(name)]
    for config in view.configs():
        rope = getattr(config, "rope_parameters", None) or {}
        if ROPE_LIMIT in rope and not rope_limits(config):  # where the frequencies follow it, it must stay
            places.append((rope, ROPE_LIMIT))
    return [(held, name) for held, name in places if _short(held[name]) != held[name]]


def _short(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_short, value))
    return SHORT if isinstance(value, (int, float)) and value > SHORT and not isinstance(value, bool) else value
