"""Running out of memory, in the words of the different devices."""

from __future__ import annotations

import psutil
import torch

REMEDY = "lower batch_size, max_new_tokens or max_kv_bytes, shorten the prompt, or take a smaller dtype or model"
_SAID = ("out of memory", "not enough memory", "can't allocate memory")  # CUDA and MPS, then the CPU's allocator


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no room: MPS and the CPU raise a plain `RuntimeError`."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _SAID)


def free_bytes(device: torch.device) -> int:
    """Memory that is left on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def release() -> None:
    """Hand unused memory back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
