"""Node targets: packed trees against plain forward passes, targets and gradients against enumeration, real runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import dts
from dts.models.table import TableModel, random_logits
from dts.search import MaxEnt

pytest.importorskip("trl")
pytest.importorskip("peft")

from toys import Paid
from training_models import Interrupt, adapter, same, saved_pair, share_of_a, tiny_config, tiny_pair

from dts.training.config import DistillSettings
from dts.training.distill import searches
from dts.training.kept import TOGETHER, kept
from dts.training.nodetargets import node_losses, targets, taught_by, taught_from
from dts.training.packed import Packed, ancestors_sum, check_packing, tree_logits
from dts.training.run import read_history, train

VOCAB, HORIZON, SCALE = 3, 3, 2.0
REWARDS = np.random.default_rng(5).normal(0, 0.5, (VOCAB,) * HORIZON)
MODEL = TableModel(random_logits(VOCAB, 3), VOCAB)


def reward(text: str) -> float:
    return float(REWARDS[tuple(int(token) for token in text.split())])


def prefixes() -> list[tuple[int, ...]]:
    return [p for depth in range(HORIZON) for p in itertools.product(range(VOCAB), repeat=depth)]


def start() -> dict[tuple[int, ...], torch.Tensor]:
    """Logits of the enumerable model by prefix, as parameters."""
    return {p: torch.tensor(MODEL.table((0, *p))).requires_grad_() for p in prefixes()}


def log_prob(policy: dict[tuple[int, ...], torch.Tensor]) -> torch.Tensor:
    """Of every sequence, [27]."""
    rows = {prefix: logits.log_softmax(-1) for prefix, logits in policy.items()}
    sequences = itertools.product(range(VOCAB), repeat=HORIZON)
    return torch.stack([sum(rows[x[:t]][x[t]] for t in range(HORIZON)) for x in sequences])


def optimum(scale: float = SCALE) -> torch.Tensor:
    """log pi* of every sequence: of all distributions the one with the largest E[r] - KL(. || p) / scale."""
    tilted = log_prob(start()).detach() + scale * torch.tensor(REWARDS).flatten()
    return tilted.log_softmax(0)


def searched(rollouts: int, scale: float = SCALE, seed: int = 0):
    result = dts.decode(MODEL, "0", reward=reward, method=MaxEnt(rollouts, scale), max_new_tokens=HORIZON, seed=seed)
    return taught_by(result, [0])


def tree_loss(policy: dict[tuple[int, ...], torch.Tensor], taught) -> torch.Tensor:
    packed, base = taught.packed, start()
    paths = [tuple(packed.tokens[row - 1] for row in packed.path(index)) for index in range(packed.rows)]
    logits = torch.stack([policy[path] for path in paths])
    reference = torch.stack([base[path] for path in paths]).detach()
    return (torch.tensor(taught.weights) * node_losses(logits, reference, taught.nats)).sum()


def gradient(loss: torch.Tensor, policy: dict[tuple[int, ...], torch.Tensor]) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(policy.values()), allow_unused=True)
    return torch.cat([torch.zeros(VOCAB) if g is None else g for g in found])


# Targets against enumeration -------------------------------------------------------------------------------------


def test_the_fixed_point_is_the_optimum_of_kl_regularised_reinforcement_learning():
    policy, taught = start(), searched(60)
    optimizer = torch.optim.LBFGS(policy.values(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = tree_loss(policy, taught)
        loss.backward()
        return loss

    optimizer.step(closure)
    found, r, base = log_prob(policy).detach(), torch.tensor(REWARDS).flatten(), log_prob(start()).detach()
    torch.testing.assert_close(found, optimum(), atol=1e-5, rtol=0)  # less than 1e-6 nats at a node count as none

    def objective(logs: torch.Tensor) -> float:
        return (logs.exp() @ (r - (logs - base) / SCALE)).item()

    log_z = torch.logsumexp(base + SCALE * r, 0).item()
    assert objective(found) == pytest.approx(log_z / SCALE, abs=1e-9)  # its known maximum
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = found + 0.1 * torch.randn(found.shape, generator=generator, dtype=found.dtype)
        assert objective(other.log_softmax(0)) < objective(found)


def test_the_gradient_becomes_the_exact_one_as_the_tree_becomes_complete():
    policy = start()
    with torch.no_grad():  # anywhere, not only at the start
        for index, logits in enumerate(policy.values()):
            logits += torch.tensor(np.random.default_rng(index).normal(0, 0.5, VOCAB))
    star = optimum()
    exact = gradient((star.exp() * (star - log_prob(policy))).sum(), policy)  # of KL(pi* || policy)
    errors = []
    for rollouts in (2, 8, 20, 60):
        found = [gradient(tree_loss(policy, searched(rollouts, seed=seed)), policy) for seed in range(8)]
        errors.append(torch.stack([(g - exact).norm() / exact.norm() for g in found]).mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.3
    assert errors[-1] < 1e-6
    assert tree_loss(policy, searched(60)).item() == pytest.approx(
        (star.exp() * (star - log_prob(policy))).sum().item(), abs=1e-6
    )


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_without_a_difference_in_reward_the_gradient_at_the_start_is_exactly_zero(monkeypatch, scale):
    if scale:
        monkeypatch.setattr("test_distill.REWARDS", np.full((VOCAB,) * HORIZON, 0.7))
    for rollouts in (1, 5, 60):
        taught, policy = searched(rollouts, scale), start()
        assert taught.nats == [{}] * taught.packed.rows
        assert gradient(tree_loss(policy, taught), policy).abs().max() == 0


def test_what_was_not_tried_is_divided_as_p_divides_it():
    taught = searched(4)
    for row, nats in enumerate(taught.nats):
        path = tuple(taught.packed.tokens[index - 1] for index in taught.packed.path(row))
        logits = torch.tensor(MODEL.table((0, *path)))[None]
        p, target = logits.softmax(-1)[0], targets(logits, [nats])[0].exp()
        others = [token for token in range(VOCAB) if token not in nats]
        ratios = (target / p)[others]
        assert ratios.numel() < 2 or (ratios / ratios[0] - 1).abs().max() < 1e-9
    assert any(0 < len(nats) < VOCAB - 1 for nats in taught.nats)


def test_gains_that_a_look_ahead_found_are_taught_too():
    """One path has tried one token at each node; the reward says at once what the others would gain."""
    taught = taught_by(dts.decode(MODEL, "0", reward=Paid(2), method=MaxEnt(1, SCALE), max_new_tokens=HORIZON), [0])
    paid = [row for row, nats in enumerate(taught.nats) if 2 in nats]
    assert len(paid) == HORIZON
    for row in paid:
        assert taught.nats[row][2] == pytest.approx(SCALE, abs=1e-6)  # e^(lambda * 1) times as likely beside the rest


def test_a_reward_of_finished_texts_is_asked_what_the_next_tokens_would_give_where_it_allows_that():
    """One path again. Without the question its tree teaches nothing, and a model of the reward's own is spared it."""

    def share_of_twos(text: str) -> float:
        return text.split().count("2") / HORIZON

    def taught(scorer):
        settings = DistillSettings(rollouts=1, reward_scale=SCALE, max_new_tokens=HORIZON)
        (tree,) = searches(settings, MODEL, [dts.Request("0", seed=1)], dts.as_reward(scorer))
        assert tree.packed.tokens == (0, 0)  # and a last one
        return tree.nats

    for nats in taught(share_of_twos)[:-1]:  # of two tokens that were not taken, one is worth a third more
        assert nats[2] - nats[1] == pytest.approx(SCALE / HORIZON, abs=1e-6)
    assert taught(dts.as_reward(share_of_twos, partial=False)) == [{}] * HORIZON
    share_of_twos.tokens = 0  # it runs a model
    assert taught(share_of_twos) == [{}] * HORIZON


def test_a_tree_s_weights_are_the_shares_of_what_finished_below():
    taught = searched(5)
    assert taught.weights[0] == pytest.approx(1)
    sums = [0.0] * taught.packed.rows
    for row, parent in enumerate(taught.packed.parents, start=1):
        sums[parent] += taught.weights[row]
    for row, depth in enumerate(taught.packed.depths()):
        assert depth == HORIZON - 1 or sums[row] == pytest.approx(taught.weights[row])
    assert ancestors_sum([0, 0, 1], [1.0, 2.0, 3.0, 4.0]) == [10.0, 6.0, 3.0, 4.0]


# One pass for a tree ---------------------------------------------------------------------------------------------


def random_tree(rows: int = 40, seed: int = 0) -> Packed:
    rng = np.random.default_rng(seed)
    parents = tuple(int(rng.integers(max(0, row - 4), row)) for row in range(1, rows))
    return Packed((3, 4, 5), tuple(rng.integers(1, 30, rows - 1).tolist()), parents)


def path_logits(model, packed: Packed) -> torch.Tensor:
    """The slow way: a plain forward pass for every row."""
    found = []
    for row in range(packed.rows):
        ids = [*packed.prompt_ids, *(packed.tokens[index - 1] for index in packed.path(row))]
        found.append(model(input_ids=torch.tensor([ids])).logits[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_tree_has_the_logits_and_gradients_of_plain_passes(attention):
    model, _ = tiny_pair()
    model.set_attn_implementation(attention)
    packed = random_tree()
    assert max(packed.depths()) > 8 and len(set(packed.parents)) < packed.rows - 1
    signs = torch.randn(packed.rows, model.config.vocab_size, generator=torch.Generator().manual_seed(1))
    gradients = []
    for logits in (tree_logits(model, packed), path_logits(model, packed)):
        gradients.append(torch.autograd.grad((logits.log_softmax(-1) * signs).sum(), list(model.parameters())))
    torch.testing.assert_close(tree_logits(model, packed), path_logits(model, packed), atol=1e-5, rtol=1e-5)
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=1e-4)
    check_packing(model, packed)


def test_every_token_goes_through_the_model_once():
    model, _ = tiny_pair()
    sizes = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].numel()))
    packed = random_tree(12)
    tree_logits(model, packed)
    assert sizes == [3 + 11]


def test_a_model_that_does_not_take_trees_is_refused():
    model, _ = tiny_pair()
    plain = model.model.forward
    model.model.forward = lambda *arguments, **options: plain(*arguments, **{**options, "attention_mask": None})
    with pytest.raises(dts.UnavailableError, match=r"other logits for a tree .* use method: grpo"):
        check_packing(model, Packed((3, 4), (5, 6, 7, 8), (0, 0, 1, 3)))


# Results that are kept -------------------------------------------------------------------------------------------


def test_what_was_kept_is_not_made_again(tmp_path):
    file, made = tmp_path / "kept.jsonl", []

    def make(indices):
        for index in indices:
            if index == 20 and len(made) == 20:
                raise KeyboardInterrupt
            made.append(index)
            yield {"value": index / 3}

    with pytest.raises(KeyboardInterrupt):
        kept(file, {"seed": 1}, 24, make)
    with file.open("a") as stream:
        stream.write('{"val')  # what a kill in the middle of a line leaves
    found = kept(file, {"seed": 1}, 24, make)
    assert found == [{"value": index / 3} for index in range(24)]
    assert made == [*range(20), *range(TOGETHER, 24)]
    assert kept(file, {"seed": 1}, 24, make) == found and len(made) == 28
    assert kept(file, {"seed": 2}, 3, make) == found[:3] and len(made) == 31  # of other settings


# Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return saved_pair(tmp_path_factory.mktemp("base"))


@pytest.fixture
def config(base, tmp_path):
    return tiny_config(base, tmp_path)


def test_a_run_comes_nearer_to_its_targets_and_starts_at_kl_zero(config):
    folder = train(config("distill", max_steps=12, save_steps=6, learning_rate=1e-2), reward=share_of_a)
    history = read_history(folder)
    assert history[0]["kl_to_start"] == 0
    assert history[0]["loss"] == pytest.approx(history[0]["target_kl"], rel=1e-4)
    assert history[-1]["kl_to_start"] > 1e-3
    halves = [sum(row["target_kl"] for row in part) for part in (history[:6], history[6:])]
    assert halves[1] < 0.9 * halves[0]
    records = [json.loads(line) for line in (folder / "trees.jsonl").read_text().splitlines()[1:]]
    trees = [taught_from(record) for record in records]
    assert [tree.as_dict() for tree in trees] == [
        {**record, "packed": {k: tuple(v) for k, v in record["packed"].items()}, "nats": tree.nats}
        for record, tree in zip(records, trees, strict=True)
    ]
    assert len(trees) == 8


def test_a_warm_start_is_its_own_reference(config):
    warm = train(config("sft", "warm", max_steps=2))
    folder = train(config("distill", checkpoint_path=str(warm), max_steps=2, save_steps=1), reward=share_of_a)
    history = read_history(folder)
    assert history[0]["kl_to_start"] == 0 and history[1]["kl_to_start"] > 0
    assert not (folder / "ref").exists()
    assert not same(adapter(folder), adapter(warm))


@pytest.mark.slow
def test_an_interrupted_run_with_trees_of_the_policy_ends_like_an_uninterrupted_one(config):
    changes = {"checkpoint_path": str(train(config("sft", "warm", max_steps=2))), "distill": {"trees": "policy"}}
    whole = train(config("distill", "whole", **changes), reward=share_of_a)
    with pytest.raises(KeyboardInterrupt):
        train(config("distill", "cut", **changes), reward=share_of_a, callbacks=[Interrupt(3)])
    resumed = train(config("distill", "cut", **changes), resume="auto", reward=share_of_a)
    assert figures(resumed) == figures(whole) and same(adapter(resumed), adapter(whole))


def figures(folder: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if "time" not in k} for record in read_history(folder)]


@pytest.mark.parametrize("warm", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(config, warm):
    changes = {"checkpoint_path": str(train(config("sft", "warm", max_steps=2)))} if warm else {}
    whole = train(config("distill", "whole", **changes), reward=share_of_a)
    cut = config("distill", "cut", **changes)
    with pytest.raises(KeyboardInterrupt):
        train(cut, reward=share_of_a, callbacks=[Interrupt(3)])
    asked = []
    resumed = train(cut, resume="auto", reward=lambda text: asked.append(text) or share_of_a(text))
    assert not asked  # the trees were kept
    assert figures(resumed) == figures(whole)
    assert same(adapter(resumed), adapter(whole))


@pytest.mark.parametrize("trees", ["start", "policy"])
def test_equal_rewards_move_nothing_from_a_warm_start_and_after_a_resume(config, trees):
    warm = train(config("sft", "warm", max_steps=2))
    run = config("distill", checkpoint_path=str(warm), max_steps=4, distill={"trees": trees, "kl_coeff": 0.5})
    with pytest.raises(KeyboardInterrupt):
        train(run, reward=lambda text: 0.5, callbacks=[Interrupt(3)])
    folder = train(run, resume="auto", reward=lambda text: 0.5)
    assert same(adapter(folder), adapter(warm))
    history = read_history(folder)
    assert len(history) == 4 and all(row["loss"] == 0 and row["kl_to_start"] == 0 for row in history)


def test_trees_of_the_policy_are_drawn_anew_for_every_step_in_one_batch(config, monkeypatch):
    asked, plain = [], dts.decode_many
    monkeypatch.setattr(dts, "decode_many", lambda lm, requests, **options: (
        asked.append([(request.prompt, request.seed) for request in requests]) or plain(lm, requests, **options)
    ))  # fmt: skip
    folder = train(config("distill", max_steps=3, distill={"trees": "policy"}), reward=share_of_a)
    assert [len(requests) for requests in asked] == [4, 4, 4]  # two passes of two trees each
    assert len({seed for requests in asked for _, seed in requests}) == 12
    history = read_history(folder)
    assert history[0]["kl_to_start"] == 0 and history[-1]["kl_to_start"] > 0
    assert not (folder / "trees.jsonl").exists()
    for row in history:
        assert row["sampled_tokens"] > 0 and row["target_reward"] > row["avg_reward"] > 0
        assert row["loss"] == pytest.approx(row["target_kl"], rel=1e-4)


@pytest.mark.slow
def test_the_kl_to_the_start_holds_the_policy_back(config):
    free, held = (
        train(
            config("distill", f"kl_{kl}", max_steps=6, distill={"trees": "policy", "kl_coeff": kl}), reward=share_of_a
        )
        for kl in (0.0, 20.0)
    )
    assert read_history(held)[-1]["kl_to_start"] < 0.5 * read_history(free)[-1]["kl_to_start"]
    assert read_history(held)[0]["loss"] == read_history(free)[0]["loss"]  # no KL yet


def test_bad_settings_are_named(config):
    with pytest.raises(dts.UsageError, match=r"distill\.rollouts=0 is not allowed"):
        config("distill", distill={"rollouts": 0})
    with pytest.raises(dts.UsageError, match=r"distill\.trees='all' is not allowed; give start, policy"):
        config("distill", distill={"trees": "all"})
    with pytest.raises(dts.UsageError, match=r"distill\.reward_scale=-1.0 is not allowed"):
        config("distill", distill={"reward_scale": -1})
    with pytest.raises(dts.UsageError, match="every prompt is longer than the 1 tokens"):
        train(config("distill", max_length=6), reward=share_of_a)
