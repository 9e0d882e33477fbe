"""Every causal family of the installed transformers: served with right numbers, or refused by name."""

from __future__ import annotations

import re
import warnings

import pytest
import transformers
from all_families import AS_DECODER, ENCODERS, FAMILIES, LATER, Outcome, outcome

# Must be on the tree cache in every supported version. What newer versions add may be served either way.
ON_THE_TREE = {
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_neox", "granite", "granitemoe",
    "helium", "llama", "mistral", "mixtral", "olmo", "olmo2", "olmoe", "opt", "phi", "phi3", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
    # attention sinks
    "gpt_oss",
    # attention code of their own
    "bloom", "codegen", "deepseek_v2", "deepseek_v3", "falcon", "gpt_neo", "gptj", "mpt", "stablelm", "xglm",
}  # fmt: skip
# Recurrent and hybrid ones.
HYBRID = {"bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "mamba", "mamba2",
          "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_next", "recurrent_gemma",
          "zamba", "zamba2"}  # fmt: skip
# Must be served: recurrent ones, and encoders that their config turns into decoders.
SERVED = HYBRID | {"rwkv", "xlstm", "bert" + AS_DECODER, "roberta" + AS_DECODER}


@pytest.fixture(scope="module")
def seen():
    """Outcomes of this run by family."""
    return {}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_served_with_right_numbers_or_refused_by_name(family, seen):
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = seen[family] = outcome(family)
    if found.path == "not built":
        pytest.skip(f"{family} cannot be built tiny: {found.reason}")
    assert found.path in ("tree", "slow", "refused"), found.reason
    if family in ON_THE_TREE | HYBRID - LATER:
        assert found == Outcome("tree")
    if found.path == "slow":
        assert found.reason
    if found.path == "refused":
        assert re.match(r"\w+ cannot be used as a causal language model: .+$", found.reason)
    if family in SERVED:
        assert found.path != "refused", found.reason
    if family in ENCODERS:
        assert "change with later tokens" in found.reason and "is_decoder=True" in found.reason


def test_nearly_all_families_were_tried(seen):
    if len(seen) < len(FAMILIES):
        pytest.skip("the sweep ran in part only")
    missing = [family for family, found in seen.items() if found.path == "not built"]
    assert not ON_THE_TREE & set(missing)
    assert len(missing) < 0.1 * len(FAMILIES)
