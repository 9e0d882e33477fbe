"""Real training runs of a tiny random model: gradients, warm starts, exact resume, and what lies in the folder."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dts
from dts.search import MaxEnt, Sampling

pytest.importorskip("trl")
pytest.importorskip("peft")

from toys import Paid
from training_models import WORDS, Interrupt, adapter, drop, same, saved_pair, share_of_a, tiny_config, tiny_pair
from transformers import TrainerCallback

from dts.models.table import TableModel, random_logits
from dts.rewards import as_reward
from dts.training.config import GRPOSettings
from dts.training.data import read_rows
from dts.training.estimator import grpo_diversity_weight, grpo_gradient_scale
from dts.training.grpo import build_grpo, derive_accumulation, group_search
from dts.training.parts import Parts
from dts.training.polychromic import sequence_log_probs
from dts.training.run import _arguments, read_history, train
from dts.training.sampling import Draw, draw_samples, draw_searched, stream
from dts.training.sft import IGNORED, encode_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return saved_pair(tmp_path_factory.mktemp("base"))


@pytest.fixture
def config(base, tmp_path):
    """config(method, **changes) -> TrainConfig of a run of six steps with a checkpoint every second one."""
    return tiny_config(base, tmp_path)


# Resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("sft", {}),
        ("polychromic", {}),
        ("grpo", {}),
        pytest.param("grpo", {"grpo": {"groups": "search"}}, marks=pytest.mark.slow),
        pytest.param("grpo", {"warm": True}, marks=pytest.mark.slow),
    ],
    ids=["sft", "polychromic", "grpo", "grpo-search", "grpo-warm"],
)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(config, method, changes):
    if changes.pop("warm", False):
        changes = {"checkpoint_path": str(train(config("sft", "warm", max_steps=2)))}
    whole = train(config(method, "whole", **changes), reward=share_of_a)
    step = random.Random(method).randint(1, 5)
    cut = config(method, "cut", **changes)
    with pytest.raises(KeyboardInterrupt):
        train(cut, reward=share_of_a, callbacks=[Interrupt(step)])
    assert not (Path(cut.folder) / "adapter_model.safetensors").exists()
    # What a kill in the middle of a save leaves is passed over.
    (Path(cut.folder) / "checkpoint-99").mkdir(exist_ok=True)
    resumed = train(cut, resume="auto", reward=share_of_a)

    def figures(folder: Path) -> list[dict]:
        return [{k: v for k, v in record.items() if "time" not in k} for record in read_history(folder)]

    assert figures(resumed) == figures(whole)
    assert len(figures(whole)) == 6
    assert same(adapter(resumed), adapter(whole))


def test_resume_refuses_other_settings_and_missing_checkpoints(config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(config("sft"), callbacks=[Interrupt(3)])
    with pytest.raises(dts.UsageError, match="holds a run already: give --resume-from-checkpoint auto, --overwrite"):
        train(config("sft"))
    with pytest.raises(dts.UsageError, match="cannot resume with another max_steps: the run has 6, now it is 9"):
        train(config("sft", max_steps=9), resume="auto")
    with pytest.raises(dts.UsageError, match="there is no whole checkpoint"):
        train(config("sft"), resume=str(tmp_path / "checkpoint-5"))
    assert len(read_history(train(config("sft", "fresh", max_steps=1), resume="auto"))) == 1  # none yet: from the start


def test_a_run_of_a_version_with_fewer_settings_is_resumed(config):
    with pytest.raises(KeyboardInterrupt):
        train(config("sft"), callbacks=[Interrupt(3)])
    file = Path(config("sft").folder) / "training_config.json"
    drop(file, "max_grad_norm")
    settings = json.loads(file.read_text())
    del settings["lora"]["target_modules"], settings["distill"]["trees"]
    settings["grpo"]["kl_coeff"] = 7.0  # which SFT does not read
    file.write_text(json.dumps(settings))
    assert len(read_history(train(config("sft"), resume="auto"))) == 6


# Polychromic ------------------------------------------------------------------------------------------------------


def test_weight_zero_is_plain_sft_bit_for_bit_and_a_weight_moves_the_weights(config):
    plain = adapter(train(config("sft", max_steps=3)))
    zero = train(config("polychromic", "zero", max_steps=3, polychromic={"weight": 0}))
    assert same(adapter(zero), plain)
    two = train(config("polychromic", "two", max_steps=3))
    assert not same(adapter(two), plain)
    for record in read_history(two):
        assert record["combined_loss"] == pytest.approx(record["quality_loss"] - 2.0 * record["diversity_score"])
        assert record["train/diversity_score"] == record["diversity_score"]
        assert record["avg_unique_words"] > 0
        assert record["quality_loss"] == pytest.approx(record["loss"], rel=1e-5)


def test_log_probs_of_samples_are_those_the_decoder_drew_with():
    model, tokenizer = tiny_pair()
    lm = dts.load((model, tokenizer))
    result = dts.decode(lm, "say ab", method=Sampling(4), max_new_tokens=6, temperature=0.7, seed=3)
    leaves = [rollout.leaf for rollout in result.rollouts]
    ids = [result.tree.tokens(leaf) for leaf in leaves]
    found = sequence_log_probs(model, lm.encode("say ab"), ids, temperature=0.7)
    wanted = torch.tensor([result.tree.log_prob(leaf) for leaf in leaves])
    torch.testing.assert_close(found.detach(), wanted.float(), atol=1e-4, rtol=1e-5)
    group = draw_samples(lm, "say ab", 4, max_new_tokens=6, temperature=0.7, seed=3)
    assert group.token_ids == ids


# GRPO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", range(1, 13))
def test_any_batch_size_goes_with_any_group_size(batch_size):
    for group in range(2, 17):
        for wanted in (1, 3):
            found = derive_accumulation(batch_size, group, wanted)
            assert found >= wanted
            assert batch_size * found % group == 0
            assert not any(batch_size * k % group == 0 for k in range(wanted, found))


def test_grpo_logs_its_figures_and_the_adapter_loads(config, base):
    folder = train(config("grpo", batch_size=3, accumulation=1, max_steps=2, grpo={"max_completion_length": 5,
                          "n_generations": 4, "kl_coeff": 0.5}), reward=share_of_a)  # fmt: skip
    history = read_history(folder)
    assert history[0]["kl_penalty"] == 0  # a new adapter is the reference
    assert history[1]["kl_penalty"] > 0
    for record in history:
        assert record["avg_reward"] == record["reward"]
        assert record["total_loss"] == pytest.approx(record["loss"], abs=1e-6)
        # dapo divides by the tokens of the step, so the KL share of the loss is the mean per token
        assert record["total_loss"] - record["policy_loss"] == pytest.approx(0.5 * record["kl"], rel=0.3, abs=1e-7)
        assert record["sampled_tokens"] > 0
        assert record["effective_group"] == 4
    names = {p.name for p in folder.iterdir()}
    assert {"adapter_model.safetensors", "trainer_state.json", "training_args.bin", "training_config.json"} <= names
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    lm = dts.load(str(folder))
    assert dts.decode(lm, [{"role": "user", "content": "say ab"}], method=Sampling(2), max_new_tokens=4).best.token_ids
    checkpoint = json.loads((folder / "checkpoint-2" / "adapter_config.json").read_text())
    assert checkpoint["base_model_name_or_path"] == base


def test_what_is_saved_names_no_folder_of_the_machine(config, tmp_path):
    model, tokenizer = tiny_pair()
    model.config._name_or_path = "/somewhere/in/a/cache"
    folder = train(config("sft", max_steps=1, save_steps=1, model="qwen3-0.6b"), model=(model, tokenizer))
    for file in [*folder.glob("*.json"), *folder.glob("*.md"), *folder.glob("*/*.json"), *folder.glob("*/*.md")]:
        assert "/somewhere" not in file.read_text(encoding="utf-8"), file
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "qwen3-0.6b"


def test_a_warm_start_is_its_own_reference(config):
    warm = train(config("sft", "warm", max_steps=2))
    folder = train(config("grpo", checkpoint_path=str(warm), max_steps=1, learning_rate=1e-9), reward=share_of_a)
    assert read_history(folder)[0]["kl_penalty"] == pytest.approx(0, abs=1e-6)
    assert not (folder / "ref").exists()
    for key, value in adapter(warm).items():
        torch.testing.assert_close(adapter(folder)[key], value)
    again = train(config("sft", "control", checkpoint_path=str(warm), max_steps=1))  # SFT -> SFT
    assert not same(adapter(again), adapter(warm))


def test_trl_with_the_diversity_reward_has_the_exact_gradient(config):
    """E over every triple of an enumerable model's completions of the gradient that TRL's own code computes."""
    length, n, weight = 2, 3, 0.7
    model, tokenizer = tiny_pair("a", seed=1)
    settings = {"n_generations": n, "max_completion_length": length, "loss_type": "dr_grpo", "scale_rewards": "none",
                "kl_coeff": 0.0, "temperature": 1.0, "diversity_weight": weight}  # fmt: skip
    run = config("grpo", batch_size=n, accumulation=1, grpo=settings, lora={"dropout": 0.0})
    lora_rows = read_rows(run.data, need=["prompt"])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        from dts.training.adapters import _lora

        trainer = build_grpo(
            Parts(run, lora_rows, model, tokenizer, _lora(run.lora), _arguments(run, (), False), quality)
        )
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(7))
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    vocab, eos = range(len(tokenizer)), tokenizer.eos_token_id
    sequences = [(eos,)] + [(a, b) for a in vocab if a != eos for b in vocab]
    prompt = [{"role": "user", "content": "a"}]
    prompt_ids = dts.load((model, tokenizer)).encode(prompt)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1

    log_p = sequence_log_probs(trainer.model, prompt_ids, sequences)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    p = log_p.exp()
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in sequences]
    from dts.training.diversity import bleu_distance, distance_matrix, gate_values, well_formed

    gates = gate_values(texts, well_formed)
    distances = (distance_matrix(texts, bleu_distance) * gates[:, None] * gates).float()
    objective = p @ torch.tensor(quality(texts)) + weight * p @ distances @ p
    exact = torch.autograd.grad(-objective * grpo_gradient_scale(n, length), trainable, retain_graph=True)

    found = [torch.zeros_like(g) for g in exact]
    for chosen in itertools.combinations_with_replacement(range(len(sequences)), n):
        counts = [chosen.count(i) for i in set(chosen)]
        probability = p[list(chosen)].prod().item() * math.factorial(n) / math.prod(map(math.factorial, counts))
        trainer._weights = [1.0] * n
        trainer.draw_groups = lambda prompts, chosen=chosen: ([prompt_ids] * n, [sequences[i] for i in chosen])
        batch = trainer._generate_and_score_completions([{"prompt": prompt}] * n)
        grads = torch.autograd.grad(probability * trainer.compute_loss(trainer.model, batch), trainable)
        found = [f + g for f, g in zip(found, grads, strict=True)]
    top = max(g.abs().max().item() for g in exact)
    assert top > 1e-3
    assert max((f - g).abs().max().item() for f, g in zip(found, exact, strict=True)) < 1e-4 * top
    assert trainer.args.reward_weights == [1.0, grpo_diversity_weight(weight, n)]


def quality(texts: list[str]) -> list[float]:
    return [0.5 * text.count("a") - 0.2 * (text == "a") for text in texts]


def test_weights_of_searched_groups_are_p_over_q(tmp_path):
    model, tokenizer = tiny_pair("abcdef", seed=1)
    lm = dts.load((model, tokenizer))
    method, reward = MaxEnt(12, reward_scale=3.0), as_reward(lambda text: float("a" in text))
    common = {"max_new_tokens": 2, "temperature": 1.0}
    (group,) = draw_searched(lm, [Draw("ab", 200, seed=4)], reward=reward, method=method, **common)
    values = dts.decode(lm, "ab", reward=reward, method=method, seed=4, **common).values
    eos = tokenizer.eos_token_id
    sequences = [(eos,)] + [(a, b) for a in range(1, len(tokenizer)) for b in range(len(tokenizer))]
    log_p = sequence_log_probs(model, lm.encode("ab"), sequences).detach().double()
    first = sequence_log_probs(model, lm.encode("ab"), [(s[0],) for s in sequences]).detach().double()
    steps = [[f.item()] + ([lp.item() - f.item()] if len(s) == 2 else [])
             for s, lp, f in zip(sequences, log_p, first, strict=True)]  # fmt: skip
    log_q = torch.tensor([values.log_prob(s, step) for s, step in zip(sequences, steps, strict=True)]).double()
    assert log_q.exp().sum().item() == pytest.approx(1, abs=1e-5)
    weights = dict(zip(sequences, (log_p - log_q).tolist(), strict=True))
    for ids, log_weight in zip(group.token_ids, group.log_weights, strict=True):
        assert log_weight == pytest.approx(weights[ids], abs=1e-4)
    assert len(set(group.token_ids)) > 3
    assert max(group.log_weights) - min(group.log_weights) > 1  # the search did tilt


def test_weights_of_searched_groups_are_exact_for_monotone_rewards_too():
    """Such a reward says at each token what is gained, which a look-ahead uses."""
    lm, horizon, n = TableModel(random_logits(6, 3), 6), 3, 4000
    settings = GRPOSettings(groups="search", search_rollouts=12, search_reward_scale=3.0)
    (group,) = draw_searched(
        lm, [Draw("0", n, seed=0)], reward=Paid(2), method=group_search(settings), max_new_tokens=horizon,
        temperature=1.0,
    )  # fmt: skip
    exact = sum(math.exp(log_p) * ids.count(2) for ids, log_p in lm.sequences(horizon, (0,)))
    weighted = torch.tensor(
        [math.exp(w) * ids.count(2) for w, ids in zip(group.log_weights, group.token_ids, strict=True)]
    )
    assert weighted.mean().item() == pytest.approx(exact, abs=4 * weighted.std().item() / math.sqrt(n))
    assert sum(ids.count(2) for ids in group.token_ids) / n > 1.1 * exact  # the search did tilt


# Data and failures ------------------------------------------------------------------------------------------------


def test_rows_are_encoded_as_the_decoder_asks(tmp_path, caplog):
    model, tokenizer = tiny_pair()
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "ab", "response": "cd"}\n{"prompt": "' + "x" * 50 + '", "response": "no"}\n')
    rows = read_rows(file)
    prompt = dts.load((model, tokenizer)).encode(rows[0].prompt)
    response = tokenizer("cd")["input_ids"]
    with caplog.at_level(logging.WARNING, "dts"):
        assert encode_rows(rows, model, tokenizer, 40) == [{
            "input_ids": [*prompt, *response, 0], "labels": [IGNORED] * len(prompt) + [*response, 0],
        }]  # fmt: skip
    assert "1 of 2 rows left out" in caplog.text
    unended = encode_rows([replace(rows[0], cut=True)], model, tokenizer, 40)[0]
    assert unended["input_ids"] == [*prompt, *response] and unended["labels"][-1] == response[-1]
    whole = encode_rows(rows, model, tokenizer, 40, completion_only_loss=False)[0]
    assert whole["labels"] == whole["input_ids"] == [*prompt, *response, 0]
    cut = encode_rows(rows, model, tokenizer, len(prompt) + 1)[0]
    assert cut["labels"] == [IGNORED] * len(prompt) + response[:1]
    with pytest.raises(dts.UsageError, match="every prompt is longer than max_length=3"):
        encode_rows(rows, model, tokenizer, 3)


def test_leaving_prompts_out_of_the_head_changes_no_loss_and_no_weight(config, monkeypatch):
    from trl.kernels.chunked_logprob import _use_triton
    from trl.trainer import utils

    rows: list[int] = []
    scored = utils._ChunkedLogProbFunction

    class Counting:
        @staticmethod
        def apply(hidden, *rest):
            rows.append(len(hidden))
            return scored.apply(hidden, *rest)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Counting)
    monkeypatch.setattr(utils, "_use_triton", _use_triton)
    with monkeypatch.context() as patch:
        patch.setattr("dts.training.sft.score_labels_only", lambda: None)
        plain = train(config("sft", "plain"))
    everything, rows[:] = sum(rows), []
    ours = train(config("sft", "ours"))
    assert 0 < sum(rows) < everything / 2
    losses = [[row["loss"] for row in read_history(folder) if "loss" in row] for folder in (plain, ours)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one, two = adapter(plain), adapter(ours)
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_too_few_prompts_for_a_step_are_named(config):
    with pytest.raises(dts.UsageError, match="8 different prompts are fewer than the 10 of one step"):
        train(config("grpo", batch_size=10, accumulation=4), reward=share_of_a)


def test_expert_iteration_trains_on_draws_from_the_search(config):
    from dts.training.expert import expert_iteration

    settings = {"max_completion_length": 5, "n_generations": 2, "search_rollouts": 6, "temperature": 1.0}
    first, second = expert_iteration(config("sft", "expert", max_steps=2, grpo=settings), share_of_a, rounds=2)
    assert (first.parent.name, second.parent.name) == ("expert_round1", "expert_round2")
    draws = [json.loads(line) for line in (first / "draws.jsonl").read_text().splitlines()]
    assert 0 < len(draws) <= 2 * len(WORDS)
    assert all(draw["reward"] == pytest.approx(share_of_a(draw["response"])) for draw in draws)
    assert any(draw["cut"] for draw in draws)
    assert all(len(draw["response"]) < 5 for draw in draws if not draw["cut"])  # the fifth token was the end
    assert json.loads((second / "training_config.json").read_text())["checkpoint_path"] == str(first)


def test_interrupted_expert_iteration_ends_like_an_uninterrupted_one(config):
    from dts.training.expert import expert_iteration

    settings = {"max_completion_length": 5, "n_generations": 2, "search_rollouts": 6, "temperature": 1.0}
    whole = config("sft", "whole", max_steps=2, save_steps=1, grpo=settings)
    cut = replace(whole, name="cut")
    wanted = expert_iteration(whole, share_of_a, rounds=2)
    asked: list[str] = []
    limit = 0

    def failing(text: str) -> float:
        asked.append(text)
        if len(asked) == limit:
            raise KeyboardInterrupt
        return share_of_a(text)

    first = Path(cut.output) / "cut_round1" / "seed_42"
    for calls, done in ((20, False), (80, True)):  # while it draws: in the first round, then in the second
        limit = calls
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            expert_iteration(cut, failing, rounds=2, resume="auto")
        assert (first / "trainer_state.json").exists() == done
    limit = -1
    asked.clear()
    drop(first / "training_config.json", "distill")  # as a version without this section wrote it
    found = expert_iteration(cut, failing, rounds=2, resume="auto")
    assert found[0] == first and asked
    for one, other in zip(found, wanted, strict=True):
        assert (one / "draws.jsonl").read_text() == (other / "draws.jsonl").read_text()
        assert same(adapter(one), adapter(other))
    asked.clear()
    assert expert_iteration(cut, failing, rounds=2, resume="auto") == found and not asked
    with pytest.raises(dts.UsageError, match="give auto"):
        expert_iteration(cut, failing, rounds=2, resume="somewhere")


def test_draws_are_a_search_s_finished_sequences_by_their_shares(tiny_lm):
    from dts.training.expert import draw_rows

    prompt, method = [{"role": "user", "content": "ab"}], MaxEnt(12, reward_scale=6.0)
    rows = list(draw_rows(tiny_lm, [prompt], share_of_a, method, per_prompt=4000, max_new_tokens=4))
    search = dts.decode(tiny_lm, prompt, reward=share_of_a, method=method, max_new_tokens=4, seed=stream(0, 0))
    texts = {rollout.leaf: rollout.text for rollout in search.rollouts}
    expected = Counter()
    for leaf, share in search.shares.items():
        expected[texts[leaf]] += share
    drawn = Counter(row["response"] for row in rows)
    for text, share in expected.items():
        assert drawn[text] / 4000 == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 4000) + 1e-9)
    assert {row["forwarded_tokens"] for row in rows} == {search.usage.forwarded_tokens}


def test_settings_that_have_no_exact_gradient_are_refused():
    with pytest.raises(dts.UsageError, match=r"needs grpo\.loss_type=dr_grpo"):
        GRPOSettings(diversity_weight=1.0)


def test_the_code_of_the_page(config, base, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, flags=re.S) if '"sft"' in code]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rows.jsonl").write_text('{"prompt": "ab", "response": "cd"}\n')
    names: dict = {}
    exec(compile(code.replace("smollm2-135m", base), "docs", "exec"), names)  # our own page
    assert names["folder"] == Path("output/experiments/mine/seed_42")
    assert names["lm"].name == str(names["folder"])


# A run as it goes -------------------------------------------------------------------------------------------------


def test_equal_rewards_move_nothing_from_a_warm_start_and_after_a_resume(config):
    warm = train(config("sft", "warm", max_steps=2))
    run = config("grpo", checkpoint_path=str(warm), max_steps=4)
    with pytest.raises(KeyboardInterrupt):
        train(run, reward=lambda text: 0.5, callbacks=[Interrupt(3)])
    folder = train(run, resume="auto", reward=lambda text: 0.5)
    assert same(adapter(folder), adapter(warm))
    history = read_history(folder)
    assert len(history) == 4 and all(row["kl_penalty"] == 0 and row["frac_reward_zero_std"] == 1 for row in history)


def test_a_step_says_where_its_time_went(config, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dts"), "level", logging.INFO)
    caplog.set_level(logging.INFO, "dts")
    caplog.set_level(logging.INFO, "dts.training.health")  # a recipe's command silences it for its process
    folder = train(config("grpo", max_steps=2), reward=share_of_a)
    for row in read_history(folder):
        assert {"time_draw", "time_score", "time_loss", "time_update", "time_tokens_per_second"} <= row.keys()
        assert min(row["time_draw"], row["time_score"], row["time_loss"], row["time_update"]) > 0
    shown = [message for message in caplog.messages if message.startswith("step ")]
    assert len(shown) == 2
    assert re.search(r"step 2 of 2: .*draw .* s, score .* s, loss .* s, update .* s, .* tokens/s; 0 s left", shown[1])


def test_the_parts_of_a_step_add_up(monkeypatch):
    from dts.training import progress

    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    clock = progress.Clock()
    clock.begin([{"num_tokens": 150}, {}])
    now[0] = 8.0
    clock.before_update()
    now[0] = 9.5
    clock.after_update()
    now[0] = 10.0
    found = clock.figures({"time_draw": 3.0, "time_score": 0.5, "sampled_tokens": 80})
    assert found == {"time_update": 1.5, "time_loss": 5.0, "time_tokens_per_second": 8.0}
    now[0] = 100.0  # a checkpoint is no part of the next step
    clock.go_on()
    now[0] = 110.0
    assert clock.figures({"num_tokens": 200})["time_tokens_per_second"] == 5.0
    assert clock.left(3) == 30.0


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("sft", ["batch_size=2", "max_length=512", "lora.r=2"]),
        ("polychromic", ["batch_size=2", "polychromic.n_samples=3", "max_length=512"]),
        ("grpo", ["batch_size=2", "grpo.n_generations=4", "grpo.max_completion_length=5"]),
        ("distill", ["batch_size=2", "distill.rollouts=6", "distill.max_new_tokens=5"]),
    ],
)
def test_out_of_memory_names_the_three_settings_that_help(config, method, settings, monkeypatch):
    from dts.training import run

    def fail(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(run, "_build", fail)
    with pytest.raises(dts.UnavailableError, match="out of memory before the first step") as caught:
        train(config(method), reward=share_of_a)
    assert all(setting in str(caught.value) for setting in settings)
    assert "--overwrite" in str(caught.value)  # other settings are refused where a run is continued


def test_out_of_memory_in_a_step_names_the_step(config):
    class Full(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(dts.UnavailableError, match="out of memory at step 2 of sft: lower batch_size=2 "):
        train(config("sft"), callbacks=[Full()])


# Estimates --------------------------------------------------------------------------------------------------------


def test_a_dry_run_knows_the_sizes_of_the_model(config, base):
    from transformers import AutoModelForCausalLM

    from dts.training import estimate
    from dts.training.adapters import load_for_training
    from dts.training.trees import adapted

    run = config("sft")
    shape, _ = estimate._inspect(run)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    plain, _, lora = load_for_training(run, None)
    trained = adapted(plain, lora, {"gradient_checkpointing": False})
    assert shape.adapter == sum(p.numel() for p in trained.parameters() if p.requires_grad)
    text = estimate.estimate(run, read_rows(run.data, need=["prompt"]))
    assert "8 rows" in text and "6 steps" in text and re.search(r"time: about \d", text) and "GiB free" in text


@pytest.mark.slow
def test_estimated_tokens_are_bounds_of_those_that_a_run_draws(config):
    from dts.training.estimate import work_of

    for method, changes in (
        ("grpo", {}), ("grpo", {"grpo": {"groups": "tree", "tree_roots": 2, "tree_segment": 2}}),
        ("distill", {"distill": {"trees": "policy"}}),
    ):  # fmt: skip
        run = config(method, f"{method}_{len(str(changes))}", max_steps=2, **changes)
        drawn = sum(row["sampled_tokens"] for row in read_history(train(run, reward=share_of_a)))
        work = work_of(run, 8, prompt=14.0, response=0.0)  # "user: say ab\n" and what follows it
        assert work.steps == 2
        assert 0.5 * work.drawn < drawn <= 1.3 * work.drawn
