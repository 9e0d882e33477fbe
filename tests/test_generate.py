"""`model.generate(custom_generate=dts.generate)`: every argument and field is honoured, or refused by its name."""

from __future__ import annotations

import inspect

import pytest
import torch
from toys import Texts
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    TextStreamer,
    WatermarkingConfig,
)

import dts
from dts.generation import HONOURED, IRRELEVANT, REFUSED
from dts.search import Greedy, MaxEnt, Sampling


def vowels(text: str) -> float:
    return sum(text.count(v) for v in "aeiou") / 10


def run(lm, inputs, **options):
    options = {"max_new_tokens": 8, "pad_token_id": 0, **options}
    return lm.model.generate(inputs, custom_generate=dts.generate, lm=lm, **options)


@pytest.fixture
def batch(tiny_lm):
    """Two prompts of unequal length, padded on the left."""
    short, long = tiny_lm.encode("On"), tiny_lm.encode("Time flies")
    width = len(long)
    return {
        "inputs": torch.tensor([[0] * (width - len(short)) + short, long]),
        "attention_mask": torch.tensor([[0] * (width - len(short)) + [1] * len(short), [1] * width]),
    }


def test_greedy_equals_plain_generate(tiny_lm):
    inputs = torch.tensor([tiny_lm.encode("Time flies")])
    plain = tiny_lm.model.generate(inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(run(tiny_lm, inputs, method=Greedy(), do_sample=False), plain)


def test_padded_batches_and_several_sequences_per_prompt(tiny_lm):
    short, long = tiny_lm.encode("Once"), tiny_lm.encode("Time flies")
    width = len(long)
    inputs = torch.tensor([[0] * (width - len(short)) + short, long])
    mask = torch.tensor([[0] * (width - len(short)) + [1] * len(short), [1] * width])
    out = run(
        tiny_lm, inputs, attention_mask=mask, method=MaxEnt(12), reward=vowels, do_sample=True, top_k=40,
        num_return_sequences=2,
    )  # fmt: skip
    assert out.shape[0] == 4 and torch.equal(out[:, :width], inputs.repeat_interleave(2, 0))
    for row, prompt in ((0, "Once"), (2, "Time flies")):
        direct = dts.decode(tiny_lm, prompt, method=MaxEnt(12), reward=vowels, max_new_tokens=8, top_k=40)
        for k in range(2):
            expected = direct.completions[k].token_ids
            assert tuple(out[row + k, width : width + len(expected)].tolist()) == expected


def test_processors_are_part_of_p(tiny_lm):
    banned = [token for token in range(4, 260) if token % 2]
    processors = LogitsProcessorList([SuppressTokensLogitsProcessor(banned)])
    result = dts.decode(
        tiny_lm, "Once", method=Sampling(20), max_new_tokens=6, logits_processor=processors, temperature=0.8
    )
    assert all(token % 2 == 0 or token < 4 for c in result.completions for token in c.token_ids)
    completion = result.completions[0]
    ids = torch.tensor([[*tiny_lm.encode("Once"), *completion.token_ids]])
    logits = tiny_lm.model(ids).logits[0, -len(completion.token_ids) - 1 : -1].double()
    logits[:, banned] = -torch.inf
    steps = (logits / 0.8).log_softmax(-1)
    expected = sum(steps[i, token].item() for i, token in enumerate(completion.token_ids))
    assert completion.logprob == pytest.approx(expected, abs=1e-4)


# -- fields of the configuration ---------------------------------------------------------------------------------------

# Field: options with which plain greedy decoding of `batch` gives other tokens than without the field. None stands for
# tokens that are known once `batch` was decoded.
GREEDY = {
    "max_length": {"max_length": 14, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 3},
    "min_length": {"min_length": 15},
    "min_new_tokens": {"min_new_tokens": 5},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 50.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1, "encoder_repetition_penalty": 50.0},
    "bad_words_ids": {"bad_words_ids": None},
    "forced_eos_token_id": {"forced_eos_token_id": 9},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 30.0)},
    "suppress_tokens": {"suppress_tokens": None},
    "begin_suppress_tokens": {"begin_suppress_tokens": None},
    "sequence_bias": {"sequence_bias": [[[77], 50.0]]},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=9.0, seeding_scheme="selfhash")},
    "eos_token_id": {"eos_token_id": None},
    "pad_token_id": {"pad_token_id": 7},
}
# Options that leave one token, so that a draw has one outcome.
ONE_TOKEN = {
    "temperature": {"temperature": 1e-4}, "top_k": {"top_k": 1}, "top_p": {"top_p": 1e-6}, "min_p": {"min_p": 1.0},
    "top_h": {"top_h": 1e-3}, "typical_p": {"typical_p": 1e-6}, "epsilon_cutoff": {"epsilon_cutoff": 0.999},
    "eta_cutoff": {"eta_cutoff": 0.999, "top_k": 2},
}  # fmt: skip
ELSEWHERE = {"do_sample", "renormalize_logits", "remove_invalid_values", "forced_bos_token_id", "num_return_sequences",
             "return_dict_in_generate"}  # fmt: skip


def test_every_field_of_the_installed_version_was_looked_at():
    """A field that a later version adds is refused where it is set; this test asks for a decision."""
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields <= HONOURED | set(IRRELEVANT) | set(REFUSED), "decide: honoured, irrelevant or refused"
    assert not HONOURED & set(IRRELEVANT) and not set(REFUSED) & (HONOURED | set(IRRELEVANT))
    assert set(GREEDY) | set(ONE_TOKEN) | ELSEWHERE == HONOURED


def plain(lm, batch, **options):
    return lm.model.generate(**batch, **{"max_new_tokens": 8, "pad_token_id": 0, **options})


@pytest.mark.parametrize("field", GREEDY)
def test_a_field_gives_what_plain_generate_gives(field, tiny_lm, batch):
    """Both rows of a left-padded batch, token for token."""
    usual = plain(tiny_lm, batch, do_sample=False)
    width = batch["inputs"].shape[1]
    first, third = usual[:, width].tolist(), usual[:, width + 2].tolist()
    by_result = {"eos_token_id": third, "suppress_tokens": first, "begin_suppress_tokens": first,
                 "bad_words_ids": [[token] for token in first]}  # fmt: skip
    options = {k: by_result[k] if v is None and k in by_result else v for k, v in GREEDY[field].items()}
    if field in ("min_length", "min_new_tokens"):
        options["eos_token_id"] = first + third
    if field == "pad_token_id":
        options["eos_token_id"] = third[0]
    expected = plain(tiny_lm, batch, do_sample=False, **options)
    without = {key: value for key, value in options.items() if key != field}
    assert not torch.equal(expected, plain(tiny_lm, batch, do_sample=False, **without))
    assert torch.equal(run(tiny_lm, **batch, method=Greedy(), do_sample=False, **options), expected)


@pytest.mark.parametrize("field", ONE_TOKEN)
def test_a_field_of_sampling_is_part_of_p(field, tiny_lm, batch):
    def drawn(options):
        found = []
        for seed in range(3):
            torch.manual_seed(seed)
            found.append(plain(tiny_lm, batch, do_sample=True, **options).tolist())
        return found

    options = {"top_k": 0, **ONE_TOKEN[field]}
    expected, other, _ = drawn(options)
    assert expected == other
    assert drawn({key: value for key, value in options.items() if key != field})[0] != expected
    assert run(tiny_lm, **batch, method=Sampling(1), do_sample=True, **options).tolist() == expected


def test_without_do_sample_the_fields_of_sampling_are_not_used(tiny_lm, batch):
    free = run(tiny_lm, **batch, method=Sampling(1), do_sample=False, top_k=1)
    assert not torch.equal(free, plain(tiny_lm, batch, do_sample=False))


def test_a_forced_first_token(tiny_lm):
    inputs = torch.tensor([[5], [6]])
    options = {"do_sample": False, "forced_bos_token_id": 99}
    expected = plain(tiny_lm, {"inputs": inputs}, **options)
    assert expected[:, 1].tolist() == [99, 99]
    assert torch.equal(run(tiny_lm, inputs, method=Greedy(), **options), expected)


@pytest.mark.parametrize("field", ["renormalize_logits", "remove_invalid_values"])
def test_fields_that_change_no_token(field, tiny_lm, batch):
    expected = plain(tiny_lm, batch, do_sample=False)
    assert torch.equal(run(tiny_lm, **batch, method=Greedy(), do_sample=False, **{field: True}), expected)


def test_a_dictionary_is_returned_where_it_is_asked_for(tiny_lm, batch):
    expected = run(tiny_lm, **batch, method=Greedy(), do_sample=False)
    given = run(tiny_lm, **batch, method=Greedy(), do_sample=False, return_dict_in_generate=True)
    assert torch.equal(given.sequences, expected) and torch.equal(given["sequences"], expected)


def test_a_watermark_with_a_state(tiny_lm, batch):
    """A processor of transformers that remembers: a copy for each path gives what one sequence at a time gives."""
    mark = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3, 4, 5, 6, 7, 8])
    one = {"inputs": batch["inputs"][1:]}
    expected = plain(tiny_lm, one, do_sample=True, top_k=1, watermarking_config=mark)
    result = run(tiny_lm, one["inputs"], method=Sampling(1), do_sample=True, top_k=1, watermarking_config=mark)
    assert torch.equal(result, expected)


# Not the default, for each field that is refused.
NOT_DEFAULT = {
    "num_beams": 3, "num_beam_groups": 2, "diversity_penalty": 0.5, "constraints": ["x"], "force_words_ids": [[5]],
    "max_time": 5.0, "stop_strings": ["x"], "token_healing": True, "guidance_scale": 1.5, "penalty_alpha": 0.6,
    "dola_layers": "low", "use_mtp": True, "prompt_lookup_num_tokens": 3, "assistant_early_exit": 2,
    "output_scores": True, "output_logits": True, "output_attentions": True, "output_hidden_states": True,
}  # fmt: skip
DEFAULTS = {"num_return_sequences": 1, "max_length": 12}


def direct(lm, **fields):
    """As `generate` calls it, with a configuration that `generate` itself might refuse before."""
    config = GenerationConfig()
    for field, value in {**DEFAULTS, **fields}.items():
        setattr(config, field, value)
    return dts.generate(lm.model, torch.tensor([[5, 6]]), lm=lm, method=Greedy(), generation_config=config)


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(field, tiny_lm):
    with pytest.raises(dts.UsageError, match=f"^{field}="):
        direct(tiny_lm, **{field: NOT_DEFAULT[field]})
    for silent in (None, *REFUSED[field][0]):
        assert direct(tiny_lm, **{field: silent}).shape == (1, 12)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"max_time": 5.0}, {"output_scores": True},
                                     {"output_hidden_states": True}, {"use_mtp": True},
                                     {"prompt_lookup_num_tokens": 3}])  # fmt: skip
def test_they_are_refused_through_generate_too(options, tiny_lm):
    with pytest.raises(dts.UsageError, match=next(iter(options))):
        run(tiny_lm, torch.tensor([[5, 6]]), method=Greedy(), **options)


def test_a_field_of_a_later_version_is_refused_where_it_is_set(tiny_lm, monkeypatch):
    with pytest.raises(dts.UsageError, match="brand_new='x' is not supported"):
        direct(tiny_lm, brand_new="x")
    assert direct(tiny_lm, brand_new=None).shape == (1, 12)
    monkeypatch.setattr(tiny_lm.model.generation_config, "chat_format", "chatml", raising=False)
    assert direct(tiny_lm, chat_format="chatml").shape == (1, 12)  # an entry of the model's own file


@pytest.mark.parametrize("field", IRRELEVANT)
def test_fields_that_change_nothing_change_nothing(field, tiny_lm):
    values = {"use_cache": False, "cache_implementation": "static", "bos_token_id": 9}
    assert torch.equal(direct(tiny_lm, **{field: values.get(field, 1)}), direct(tiny_lm))


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_every_argument_of_the_installed_generate_was_looked_at(tiny_lm):
    """Those that reach a loop as they are, as processors or criteria, and those that are read from the frame."""
    handled = {"self", "inputs", "generation_config", "logits_processor", "stopping_criteria", "custom_generate",
               "kwargs", "prefix_allowed_tokens_fn"}  # fmt: skip
    refused = {"synced_gpus", "assistant_model", "streamer", "negative_prompt_ids", "negative_prompt_attention_mask"}
    assert set(inspect.signature(tiny_lm.model.generate).parameters) | {"self"} == handled | refused


@pytest.mark.parametrize("name", ["synced_gpus", "negative_prompt_ids", "negative_prompt_attention_mask", "streamer"])
def test_arguments_that_a_search_ignores_are_refused(name, tiny_lm):
    class Quiet(TextStreamer):
        def __init__(self) -> None:
            pass

        def put(self, value) -> None:
            pass

    value = {"synced_gpus": True, "streamer": Quiet()}.get(name, torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(dts.UsageError, match=f"^{name} "):
        run(tiny_lm, torch.tensor([[5, 6]]), method=Greedy(), **{name: value})


def test_arguments_of_the_forward_pass_that_a_search_ignores_are_refused(tiny_lm):
    inputs = torch.tensor([[5, 6, 7]])
    with pytest.raises(dts.UsageError, match="position_ids"):
        run(tiny_lm, inputs, method=Greedy(), position_ids=torch.tensor([[4, 5, 6]]))
    run(tiny_lm, inputs, method=Greedy(), position_ids=torch.tensor([[0, 1, 2]]))
    with pytest.raises(dts.UsageError, match="inputs_embeds"):
        embedded = tiny_lm.model.get_input_embeddings()(inputs)
        tiny_lm.model.generate(inputs_embeds=embedded, custom_generate=dts.generate, lm=tiny_lm, method=Greedy(),
                               max_new_tokens=2)  # fmt: skip
    cache = tiny_lm.model(inputs[:, :2], use_cache=True).past_key_values
    with pytest.raises(dts.UsageError, match="past_key_values"):
        run(tiny_lm, inputs, method=Greedy(), past_key_values=cache)


def test_the_eos_of_arguments_and_configurations_ends_sequences(tiny_lm):
    inputs = torch.tensor([tiny_lm.encode("Time flies")])
    usual = plain(tiny_lm, {"inputs": inputs}, do_sample=False)[0, inputs.shape[1] :].tolist()
    third = usual[2]
    expected = usual[: usual.index(third) + 1]
    ways = [
        {"eos_token_id": third}, {"eos_token_id": [0, third]},
        {"generation_config": GenerationConfig(eos_token_id=third, max_new_tokens=8), "max_new_tokens": None},
        {"stopping_criteria": StoppingCriteriaList([EosTokenCriteria(third)])},
        {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(inputs.shape[1] + len(expected))])},
    ]  # fmt: skip
    for options in ways:
        out = run(tiny_lm, inputs, method=Greedy(), do_sample=False, **options)
        assert out[0, inputs.shape[1] :].tolist() == expected, options


def test_prefix_allowed_tokens_know_their_row(tiny_lm, batch):
    def allowed(row, ids):
        return [50 + row, 60 + row]

    out = run(tiny_lm, **batch, method=Sampling(2), do_sample=True, num_return_sequences=2,
              prefix_allowed_tokens_fn=allowed)  # fmt: skip
    width = batch["inputs"].shape[1]
    assert set(out[:2, width:].flatten().tolist()) <= {50, 60}
    assert set(out[2:, width:].flatten().tolist()) <= {52, 62}


def test_a_processor_of_the_caller_with_a_state_in_a_padded_batch(tiny_lm, batch):
    class Marks:
        """Wants token 40 + row + the number of calls."""

        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, ids, logits):
            assert ids.shape[1] == batch["inputs"].shape[1] + self.calls and len(ids) == 2
            for row in range(2):
                logits[row, 40 + 10 * row + self.calls] = 1e4
            self.calls += 1
            return logits

    out = run(tiny_lm, **batch, method=MaxEnt(3), do_sample=True, logits_processor=LogitsProcessorList([Marks()]))
    width = batch["inputs"].shape[1]
    assert out[:, width:].tolist() == [list(range(40, 48)), list(range(50, 58))]


def test_stop_strings_have_an_argument_of_their_own(tiny_lm, batch):
    free = run(tiny_lm, **batch, method=Sampling(1), do_sample=True, max_new_tokens=30)
    text = tiny_lm.decode(free[1, batch["inputs"].shape[1] :].tolist())
    stop = next(character for character in text[3:] if character.isascii())
    out = run(tiny_lm, **batch, method=Sampling(1), do_sample=True, max_new_tokens=30, stop=stop)
    ended = tiny_lm.decode(out[1, batch["inputs"].shape[1] :].tolist())
    assert text.startswith(ended) and ended.index(stop) == len(ended) - 1


def test_a_constraint_reaches_the_search(tiny_lm, batch):
    members = [(70, 80, 90), (71, 81), (70, 82)]
    constraint, width = Texts(members, tiny_lm.vocab_size), batch["inputs"].shape[1]
    for method, mode in ((MaxEnt(6), None), (Sampling(2), "mask")):
        options = {"do_sample": True, "top_k": 0, "constraint": constraint, "constraint_mode": mode}
        out = run(tiny_lm, **batch, method=method, **options)
        for row in out[:, width:].tolist():
            assert tuple(token for token in row if token) in members
    with pytest.raises(dts.UsageError, match="constraint_mode='no'"):
        run(tiny_lm, **batch, method=MaxEnt(2), constraint=constraint, constraint_mode="no")


def test_unknown_stopping_criteria_are_refused(tiny_lm):
    class Never:
        def __call__(self, ids, scores, **kwargs):
            return torch.zeros(len(ids), dtype=torch.bool)

    with pytest.raises(dts.UsageError, match="MaxTimeCriteria"):
        run(tiny_lm, torch.tensor([[5, 6]]), method=Greedy(), max_time=5.0)
    with pytest.raises(dts.UsageError, match="stopping criterion Never"):
        run(tiny_lm, torch.tensor([[5, 6]]), method=Greedy(), stopping_criteria=StoppingCriteriaList([Never()]))


def test_what_generate_needs_is_asked_for(tiny_lm):
    from families import ByteTokenizer, random_model

    inputs = torch.tensor([[5, 6]])
    with pytest.raises(dts.UsageError, match="needs lm="):
        tiny_lm.model.generate(inputs, custom_generate=dts.generate, method=Greedy(), max_new_tokens=2)
    with pytest.raises(dts.UsageError, match="needs method="):
        run(tiny_lm, inputs)
    other = dts.load((random_model("llama"), ByteTokenizer()))
    with pytest.raises(dts.UsageError, match="holds another model"):
        other.model.generate(inputs, custom_generate=dts.generate, lm=tiny_lm, method=Greedy(), max_new_tokens=2)
