"""Tensor parallelism: two processes that share one model give the completions of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import random_model

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
from families import ByteTokenizer
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import dts
from dts.search import MaxEnt

def completions(model):
    lm = dts.load((model, ByteTokenizer()))
    result = dts.decode(lm, "Time flies", reward=lambda t: t.count("a"), method=MaxEnt(12), max_new_tokens=8, seed=0)
    assert result.usage.recomputed_tokens == 0
    return [completion.token_ids for completion in result.completions]

load = AutoModelForCausalLM.from_pretrained
shared = load({folder!r}, distributed_config=DistributedConfig(tp_size=2))
alone = load({folder!r})
width = lambda model: model.model.layers[0].self_attn.q_proj.weight
assert width(shared).to_local().shape[0] * 2 == width(alone).shape[0]
assert completions(shared) == completions(alone)
"""


def test_two_processes_with_half_of_each_matrix_find_what_one_process_finds(tmp_path):
    pytest.importorskip("transformers.distributed", reason="this transformers has no DistributedConfig")
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    random_model("llama").save_pretrained(tmp_path / "model")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), folder=str(tmp_path / "model")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
