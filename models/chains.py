"""Several tokens of several paths in one forward call.

A `Forest` sends one token for each path, as a search needs it. A reward model often meets whole texts, so here the
missing ends of many paths go through the model together: plain attention over copies of what their tree holds, shorter
paths padded in front and shorter ends after them. What is computed is put into the tree's cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from dts.models.sessions import TreeSession
from dts.models.view import ModelView

Tokens = tuple[int, ...]
Chain = tuple[int, Tokens]  # the slot that it follows, and its tokens


def chains_of(starts: Sequence[int], rests: Sequence[Tokens]) -> list[Chain]:
    """What can be sent first of these tokens, each after its slot: up to where tokens after the same slot part. One
    that is the beginning of another parts from nothing."""
    together: dict[tuple[int, int], list[Tokens]] = {}
    for slot, rest in zip(starts, rests, strict=True):
        if rest:
            together.setdefault((slot, rest[0]), []).append(rest)
    return [(slot, _before_they_part(group)) for (slot, _), group in together.items()]


def _before_they_part(group: Sequence[Tokens]) -> Tokens:
    longest = max(group, key=len)
    shared = (_shared(longest, other) for other in group)
    return longest[: min((n for n, other in zip(shared, group, strict=True) if n < len(other)), default=len(longest))]


def _shared(one: Tokens, other: Tokens) -> int:
    """Tokens of the longest common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@torch.inference_mode()
def send(session: TreeSession, view: ModelView, device: torch.device, chains: Sequence[Chain]) -> list[list[int]]:
    """Send chains that differ in their slot or their first token; returns the new slots of each. view: of plain
    attention. A chain has a lane of the session for itself."""
    held = [session.held(slot) for slot, _ in chains]  # [heads, tokens, dim] per layer, keys before values
    lengths = [columns[0].shape[1] for columns in held]
    before, longest = max(lengths), max(len(tokens) for _, tokens in chains)
    cache = _past(held, before)
    ids = [[*tokens, *([0] * (longest - len(tokens)))] for _, tokens in chains]
    mask = [[0] * (before - past) + [1] * (past + len(tokens)) + [0] * (longest - len(tokens))
            for past, (_, tokens) in zip(lengths, chains, strict=True)]  # fmt: skip
    positions = [[past + min(i, len(tokens) - 1) for i in range(longest)]
                 for past, (_, tokens) in zip(lengths, chains, strict=True)]  # fmt: skip
    hidden = view.decoder(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=torch.tensor(mask, device=device),
        position_ids=torch.tensor(positions, device=device),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state  # [chains, longest, H]
    new = [*(layer.keys for layer in cache.layers), *(layer.values for layer in cache.layers)]
    slots = [
        session.adopt(slot, tokens, [tensor[row, :, before - lengths[row] : before + len(tokens)] for tensor in new])
        for row, (slot, tokens) in enumerate(chains)
    ]
    kept = torch.cat([hidden[row, : len(tokens)] for row, (_, tokens) in enumerate(chains)])
    session.keep([slot for chain in slots for slot in chain], kept)
    return slots


def _past(held: Sequence[Sequence[torch.Tensor]], longest: int) -> DynamicCache:
    """Keys and values of all paths, [chains, heads, longest, dim] per layer, each path at its end."""
    cache = DynamicCache()
    if longest:
        columns = []
        for of_column in zip(*held, strict=True):
            heads, _, dim = of_column[0].shape
            column = of_column[0].new_zeros(len(held), heads, longest, dim)
            for row, tensor in enumerate(of_column):
                column[row, :, longest - tensor.shape[1] :] = tensor
            columns.append(column)
        layers = len(columns) // 2
        for index in range(layers):
            cache.update(columns[index], columns[layers + index], index)
    return cache
