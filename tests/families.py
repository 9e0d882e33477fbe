"""Tiny random models of every family the tree cache serves, and a tokenizer without files."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForCausalLM

VOCAB = 260
LLAMA_LIKE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_ONE_KV_HEAD_EACH = {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}
_GEMMA = {**LLAMA_LIKE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

# family: (config class, arguments). Windows are short, so that trees grow deeper than them.
FAMILIES = {
    "llama": ("LlamaConfig", LLAMA_LIKE),
    "mistral": ("MistralConfig", {**LLAMA_LIKE, "sliding_window": 6}),
    "mixtral": ("MixtralConfig", {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi": ("PhiConfig", LLAMA_LIKE),
    "phi3": ("Phi3Config", {**LLAMA_LIKE, "sliding_window": 6}),
    "gemma": ("GemmaConfig", {**LLAMA_LIKE, "head_dim": 8}),
    # Its caps reach SDPA in newer versions of transformers only.
    "gemma2": ("Gemma2Config", {**_GEMMA, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "layer_types": _MIXED}),
    "qwen2": ("Qwen2Config", {**LLAMA_LIKE, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {**LLAMA_LIKE, "head_dim": 8}),
    "gpt2": ("GPT2Config", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
                            "bos_token_id": 1, "eos_token_id": 0}),
    "gpt_neox": ("GPTNeoXConfig", _ONE_KV_HEAD_EACH),
    "opt": ("OPTConfig", {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "max_position_embeddings": 256, "word_embed_proj_dim": 32,
                          "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}),
    "cohere": ("CohereConfig", {**LLAMA_LIKE, "logit_scale": 0.3}),
    "granite": ("GraniteConfig", {**LLAMA_LIKE, "logits_scaling": 3.0}),
    "olmo2": ("Olmo2Config", LLAMA_LIKE),
    "smollm3": ("SmolLM3Config", LLAMA_LIKE),
    "gpt_oss": ("GptOssConfig", {**LLAMA_LIKE, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
                                 "sliding_window": 6, "layer_types": _MIXED}),  # attention sinks
    # Attention code of their own, which biases by distance (ALiBi) or takes nothing but tensors.
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4,
                              "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}),
    "falcon": ("FalconConfig", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2,
                                "num_attention_heads": 4, "new_decoder_architecture": True, "num_kv_heads": 2,
                                "alibi": False, "bos_token_id": 1, "eos_token_id": 0}),
    "gptj": ("GPTJConfig", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
                            "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 0}),
}  # fmt: skip

# Served by the slow correct path: no cache at all, and positions that no caller can give.
GATHERED = ("bloom", "falcon", "gptj")  # attention code of their own, which takes whole paths
SLOW_FAMILIES = {
    "openai_gpt": ("OpenAIGPTConfig", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4,
                                       "n_positions": 256}),
    "roberta": ("RobertaConfig", {**LLAMA_LIKE, "is_decoder": True}),
}  # fmt: skip


def random_model(family: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model whose logits differ enough from token to token to show a mistake."""
    name, arguments = {**FAMILIES, **SLOW_FAMILIES}[family]
    torch.manual_seed(seed)
    return randomize(AutoModelForCausalLM.from_config(getattr(transformers, name)(**arguments)))


def randomize(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Weights large enough to tell tokens apart; in eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
    return model.eval()


class ByteTokenizer:
    """Bytes as ids 4 to 259; 0 is EOS. What `HFModel` needs of a tokenizer, and no more."""

    eos_token_id = 0
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [byte + 4 for byte in text.encode()]}

    def decode(self, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) -> str:
        return bytes(i - 4 for i in ids if i >= 4).decode(errors="replace")


class PairTokenizer:
    """Another vocabulary: 1 begins a text, two letters in a row are one token, other bytes one each. What a text's last
    token is changes as the text grows."""

    eos_token_id = 0
    chat_template = None
    vocab_size = 260 + 26 * 26

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [1] if add_special_tokens else []
        data = text.encode()
        while data:
            one, other = data[0] - 97, data[1] - 97 if len(data) > 1 else -1
            pair = 0 <= one < 26 and 0 <= other < 26
            ids.append(260 + 26 * one + other if pair else data[0] + 4)
            data = data[1 + pair :]
        return {"input_ids": ids}
