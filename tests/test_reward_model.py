"""Learned rewards: pairs, training on a tiny random model, saving, and use in search and in TRL's form."""

from __future__ import annotations

import json

import numpy as np
import pytest

import dts
from dts.search import BestOfN
from dts.training.data import Row
from dts.training.reward_model import (
    FILE,
    LearnedReward,
    RewardModelSettings,
    _accuracy,
    hold_out,
    load_reward_model,
    make_pairs,
    run_script,
    train_reward_model,
)

pytest.importorskip("trl")
POST = "say something"


def rows(groups: int = 8, each: int = 4) -> list[Row]:
    """In every group, replies made of the letter a are liked and those of the letter z are not."""
    return [
        Row([{"role": "user", "content": POST}], ("a" if i % 2 else "z") * (4 + i) + f" {'bcdefghi'[g % 8]}",
            float(i % 2), str(g), "x:1") for g in range(groups) for i in range(each)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny causal model in a folder."""
    from training_models import tiny_pair

    folder = tmp_path_factory.mktemp("base")
    for part in tiny_pair():
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    settings = RewardModelSettings(
        model=base, max_steps=30, learning_rate=1e-2, batch_size=8, lora_r=4, max_length=64, held_out=0.25
    )
    return folder, train_reward_model(rows(), folder, settings)


def test_pairs_stay_in_their_group_and_have_a_winner():
    pairs = make_pairs(rows(3), 100, seed=0)
    assert len(pairs) == 3 * 4  # two liked times two not, in each group
    assert all(a.group == b.group and a.engagement > b.engagement for a, b in pairs)
    assert len(make_pairs(rows(3), 2, seed=0)) == 6
    assert make_pairs(rows(3), 2, seed=0) == make_pairs(rows(3), 2, seed=0)
    assert not make_pairs([r for r in rows(3) if r.engagement == 1.0], 100, seed=0)


def test_held_out_groups_are_whole():
    train, kept = hold_out(rows(8), 0.25, seed=3)
    assert len({r.group for r in kept}) == 2
    assert not {r.group for r in train} & {r.group for r in kept}
    assert len(train) + len(kept) == 32


def test_pairwise_training_learns_the_preference(trained):
    folder, reward = trained
    about = json.loads((folder / FILE).read_text())
    assert about["kind"] == "pairwise"
    assert about["held_out"]["accuracy"] > 0.9
    assert about["held_out"]["groups"] == 2
    low, high = about["held_out"]["interval"]
    assert low <= about["held_out"]["accuracy"] <= high
    liked, other = reward([POST] * 2, ["aaaaaaa", "zzzzzzz"])
    assert 0 < other < 0.5 < liked < 1
    assert (folder / "adapter_model.safetensors").is_file()


def test_an_interrupted_training_ends_like_an_uninterrupted_one(base, tmp_path):
    from training_models import Interrupt, adapter, drop, same

    settings = RewardModelSettings(
        model=base, max_steps=8, learning_rate=1e-2, batch_size=4, lora_r=2, max_length=32, held_out=0, save_steps=3
    )
    train_reward_model(rows(), tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(rows(), tmp_path / "cut", settings, callbacks=[Interrupt(5)])
    assert not (tmp_path / "cut" / "adapter_model.safetensors").exists()
    drop(tmp_path / "cut" / "reward_training.json", "pairs_per_group")  # as a version without this setting wrote it
    steps = []

    class Count(Interrupt):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    train_reward_model(rows(), tmp_path / "cut", settings, resume="auto", callbacks=[Count(0)])
    assert steps == [4, 5, 6, 7, 8]
    assert same(adapter(tmp_path / "cut"), adapter(tmp_path / "whole"))
    assert json.loads((tmp_path / "cut" / FILE).read_text()) == json.loads((tmp_path / "whole" / FILE).read_text())
    with pytest.raises(dts.UsageError, match="cannot resume with another rows"):
        train_reward_model(rows(7), tmp_path / "cut", settings, resume="auto")
    with pytest.raises(dts.UsageError, match="there is no whole checkpoint"):
        train_reward_model(rows(), tmp_path / "cut", settings, resume=str(tmp_path))


def test_saved_and_loaded_reward_is_the_same_in_any_batch(trained):
    folder, reward = trained
    again = load_reward_model(folder)
    texts = ["aaaa", "zz", "a z a z a z a z", "", "b" * 200]
    assert again([POST] * 5, texts) == pytest.approx(reward([POST] * 5, texts), abs=1e-6)
    alone = [again([POST], [text])[0] for text in texts]
    assert again([POST] * 5, texts) == pytest.approx(alone, abs=1e-5)
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert again(prompts=[POST] * 5, completions=chats, completion_ids=[[1]] * 5) == pytest.approx(alone, abs=1e-5)


def test_the_interval_of_the_accuracy_is_over_groups():
    # one of two groups all right, the other all wrong: two groups of a million pairs say no more than two of one
    pairs = make_pairs(rows(2), 100, seed=0)
    first = pairs[0][0].group

    def raw(prompts, replies):
        return np.array([scores[id(reply)] for reply in replies])

    scores = {id(a.response): float(a.group == first) for a, _ in pairs}
    scores |= {id(b.response): 0.5 for _, b in pairs}
    many = _accuracy(raw, pairs * 50)
    assert many == {"pairs": 400, "groups": 2, "accuracy": 0.5, "interval": [0.0, 1.0]}
    assert _accuracy(raw, [pair for pair in pairs if pair[0].group == first])["interval"] is None


def test_search_uses_it(trained, tiny_lm):
    _, reward = trained
    assert dts.as_reward(reward).name == "reward_model_pairwise"
    result = dts.decode(tiny_lm, POST, reward=reward, method=BestOfN(3), max_new_tokens=5)
    assert result.best.reward == pytest.approx(max(reward([POST] * 3, [r.text for r in result.rollouts])), abs=1e-5)


def test_all_weights_can_be_trained(base, tmp_path):
    settings = RewardModelSettings(model=base, max_steps=2, lora_r=0, max_length=32, held_out=0)
    reward = train_reward_model(rows(2), tmp_path, settings)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert reward.about["held_out"]["accuracy"] is None
    again = load_reward_model(tmp_path)
    assert again([POST], ["aaa"]) == pytest.approx(reward([POST], ["aaa"]), abs=1e-6)


def test_the_fast_kind_says_what_it_is(tmp_path):
    data = tmp_path / "data.jsonl"
    lines = [{"prompt": POST, "response": ("good words " if i % 2 else "other text ") + "x y"[: i % 3],
              "engagement": i % 2, "group": i // 4} for i in range(40)]  # fmt: skip
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    assert run_script(["--data", str(data), "--output", str(out), "--kind", "tfidf-ridge", "--held_out", "0.2"]) == 0
    reward = load_reward_model(out)
    assert reward.about["kind"] == "tfidf-ridge"
    assert reward.__name__ == "reward_model_tfidf_ridge"
    assert reward.about["held_out"]["accuracy"] == 1.0
    good, bad = reward([POST] * 2, ["good words", "other text"])
    assert good > 0.5 > bad


def test_standardised_scores():
    reward = LearnedReward(lambda prompts, replies: np.array([float(r) for r in replies]),
                           {"kind": "pairwise", "mean": 2.0, "deviation": 0.5})  # fmt: skip
    assert reward([""] * 3, ["2", "2.5", "1000"]) == pytest.approx([0.5, 1 / (1 + np.exp(-1)), 1.0])
    assert reward([], []) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kind": "magic"}, "kind='magic'"), ({"held_out": 1.0}, "held-out"), ({"batch_size": 0}, "batch-size=0")],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(dts.UsageError, match=message):
        RewardModelSettings(**options)


def test_missing_models_and_useless_data_are_one_line_errors(tmp_path, base):
    with pytest.raises(dts.UsageError, match="train one with"):
        load_reward_model(tmp_path)
    alike = [r for r in rows() if r.engagement == 1.0]
    with pytest.raises(dts.UsageError, match="different engagement"):
        train_reward_model(alike, tmp_path / "new", RewardModelSettings(model=base))
