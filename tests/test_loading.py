"""Loading weights: tiny random models in temporary folders, a hub that is never there, and the embedded model."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import dts
from dts import fetch
from dts.errors import UnavailableError, UsageError
from dts.models import loading
from dts.models.loading import check_available, load_pretrained, pick_device, pick_dtype
from dts.models.registry import resolve


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random Llama of 16 tokens and a whitespace tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(16)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def answer(monkeypatch, error):
    """Lets the hub's one metadata request fail like this; returns the list of what was asked."""
    asked = []

    def metadata(url, timeout):
        asked.append((url, timeout))
        raise error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    return asked


@pytest.fixture
def empty_hub_cache(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: None)


def test_a_folder_loads_with_its_exact_weights_in_eval_mode(tiny):
    model, tokenizer = load_pretrained(str(tiny), device="cpu")
    reference = LlamaForCausalLM.from_pretrained(tiny)
    assert not model.training and model.dtype == torch.float32 and model.device.type == "cpu"
    ids = torch.tensor([tokenizer("w3 w5 w7")["input_ids"]])
    assert ids.tolist() == [[3, 5, 7]]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)


def test_dtype_is_honoured_and_a_spec_works_like_a_name(tiny):
    model, _ = load_pretrained(resolve(str(tiny)), device="cpu", dtype="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert load_pretrained(str(tiny), device="cpu", dtype=torch.float16)[0].dtype == torch.float16


def test_device_map_replaces_device(tiny):
    model, _ = load_pretrained(str(tiny), device="cpu", device_map={"": "meta"})
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_folders_that_are_no_models_are_refused_before_loading(copy, tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        check_available(str(tmp_path))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UsageError, match="pickled weights are not loaded"):
        load_pretrained(str(copy))
    file = tmp_path / "models.yaml"
    file.write_text("llama-7b: {path: nowhere}\n")
    with pytest.raises(UsageError, match=r"'llama-7b': there is no folder .*nowhere"):
        check_available(resolve("llama-7b", file))


def test_missing_weights_are_an_error_and_never_random_numbers(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnavailableError, match=r"lacks 1 weights.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_pretrained(str(copy), device="cpu")


@pytest.mark.parametrize("broken", ["model.safetensors", "config.json"])
def test_damaged_files_give_one_line_that_names_the_folder(copy, broken):
    content = (copy / broken).read_bytes()
    (copy / broken).write_bytes(content[: len(content) // 2])
    with pytest.raises(UnavailableError, match="cannot be loaded from") as caught:
        load_pretrained(str(copy), device="cpu")
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


def refusal(kind):
    """The hub's error without the HTTP response that its constructor wants."""
    return kind.__new__(kind, "refused")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("Name or service not known"), "hub cannot be reached .Name or service.*smollm2-135m needs no"),
        (errors.OfflineModeIsEnabled("offline mode"), "hub cannot be reached .offline mode"),
        (refusal(errors.GatedRepoError), "is gated: accept its terms"),
        (refusal(errors.RepositoryNotFoundError), "is not on the hub"),
        (refusal(errors.RemoteEntryNotFoundError), r"no config\.json on"),
    ],
)
def test_a_hub_model_that_cannot_be_had_says_what_to_do(monkeypatch, empty_hub_cache, error, message):
    asked = answer(monkeypatch, error)
    with pytest.raises(UnavailableError, match=message) as caught:
        load_pretrained("llama-7b", device="cpu")
    assert "meta-llama/Llama-2-7b-hf" in str(caught.value) and "\n" not in str(caught.value)
    assert len(asked) == 1 and asked[0][1] <= 10


def test_a_model_in_the_hub_cache_needs_no_network(tiny, tmp_path, monkeypatch):
    commit = "0" * 40
    repo = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(tiny, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    asked = answer(monkeypatch, OSError("no network"))
    model, tokenizer = load_pretrained("owner/tiny", device="cpu")
    assert model.config.vocab_size == 16 and len(tokenizer) == 16 and asked == []

    (repo / "snapshots" / commit / "model.safetensors").unlink()  # an interrupted download: the rest must be fetched
    with pytest.raises(UnavailableError, match=r"no network.*from the local cache of the hub") as caught:
        load_pretrained("owner/tiny", device="cpu")
    assert len(asked) == 1 and "\n" not in str(caught.value)


def test_devices_and_dtypes_are_checked(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu") and pick_device(None).type in ("cpu", "cuda", "mps")
    with pytest.raises(UsageError, match="device='toaster' is not a device"):
        pick_device("toaster")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda") == torch.device("cuda")
    with pytest.raises(UsageError, match="device='cuda:1' is not on this machine; there is cpu, cuda"):
        pick_device("cuda:1")
    assert pick_dtype(None, torch.device("cpu")) == torch.float32
    assert pick_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("fp16", torch.device("cpu")) == torch.float16
    with pytest.raises(UsageError, match="dtype='int3' is unknown"):
        pick_dtype("int3", torch.device("cpu"))


def test_quantization_is_checked_before_loading(tiny, monkeypatch):
    with pytest.raises(UsageError, match="quantization='3bit'"):
        load_pretrained(str(tiny), device="cpu", quantization="3bit")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="pip install bitsandbytes"):
        load_pretrained(str(tiny), device="cpu", quantization="4bit")


def adapter(tiny, folder, base):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return str(folder)


def test_an_adapter_without_peft_or_without_its_base_says_so(tiny, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="names no base model"):
        check_available(adapter(tiny, tmp_path / "orphan", "no such thing"))
    with pytest.raises(UsageError, match=r"no config\.json"):
        check_available(adapter(tiny, tmp_path / "astray", str(tmp_path)))
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"needs peft; run: pip install 'maxent-decoding\[train\]'"):
        load_pretrained(adapter(tiny, tmp_path / "lora", str(tiny)), device="cpu")


def test_an_adapter_is_merged_into_its_base(tiny, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is part of the train extra")
    base, _ = load_pretrained(str(tiny), device="cpu")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    lora = peft.get_peft_model(LlamaForCausalLM.from_pretrained(tiny), config)
    lora.save_pretrained(tmp_path / "lora")
    model, tokenizer = load_pretrained(str(tmp_path / "lora"), device="cpu")
    ids = torch.tensor([[3, 5, 7]])
    with torch.no_grad():
        merged, plain, wanted = model(ids).logits, base(ids).logits, lora.eval()(ids).logits
    assert type(model) is LlamaForCausalLM and len(tokenizer) == 16
    assert torch.allclose(merged, wanted, atol=1e-5) and not torch.allclose(plain, wanted, atol=1e-3)


@pytest.fixture(scope="module")
def smollm2():
    try:
        fetch.cached("smollm2-135m")
    except UnavailableError as reason:
        pytest.skip(str(reason))
    return load_pretrained("smollm2-135m", device="cpu")


def test_the_embedded_model_is_the_instruct_model(smollm2):
    model, tokenizer = smollm2
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not hasattr(model.config, "quantization_config") and not list(fetch.cached("smollm2-135m").glob("*.gguf"))
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == 2
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_embedded_tokenizer_keeps_digits_apart(smollm2):
    _, tokenizer = smollm2
    assert tokenizer.tokenize("a  12.5") == ["a", "ĠĠ", "1", "2", ".", "5"]  # plain GPT-2 splitting gives Ġ Ġ
    for text in ("a  12.5,-3\n\nb", "héllo 😀 I'm"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_embedded_model_answers(smollm2):
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(made) and made[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(("change", "message"), [
    ({"model": 3}, "model=3 is not allowed; give a registry name"),
    ({"model": ("one",)}, "give a pair"),
    ({"model": ("model", "tokenizer")}, "give a pair"),
    ({"device": 0.5}, "device=0.5"), ({"dtype": 16}, "dtype=16"), ({"dtype": torch.int8}, r"dtype=torch.int8"),
    ({"device_map": 3}, "device_map=3"), ({"models_file": 1.5}, "models_file=1.5"),
    ({"trust_remote_code": "yes"}, "trust_remote_code='yes'"), ({"quantization": 4}, "quantization=4"),
    ({"model": "a" * 5000}, "unknown model"),
])  # fmt: skip
def test_arguments_of_another_type_are_refused(change, message):
    with pytest.raises(dts.UsageError, match=message):
        dts.load(**{"model": "smollm2-135m", **change})


def test_a_pair_in_the_wrong_order_is_refused(tiny_lm):
    with pytest.raises(dts.UsageError, match=r"give a pair \(model, tokenizer\)"):
        dts.load((tiny_lm.tokenizer, tiny_lm.model))
    with pytest.raises(dts.UsageError, match="tokenizer='str' is not allowed"):
        dts.load((tiny_lm.model, "tokenizer"))


def test_a_folder_may_be_a_path(tmp_path):
    with pytest.raises(dts.UsageError, match=r"has no config.json"):
        dts.load(tmp_path)
