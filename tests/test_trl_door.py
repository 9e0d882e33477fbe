"""Our search as `rollout_func` of a plain TRL script."""

import math

import pytest

pytest.importorskip("trl")

import torch
from datasets import Dataset
from test_docs import blocks, run
from training_models import tiny_pair
from trl import GRPOConfig, GRPOTrainer

import dts
from dts.doors.trl import decoding_of, draws, search_rollouts
from dts.search import BestOfN, MaxEnt, Sampling
from dts.training.sampling import stream

pytestmark = pytest.mark.filterwarnings("ignore:.*rollout_func.*")


def many_a(text):
    return float(text.count("a"))


TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if quiet %}quiet{% endif %}"


def trainer_of(tmp_path, rollouts, rewards, steps=2, **arguments):
    model, tokenizer = tiny_pair()
    tokenizer.chat_template = TEMPLATE
    args = GRPOConfig(
        str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_completion_length=8, max_steps=steps,
        learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, logging_steps=1, seed=3, beta=0.0,
        disable_tqdm=True, **arguments,
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": prompt} for prompt in ("ab cd", "ef", "gh ij", "kl")])
    return GRPOTrainer(model, rewards, args=args, train_dataset=prompts, processing_class=tokenizer,
                       rollout_func=rollouts)  # fmt: skip


def test_a_plain_script_trains_on_texts_that_the_search_found(tmp_path):
    seen = []

    def reward(completions, search_reward, **_):
        seen.append((completions, search_reward))
        return [many_a(text) for text in completions]

    trainer = trainer_of(tmp_path, search_rollouts(MaxEnt(8, reward_scale=4.0), many_a), reward)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert len(seen) == 2 and all(rewards == [many_a(text) for text in texts] for texts, rewards in seen)
    assert any(not torch.equal(one, other) for one, other in zip(before, trainer.model.parameters(), strict=True))
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_groups_are_those_of_decode_with_the_log_probabilities_of_the_model(tmp_path):
    rollouts = search_rollouts(MaxEnt(8, reward_scale=4.0), many_a, batch_size=16)
    trainer = trainer_of(tmp_path, rollouts, lambda completions, **_: [0.0] * len(completions))
    trainer.model.train()
    found = rollouts(["ab cd"] * 4 + ["ef"] * 4, trainer)
    lm = dts.load((trainer.model, trainer.processing_class))
    for group, prompt in enumerate(("ab cd", "ef")):
        seed = stream(3, 0, 0, 1, group)
        result = dts.decode(lm, prompt, method=MaxEnt(8, reward_scale=4.0), reward=many_a, batch_size=4, seed=seed,
                            max_new_tokens=8)  # fmt: skip
        alone, members = result.sample(4, seed), slice(4 * group, 4 * group + 4)
        assert found["completion_ids"][members] == [list(one.token_ids) for one in alone]
        assert found["prompt_ids"][members] == [lm.encode(prompt)] * 4
        assert found["search_reward"][members] == [one.reward for one in alone]
        for got, one in zip(found["logprobs"][members], alone, strict=True):
            assert got == pytest.approx(list(one.token_logprobs), abs=1e-4)
    assert trainer.model.training  # as it was


def test_top_k_top_p_and_template_variables_of_the_trainer_reach_the_search(tmp_path):
    trainer = trainer_of(tmp_path, None, many_a, top_k=3, top_p=0.7, temperature=1.5,
                         chat_template_kwargs={"quiet": True})  # fmt: skip
    trainer.model.train()
    messages = [{"role": "user", "content": "ab"}]
    found = search_rollouts(Sampling(4), many_a, width=4)([messages] * 4, trainer)
    lm, seed = dts.load((trainer.model, trainer.processing_class)), stream(3, 0, 0, 1, 0)
    alone = dts.decode(lm, "abquiet", method=Sampling(4), seed=seed, max_new_tokens=8, temperature=1.5, top_k=3,
                       top_p=0.7)  # fmt: skip
    assert found["prompt_ids"] == [lm.encode("abquiet")] * 4
    assert found["completion_ids"] == [list(one.token_ids) for one in draws(alone, 4, seed)]
    free = dts.decode(lm, "abquiet", method=Sampling(4), seed=seed, max_new_tokens=8, temperature=1.5)
    assert found["completion_ids"] != [list(one.token_ids) for one in draws(free, 4, seed)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_p": 0.1}, "min_p=0.1 of the trainer has no effect in a search; .* MinPLogitsWarper"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 of the trainer .* RepetitionPenaltyLogitsProcessor"),
        ({"generation_kwargs": {"top_k": 2}}, "generation_kwargs=.* of the trainer has no effect"),
    ],
)
def test_arguments_of_the_trainer_that_a_search_would_ignore_are_refused(tmp_path, arguments, message):
    with pytest.raises(dts.UsageError, match=message):
        decoding_of(GRPOConfig(str(tmp_path), use_cpu=True, **arguments))


@pytest.mark.parametrize("option", ["temperature", "max_new_tokens", "top_p", "seed"])
def test_what_the_trainer_sets_is_refused_beside_it(option):
    with pytest.raises(dts.UsageError, match=f"{option}=2 is the trainer's; set .* of its args"):
        search_rollouts(Sampling(4), many_a, **{option: 2})


def test_methods_without_a_target_give_their_first_rollouts_and_too_few_are_refused(tiny_lm):
    result = dts.decode(tiny_lm, "a", method=Sampling(6), max_new_tokens=3, seed=1)
    assert [one.text for one in draws(result, 4, 0)] == [rollout.text for rollout in result.rollouts[:4]]
    few = dts.decode(tiny_lm, "a", method=BestOfN(2), max_new_tokens=3)
    with pytest.raises(dts.UsageError, match="made 2 rollouts for a group of 4"):
        draws(few, 4, 0)


def test_prompts_that_do_not_come_in_groups_are_refused(tmp_path):
    rollouts = search_rollouts(MaxEnt(8), many_a)
    trainer = trainer_of(tmp_path, rollouts, lambda completions, **_: [0.0] * len(completions))
    trainer.model.train()
    with pytest.raises(dts.UsageError, match="do not come in groups of 4"):
        rollouts(["ab", "ab", "cd", "cd"], trainer)


def test_the_example_of_the_page_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = dts.load(tiny_pair())
    monkeypatch.setattr(dts, "load", lambda name: tiny, raising=False)
    names = run(blocks("docs/doors.md")[1])
    assert names["trainer"].state.global_step == 2
    history = [log["reward"] for log in names["trainer"].state.log_history if "reward" in log]
    assert all(0 < reward <= 1 for reward in history)
