"""The comparison of fine-tuned models: judge, tests, questions, verdicts, and one run from models to report."""

from __future__ import annotations

import http.server
import json
import threading
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

import dts
from dts.errors import UsageError
from dts.evaluation.finetuned import compare, replies
from dts.evaluation.finetuned import contrasts as comparison
from dts.evaluation.finetuned.cli import run_script
from dts.evaluation.finetuned.compare import CompareSettings, compare_models, compare_three
from dts.evaluation.finetuned.judge import INSTRUCTION, Judge, parse
from dts.evaluation.finetuned.replies import CODING, Item, Reply, Yardstick, failures, read_items, table
from dts.evaluation.finetuned.report import markdown, section, verdict_table
from dts.search import Sampling
from dts.training.coding import problems
from dts.training.data import Row

KEY = "sk-very-secret"

# Judge ---------------------------------------------------------------------------------------------------------------


class Stub:
    """A judge on this machine. `decide(question) -> answer text`; every request is kept."""

    def __init__(self, decide):
        self.requests: list[dict] = []
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append({"body": body, "headers": dict(self.headers), "path": self.path})
                answer = decide(json.loads(body["messages"][-1]["content"]))
                status = answer if isinstance(answer, int) else 200
                form = ({"content": [{"type": "text", "text": answer}]} if self.path.endswith("/messages")
                        else {"choices": [{"message": {"content": answer}}]})  # fmt: skip
                data = json.dumps(form).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def stub():
    made: list[Stub] = []

    def make(decide):
        made.append(Stub(decide))
        return made[-1]

    yield make
    for one in made:
        one.server.shutdown()
        one.server.server_close()


def prefers_long(question):
    one, two = len(question["reply 1"]), len(question["reply 2"])
    return json.dumps({"winner": "1" if one > two else "2" if two > one else "tie"})


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_judge_asks_in_both_orders_at_temperature_zero_and_caches(stub, tmp_path, path):
    server = stub(prefers_long)
    cache = tmp_path / "cache.jsonl"
    judge = Judge(server.url + path, "stub-1", cache, KEY)
    found = judge.compare("a post", "long reply", "short")
    assert (found.score, found.consistent) == (1.0, True)
    assert judge.compare("a post", "x", "longer").score == 0.0
    orders = [json.loads(r["body"]["messages"][-1]["content"])["reply 1"] for r in server.requests]
    assert orders == ["long reply", "short", "x", "longer"]
    assert all(r["body"]["temperature"] == 0 and r["body"]["model"] == "stub-1" for r in server.requests)
    assert all(INSTRUCTION in json.dumps(r["body"], ensure_ascii=False).replace('\\"', '"') for r in server.requests)
    sent = server.requests[0]["headers"]
    assert (sent.get("X-Api-Key") == KEY) if path.endswith("messages") else (sent["Authorization"] == f"Bearer {KEY}")
    again = Judge(server.url + path, "stub-1", cache)  # no key: everything is known
    assert again.compare("a post", "long reply", "short").score == 1.0
    assert len(server.requests) == 4
    assert (again.tally.asked, again.tally.requests) == (2, 0)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-9])  # the power failed while the last answer was written
    Judge(server.url + path, "stub-1", cache, KEY).compare("a post", "x", "longer")
    assert len(server.requests) == 5 and cache.read_bytes() == whole
    assert KEY not in cache.read_text()
    assert KEY not in repr(judge)


def test_a_judge_that_always_names_the_first_gives_a_tie_and_shows(stub, tmp_path):
    judge = Judge(stub(lambda _: '{"winner": "1"}').url + "/chat", "m", tmp_path / "c")
    found = judge.compare("p", "a", "b")
    assert (found.score, found.consistent) == (0.5, False)
    assert (judge.tally.first_wins, judge.tally.second_wins, judge.tally.inconsistent) == (2, 0, 1)
    assert judge.compare("p", "same", "same").score == 0.5
    assert judge.tally.asked == 2


def test_answers_that_are_not_the_json_asked_for_are_counted_not_repaired(stub, tmp_path):
    half = stub(lambda q: '{"winner": "1"}' if q["reply 1"] == "a" else 'Sure! {"winner": "2"}')
    judge = Judge(half.url + "/chat", "m", tmp_path / "c")
    found = judge.compare("p", "a", "b")
    assert (found.score, found.consistent, judge.tally.parse_failures) == (1.0, None, 1)
    assert judge.compare("p", "x", "y").score is None
    assert judge.tally.parse_failures == 3


@pytest.mark.parametrize("answer", ["", "1", "[]", '{"winner": 1}', '{"winner": ["1"]}', '{"winner": "1", "x": 0}',
                                    '{"winner": "3"}', '```json\n{"winner": "1"}\n```', "null",
                                    '{"winner": "1", "winner": "2"}', "[" * 5000])  # fmt: skip
def test_only_strict_json_is_read(answer):
    with pytest.raises(Exception) as caught:
        parse(answer)
    assert type(caught.value).__name__ == "BadAnswer"
    assert parse(' {"winner": "tie"}\n') == 0.5


@pytest.mark.parametrize("status", [401, 429, 500, 302])
def test_a_failing_judge_is_one_line_without_the_key_and_keeps_its_cache(stub, tmp_path, status):
    answers = iter(['{"winner": "1"}', status])
    judge = Judge(stub(lambda _: next(answers)).url + "/chat", "m", tmp_path / "c", KEY)
    with pytest.raises(dts.UnavailableError, match=f"status {status}") as caught:
        judge.compare("p", "a", "b")
    assert KEY not in str(caught.value)
    assert len((tmp_path / "c").read_text().splitlines()) == 1


def test_bad_judge_addresses_are_refused_and_unreachable_ones_fail_at_once(tmp_path):
    for url in ("ftp://host/x", "host", f"https://user:{KEY}@host/x", f"https://:{KEY}@host/x",
                f"https://host/x?key={KEY}"):  # fmt: skip
        with pytest.raises(dts.UsageError, match="judge-url") as caught:
            Judge(url, "m", tmp_path / "c")
        assert KEY not in str(caught.value)
    with pytest.raises(dts.UnavailableError, match="judge-url"):
        Judge("http://127.0.0.1:1/chat", "m", tmp_path / "c", KEY).compare("p", "a", "b")


# Measures ------------------------------------------------------------------------------------------------------------

POST = "the old bridge over the river is closed for repairs until spring"
ITEM = Item([{"role": "user", "content": POST}], ("a reply", "the bridge will be missed"), "t")


def as_replies(*texts: str) -> list[Reply]:
    return [Reply(text, len(text), False) for text in texts]


def test_measures_of_known_replies():
    found = Yardstick(None, None, 0.0).measure(ITEM, as_replies("a reply", "a reply", "b c d e", ""))
    assert found["diversity"] == pytest.approx(1 - found["self_bleu"] / 100)
    assert found["valid"] == 0.75
    assert found["pass@1"] == pytest.approx(0.75)
    assert found["distinct_1"] == pytest.approx(6 / 8)
    assert found["rouge_l"] == pytest.approx((1 + 1 + 0 + 0) / 4)
    assert found["words"] == 2.0
    assert "engagement" not in found
    assert "pass@5" not in found  # 4 samples are too few


def test_success_asks_for_validity_and_the_human_median():
    yardstick = Yardstick(None, lambda item, texts: [len(text) / 10 for text in texts], 0.5)
    found = yardstick.measure(ITEM, as_replies("good one here", "no", "", POST))
    assert found["pass@1"] == 0.25  # too little engagement, empty, a copy
    assert "held-out scorer" in yardstick.predicate


def test_failure_modes():
    found = failures(ITEM, [*as_replies("", POST, "no", "no", "spam spam spam spam spam", "a fine plain reply"),
                            Reply("it goes on and", 8, True)])  # fmt: skip
    assert found == [["empty"], ["copies the post"], ["very short"], ["very short", "repeats another sample"],
                     ["broken"], [], ["cut off"]]  # fmt: skip


def test_coding_items_are_solved_by_their_tests():
    item = read_items(CODING, 1, 0)[0][0]
    right, wrong = item.problem.solution, f"def {item.problem.signature}:\n    return 5"
    found = Yardstick(None, None, 0.0).measure(item, as_replies(right, wrong, "no code", right))
    assert found["pass@1"] == 0.5
    assert found["valid"] == 0.75
    assert 0.5 <= found["train_reward"] < 1
    assert failures(item, as_replies("no code"))[0] == ["no code"]


def test_the_held_out_scorer_never_scores_a_thread_it_was_fitted_on():
    rng = np.random.default_rng(0)
    rows = [Row([{"role": "user", "content": f"p{g}"}], f"{'bridge' if liked else 'nothing'} words {rng.integers(99)}",
                2.0 * liked, str(g), "x") for g in range(10) for liked in (0, 1) for _ in range(3)]  # fmt: skip
    scorer = replies.CrossFitted(rows, seed=0)
    assert sorted(scorer._fold.values()) == sorted(list(range(5)) * 2)
    assert scorer.validity.value > 0.8  # the word decides, in every thread
    # A thread whose likes contradict all others: its own folds cannot have told the scorer.
    odd = [Row(row.prompt, row.response, 2.0 - row.engagement, row.group, "x") if row.group == "0" else row
           for row in rows]  # fmt: skip
    item = Item(rows[0].prompt, (), "0")
    liked, ignored = replies.CrossFitted(odd, seed=0)(item, ["bridge words 1", "nothing words 1"])
    assert liked > ignored


# Comparison ----------------------------------------------------------------------------------------------------------

CLUSTERS = [f"c{i}" for i in range(30)]


def values(shift: float = 0.0, seeds: int = 3, **more: float) -> dict[str, np.ndarray]:
    """Three seeds and thirty items; `shift` is added to diversity, `more` to other measures."""
    rng = np.random.default_rng(0)
    base = {"diversity": 0.5, "rouge_l": 0.3, "valid": 0.9, "engagement": 0.5, "pass@1": 0.4, "words": 10.0,
            "train_reward": 0.4}  # fmt: skip
    noise = rng.normal(0, 0.01, (30,))
    per_seed = 0.001 * np.arange(seeds)[:, None]
    moved = {"diversity": shift, **{name.replace("pass_", "pass@"): value for name, value in more.items()}}
    jitter = np.random.default_rng(1).normal(0, 0.005, (30,))
    return {name: value + noise + per_seed + (moved.get(name, 0.0) + jitter if moved.get(name) else 0.0)
            for name, value in base.items()}  # fmt: skip


def contrasts(**pairs):
    found = {name.replace("_vs_", " vs "): comparison.contrast(own, values(), CLUSTERS) for name, own in pairs.items()}
    comparison.adjust(found)
    return found


def test_contrast_agrees_with_the_statistics_it_is_made_of():
    from dts.evaluation.measures import statistics

    own, base = values(0.1), values()
    entry = comparison.contrast(own, base, CLUSTERS)["diversity"]
    a, b = own["diversity"].mean(axis=0), base["diversity"].mean(axis=0)
    assert entry["value"] == pytest.approx(np.mean(a - b))
    assert entry["p"] == statistics.sign_flip_test(a, b)
    assert entry["p_wilcoxon"] == statistics.wilcoxon(a, b)
    assert entry["d"] == pytest.approx(statistics.cohens_d(a, b))
    assert entry["d_z"] == pytest.approx(statistics.cohens_dz(a, b))
    assert entry["relative"]["value"] == pytest.approx(a.mean() / b.mean() - 1)
    assert len(entry["by_seed"]) == 3
    assert entry["seed_deviation"] == pytest.approx(0, abs=1e-9)  # every seed shifts alike


def test_holm_covers_the_claims_and_not_the_descriptions():
    found = contrasts(polychromic_vs_baseline=values(0.1))["polychromic vs baseline"]
    assert found["diversity"]["p_holm"] >= found["diversity"]["p"]
    assert "p_holm" not in found["words"]
    assert "p_holm" not in found["train_reward"]


def test_four_questions():
    found = contrasts(polychromic_vs_baseline=values(0.1), grpo_baseline_vs_baseline=values(0, pass_1=-0.1))
    diversity, quality, grpo, warm = (comparison.answer(q, found) for q in comparison.QUESTIONS)
    assert diversity["answer"] == "yes"
    assert quality["answer"] == "yes"
    assert grpo["answer"] == "no: it falls"
    assert warm["answer"] == "not evaluated"
    assert "grpo_baseline, grpo_polychromic" in warm["why"]
    worse = contrasts(polychromic_vs_baseline=values(0.1, rouge_l=-0.1))
    assert comparison.answer(comparison.QUESTIONS[1], worse)["answer"] == "no"
    same = contrasts(polychromic_vs_baseline=values())
    assert comparison.answer(comparison.QUESTIONS[0], same)["answer"] == "not shown"


def test_reward_hacking_is_suspected_where_only_the_training_reward_rises():
    def check(**moved):
        return comparison.hacking(contrasts(grpo_vs_baseline=values(0, **moved))["grpo vs baseline"])

    assert check(train_reward=0.1)["suspected"]
    assert not check(train_reward=0.1, engagement=0.1)["suspected"]
    assert not check()["suspected"]
    assert check(words=5.0)["length_drift"]
    assert not check(words=1.0)["length_drift"]


@pytest.mark.parametrize(("gain", "row"), [(0.3, "> 25 %"), (0.25, "15-25 %"), (0.16, "15-25 %"), (0.15, "8-15 %"),
                                           (0.08, "< 8 %"), (-0.5, "< 8 %"), (float("nan"), "unknown")])  # fmt: skip
def test_bands_of_the_verdict(gain, row):
    assert comparison.band(gain) == row


def test_verdict_carries_its_interval_and_quality():
    found = comparison.verdict(contrasts(moderate_vs_baseline=values(0.1, rouge_l=-0.2))["moderate vs baseline"])
    assert found["band"] == "15-25 %"
    assert found["improvement"]["low"] < 0.2 < found["improvement"]["high"]
    assert found["quality_kept"] == "no"
    assert found["ceiling"] == pytest.approx(1 / values()["diversity"].mean() - 1)


def test_a_judges_preferences_are_tested_against_one_half():
    found = comparison.judged([1.0] * 12 + [None], [str(i) for i in range(13)])
    assert (found["value"], found["pairs"], found["unread"]) == (0.5, 12, 1)
    assert found["p"] == pytest.approx(2 / 2**12)
    assert comparison.judged([None], ["a"]) is None


def test_measures_that_some_item_lacks_are_left_out():
    found = table([[{"a": 1.0, "b": 2.0}, {"a": 3.0}]])
    assert list(found) == ["a"]
    assert found["a"].tolist() == [[1.0, 3.0]]


# From models to report -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def test_data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "test.jsonl"
    lines = [{"prompt": f"post {g}: <b>bold</b>", "response": f"reply number {i} to post {g} indeed", "engagement": i,
              "group": g} for g in range(12) for i in range(5)]  # fmt: skip
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


@pytest.fixture(scope="module")
def models():
    from families import ByteTokenizer, random_model

    from dts.models.huggingface import HFModel

    made = [random_model("llama", seed) for seed in range(3)]
    for model in made:
        model.config.max_position_embeddings = 1024  # coding prompts are long in bytes
    return [HFModel(model, ByteTokenizer(), name=f"tiny-{seed}") for seed, model in enumerate(made)]


QUICK = {"max_examples": 6, "samples": 3, "max_tokens": 8}


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_two_models_from_replies_to_report(models, test_data, tmp_path, stub):
    judge = Judge(stub(prefers_long).url + "/chat", "stub", tmp_path / "judge.jsonl", KEY)
    settings = CompareSettings(test_data=test_data, **QUICK)
    arms = {"baseline": models[:2], "polychromic": models[1:3]}
    summary = compare_models(arms, settings, tmp_path, judge)
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert set(saved["diversity"]) == {"baseline", "polychromic"}
    assert saved["diversity"]["baseline"]["value"] == pytest.approx(summary["diversity"]["baseline"]["value"])
    assert [entry["answer"] for entry in saved["questions"]][2:] == ["not evaluated"] * 2
    found = saved["contrasts"]["polychromic vs baseline"]
    assert len(found["diversity"]["by_seed"]) == 2
    assert found["judge"]["pairs"] == 6
    assert saved["judge"]["requests"] <= 12
    assert saved["scorer"]["rank_correlation_with_engagement"]["value"] is not None
    lines = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * 6
    assert all(len(line["replies"]) == 3 for line in lines)
    for name in ("measures.png", "contrasts.png", "report.md", "section.html"):
        assert (tmp_path / name).stat().st_size > 100
    everything = "".join(f.read_text(errors="replace") for f in tmp_path.iterdir() if f.is_file())
    assert KEY not in everything
    report = markdown(saved)
    assert "Is quality kept?" in report
    assert "Holm" in report
    fragment, tags = section(saved, tmp_path), _Tags()
    tags.feed(fragment)
    assert not tags.open
    assert "b" not in tags.seen  # the post's own tag is text here
    assert fragment.count("data:image/png;base64,") == 2


def test_the_same_model_twice_shows_no_difference(models, test_data, tmp_path):
    arms = {"baseline": models[:1], "polychromic": models[:1]}
    summary = compare_models(arms, CompareSettings(test_data=test_data, **QUICK), tmp_path)
    for entry in summary["contrasts"]["polychromic vs baseline"].values():
        assert entry["value"] == 0.0
        assert entry["p"] == 1.0
    assert summary["questions"][0]["answer"] == "not shown"
    assert summary["judge"] is None


def test_three_models_give_two_verdicts(models, test_data, tmp_path):
    arms = dict(zip(("baseline", "moderate", "aggressive"), ([m] for m in models), strict=True))
    found = compare_three(arms, CompareSettings(test_data=test_data, **QUICK), tmp_path)
    assert set(found) == {"moderate", "aggressive"}
    for name in found:
        saved = json.loads((tmp_path / f"baseline_vs_{name}" / "summary.json").read_text())
        assert set(saved["diversity"]) == {"baseline", name}
        row = verdict_table(saved)[1]
        assert row[0] == f"{name} vs baseline"
        assert row[2] in [text for _, text in comparison.BANDS]
        assert "[" in row[1]


def test_coding_comparison(models, tmp_path):
    arms = {"baseline": models[:1], "polychromic": models[1:2]}
    settings = CompareSettings(test_data=CODING, max_examples=3, samples=2, max_tokens=4)
    summary = compare_models(arms, settings, tmp_path)
    assert summary["items"] == 3
    assert "every test" in summary["success"]
    assert summary["models"]["baseline"]["measures"]["pass@1"]["value"] == 0.0
    assert summary["failures"]["baseline"]["no code"]["share"] == 1.0
    assert len(problems()) > 3


def test_a_screen_keeps_the_problems_that_a_model_solves_sometimes_by_samples_that_are_not_compared(
    models, tmp_path, monkeypatch
):
    right = {problem.name: f"```python\n{problem.solution}```" for problem in problems("test")}
    solved = [0, 1, 20, 2, 10]  # of 20 samples: pass@10 of 0, 0.5, 1, 0.76, 1
    drawn = []

    def sample(arms, items, folder, *, samples, seed, **_):
        drawn.append((list(arms), folder, seed, [item.problem.name for item in items]))
        counts = dict(zip([item.cluster for item in items], solved, strict=False)) if "screen" in arms else {}
        own = [
            [Reply(right[name] if i < counts.get(name, 3) else f"no {i}", 9, False) for i in range(samples)]
            for name in (item.cluster for item in items)
        ]
        return {name: [own for _ in sources] for name, sources in arms.items()}

    monkeypatch.setattr(compare, "sample_models", sample)
    monkeypatch.setattr("dts.models.loading.check_available", lambda source: None)
    monkeypatch.setattr(compare, "SCREEN", (0.1, 0.8))
    arms = {"baseline": models[:1], "polychromic": models[1:2]}
    settings = CompareSettings(test_data=CODING, max_examples=5, samples=20, seed=7, screen="base")
    summary = compare_models(arms, settings, tmp_path)
    names = [problem.name for problem in problems("test")[:5]]
    assert drawn == [(["screen"], tmp_path / "screen", 8, names), (list(arms), tmp_path, 7, [names[1], names[3]])]
    assert summary["items"] == summary["clusters"] == 2 and summary["settings"]["screen"] == "base"
    assert summary["models"]["baseline"]["measures"]["pass@1"]["value"] == pytest.approx(0.15)
    three = compare_three({"baseline": models[:1], "moderate": models[1:2]}, settings, tmp_path)
    assert three["moderate"]["items"] == 2  # the same screen
    monkeypatch.setattr(compare, "SCREEN", (0.1, 0.4))
    with pytest.raises(UsageError, match="screen='base' keeps 0 of 5 prompts"):
        compare_models(arms, settings, tmp_path)
    with pytest.raises(UsageError, match="samples=9 is not allowed with screen"):
        replace(settings, samples=9)


def test_command_on_saved_models(tmp_path, test_data, caplog):
    from training_models import tiny_pair

    for seed, name in enumerate(("one", "two")):
        for part in tiny_pair(seed=seed):
            part.save_pretrained(tmp_path / name)
    words = ["--test-data", test_data, "--max_examples", "4", "--samples", "2", "--max-tokens", "6"]
    four = ["--baseline-lora", str(tmp_path / "one"), "--polychromic-lora", str(tmp_path / "two")]
    assert run_script([*four, *words, "--output", str(tmp_path / "four")]) == 0
    assert "Does polychromic training raise diversity?" in caplog.text
    three = ["--baseline-lora", str(tmp_path / "one"), "--moderate-lora", str(tmp_path / "two")]
    assert run_script(["evaluate_three_models", *three, *words, "--output", str(tmp_path / "three")]) == 0
    assert (tmp_path / "three" / "baseline_vs_moderate" / "summary.json").is_file()
    assert "band" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--test-data", "coding"], "--baseline-lora"),
        (["--test-data", "coding", "--baseline-lora", "nowhere", "--grpo-lora", "nowhere"], "unknown model 'nowhere'"),
        (["--test-data", "coding", "--samples", "1"], "samples=1"),
        (["--test-data", "coding", "--judge-url", "http://h/chat"], "--judge-model"),
        (["--test-data", "coding", "--anthropic-key"], "ANTHROPIC_API_KEY"),
    ],
)
def test_bad_requests_are_one_line_errors(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    assert run_script([*words, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# Reward hacking ------------------------------------------------------------------------------------------------------


def test_the_page_on_reward_hacking_scores_replies_with_the_start_and_shows_texts(models, test_data, tmp_path):
    settings = CompareSettings(test_data=test_data, **QUICK, dashboard=True)
    arms = {"baseline": models[:1], "polychromic": models[1:2]}
    summary = compare_models(arms, settings, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    start = [line for line in lines if line["model"] == "baseline"]
    plain = [np.mean([lp / len(ids) for lp, ids in zip(line["logprobs"], line["ids"], strict=True)]) for line in start]
    measures = {name: model["measures"] for name, model in summary["models"].items()}
    assert measures["baseline"]["kl"]["value"] == pytest.approx(0, abs=1e-4)  # its own replies
    assert measures["baseline"]["fluency"]["value"] == pytest.approx(np.mean(plain), abs=1e-4)
    assert measures["polychromic"]["kl"]["value"] > 1
    assert measures["polychromic"]["fluency"]["value"] < measures["baseline"]["fluency"]["value"]
    page, tags = (tmp_path / "dashboard.html").read_text(), _Tags()
    assert "polychromic vs baseline" in page and "largest gain" in page and "train_reward" in page
    assert "b" not in (tags.feed(page.replace("<meta charset=utf-8>", "")) or tags.seen)  # texts are escaped
    assert page.count("data:image/png;base64,") == 1


def test_scored_log_probs_are_those_of_plain_decoding():
    from dts.evaluation.finetuned.hacking import log_probs
    from dts.models.table import TableModel, random_logits

    lm = TableModel(random_logits(3, 3), 3)

    result = dts.decode(lm, "0", method=Sampling(12), max_new_tokens=3, temperature=0.7, seed=1)
    leaves = [rollout.leaf for rollout in result.rollouts]
    found = log_probs(lm, "0", [result.tree.tokens(leaf) for leaf in leaves], 0.7)
    assert [tilted for tilted, _ in found] == pytest.approx([result.tree.log_prob(leaf) for leaf in leaves], abs=1e-5)


def test_what_is_suspicious_is_named():
    from dts.evaluation.finetuned.hacking import signals

    def entry(low, high, relative=0.0):
        return {"value": (low + high) / 2, "low": low, "high": high, "relative": {"value": relative}}

    found = {"train_reward": entry(0.1, 0.2), "fluency": entry(-0.3, -0.1), "words": entry(1, 4, 0.3),
             "kl": entry(1, 2), "repetition": entry(0.01, 0.2)}  # fmt: skip
    warnings = {row["name"]: row["warning"] for row in signals(found, "train_reward")}
    assert warnings == {
        "train_reward": "",
        "fluency": "the reward rose and the held-out scorer fell",
        "words": "length moved by +30%",
        "kl": "",
        "repetition": "replies repeat themselves more",
    }
    calm = {**found, "train_reward": entry(-0.1, 0.2), "words": entry(-1, 4, 0.3), "repetition": entry(-0.1, 0.1)}
    assert not any(row["warning"] for row in signals(calm, "train_reward"))


def test_intervals_without_ends_raise_no_suspicion():
    from dts.evaluation.finetuned.hacking import signals

    unknown = {"value": 0.1, "low": None, "high": None, "relative": {"value": None}}
    rows = signals(dict.fromkeys(("train_reward", "fluency", "words", "kl", "repetition"), unknown), "train_reward")
    assert [row["warning"] for row in rows] == [""] * 5


def test_signals_of_the_dashboard_change_no_adjusted_p():
    found = {"grpo vs baseline": {name: {"p": 0.01} for name in ("diversity", "fluency", "kl", "repetition", "words")}}
    comparison.adjust(found)
    assert {name: entry.get("p_holm") for name, entry in found["grpo vs baseline"].items()} == {
        "diversity": 0.01, "fluency": None, "kl": None, "repetition": None, "words": None,
    }  # fmt: skip


def test_examples_are_those_of_the_largest_the_middle_and_the_smallest_gain():
    from dts.evaluation.finetuned.hacking import examples

    items = [Item([{"role": "user", "content": f"p{i}"}], (), str(i)) for i in range(5)]
    before, after = ([as_replies(f"{word}{i}") for i in range(5)] for word in ("a", "b"))
    found = examples(items, before, after, np.array([0.1, 0.5, -0.2, 0.3, 0.2]))
    assert found == [("largest gain, +0.50", "p1", "a1", "b1"), ("middle gain, +0.20", "p4", "a4", "b4"),
                     ("smallest gain, -0.20", "p2", "a2", "b2")]  # fmt: skip


def test_intervals_over_seeds_are_wider_where_seeds_differ():
    own, base = values(0.1)["diversity"], values()["diversity"]
    low, high = comparison.over_seeds(own, base, CLUSTERS)
    assert low < (own - base).mean() < high
    apart = own + np.array([-0.2, 0.0, 0.2])[:, None]
    assert np.diff(comparison.over_seeds(apart, base, CLUSTERS))[0] > 5 * (high - low)
    one = comparison.over_seeds(own[:1], base[:1], CLUSTERS)
    from dts.evaluation.measures import statistics

    plain = statistics.paired_difference(own[0], base[0], clusters=CLUSTERS, method="percentile")
    assert one == pytest.approx((plain.low, plain.high), abs=2e-4)


def test_checkpoints_nearest_to_a_number_of_drawn_tokens_are_compared_too(tmp_path):
    from dts.evaluation.finetuned.compare import checkpoints_at

    for seed, tokens in (("one", 100), ("two", 250)):
        for step in (1, 2, 3):
            folder = tmp_path / seed / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            history = [{"loss": 0.0, "sampled_tokens": tokens} for _ in range(step)]
            (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    sources = {"baseline": ["smollm2-135m"], "grpo": [str(tmp_path / "one"), str(tmp_path / "two")]}
    with pytest.raises(dts.UsageError, match="--tokens 240: no model has checkpoints"):
        checkpoints_at({"baseline": ["smollm2-135m"]}, [240])
    found = checkpoints_at(sources, [240, 700])
    assert found == {
        "grpo@240": [str(tmp_path / "one" / "checkpoint-2"), str(tmp_path / "two" / "checkpoint-1")],
        "grpo@700": [str(tmp_path / "one" / "checkpoint-3"), str(tmp_path / "two" / "checkpoint-3")],
    }
