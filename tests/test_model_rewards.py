"""Models as rewards: what plain transformers gives, each token sent once, whatever is scored together."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import transformers
from families import FAMILIES, GATHERED, SLOW_FAMILIES, VOCAB, ByteTokenizer, PairTokenizer, random_model, randomize
from test_core_edges import saved_tokenizer
from transformers import AutoModelForSequenceClassification

import dts
from dts.errors import RewardError, UnavailableError, UsageError
from dts.models.chains import chains_of
from dts.models.huggingface import HFModel
from dts.models.readings import Steps
from dts.models.scoring import Scorer, TokenTree
from dts.rewards import Context, Finished
from dts.search import BestOfN, MaxEnt

TEXTS = ["a cat", "a cat sat", "the dog barks at night", "a dog", "x", "the dog barks", "a cat sat down", "th"]
PROMPT = "It is "


def headed(family: str = "llama", labels: int = 1, **changes) -> transformers.PreTrainedModel:
    """A random model with a score head, without a token for padding."""
    name, arguments = {**FAMILIES, **SLOW_FAMILIES}[family]
    config = getattr(transformers, name)(**{**arguments, "num_labels": labels, "pad_token_id": None, **changes})
    torch.manual_seed(1)
    return randomize(AutoModelForSequenceClassification.from_config(config))


def plain(model, ids) -> torch.Tensor:
    """What transformers gives for one text, [labels]."""
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0]


def asked(reward, texts, prompt=PROMPT, decode=lambda ids: "", prompt_ids=()) -> list[float]:
    """Scores of texts that come from a model with another tokenizer."""
    state = reward.start(Context(prompt, tuple(prompt_ids), decode))
    return reward.finish([state] * len(texts), [Finished((), text) for text in texts])


def beginnings(rows) -> int:
    """Different beginnings of these sequences: the tokens of a tree that holds them."""
    return len({tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)})


class Watched(dts.ModelReward):
    """Remembers which sequences were scored."""

    def finish(self, states, finished):
        self.seen = [*getattr(self, "seen", []), *(done.token_ids for done in finished)]
        return super().finish(states, finished)


# The tree -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma2", "qwen2", "opt"])
def test_a_search_gets_the_plain_scores_and_sends_each_token_once(family, tiny_lm):
    model = headed(family)
    reward = Watched(model, tiny_lm.tokenizer, batch_size=4)
    result = dts.decode(tiny_lm, PROMPT, reward=reward, method=MaxEnt(12, reward_scale=4.0), max_new_tokens=10, seed=3)
    prompt, eos = tiny_lm.encode(PROMPT), tiny_lm.tokenizer.eos_token_id
    rows = [[token for token in done if token != eos] for done in reward.seen]
    assert len(rows) == len(result.completions) > 4
    for one in result.completions:
        ids = [*prompt, *(token for token in one.token_ids if token != eos)]
        assert one.reward == pytest.approx(float(plain(model, ids)[0]), abs=1e-4)
    assert reward.tokens == len(prompt) + beginnings(rows) < sum(len(prompt) + len(row) for row in rows)


def test_tokens_that_were_sent_before_an_error_are_counted(tiny_lm, monkeypatch):
    reward, other = (dts.ModelReward(headed(), tiny_lm.tokenizer) for _ in range(2))
    texts = [Finished((), "a dog"), Finished((), "the dog barks")]
    state = reward.start(Context(PROMPT, (), lambda ids: ""))

    def fails(self, slots):
        raise RuntimeError("no")

    with monkeypatch.context() as patched:
        patched.setattr(TokenTree, "outputs", fails)
        with pytest.raises(RuntimeError, match="no"):
            reward.finish([state] * 2, texts)
    asked(other, [text.text for text in texts])
    assert reward.tokens == other.tokens > 0
    reward.finish([state] * 2, texts)
    assert reward.tokens == other.tokens  # nothing is sent again


def test_unfinished_texts_are_scored_at_the_cost_of_their_new_tokens(tiny_lm):
    reward = Watched(headed(), tiny_lm.tokenizer)
    method = MaxEnt(8, search="best", values="online", lookahead=4)
    dts.decode(tiny_lm, PROMPT, reward=reward, method=method, max_new_tokens=8, seed=1)
    eos = tiny_lm.tokenizer.eos_token_id
    rows = [[token for token in done if token != eos] for done in reward.seen]
    assert len(rows) > 100 and {len(row) for row in rows} >= set(range(1, 9))
    assert reward.tokens == len(tiny_lm.encode(PROMPT)) + beginnings(rows)


@pytest.mark.parametrize("template", ["{prompt}{completion}", "{completion}", "Reply: {completion}. To: {prompt}?"])
def test_another_tokenizer_is_given_the_text_and_reuses_its_beginnings(template):
    tokenizer = PairTokenizer()
    model = headed(vocab_size=tokenizer.vocab_size)
    reward = dts.ModelReward(model, tokenizer, template=template)
    rows = [tokenizer(template.format(prompt=PROMPT, completion=text))["input_ids"] for text in TEXTS]
    assert asked(reward, TEXTS) == pytest.approx([float(plain(model, row)[0]) for row in rows], abs=1e-4)
    assert reward.tokens == beginnings(rows)


def test_texts_that_share_no_first_token_share_a_tree():
    model, tokenizer = headed(), ByteTokenizer()
    reward = dts.ModelReward(model, tokenizer, template="{completion}", max_kv_bytes=10**7, max_tokens=64)
    expected = [float(plain(model, tokenizer(text)["input_ids"])[0]) for text in TEXTS]
    assert asked(reward, TEXTS) == pytest.approx(expected, abs=1e-4)
    assert reward.tokens == beginnings([text.encode() for text in TEXTS])


def test_a_text_without_tokens_has_a_score():
    model = headed()
    reward = dts.ModelReward(model, ByteTokenizer(), template="{completion}")
    assert asked(reward, [""]) == pytest.approx([float(plain(model, [0])[0])], abs=1e-4)


def test_a_stop_string_is_not_part_of_what_is_scored(tiny_lm):
    model = headed()
    reward = dts.ModelReward(model, tiny_lm.tokenizer)
    stops = [chr(letter) for letter in range(97, 115)]
    result = dts.decode(tiny_lm, PROMPT, reward=reward, method=BestOfN(12), stop=stops, max_new_tokens=12)
    assert "stop" in {one.finished_by for one in result.completions}
    for one in result.completions:
        ids = tiny_lm.encode(PROMPT + one.text)
        if one.finished_by == "stop" and one.text.isascii():
            assert one.reward == pytest.approx(float(plain(model, ids)[0]), abs=1e-4)


def test_one_reward_serves_many_prompts_and_frees_each_search(tiny_lm):
    prompts = [PROMPT, "What a ", "On Mon", "The "]
    model = headed()
    alone = [
        dts.decode(tiny_lm, prompt, reward=dts.ModelReward(model, tiny_lm.tokenizer), method=MaxEnt(4),
                   max_new_tokens=6, seed=index)
        for index, prompt in enumerate(prompts)
    ]  # fmt: skip
    reward = dts.ModelReward(model, tiny_lm.tokenizer)
    many = list(dts.decode_many(tiny_lm, prompts, reward=reward, method=MaxEnt(4), max_new_tokens=6))
    for one, other in zip(alone, many, strict=True):
        assert {c.token_ids: c.reward for c in other.completions} == pytest.approx(
            {c.token_ids: c.reward for c in one.completions}, abs=1e-4
        )
    assert len(reward._used) == 4
    del many, one, other
    gc.collect()
    assert len(reward._used) == 0


def test_searches_beyond_the_memory_bound_give_up_what_they_hold():
    model, tokenizer = headed(), ByteTokenizer()
    options = {"max_tokens": 32, "batch_size": 2}
    free, bounded = (dts.ModelReward(model, tokenizer, **options, max_kv_bytes=bound) for bound in (None, 100_000))
    held, scores = [], []
    for reward in (free, bounded):
        states = [reward.start(Context(prompt, (), lambda ids: "")) for prompt in ("a " * 20, "b " * 20, "c " * 20)]
        scores.append([reward.finish([state], [Finished((), text)]) for text in TEXTS[:3] for state in states])
        held.append(sum(tree.nbytes() for tree in reward._used))
    assert scores[1] == [pytest.approx(score, abs=1e-4) for score in scores[0]]
    assert held[1] <= 100_000 < held[0] and bounded.tokens > free.tokens


def test_a_tree_lives_as_long_as_its_search():
    reward = dts.ModelReward(headed(), ByteTokenizer())
    state = reward.start(Context(PROMPT, (), lambda ids: ""))
    reward.finish([state], [Finished((), "a cat")])
    (tree,) = map(weakref.ref, state.trees.values())
    assert tree() is not None
    del state
    assert tree() is None


# Several tokens in one call -----------------------------------------------------------------------------------------


def test_chains_end_where_texts_part():
    assert chains_of([0, 0, 0, 0, 7, 3], ["abcd", "abx", "abcz", "q", "ab", ""]) == [(0, "ab"), (0, "q"), (7, "ab")]
    assert chains_of([0, 0, 0, 0], ["a", "abcd", "abc", "abx"]) == [(0, "ab")]
    assert chains_of([0, 0, 0], ["a", "abcd", "abc"]) == [(0, "abcd")]  # a beginning of another parts from nothing


@pytest.mark.parametrize(
    ("family", "spare"),
    [
        *((family, None) for family in FAMILIES if family not in GATHERED),
        *((f, 4) for f in ("llama", "gpt2", "gemma3")),
    ],
)
def test_ends_of_several_tokens_are_those_of_plain_calls(family, spare):
    """Every family that takes views of keys, beyond its window of attention: whole ends, then single tokens after them,
    then ends again; also where a memory bound leaves room for `spare` tokens of idle branches, and others are given up
    and sent again."""
    scorer = Scorer(random_model(family))
    assert scorer.shares_prefixes(60) and scorer.sends_chains
    rows = [[*range(10, 22)], [*range(10, 15), *range(40, 49)], [*range(70, 78)], [*range(10, 22), 5], [70, 71, 6],
            [*range(10, 22), 5, *range(90, 100)], [*range(70, 78), *range(20, 30)], [*range(101, 113)]]  # fmt: skip
    for root in ((), (3, 4)):
        bound = None if spare is None else scorer._nothing.token_bytes * (2 * 30 + len(root) + spare)
        expected = torch.stack([plain(scorer.model, [*root, *row])[-1] for row in rows])
        usages = []
        for long_chains in (True, False):
            tree = TokenTree(scorer, root, lanes=2, room=30, max_kv_bytes=bound, long_chains=long_chains)
            ends = [tree.slots([row])[0][-1] for row in rows[:3]]
            ends += [path[-1] for path in tree.slots(rows[3:])]
            outputs = torch.cat(list(tree.outputs(ends)))
            assert (outputs - expected).abs().max() < 1e-4 * max(1.0, expected.abs().max())
            usages.append(tree._session.usage)
            assert usages[-1].forwarded_tokens - usages[-1].recomputed_tokens == len(root) + beginnings(rows)
        assert usages[0].recomputed_tokens if spare else usages[0].model_calls < usages[1].model_calls / 4


def test_memory_that_runs_out_for_whole_ends_still_serves_single_tokens(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    scorer = Scorer(headed())
    assert scorer.sends_chains
    monkeypatch.setattr("dts.models.scoring.send", fail)
    tree = TokenTree(scorer, (3,), lanes=2, room=30, max_kv_bytes=None, long_chains=True)
    rows = [[5, 6, 7, 8, 9, 9], [6, 6, 9, 9, 9, 9]]
    ends = [path[-1] for path in tree.slots(rows)]
    expected = torch.stack([plain(scorer.model, [3, *row]) for row in rows])
    assert torch.cat(list(tree.outputs(ends))) == pytest.approx(expected, abs=1e-4)
    assert tree.tokens == 13 and not tree.long_chains


# Whole texts --------------------------------------------------------------------------------------------------------


def bert(labels: int = 3):
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, num_labels=labels, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


@pytest.mark.parametrize(
    "make", [bert, lambda: headed("falcon", 3), lambda: headed("llama", 3)], ids=["bert", "falcon", "llama"]
)
def test_scores_do_not_depend_on_what_is_scored_beside(make):
    """Without a pad token: of a model that sees later tokens, one that the tree cannot serve, one that it can."""
    model, tokenizer = make(), ByteTokenizer()
    expected = [float(plain(model, tokenizer(text)["input_ids"]).double().softmax(-1)[2]) for text in TEXTS]
    for size in (1, 8):
        reward = dts.ModelReward(model, tokenizer, "classifier", label=2, batch_size=size)
        assert asked(reward, TEXTS) == pytest.approx(expected, abs=1e-6)
    alone = dts.ModelReward(model, tokenizer, "classifier", label="LABEL_2")
    assert [asked(alone, [text])[0] for text in TEXTS] == pytest.approx(expected, abs=1e-6)
    assert alone.earned([None]) == [0.0] and alone.upper([None]) == [1.0] and not alone.monotone


def test_whole_texts_are_counted_without_their_padding():
    reward = dts.ModelReward(bert(), ByteTokenizer(), "classifier", label=0)
    asked(reward, TEXTS)
    assert reward.tokens == sum(map(len, TEXTS))


# Kinds --------------------------------------------------------------------------------------------------------------


def log_p(model, ids, start):
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0, start - 1 : -1].double().log_softmax(-1)
    return rows.gather(1, torch.tensor(ids[start:])[:, None])[:, 0]


def test_a_prompt_that_fills_the_context_of_the_reward_model_leaves_nothing_to_score(tiny_lm):
    small = random_model("gpt2")  # 256 positions
    reward = dts.ModelReward(small, ByteTokenizer(), "likelihood", template="x" * 256 + "{completion}")
    with pytest.raises(RewardError, match="exceeds the reward model's context of 256"):
        dts.decode(tiny_lm, PROMPT, reward=reward, method=MaxEnt(2), max_new_tokens=4)


def test_likelihood_under_another_prompt(tiny_lm):
    other = "A sad tale: "
    for per_token in (True, False):
        reward = dts.ModelReward(tiny_lm.model, tiny_lm.tokenizer, "likelihood", per_token=per_token,
                                 template=other + "{completion}")  # fmt: skip
        result = dts.decode(tiny_lm, PROMPT, reward=reward, method=MaxEnt(8), max_new_tokens=6)
        prefix = tiny_lm.encode(other)
        for one in result.completions:
            values = log_p(tiny_lm.model, [*prefix, *one.token_ids], len(prefix))
            expected = float(values.mean() if per_token else values.sum())
            assert one.reward == pytest.approx(expected, abs=1e-4)
        rows = [one.token_ids[:-1] for one in result.completions]  # nothing is read after the last token
        assert reward.tokens == len(prefix) + beginnings(rows)


def test_likelihood_by_a_model_with_another_tokenizer():
    tokenizer = PairTokenizer()
    lm = HFModel(random_model("llama"), tokenizer)
    lm.model.resize_token_embeddings(tokenizer.vocab_size)
    reward = dts.ModelReward(lm.model, tokenizer, "likelihood")
    before = len(tokenizer(PROMPT)["input_ids"])
    rows = [tokenizer(PROMPT + text)["input_ids"] for text in TEXTS]
    assert asked(reward, TEXTS) == pytest.approx([float(log_p(lm.model, r, before).mean()) for r in rows], abs=1e-4)
    assert asked(reward, [""]) == pytest.approx([float(log_p(lm.model, [*rows[0][:before], 0], before)[0])], abs=1e-4)


def test_a_judge_gives_the_log_odds_of_its_answers(tiny_lm):
    template = "Q: {prompt}\nA: {completion}\nGood? "
    reward = dts.ModelReward(tiny_lm.model, tiny_lm.tokenizer, "judge", yes="y", no="n", template=template)
    logits = [plain(tiny_lm.model, tiny_lm.encode(template.format(prompt=PROMPT, completion=t)))[-1] for t in TEXTS]
    odds = [float(row[ord("y") + 4] - row[ord("n") + 4]) for row in logits]
    assert asked(reward, TEXTS) == pytest.approx(odds, abs=1e-4)


def test_chat_messages_are_rendered_by_the_reward_model_own_template():
    class Chat(ByteTokenizer):
        chat_template = "yes"

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            text = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
            return text + "<assistant>" * add_generation_prompt

    model, tokenizer = headed(), Chat()
    messages = [{"role": "user", "content": "Hi"}]
    reward = dts.ModelReward(model, tokenizer)
    shown = [f"<user>Hi</><assistant>{text}</>" for text in TEXTS]
    expected = [float(plain(model, tokenizer(text)["input_ids"])[0]) for text in shown]
    assert asked(reward, TEXTS, messages) == pytest.approx(expected, abs=1e-4)
    lm = HFModel(random_model("llama"), tokenizer)  # the same ids: the completion's tokens are read as they are
    ids = [tuple(tokenizer(text)["input_ids"]) for text in TEXTS]
    state = reward.start(Context(messages, tuple(tokenizer("<user>Hi</><assistant>")["input_ids"]), lm.decode))
    done = [Finished((*row, 0), text) for row, text in zip(ids, TEXTS, strict=True)]
    assert reward.finish([state] * len(done), done) == pytest.approx(expected, abs=1e-4)
    asking = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "{prompt} | {completion} ok?"}]
    odds = dts.ModelReward(lm.model, tokenizer, "judge", yes="y", no="n", template=asking)
    row = plain(lm.model, lm.encode("<system>Judge.</><user>Hi | a cat ok?</><assistant>"))[-1]
    assert asked(odds, ["a cat"], messages) == pytest.approx([float(row[125] - row[114])], abs=1e-4)


SOLUTION = "First a\n\nThen b\n\n\nLast"


def step_model(labels: int = 2):
    config = transformers.LlamaConfig(**{**FAMILIES["llama"][1], "num_labels": labels})
    torch.manual_seed(1)
    return randomize(transformers.LlamaForTokenClassification(config))


class Marked(ByteTokenizer):
    """Bytes, and the marker of Qwen's process reward models as a token of its own."""

    def __call__(self, text, add_special_tokens=True):
        parts = [super(Marked, self).__call__(part)["input_ids"] for part in text.split("<extra_0>")]
        return {"input_ids": [token for part in parts for token in (*part, 2)][:-1]}


def test_qwen_steps_are_read_at_their_marker():
    model, tokenizer = step_model(), Marked()
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    text = f"system: {system}\nuser: {PROMPT}\nassistant:First a<extra_0>Then b<extra_0>Last<extra_0>"
    ids = tokenizer(text)["input_ids"]
    chances = plain(model, ids).double().softmax(-1)[[i for i, token in enumerate(ids) if token == 2], 1].tolist()
    assert len(chances) == 3 and len(set(chances)) == 3
    wanted = {"min": min(chances), "last": chances[-1], "mean": sum(chances) / 3,
              "product": chances[0] * chances[1] * chances[2]}  # fmt: skip
    for aggregate, expected in wanted.items():
        reward = dts.ModelReward(model, tokenizer, "prm", steps="qwen2.5-math-prm", aggregate=aggregate)
        assert asked(reward, [SOLUTION]) == pytest.approx([expected], abs=1e-4)
    before = reward.tokens
    state = reward.start(Context(PROMPT, (), lambda ids: ""))
    for end in range(1, len(SOLUTION) + 1):
        reward.finish([state], [Finished((), SOLUTION[:end])])
    # Every beginning was asked about. Each costs its own marker, and the text in front of it is sent once.
    marked = {Steps("\n\n", "<extra_0>").mark(SOLUTION[:end]) for end in range(1, len(SOLUTION) + 1)}
    rows = [tokenizer(text.partition("First")[0] + one)["input_ids"] for one in marked]
    assert reward.tokens - before == beginnings(rows)


def test_math_shepherd_steps_are_read_as_plus_against_minus():
    class Tagged(ByteTokenizer):
        """The step tag is one token, which comes from two characters."""

        def __call__(self, text, add_special_tokens=True):
            parts = [super(Tagged, self).__call__(part)["input_ids"] for part in text.split("ки")]
            return {"input_ids": [token for part in parts for token in (*part, 3)][:-1]}

    model, tokenizer = random_model("mistral"), Tagged()
    reward = dts.ModelReward(model, tokenizer, "prm", steps="math-shepherd")
    ids = tokenizer("What? Step 1: a ки\nStep 2: b ки")["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    at = [i for i, token in enumerate(ids) if token == 3]
    chances = logits[at][:, [ord("-") + 4, ord("+") + 4]].softmax(-1)[:, 1]
    assert asked(reward, ["Step 1: a\nStep 2: b"], "What?") == pytest.approx([float(chances.min())], abs=1e-4)


# Loading and bad input ----------------------------------------------------------------------------------------------


def saved(model, folder):
    model.save_pretrained(folder)
    saved_tokenizer(folder)
    return folder


def test_rewards_load_from_folders(tmp_path):
    model = headed()
    reward = dts.load_reward(saved(model, tmp_path / "scalar"), device="cpu", name="quality")
    assert reward.name == "quality"
    ids = saved_tokenizer(tmp_path)(PROMPT + "a cat")["input_ids"]
    assert asked(reward, ["a cat"]) == pytest.approx([float(plain(model, ids)[0])], abs=1e-4)
    lm = saved(random_model("llama"), tmp_path / "lm")
    with pytest.raises(UnavailableError, match=r"lacks 1 weights, the first of them score\.weight"):
        dts.load_reward(lm, device="cpu")
    assert asked(dts.load_reward(lm, "likelihood", device="cpu"), ["a cat"])[0] < 0


def test_an_adapter_brings_its_head(tmp_path):
    peft = pytest.importorskip("peft")
    base = saved(random_model("llama"), tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in filter(lambda one: one.requires_grad, tuned.parameters()):  # the adapter and the head
            parameter.normal_(0, 0.3)
    tuned.eval().save_pretrained(tmp_path / "lora")
    reward = dts.load_reward(tmp_path / "lora", device="cpu")
    ids = saved_tokenizer(tmp_path)(PROMPT + "a cat")["input_ids"]
    with torch.no_grad():
        expected = float(tuned(torch.tensor([ids])).logits[0, 0])
    assert asked(reward, ["a cat"]) == pytest.approx([expected], abs=1e-4)


def test_qwen_process_reward_models_load_with_their_head_of_two_layers(tmp_path, monkeypatch):
    from dts.models.rewards import _qwen_steps

    config = transformers.Qwen2Config(**{**FAMILIES["llama"][1], "num_labels": 2})
    model = randomize(_qwen_steps()(config))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: ByteTokenizer())
    reward = dts.load_reward(tmp_path, "prm", steps=Steps("\n", "#"), device="cpu")
    ids = ByteTokenizer()(PROMPT + "a#")["input_ids"]
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        first, last = model.score[0], model.score[2]
        expected = last(first(hidden).relu()).double().softmax(-1)[1]
    assert asked(reward, ["a"]) == pytest.approx([float(expected)], abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("reward", {}, "kind='reward' is not known"),
        ("scalar", {"label": 1}, "kind='scalar' does not take these options"),
        ("classifier", {"label": "great"}, "label='great' is none of the model's labels LABEL_0"),
        ("classifier", {}, "does not take these options"),
        ("likelihood", {}, "needs a causal language model"),
        ("prm", {"steps": "openai"}, "steps='openai' is not known; give one of qwen2.5-math-prm, math-shepherd"),
        ("prm", {"steps": "qwen2.5-math-prm"}, "needs a head with 2 labels; the model has 1"),
        ("prm", {"steps": "math-shepherd", "aggregate": "max"}, "aggregate='max' is not known"),
        ("scalar", {"template": "{prompt}"}, r"template='\{prompt\}' is not allowed"),
        ("scalar", {"batch_size": 0}, "batch_size=0 is not allowed"),
        ("scalar", {"max_tokens": 0}, "max_tokens=0 is not allowed"),
        ("scalar", {"max_kv_bytes": 0}, "max_kv_bytes=0 is not allowed"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(kind, options, message):
    with pytest.raises(UsageError, match=message):
        dts.ModelReward(headed(), ByteTokenizer(), kind, **options)


def test_more_bad_settings(tiny_lm):
    with pytest.raises(UsageError, match="has 3 labels: give kind='classifier'"):
        dts.ModelReward(headed(labels=3), ByteTokenizer())
    lm = (tiny_lm.model, tiny_lm.tokenizer)
    with pytest.raises(UsageError, match="one token each"):
        dts.ModelReward(*lm, "judge", yes=" Yes")
    with pytest.raises(UsageError, match="has text after"):
        dts.ModelReward(*lm, "likelihood", template="{completion} End.")
    with pytest.raises(UsageError, match="needs a prompt of text or messages"):
        dts.ModelReward(headed(), ByteTokenizer()).start(Context([5, 6], (5, 6), lambda ids: ""))
    with pytest.raises(RewardError, match="raise max_tokens"):
        asked(dts.ModelReward(*lm, "likelihood", max_tokens=4), ["a long text"])


def test_token_ids_as_prompt_need_no_text_where_the_tokenizers_agree(tiny_lm):
    model = headed()
    reward = dts.ModelReward(model, tiny_lm.tokenizer)
    result = dts.decode(tiny_lm, [7, 8, 9], reward=reward, method=BestOfN(3), max_new_tokens=5)
    best = [token for token in result.best.token_ids if token]
    assert result.best.reward == pytest.approx(float(plain(model, [7, 8, 9, *best])[0]), abs=1e-4)


def test_whole_ends_go_through_smollm2_in_one_call(smollm):
    """Rounding differs from plain calls by more than between the two ways of the tree."""
    assert Scorer(smollm.model).sends_chains


def test_all_beginnings_of_a_finished_text_go_through_a_reward_model_in_one_call(tiny_lm):
    """Without a look-ahead nothing needs a score before, and one call for a text is cheaper than one for a token."""
    calls = []

    class Counted(dts.ModelReward):
        def finish(self, states, finished):
            calls.append(len(finished))
            return super().finish(states, finished)

    reward = Counted(headed(), ByteTokenizer())
    method = MaxEnt(6, reward_scale=4.0, search="best")
    result = dts.decode(tiny_lm, PROMPT, reward=reward, method=method, max_new_tokens=12, batch_size=1)
    found = len(result.rollouts)
    assert found == 6 and len(calls) <= 2 * found  # its end, and its beginnings
    assert sum(calls) == result.usage.reward_calls > 3 * found
