"""Fixtures that the whole suite shares: one small random model, one real one where it was fetched."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # threads stall where cores are shared, and results do not depend on them


@pytest.fixture(autouse=True)
def _own_levels():
    """A command that a test runs sets what is logged (--quiet); the next test starts as the first one did."""
    yield
    for name in ("dts", "dts.fetch"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def tiny_lm():
    """A random two-layer Llama over a byte tokenizer: real forward calls, no download."""
    from families import ByteTokenizer, random_model

    from dts.models.huggingface import HFModel

    return HFModel(random_model("llama"), ByteTokenizer(), name="tiny")


@pytest.fixture(scope="session")
def smollm():
    """SmolLM2-135M-Instruct; skips where it was not fetched."""
    import dts
    from dts.fetch import cached

    try:
        cached("smollm2-135m")
    except dts.UnavailableError as error:
        pytest.skip(str(error))
    return dts.load("smollm2-135m")


@pytest.fixture(scope="session")
def packaged():
    """The packaged data (BasicMotions, M4); skips where they were not fetched."""
    import dts
    from dts.fetch import cached

    try:
        return cached("basic-motions"), cached("m4-mini")
    except dts.UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def shared_data():
    """The folder of larger real samples beside the checkout; skips where it is absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return folder
