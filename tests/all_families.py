"""Every causal family of the installed transformers, tiny and with random weights, and how the library serves it.

`python tests/all_families.py` writes the table of docs/families.md.
"""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from families import VOCAB, ByteTokenizer, randomize
from test_engine import grow
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dts.errors import UsageError
from dts.models.huggingface import HFModel
from dts.models.sessions import TreeSession

# Encoders that become decoders by their config; otherwise they see later tokens.
ENCODERS = [
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
]  # fmt: skip
AS_DECODER = " (is_decoder=True)"
FAMILIES = sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(name + AS_DECODER for name in ENCODERS)])
# Served by recomputation in the oldest supported version of transformers.
LATER = {"recurrent_gemma"} if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23) else set()
LAYERS, HEADS, HEAD_DIM = 3, 4, 8
PROMPT = [13, 5, 7, 11, 13, 17, 19, 23]
TOLERANCE = 2e-4
PATHS = ("tree", "slow", "refused", "wrong", "not built")

# Sizes by the names that configs give them; a size that is smaller already stays.
SIZES = [
    (re.compile(names), size)
    for names, size in [
        (r"(.*_)?vocab_size(_.*)?|n_tokens|n_words", VOCAB),
        (r"encoder_hash_byte_group_vocab|ngram_vocab_size_base", 64),
        (r"(num|n)_(hidden_)?layers?|(encoder|decoder)_layers|.*num_hidden_layers|(.*_)?depth", LAYERS),
        (r"n_heads?|(.*_)?num_(attention_)?heads|(encoder|decoder)_attention_heads", HEADS),
        (r"(.*_)?num_key_value_heads|(.*_)?kv_n?_?heads", 2),
        (r"(.*_)?head_(dim|size)|d_kv|kv_channels|attention_head_dim|qk_nope_head_dim", HEAD_DIM),
        (r"rotary_dim|qk_rope_head_dim", 4),
        (
            r"d_model|n_embd|dim|emb_dim|(.*_)?embed(ding)?_(dim|size)|(.*_)?hidden_size|(.*_)?embed_proj_dim|d_embed",
            32,
        ),
        (r"(.*_)?intermediate_size|(.*_)?ffn_dim|d_ff|dff|(.*_)?ffn_hidden_size|(.*_)?mlp_dim|feed_forward_size", 48),
        (r"(.*_)?max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?", 256),
        (r"(.*_)?num_experts|num_local_experts|n_routed_experts|zero_expert_num", 4),
        (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|num_selected_experts|top_k_experts", 2),
        (r"n_group|num_expert_group|topk_group|n_shared_experts|moe_num_shared_experts", 1),
        (r"(.*_)?lora_rank|altup_rank|hc_lowrank", 16),
        (r"(.*_)?(d_state|state_size)", 8),
        (r"(mamba_)?chunk_size", 16),
        (r"sliding_window(_size)?|window_size|attention_(window|chunk_size)|local_attention_window_len", 6),
        (r"image_size", 16),
        (r"patch_size", 8),
    ]
]
LAYER_LISTS = {
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "intermediate_size",
    "activation_sparsity_pattern",
}
_MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8}

# What the rules above cannot guess.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA_HEADS, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}, "num_key_value_heads": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "falcon_h1": {**_MAMBA_HEADS, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {**_MAMBA_HEADS, "layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"head_dim": 4, "qk_head_dim": 12},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                       "indexer_compress_ratio": 2},
    "reformer": {
        "is_decoder": True, "axial_pos_shape": (16, 16), "axial_pos_embds_dim": (8, 24), "attention_head_size": 8,
        "attn_layers": ("local", "lsh"), "num_hidden_layers": 2, "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 4,
              "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    # transformers' step of one token leaves out the lower bound on time steps that its other calls apply.
    "zamba2": {"time_step_min": 1e-6,
               "attention_hidden_size": 64, "attention_head_dim": 16, "kv_channels": 16, "n_mamba_heads": 8,
               "mamba_headdim": 8, "num_query_groups": 4, "num_key_value_heads": 4, "hybrid_layer_ids": [1, 2],
               "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a family is served: "tree", "slow", "refused", "wrong" or "not built", and why."""

    path: str
    reason: str = ""


def tiny_config(family: str) -> PreTrainedConfig:
    name, _, decoder = family.partition(AS_DECODER[:2])
    cls = CONFIG_MAPPING[name]
    return cls(**{**_shrunk(cls()), **SPECIAL.get(name, {}), **({"is_decoder": True} if decoder else {})})


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments that make a config tiny."""
    sizes = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            if inner := {**_shrunk(value), **SPECIAL.get(value.model_type, {})}:
                sizes[name] = inner
        elif name in LAYER_LISTS and isinstance(value, (list, tuple)):
            kinds = list(dict.fromkeys(value))  # each kind once, as far as there are layers
            sizes[name] = [_small(name, kinds[i % len(kinds)]) for i in range(LAYERS)]
        elif name.endswith("token_id"):
            sizes[name] = _small_id(name, value)
        elif name == "head_dim" and value is None:
            sizes[name] = HEAD_DIM
        elif (small := _small(name, value)) != value:
            sizes[name] = small
    if "kv_lora_rank" in vars(config):  # keys and values of all heads from one latent vector
        sizes["num_key_value_heads"] = HEADS
    if "qk_rope_head_dim" in vars(config) and "head_dim" in sizes:  # they compute rope from head_dim
        sizes["head_dim"] = sizes["qk_rope_head_dim"]
    return sizes


def _small(name: str, value: Any) -> Any:
    if type(value) is int:
        return min([value, *(size for names, size in SIZES if names.fullmatch(name))])
    return value


def _small_id(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [0]
    if value is None or value < VOCAB:
        return value
    return {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 0}.get(name, VOCAB - 1)


def tiny_model(family: str) -> Any:
    """Raises whatever the family raises where it cannot be built, or cannot run at all."""
    config = tiny_config(family)
    torch.manual_seed(0)
    model = randomize(AutoModelForCausalLM.from_config(config))
    plain_logits(model, PROMPT)
    return model


@torch.inference_mode()
def plain_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Next-token logits [V] of the user's own call."""
    logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits


def outcome(family: str) -> Outcome:
    """Build a family, grow a tree deeper than its windows, and compare with plain calls."""
    try:
        model = tiny_model(family)
    except Exception as error:
        return Outcome("not built", f"{type(error).__name__}: {_cell(str(error))}")
    return _served(model)


def _served(model: Any) -> Outcome:
    lm = HFModel(model, ByteTokenizer())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        session = lm.open(PROMPT, batch_size=min(2, lm.batch_limit(8, 16, None)), max_new_tokens=16)
    except UsageError as error:
        return Outcome("refused", str(error))
    ids = grow(session, seed=1, steps=8, lanes=2, max_depth=15, vocabulary=VOCAB)
    direct = torch.stack([plain_logits(model, sequence) for sequence in ids.values()])
    error = (session.logits(list(ids)) - direct).abs().max().item()
    if not error <= TOLERANCE * max(1.0, direct.abs().max().item()):
        return Outcome("wrong", f"logits differ by {error:.3g}")
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    if changed:
        return Outcome("wrong", f"weights changed: {changed[0]}")
    return Outcome("tree") if isinstance(session, TreeSession) else Outcome("slow", str(lm._tree_problem()))


def table() -> str:
    """The page's counts and lists, in Markdown."""
    found = {family: outcome(family) for family in FAMILIES}
    paths = {path: [family for family, result in found.items() if result.path == path] for path in PATHS}
    counts = ", ".join(f"{len(families)} {path}" for path, families in paths.items() if families)
    lines = [f"transformers {transformers.__version__}, {len(found)} families: {counts}.", ""]
    lines += [f"On the tree: {', '.join(paths.pop('tree'))}.", "", "| family | served | why |", "| --- | --- | --- |"]
    for path, families in paths.items():
        lines += [f"| {family} | {path} | {_cell(found[family].reason)} |" for family in families]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    text = re.sub(r"^\w+ cannot be used as a causal language model: ", "", text)
    text = text.partition(", so they")[0]
    return re.sub(r"\s+", " ", text.replace("|", "/"))[:120].rstrip()


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    page = Path(__file__).parents[1] / "docs" / "families.md"
    intro = page.read_text(encoding="utf-8").partition("<!-- table -->")[0]
    page.write_text(intro + "<!-- table -->\n\n" + table(), encoding="utf-8")


if __name__ == "__main__":
    main()
