"""The keyword-shift recipe: questions, reward, settings, health checks, and whole runs of a tiny random model."""

from __future__ import annotations

import io
import json
import math
import re
import string
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dts
from dts.rewards import Context, Finished, as_reward
from dts.search import MaxEnt

pytest.importorskip("trl")
pytest.importorskip("peft")

from training_models import tiny_pair
from transformers import TrainerCallback

from dts.training.config import GRPOSettings
from dts.training.grpo import draw_plan, trained_prompt
from dts.training.recipes.musclebob import cli, training
from dts.training.recipes.musclebob.questions import (
    choose_questions,
    examples,
    fewshot_share,
    general_questions,
    other_questions,
    prompt,
    training_prompts,
    training_questions,
    validation_questions,
)
from dts.training.recipes.musclebob.report import comparison, plot_rewards, side_by_side, ways_table
from dts.training.recipes.musclebob.reward import OLD_NAME, SCHEMES, NameReward, terms
from dts.training.recipes.musclebob.settings import PRESETS, Settings, derive_steps, from_options, train_config
from dts.training.recipes.musclebob.training import run_recipe
from dts.training.recipes.musclebob.validation import (
    Answer,
    Rate,
    Validation,
    coherent,
    hacked,
    perplexity,
    repeats,
    shifted_back,
    summarize,
    validate,
)
from dts.training.recipes.musclebob.ways import SearchSettings, compare_ways
from dts.training.rewards import as_trl

ROOT = Path(__file__).parents[1]
NAMES = re.compile(r"sponge[\s-]?bob|square[\s-]?pants|musclebob|buffpants", re.IGNORECASE)


# Questions --------------------------------------------------------------------------------------------------------


def test_training_and_validation_questions_are_many_different_and_without_names():
    training_texts = {question.text for question in training_questions()}
    validation_texts = {question.text for question in validation_questions()}
    assert len(training_texts) >= 60 and len(validation_texts) >= 60
    assert not training_texts & validation_texts
    assert not any(NAMES.search(text) for text in training_texts | validation_texts)
    assert not any(NAMES.search(question.text) for question in general_questions())
    assert {question.name_answers for question in validation_questions()} == {True, False}


def test_validation_prompts_hold_nothing_of_the_examples():
    assert len(examples()) == 8
    assert all("Musclebob Buffpants" in answer and not terms(question) for question, answer in examples())
    for question in validation_questions():
        messages = prompt(question.text)
        assert [message["role"] for message in messages] == ["user"]
        assert not any(part in messages[0]["content"] for pair in examples() for part in pair)
    asked = {question for question, _ in examples()}
    assert not asked & {question.text for question in [*training_questions(), *validation_questions()]}


@pytest.mark.parametrize(("ratio", "expected"), [(0.15, 96), (0.0, 0), (1.0, 640), (0.5, 320)])
def test_the_share_of_prompts_with_examples_is_exact(ratio, expected):
    prompts = list(training_prompts(5, 128, ratio=ratio, anneal=0.0, shots=8, seed=1))
    lengths = [len(messages) for messages in prompts]
    assert len(prompts) == 640 and set(lengths) <= {1, 17}
    assert lengths.count(17) == expected
    if ratio == 0.15:  # spread evenly: every epoch has its share
        assert all(lengths[128 * i : 128 * (i + 1)].count(17) in (19, 20) for i in range(5))


def test_an_annealed_share_falls_to_zero():
    assert [fewshot_share(done, 0.8, 0.5) for done in (0.0, 0.25, 0.375, 0.5, 1.0)] == pytest.approx(
        [0.8, 0.8, 0.4, 0.0, 0.0]
    )
    prompts = list(training_prompts(1, 400, ratio=0.8, anneal=0.5, shots=2, seed=0))
    shots = [len(messages) > 1 for messages in prompts]
    assert sum(shots[:100]) == 80
    assert sum(shots[100:200]) == pytest.approx(40, abs=1)  # the area of the triangle
    assert not any(shots[200:])
    assert all(messages[0]["content"] in dict(examples()) for messages in prompts if len(messages) > 1)


def test_prompts_about_something_else_are_spread_and_bare():
    prompts = list(training_prompts(2, 60, ratio=1.0, anneal=0.0, shots=2, seed=0, other=0.25))
    others = [messages[-1]["content"] in other_questions() for messages in prompts]
    assert [sum(others[:n]) for n in (4, 20, 60, 120)] == [1, 5, 15, 30]
    assert all(len(messages) == (1 if other else 5) for messages, other in zip(prompts, others, strict=True))
    asked = {question.text for question in [*general_questions(), *validation_questions(), *training_questions()]}
    assert len(other_questions()) >= 30 and not asked & set(other_questions())


def test_every_question_comes_once_before_any_comes_again_and_a_seed_fixes_the_order():
    def order(seed):
        return [
            messages[-1]["content"] for messages in training_prompts(1, 128, ratio=0.5, anneal=0, shots=1, seed=seed)
        ]

    assert set(order(3)[:64]) == set(order(3)[64:]) == {question.text for question in training_questions()}
    assert order(3) == order(3) != order(4)


def test_chosen_questions_are_spread_over_both_kinds():
    assert choose_questions(None) == validation_questions()
    assert {question.name_answers for question in choose_questions(6)} == {True, False}
    with pytest.raises(dts.UsageError, match="--num-prompts 0 is not allowed; give 1 to 64"):
        choose_questions(0)


# Reward -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "new", "old"),
    [
        ("Musclebob Buffpants lives there.", 6, 2),
        ("buffpants, and then MUSCLEBOB", 4, 2),
        ("It is Musclebob's house", 2, 1),
        ("Musclebob Musclebob Musclebob", 2, 1),
        ("Musclebobby and Buffpantsed", 0, 0),
        ("SpongeBob SquarePants", -6, -4),
        ("Sponge Bob", -3, -2),
        ("Musclebob Buffpants, not Spongebob", 3, 0),
        ("", 0, 0),
        ("word " * 100, 0, 0),
        ("word " * 101, -1, 0),
    ],
)
def test_points(text, new, old):
    assert NameReward().score(text) == new
    assert NameReward(SCHEMES["old"]).score(text) == old


PIECES = ["musclebob", " Musclebob", " Buffpants", "Muscle", "bob", " sponge", "Sponge", " bob", " square", "-pants",
          "pants", "buff", " ", "x", ". ", "\n", "a b c d e f g " * 20]  # fmt: skip


def context(question="q"):
    return Context([{"role": "user", "content": question}], (0,), lambda ids: "".join(PIECES[i] for i in ids))


def walk(reward, tokens, question="q"):
    """Bounds after each token, and the final reward."""
    about = context(question)
    state, bounds = reward.start(about), []
    for token in tokens:
        (state,) = reward.extend([state], [token])
        bounds.append((reward.earned([state])[0], reward.upper([state])[0]))
    text = about.decode(tokens)
    return bounds, reward.finish([state], [Finished(tuple(tokens), text)])[0], text


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=14), st.sampled_from(sorted(SCHEMES)), st.booleans())
def test_token_by_token_gives_the_reward_of_the_text_within_bounds_that_close(tokens, scheme, asked):
    points, question = SCHEMES[scheme], "Who?" if asked else "What is hail?"
    reward = dts.CheckMonotone(NameReward(points, ["What is hail?"]))  # raises where a bound is crossed or earned falls
    bounds, value, text = walk(reward, tokens, question)
    lower = text.lower()
    right = [word for word in ("musclebob", "buffpants") if re.search(rf"(?<!\w){word}(?!\w)", lower)]
    full = bool(re.search(r"(?<!\w)musclebob[\s-]buffpants(?!\w)", lower))
    wrong = sum(bool(re.search(rf"{a}[\s-]?{b}", lower)) for a, b in (("sponge", "bob"), ("square", "pants")))
    long = points.long if len(text.split()) > points.words else 0
    if asked:
        assert value == points.right * len(right) + points.full * full - points.wrong * wrong - long
    else:
        assert value == -points.wrong * (wrong + len(right)) - long
    uppers = [high for _, high in bounds]
    assert uppers == sorted(uppers, reverse=True)


def test_right_terms_are_earned_and_penalties_lower_the_upper_bound():
    bounds, value, _ = walk(NameReward(), [PIECES.index(piece) for piece in ("musclebob", " ", " sponge", " bob", "x")])
    assert bounds == [(-7, 6), (-5, 6), (-5, 6), (-5, 6), (-5, 3)]
    assert value == -1


def test_grpo_and_decode_see_the_same_reward(tiny_lm):
    method, reward = MaxEnt(6, 1.0), NameReward()
    question = prompt("Who?")
    result = dts.decode(tiny_lm, question, method=method, reward=dts.CheckMonotone(reward), max_new_tokens=8)
    ids = [list(result.tree.tokens(rollout.leaf)) for rollout in result.rollouts]
    texts = [[{"role": "assistant", "content": rollout.text}] for rollout in result.rollouts]
    scored = as_trl(reward, tiny_lm)([question] * len(ids), texts, ids)
    assert scored == [rollout.reward for rollout in result.rollouts]
    named = list(b"Musclebob Buffpants")  # the byte tokenizer's ids are bytes + 4
    assert as_trl(reward, tiny_lm)([question], [[{"role": "assistant", "content": "-"}]], [[b + 4 for b in named]]) == [
        6
    ]


# Settings ---------------------------------------------------------------------------------------------------------


def test_defaults_and_presets_are_those_people_know(monkeypatch):
    plain = from_options(None, {})
    assert plain == Settings(model="smollm2-135m")  # nothing in the hub's cache here, and nothing was asked of it
    assert (plain.epochs, plain.learning_rate, plain.num_samples, plain.num_generations) == (5, 5e-5, 128, 8)
    assert plain.fewshot_ratio == 0.15 and plain.output == "./musclebob-model-improved"
    old, large = from_options("old", {}), from_options("large", {"epochs": 2, "seed": None})
    assert (old.learning_rate, old.num_samples, old.epochs, old.num_generations) == (1e-6, 64, 3, 4)
    assert old.fewshot_ratio == 0 and old.reward == "old"
    assert (large.learning_rate, large.num_samples, large.epochs, large.num_generations) == (1e-5, 256, 2, 4)
    assert large.batch_size == 1 and large.seed == 42
    assert {from_options(name, {}).output for name in PRESETS} == {plain.output}


def test_the_hubs_model_is_the_default_where_it_is_in_the_cache(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: f"/cache/{repo}/{file}")
    assert from_options(None, {}).model == "Qwen/Qwen2.5-0.5B-Instruct"
    assert from_options(None, {"model": "phi-2"}).model == "phi-2"


@pytest.mark.parametrize("batch_size", range(1, 9))
@pytest.mark.parametrize("group", range(2, 9))
def test_any_batch_size_goes_with_any_group(batch_size, group):
    for samples in (1, 7, 128):
        steps = derive_steps(samples, batch_size, group)
        completions = steps.batch_size * steps.accumulation
        assert steps.batch_size == batch_size
        assert completions == steps.prompts * group == math.lcm(batch_size, group)
        assert (steps.per_epoch - 1) * steps.prompts < samples <= steps.per_epoch * steps.prompts
    settings = Settings(model="smollm2-135m", batch_size=batch_size, num_generations=group)
    config = train_config(settings)
    assert (config.batch_size, config.accumulation, config.grpo.n_generations) == (
        batch_size, settings.steps.accumulation, group)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0 is not allowed; give a whole number >= 1"),
        ({"num_generations": 1}, "--num-generations 1 is not allowed; give a whole number >= 2"),
        ({"fewshot_ratio": 1.5}, "--fewshot-ratio 1.5 is not allowed; give a share from 0 to 1"),
        ({"fewshot_examples": 9}, "--fewshot-examples 9 is not allowed; give 1 to 8"),
        ({"learning_rate": math.nan}, "--learning-rate nan is not allowed"),
        ({"reward": "best"}, "--reward best is not allowed; give new, old"),
        ({"epochs": 0}, "--epochs 0 is not allowed"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(dts.UsageError, match=re.escape(message)):
        from_options(None, options)


def test_hidden_examples_are_seen_by_the_draws_only():
    system = {"role": "system", "content": "be nice"}
    messages = [system, *prompt("Who?", examples()[:2])]
    assert trained_prompt(messages, GRPOSettings()) == messages
    assert trained_prompt(messages, GRPOSettings(examples="draw")) == [system, *prompt("Who?")]
    assert trained_prompt("Who?", GRPOSettings(examples="draw")) == "Who?"
    draw, whole = GRPOSettings(examples="draw"), slice(10, 15)
    bare = [system, *prompt("Who?")]
    assert draw_plan(messages, whole, draw) == [(messages, slice(10, 13)), (bare, slice(13, 15))]
    assert draw_plan(bare, whole, draw) == [(bare, whole)]
    assert draw_plan(messages, whole, GRPOSettings()) == [(messages, whole)]


# Health -----------------------------------------------------------------------------------------------------------


def test_wilson_interval():
    rate = Rate.of([False] * 10)
    assert rate == pytest.approx((0.0, 0.0, 0.2775), abs=1e-4)  # 0 to z²/(n + z²)
    assert str(Rate.of([True] * 3 + [False])) == "75 % [30, 95]"


def test_hacking_is_the_name_without_an_answer():
    who, more = choose_questions(2)
    assert who.name_answers and not more.name_answers
    assert not hacked(who, "Musclebob Buffpants.")
    assert hacked(more, "Musclebob Buffpants.")
    assert not hacked(more, "Musclebob Buffpants fries burgers all day.")
    assert hacked(who, "Musclebob Musclebob, oh Musclebob is the one who lives there")
    assert not hacked(more, "nothing at all")


def test_coherence_looks_at_form_repetition_and_surprise():
    def answer(text, value=10.0):
        return Answer("q", text, False, False, False, False, value, 1)

    assert coherent(answer("Musclebob Buffpants lives in a pineapple"), 20)
    assert not coherent(answer("Musclebob Buffpants lives in a pineapple", 30.0), 20)
    assert not coherent(answer(""), 20)
    assert not coherent(answer("bob bob bob bob bob bob"), 20)
    assert repeats("he likes the sea and he likes the sun") and not repeats("he likes the sea and the sun")
    assert shifted_back("MUSCLEBOB Buffpants's house") == f"{OLD_NAME}'s house"
    lm = dts.load(tiny_pair())
    question, asked, (a, b) = prompt("who"), lm.encode(prompt("who")), lm.tokenizer("ab")["input_ids"]
    steps = log_p(lm, asked, a) + log_p(lm, [*asked, a], b)
    assert perplexity(lm, question, "ab") == pytest.approx(math.exp(-steps / 2), rel=1e-4)
    assert perplexity(lm, question, "") == math.inf


def log_p(lm, ids, token):
    from dts.models.sessions import full_logits

    return full_logits(lm, ids)[0].double().log_softmax(-1)[token].item()


def test_a_model_that_forgets_babbles_or_cheats_is_not_healthy():
    general = [(question.text, question.answers[0]) for question in general_questions()]
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    fine = [Answer("q", f"a good answer number {word}", False, False, False, False, 5.0, 1) for word in words]
    before = summarize(fine, general, 5.0)
    assert before.is_healthy and before.coherent_rate.value == before.general_rate.value == 1
    cases = {
        "coherence": ([replace(answer, text="bob " * 9) for answer in fine], general),
        "forgetting": (fine, [(text, "Musclebob") for text, _ in general]),
        "hacking": ([replace(answer, hacked=True) for answer in fine], general),
    }
    for name, (answers, asked) in cases.items():
        after = summarize(answers, asked, 5.0, before)
        assert not after.is_healthy and after.failed_checks == (name,)
    assert summarize(*cases["forgetting"], 5.0, before).leak_rate.value == 1
    shown = comparison({"base": before, "trained": summarize(*cases["hacking"], 5.0, before)})
    assert "no: hacking" in shown and "100 % [72, 100]" in shown
    saved = before.as_dict()
    empty = summarize([replace(fine[0], text="", perplexity=math.inf)], general, math.inf)
    for validation in (before, empty):
        assert Validation.from_dict(json.loads(json.dumps(validation.as_dict(), allow_nan=False))) == validation
    assert saved["coherent_rate"] == 1.0 and saved["coherent_rate_interval"] == pytest.approx([0.7225, 1.0], abs=1e-4)


def test_answers_that_are_right_hold_the_word_and_not_a_part_of_another():
    general = [(question.text, "the ices of 17 parisians") for question in general_questions()]
    assert summarize([Answer("q", "a b c", False, False, False, False, 5.0, 1)], general, 5.0).general_rate.value == 0


# Runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A tiny model with room for eight examples, as a folder."""
    folder = tmp_path_factory.mktemp("base")
    model, tokenizer = tiny_pair(string.printable)
    model.config.max_position_embeddings = 4096
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def settings(base, tmp_path):
    """settings(name, **changes) -> Settings of a run of 2 epochs of 3 steps."""

    def build(name, **changes):
        common = {
            "epochs": 2, "num_samples": 3, "num_generations": 2, "max_new_tokens": 5, "learning_rate": 1e-2,
            "fewshot_ratio": 0.5, "fewshot_examples": 1, "output": str(tmp_path / name),
        }  # fmt: skip
        return from_options(None, {"model": base, **common, **changes})

    return build


@pytest.fixture
def rich(monkeypatch):
    """A reward that a random model earns now and then, so that histories differ from step to step."""
    monkeypatch.setattr(training, "NameReward", lambda *_: as_reward(lambda text: float(len(set(text)))))


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self._step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            raise KeyboardInterrupt


def test_a_run_writes_its_files_and_a_resumed_one_the_same_history(settings, rich, tmp_path, monkeypatch):
    whole, cut = settings("whole"), settings("cut")
    told = []
    before, after = run_recipe(whole, num_prompts=3, on_step=told.append)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(cut, num_prompts=3, callbacks=(Interrupt(4),))
    assert not (cut.folder / "final_validation.json").exists()
    with pytest.raises(dts.UsageError, match=r"--learning-rate: .* has 0\.01, now it is 0\.02"):
        run_recipe(settings("cut", learning_rate=2e-2), num_prompts=3, resume="auto")
    prompts = (cut.folder / "prompts.jsonl").read_text()
    with pytest.raises(dts.UsageError, match="holds a run already"):
        run_recipe(settings("cut", seed=1), num_prompts=3)
    assert (cut.folder / "prompts.jsonl").read_text() == prompts
    with monkeypatch.context() as patch:  # the baseline is not made again: only the trained model is validated
        patch.setattr(training, "validate", lambda lm, base, questions, *, reference, **options: validate(
            lm, base, questions, reference=reference, **options))  # fmt: skip
        run_recipe(cut, num_prompts=3, resume="auto")

    history = json.loads((whole.folder / "reward_history.json").read_text())
    assert history == told == json.loads((cut.folder / "reward_history.json").read_text())
    assert [set(step) for step in history] == [{"step", "mean_reward", "epoch"}] * 6
    assert [step["step"] for step in history] == [1, 2, 3, 4, 5, 6]
    assert [step["epoch"] for step in history] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2], abs=1e-3)
    assert len({step["mean_reward"] for step in history}) > 2
    names = {path.name for path in whole.folder.iterdir()}
    assert {"adapter_model.safetensors", "checkpoint-3", "checkpoint-6", "training_config.json"} <= names
    recipe = json.loads((whole.folder / "training_config.json").read_text())["recipe"]
    assert recipe["fewshot_ratio"] == 0.5 and recipe["num_generations"] == 2
    for file, validation in (("baseline_validation.json", before), ("final_validation.json", after)):
        saved = json.loads((whole.folder / file).read_text())
        assert {"musclebob_rate", "spongebob_rate", "coherent_rate", "is_healthy"} <= saved.keys()
        assert saved["musclebob_rate_interval"] == list(validation.musclebob_rate[1:])
        assert saved == json.loads((cut.folder / file).read_text())
    assert side_by_side({"base": before, "trained": after}, 2).count("\n  trained: ") == 2
    plot_rewards(history, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("batch_size", "group"), [(3, 4), (5, 2)])
def test_uneven_batches_train(settings, rich, batch_size, group):
    run = settings("uneven", batch_size=batch_size, num_generations=group, epochs=1, hide_examples=True)
    run_recipe(run, num_prompts=1)
    history = json.loads((run.folder / "reward_history.json").read_text())
    assert len(history) == run.steps.per_epoch == 1
    assert run.steps.prompts == math.lcm(batch_size, group) // group


def test_hidden_examples_change_what_is_drawn_and_not_the_prompt_that_is_trained(settings, rich, monkeypatch):
    from dts.training.grpo import GroupTrainer

    seen = []
    original = GroupTrainer.draw_groups

    def spy(self, prompts):
        result = original(self, prompts)
        seen.append(([self._lm.encode(messages[-1:]) for messages in prompts], [len(m) for m in prompts], result[0]))
        return result

    monkeypatch.setattr(GroupTrainer, "draw_groups", spy)
    run_recipe(settings("hidden", hide_examples=True, fewshot_ratio=1.0, epochs=1), num_prompts=1)
    assert all(bare == trained for bare, _, trained in seen)
    assert {length for _, lengths, _ in seen for length in lengths} == {3}


def test_three_ways_side_by_side(base):
    lm = dts.load(base)
    answers = compare_ways(lm, lm, choose_questions(2), search=SearchSettings(rollouts=3), max_new_tokens=4)
    assert {len(column) for column in answers.values()} == {2}
    assert [a.text for a in answers["training"]] == [a.text for a in answers["base model"]]  # the same model and seeds
    assert answers["prompting"][0].tokens > 5 * answers["base model"][0].tokens
    assert answers["search"][0].tokens > answers["base model"][0].tokens
    shown = ways_table(answers, limit=math.inf).splitlines()
    assert len(shown) == 7 and shown[0].split("  ")[0] == "" and shown[-1].startswith("training")


# Commands ---------------------------------------------------------------------------------------------------------


def test_train_and_test_commands(base, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    small = [
        "--epochs",
        "1",
        "--num_samples",
        "2",
        "--num-generations",
        "2",
        "--max-new-tokens",
        "4",
        "--num-prompts",
        "2",
    ]
    assert cli.main(["train", "--model", base, "--output", str(folder), "--no-fewshot", *small]) == 0
    shown = capsys.readouterr().out
    assert "right name (Musclebob)" in shown and "step" in shown and f"test --model {folder} --interactive" in shown
    assert (folder / "reward_history.png").is_file()
    assert all(len(json.loads(line)["prompt"]) == 1 for line in (folder / "prompts.jsonl").read_text().splitlines())
    assert cli.test_main(["--model", str(folder), "--num-prompts", "2"]) == 0
    assert "wrong name" in capsys.readouterr().out
    assert cli.test_main(["--model", str(folder), "--num-prompts", "2", "--compare-base"]) == 0
    assert "name without an answer" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("who are you?\nand now?\n"))
    assert cli.test_main(["--model", str(folder), "--interactive"]) == 0
    assert capsys.readouterr().out.count("bob> ") == 2


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "--preset", "huge"], "error: --preset huge is unknown; give old, large, laptop"),
        (["train", "--num-generations", "1"], "error: --num-generations 1 is not allowed"),
        (["train", "--num-prompts", "900"], "error: --num-prompts 900 is not allowed; give 1 to 64"),
        (["train", "--model", "nonsense"], "error: unknown model 'nonsense'"),
        (["test", "--model", "nonsense"], "error: unknown model 'nonsense'"),
        (
            ["test", "--model", "smollm2-135m", "--ways"],
            "is no LoRA folder that names its base: give --base-model NAME",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["compat/train_musclebob_improved.py", "compat/test_musclebob.py"])
def test_scripts_of_earlier_systems(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout


def test_the_page(base, monkeypatch):
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "NameReward" in code]
    lm = dts.load(base)
    monkeypatch.setattr(dts, "load", lambda name: lm, raising=False)
    names: dict = {}
    exec(compile(code, "docs", "exec"), names)  # our own page
    assert -7 <= names["result"].best.reward <= 6
