"""Small paths through `dts/` and `models/` that no other test takes."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from families import ByteTokenizer, random_model
from transformers import PreTrainedTokenizerFast

import dts
from dts import fetch_command as command
from dts.memory import first_line, is_out_of_memory
from dts.models import loading
from dts.models.huggingface import HFModel
from dts.models.loading import load_pretrained
from dts.models.table import TableModel
from dts.yamlfile import decode_text, parse_yaml, read_yaml


def test_the_public_names_are_those_that_can_be_had():
    assert set(dir(dts)) == {*dts.__all__, "__version__"}
    assert all(getattr(dts, name) for name in dts.__all__)
    with pytest.raises(AttributeError, match="module 'dts' has no attribute 'nothing'"):
        _ = dts.nothing


def test_an_interrupted_fetch_says_so(monkeypatch, capsys):
    def stop(names, cache):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "fetch", stop)
    assert command.main([]) == 130 and "interrupted" in capsys.readouterr().err


def test_what_counts_as_a_lack_of_memory():
    for yes in (MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("MPS backend OUT OF MEMORY"),
                RuntimeError("can't allocate memory"), RuntimeError("not enough memory")):  # fmt: skip
        assert is_out_of_memory(yes)
    for no in (RuntimeError("shapes differ"), ValueError("out of memory"), KeyboardInterrupt()):
        assert not is_out_of_memory(no)
    assert first_line(RuntimeError("\n  one \ntwo")) == "one" and first_line(MemoryError()) == "MemoryError"


def test_text_and_yaml_files_of_users(tmp_path):
    assert decode_text("\ufeffé".encode()) == "é"
    with pytest.raises(ValueError, match="line 2, byte 0xff at offset 3: not UTF-8"):
        decode_text(b"ab\n\xff")
    assert parse_yaml("a: [1, 2]") == {"a": [1, 2]}
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_yaml("[" * 100_000)
    with pytest.raises(dts.UsageError, match=r"settings .*missing\.yaml cannot be read"):
        read_yaml(tmp_path / "missing.yaml", "settings")
    (tmp_path / "bad.yaml").write_text("a: [1,\n")
    with pytest.raises(dts.UsageError, match=r"settings .*bad\.yaml is not valid YAML") as error:
        read_yaml(tmp_path / "bad.yaml", "settings")
    assert "\n" not in str(error.value)


def test_a_table_model_takes_ids_or_a_string_of_them():
    lm = TableModel(lambda prefix: torch.zeros(3).numpy(), 3)
    assert lm.encode("1 2") == lm.encode([1, 2]) == [1, 2]
    with pytest.raises(dts.UsageError, match="token ids"):
        lm.encode([{"role": "user", "content": "1"}])


def test_a_pair_of_objects_is_a_model_and_a_folder_is_one(tmp_path):
    model, tokenizer = random_model("llama"), ByteTokenizer()
    lm = dts.load((model, tokenizer))
    assert lm.model is model and lm.tokenizer is tokenizer
    model.save_pretrained(tmp_path / "tiny")
    saved_tokenizer(tmp_path / "tiny")
    again = dts.load(str(tmp_path / "tiny"), device="cpu")
    ids = torch.tensor([[5, 9, 11]])
    assert torch.equal(again.model(ids).logits, model(ids).logits) and again.eos_ids == lm.eos_ids


def saved_tokenizer(folder) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(260)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0")
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_prompts_are_text_messages_or_ids():
    lm = HFModel(random_model("llama"), ByteTokenizer())
    messages = [{"role": "user", "content": "hi"}, {"role": "system", "content": "ok"}]
    assert lm.encode([7, 8]) == [7, 8] and lm.decode(lm.encode("né")) == "né"
    assert lm.decode(lm.encode(messages)) == "user: hi\nsystem: ok\nassistant:"  # no chat template

    class Chat(ByteTokenizer):
        chat_template = "any"

        def apply_chat_template(self, given, add_generation_prompt, return_dict):
            assert given == messages and add_generation_prompt and not return_dict
            return (4, 5)

    assert HFModel(lm.model, Chat()).encode(messages) == [4, 5]


@pytest.mark.parametrize(("bits", "expected"), [
    ("8bit", {"load_in_8bit": True, "load_in_4bit": False}),
    ("4bit", {"load_in_8bit": False, "load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float16}),
])  # fmt: skip
def test_a_quantized_model_is_asked_for_and_stays_where_it_was_loaded(tmp_path, monkeypatch, bits, expected):
    seen = {}

    def load(name, source, **options):
        seen.update(options)
        return types.SimpleNamespace(eval=lambda: "model"), "tokenizer"

    random_model("llama").save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(loading, "_from_pretrained", load)
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: name)
    options = {"device": "cpu", "dtype": "fp16", "quantization": bits}
    assert load_pretrained(str(tmp_path / "tiny"), **options) == ("model", "tokenizer")  # never moved: it has no `to`
    assert {key: getattr(seen["quantization_config"], key) for key in expected} == expected
    assert seen["device_map"] == {"": torch.device("cpu")}
    load_pretrained(str(tmp_path / "tiny"), **options, device_map="auto")
    assert seen["device_map"] == "auto"


def test_an_adapter_may_bring_its_own_tokenizer(tmp_path, monkeypatch):
    random_model("llama").save_pretrained(tmp_path / "base")
    saved_tokenizer(tmp_path / "base")
    (tmp_path / "lora").mkdir()
    settings = {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"")
    own = saved_tokenizer(tmp_path / "lora")
    own.add_tokens(["<new>"])
    own.save_pretrained(tmp_path / "lora")
    merged = types.SimpleNamespace(merge_and_unload=lambda: random_model("llama"))
    fake = types.SimpleNamespace(from_pretrained=lambda model, folder, local_files_only: merged)
    monkeypatch.setitem(sys.modules, "peft", types.SimpleNamespace(PeftModel=fake))
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: name)
    _, tokenizer = load_pretrained(str(tmp_path / "lora"), device="cpu")
    assert tokenizer.convert_tokens_to_ids("<new>") == 260
