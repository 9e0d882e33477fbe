"""A decode changes nothing of the user's model that anyone else could see, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from families import VOCAB, ByteTokenizer, random_model, randomize

import dts
from dts.lm import PROMPT_SLOT
from dts.models.huggingface import HFModel
from dts.models.sessions import TreeSession, full_logits
from dts.models.view import ModelView
from dts.search import MaxEnt

PROMPT = [13, 5, 7, 11, 13, 17, 19, 23]
INPUT = torch.tensor([PROMPT])


def found(lm, seed=0, prompt=PROMPT, **options):
    result = dts.decode(lm, prompt, reward=lambda text: len(set(text)) / 10, method=MaxEnt(8), max_new_tokens=8,
                        seed=seed, **options)  # fmt: skip
    return [(c.token_ids, c.reward, c.logprob) for c in result.completions]


def with_dropout(seed=0):
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=0,
        resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5,
    )  # fmt: skip
    torch.manual_seed(seed)
    return randomize(transformers.GPT2LMHeadModel(config))


def greedy(model):
    return model.generate(INPUT, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()


@contextlib.contextmanager
def on_forward(model, act):
    """Call `act` before each forward call of the decoder, also in views made meanwhile."""
    hook = model.base_model.register_forward_pre_hook(lambda module, args, kwargs: act(), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def side_by_side(model, *calls, meetings=6):
    """Run the calls in threads that wait for each other before each of their first forward calls."""
    barrier, mine = threading.Barrier(len(calls), timeout=60), threading.local()

    def meet():
        mine.count = getattr(mine, "count", 0) + 1
        if mine.count <= meetings:
            barrier.wait()

    with on_forward(model, meet), ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


# Threads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_two_decodes_of_one_model_at_once_find_what_they_find_one_after_another(family):
    model = random_model(family)
    lm = dts.load((model, ByteTokenizer()))
    alone = [found(lm, 0), found(lm, 1, prompt=[90, 91, 92])]
    calls = [functools.partial(found, lm, 0), functools.partial(found, lm, 1, prompt=[90, 91, 92])]
    assert side_by_side(model, *calls) == alone
    others = [HFModel(model, ByteTokenizer()) for _ in calls]  # two wrappers of one model
    calls = [functools.partial(found, others[0], 0), functools.partial(found, others[1], 1, prompt=[90, 91, 92])]
    assert side_by_side(model, *calls, meetings=2) == alone


def test_generate_beside_a_decode_gives_what_it_gives_alone():
    model = random_model("llama")
    lm = dts.load((model, ByteTokenizer()))
    alone = found(lm), greedy(model)
    assert side_by_side(model, lambda: found(lm), lambda: greedy(model)) == list(alone)


def test_inside_a_decodes_forward_call_the_users_model_is_as_it_was():
    model = random_model("llama").train()
    lm = dts.load((model, ByteTokenizer()))
    seen = []
    with on_forward(model, lambda: seen.append((model.config._attn_implementation, model.training))):
        found(lm)
    assert len(seen) > 8 and set(seen) == {(model.config._attn_implementation, True)}


def test_after_an_error_inside_a_forward_call_everything_works_as_before():
    model = random_model("llama").train()
    lm = dts.load((model, ByteTokenizer()))
    wanted, before = found(lm), model.config.to_dict()
    calls = iter(range(100))

    def fail():
        if next(calls) == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), on_forward(model, fail):
        found(lm)
    assert model.config.to_dict() == before and model.training
    assert found(lm) == wanted


def test_threads_that_keep_one_prompt_hold_one_object():
    model = random_model("llama")
    lm = dts.load((model, ByteTokenizer()))
    lm.open(PROMPT, batch_size=1, max_new_tokens=1)  # the self-check
    first, second = side_by_side(model, lambda: lm.prefix(PROMPT), lambda: lm.prefix(PROMPT), meetings=1)
    assert first is second
    assert lm.open(PROMPT, batch_size=1, max_new_tokens=2).usage.cached_tokens == len(PROMPT)


def test_threads_check_an_architecture_once_and_warn_once(caplog):
    caplog.set_level(logging.WARNING, "dts")
    lm = dts.load((random_model("openai_gpt"), ByteTokenizer()))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: lm.open(PROMPT, batch_size=1, max_new_tokens=2), range(4)))
    assert caplog.text.count("cannot use the tree cache") == 1


# Modes --------------------------------------------------------------------------------------------------------------


def modes(model):
    return [module.training for module in model.modules()]


def test_a_model_in_training_mode_decodes_without_dropout_and_stays_in_it():
    model = with_dropout()
    wanted = found(HFModel(model, ByteTokenizer()))
    model.train()
    model.transformer.h[0].eval()  # frozen layers are often left in eval mode
    before = modes(model)
    lm = dts.load((model, ByteTokenizer()))
    assert modes(model) == before
    assert found(lm) == wanted
    assert isinstance(lm.open(PROMPT, batch_size=1, max_new_tokens=2), TreeSession)
    assert modes(model) == before


def test_a_model_put_back_into_training_mode_decodes_as_before():
    model = with_dropout()
    lm = dts.load((model, ByteTokenizer()))
    wanted = found(lm)
    model.train()
    assert found(lm) == wanted and model.training
    assert torch.equal(full_logits(lm, PROMPT), full_logits(lm, PROMPT))


def test_the_slow_path_has_no_dropout_either():
    model = random_model("falcon")
    model.config.hidden_dropout = model.config.attention_dropout = 0.5
    wanted = model(INPUT).logits[:, -1]
    lm = dts.load((model.train(), ByteTokenizer()))
    assert torch.allclose(lm.open(PROMPT, batch_size=1, max_new_tokens=2).logits([PROMPT_SLOT]), wanted, atol=1e-5)


# Views --------------------------------------------------------------------------------------------------------------


def test_a_view_shares_every_parameter_and_nothing_else():
    model = random_model("gemma3").train()
    view = ModelView(model)
    parameters = dict(model.named_parameters())
    assert all(parameter is parameters[name] for name, parameter in view.model.named_parameters())
    originals = {id(module): module for module in model.modules()}
    assert len(view.modules()) == len(originals) and not originals.keys() & {id(m) for m in view.modules()}
    assert not any(module.training for module in view.modules())
    dicts = {id(held) for m in originals.values() for held in vars(m).values() if isinstance(held, (dict, list))}
    assert not dicts & {id(held) for m in view.modules() for held in vars(m).values()}
    view.attend_with("dts_tree")
    assert {m.config._attn_implementation for m in view.modules() if hasattr(m, "config")} == {"dts_tree"}
    assert not any(m.config._attn_implementation == "dts_tree" for m in originals.values() if hasattr(m, "config"))


def test_modules_used_twice_and_configs_inside_configs_stay_one_object():
    model = random_model("llama")
    model.model.layers[1] = model.model.layers[0]
    model.model.again = {"layers": [model.model.layers[0]], "both": (model.config, model.lm_head)}
    view = ModelView(model).model
    assert view.model.layers[1] is view.model.layers[0] is view.model.again["layers"][0]
    assert view.model.again["both"] == (view.config, view.lm_head) and view.config is not model.config
    assert view.model.layers[0].self_attn.config is view.config


def test_a_forward_put_on_the_instance_runs_on_the_views_modules():
    model = with_dropout()
    wanted = model(INPUT).logits
    block = model.transformer.h[0]
    block.forward = types.MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), block)
    mlp = model.transformer.h[1].mlp
    mlp.forward = functools.partial(type(mlp).forward, mlp)
    model.train()
    assert torch.equal(ModelView(model).model(INPUT).logits, wanted)


def test_layers_that_accelerate_offloads_are_served():
    accelerate = pytest.importorskip("accelerate")
    model = with_dropout()
    wanted = found(HFModel(model, ByteTokenizer()))
    direct = model(INPUT).logits
    offloaded = accelerate.cpu_offload(with_dropout().train(), execution_device="cpu")
    assert found(dts.load((offloaded, ByteTokenizer()))) == wanted
    assert torch.equal(offloaded.eval()(INPUT).logits, direct)
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}  # nothing was left loaded


@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_models_are_served_by_their_plain_code(compiled):
    def backend(graph, inputs):
        raise AssertionError("a view must not run what was compiled for the original")

    model = random_model("llama")
    wanted = found(HFModel(model, ByteTokenizer()))
    if compiled:
        model = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
    assert found(dts.load((model, ByteTokenizer()))) == wanted


def test_adapters_count_as_they_are_switched_and_their_dropout_never():
    peft = pytest.importorskip("peft")
    base = random_model("llama")
    plain = found(HFModel(base, ByteTokenizer()))
    lora = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"]))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    lm = dts.load((lora.train(), ByteTokenizer()))
    adapted = found(lm)
    assert isinstance(lm.open(PROMPT, batch_size=1, max_new_tokens=2), TreeSession)
    assert adapted == found(lm) and adapted != plain
    with lora.disable_adapter():
        assert found(lm) == plain
    assert found(lm) == adapted
    lora.eval()
    ids = [*PROMPT, *adapted[0][0]]
    logprobs = lora(torch.tensor([ids])).logits[0].log_softmax(-1)[len(PROMPT) - 1 : -1]
    wanted = logprobs[torch.arange(len(adapted[0][0])), list(adapted[0][0])].sum().item()
    assert adapted[0][2] == pytest.approx(wanted, abs=1e-3)


def test_weights_replaced_after_loading_count():
    model = random_model("llama")
    lm = dts.load((model, ByteTokenizer()))
    found(lm)
    model.to(torch.float64)
    assert full_logits(lm, PROMPT).dtype == torch.float64
    model.set_input_embeddings(torch.nn.Embedding(VOCAB, 32, dtype=torch.float64))
    session = lm.open(PROMPT, batch_size=1, max_new_tokens=2)
    assert torch.allclose(session.logits([PROMPT_SLOT]), model(INPUT).logits[:, -1])


def test_rwkv_weights_that_it_divides_in_eval_mode_stay_what_they_are():
    config = transformers.RwkvConfig(vocab_size=VOCAB, hidden_size=32, attention_hidden_size=32, intermediate_size=48,
                                     num_hidden_layers=5, rescale_every=2)  # fmt: skip
    torch.manual_seed(0)
    model = randomize(transformers.RwkvForCausalLM(config)).train()
    before = [parameter.clone() for parameter in model.parameters()]
    lm = dts.load((model, ByteTokenizer()))
    logits = lm.open(PROMPT, batch_size=1, max_new_tokens=2).logits([PROMPT_SLOT])
    assert all(torch.equal(parameter, held) for parameter, held in zip(model.parameters(), before, strict=True))
    assert torch.allclose(model.eval()(INPUT).logits[:, -1], logits, atol=1e-3)  # divides its weights
    assert torch.allclose(lm.open(PROMPT, batch_size=1, max_new_tokens=2).logits([PROMPT_SLOT]), logits, atol=1e-3)
