"""Ids that a model's head has and its tokenizer does not: heads are padded, and vocabularies have holes."""

from __future__ import annotations

from typing import Any

import torch


def unknown_ids(tokenizer: Any, vocab_size: int) -> list[int]:
    """Ids below `vocab_size` that stand for no token, ascending; none where the tokenizer does not tell."""
    if not hasattr(tokenizer, "get_vocab"):
        return []
    known = set(tokenizer.get_vocab().values())
    return [token for token in range(vocab_size) if token not in known and not _text(tokenizer, token)]


def _text(tokenizer: Any, token: int) -> str:
    """What an id outside the vocabulary decodes to: tokenizers with several ids for one text list only one of them."""
    try:
        text = str(tokenizer.decode([token]))
    except Exception:  # as many types as there are tokenizers
        return ""
    return "" if text == getattr(tokenizer, "unk_token", None) else text


def without(unknown: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    """Logits with -inf for these ids."""
    if unknown is None:
        return logits
    return logits.index_fill_(-1, unknown.to(logits.device), -torch.inf)
