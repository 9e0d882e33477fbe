"""Constraints by themselves: what they allow, against slow references; bad input."""

from __future__ import annotations

import itertools
import json
import re
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
import torch
from toys import Texts, Worded, fast_tokenizer

pytest.importorskip("llguidance", reason="needs llguidance: pip install 'maxent-decoding[constraints]'")

from dts.constraints import Choice, Grammar, JsonSchema, Regex, check_constraint
from dts.constraints.guided import GuidedState
from dts.errors import UnavailableError, UsageError
from dts.evaluation.tasks.registry import read_task_file
from dts.models.table import TableModel

SCHEMAS = read_task_file("json").options["items"]
WORDS = (b"a", b"b", b"c", b"ab", b"ba", b"abc", b"cc", b" ", b" a", b"\xc3", b"\xa9", b"\xc3\xa9", b"-")


@pytest.fixture(scope="module")
def worded():
    return Worded(TableModel(lambda prefix: np.zeros(len(WORDS) + 1), len(WORDS) + 1, eos=0), WORDS)


def language(pattern, longest):
    """Every text of at most so many characters that matches, by Python's `re`."""
    texts = ("".join(text) for size in range(longest + 1) for text in itertools.product("abcé -", repeat=size))
    return [text.encode() for text in texts if re.fullmatch(pattern, text)]


def check_against(constraint, texts, lm, rng, walks=40):
    """Masks and ends along random paths: a token is allowed iff a text of the language continues with its bytes."""
    start, seen = constraint.start(lm), set()
    for _ in range(walks):
        state, done = start, b""
        while True:
            allowed = constraint.allowed([state])[0].tolist()[1:]
            expected = [any(text.startswith(done + word) for text in texts) for word in lm.words[1:]]
            assert allowed == expected, done
            assert constraint.accepts([state]) == [done in texts], done
            seen.add(done)
            if not any(expected):
                break
            token = 1 + int(rng.choice(np.flatnonzero(expected)))
            (state,), done = constraint.advance([state], [token]), done + lm.words[token]
    return seen


PATTERNS = ["abc", "a|ab", "(a|b){1,3}c?", "a{2}|b{3}|", "(?:ab|a|b)(?:c|bc)", "é|éa|a é", "[abc]{4}", "(a-){0,2}b"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_regex_allows_what_a_list_of_its_texts_allows(pattern, worded):
    assert len(check_against(Regex(pattern), language(pattern, 5), worded, np.random.default_rng(0))) > 2


def test_random_regexes_allow_what_lists_of_their_texts_allow(worded):
    rng = np.random.default_rng(1)

    def random_pattern(depth):
        if depth == 0 or rng.random() < 0.2:
            return str(rng.choice(["a", "b", "c", "é", "[ab]", " ", "ab"]))
        left, right = random_pattern(depth - 1), random_pattern(depth - 1)
        return str(
            rng.choice([f"{left}{right}", f"(?:{left}|{right})", f"(?:{left})?{right}", f"(?:{left}|{right}){{2}}"])
        )

    for pattern in [random_pattern(2) for _ in range(25)]:
        texts = language(pattern, 6)
        if max(map(len, texts), default=99) < 6:  # the list is complete
            check_against(Regex(pattern), texts, worded, rng, walks=10)


def test_choices_allow_what_their_list_allows(worded):
    for texts in (
        ["a"],
        ["abc", "ab", "ba"],
        ["", "a"],
        ["é", "a b", "cc-cc"],
        ["a" * 20, "a" * 19 + "b"],
        ["ab", "ab"],
    ):
        check_against(Choice(texts), [text.encode() for text in texts], worded, np.random.default_rng(2))


def test_a_grammar_allows_what_a_list_of_its_texts_allows(worded):
    """Dyck words in b and c of depth at most 2 would be regular; these are all of at most 8 letters, by the grammar."""
    grammar = Grammar('start: "b" start "c" | "a"')
    texts = [b"b" * depth + b"a" + b"c" * depth for depth in range(40)]
    check_against(grammar, texts, worded, np.random.default_rng(3), walks=60)


def test_special_characters_of_a_choice_stand_for_themselves(smollm):
    for text in ['a"b', "a\\b", "(x)*", "😀", "a\nb", "tab\t", "a/b", "[a-z]", "é", "{}", "#", "%json"]:
        constraint = Choice([text, "other"])
        states = [constraint.start(smollm)]
        for token in smollm.tokenizer(text, add_special_tokens=False)["input_ids"]:
            assert constraint.allowed(states)[0, token], text
            states = constraint.advance(states, [token])
        assert constraint.accepts(states) == [True], text


def test_masks_of_a_real_vocabulary_equal_a_loop_over_it(smollm):
    texts = ["Monday", "Mon", "the moon", "naïve 日"]
    constraint, tokenizer = Choice(texts), smollm.tokenizer
    pieces = [as_bytes(tokenizer.convert_ids_to_tokens(token)) for token in range(smollm.vocab_size)]
    special = set(tokenizer.all_special_ids)
    for done in ("", "M", "Mon", "na", "naïve "):
        state = constraint.start(smollm)
        for token in tokenizer(done, add_special_tokens=False)["input_ids"]:
            (state,) = constraint.advance([state], [token])
        left = [text.encode()[len(done.encode()) :] for text in texts if text.startswith(done)]
        expected = [
            token
            for token, piece in enumerate(pieces)
            if token not in special and piece and any(text.startswith(piece) for text in left)
        ]
        found = constraint.allowed([state])[0].nonzero().flatten().tolist()
        assert [token for token in found if token not in smollm.eos_ids] == expected and (expected or done in texts)


PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
TABLE = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + index): byte for index, byte in enumerate(OTHERS)}


def as_bytes(spelled):
    """A token of byte-level BPE as bytes, by GPT-2's table."""
    return bytes(TABLE[c] for c in spelled) if all(c in TABLE for c in spelled) else b""


def test_many_states_are_masked_as_each_alone(worded):
    constraint = Regex("(a|b){1,3}c?")
    states = [constraint.start(worded)]
    for _ in range(3):
        states += constraint.advance([states[-1]], [1])
    together = constraint.allowed(states)
    assert together.dtype == torch.bool and together.shape == (4, worded.vocab_size)
    assert torch.equal(together, torch.cat([constraint.allowed([state]) for state in states]))


def test_forks_are_independent(worded):
    constraint = Regex("ab|bc|a")
    start = constraint.start(worded)
    before = constraint.allowed([start]).clone()
    after_a, after_b = constraint.advance([start, start], [1, 2])
    assert torch.equal(constraint.allowed([start]), before)
    assert constraint.accepts([start, after_a, after_b]) == [False, True, False]
    assert constraint.allowed([after_a])[0].nonzero().flatten().tolist()[-1:] == [2]
    assert constraint.allowed([after_b])[0].nonzero().flatten().tolist()[-1:] == [3]


def test_a_token_that_is_not_allowed_leads_to_nothing(worded):
    constraint = Regex("ab")
    states = constraint.advance([constraint.start(worded)], [3])
    assert constraint.accepts(states) == [False] and not constraint.allowed(states).any()
    assert constraint.accepts(constraint.advance(states, [1])) == [False]


def test_a_padded_head_gets_a_column_for_each_of_its_ids():
    words = (b"a", b"b")
    lm = SimpleNamespace(tokenizer=fast_tokenizer(words), vocab_size=70, eos_ids=frozenset([0]), name="padded")
    constraint = Regex("[ab]+")
    assert constraint.allowed([constraint.start(lm)])[0].nonzero().flatten().tolist() == [1, 2]
    lm.vocab_size = 2
    assert constraint.allowed([constraint.start(lm)])[0].nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("entry", SCHEMAS, ids=lambda entry: entry["name"])
def test_a_schema_takes_a_valid_object_and_refuses_another(entry, smollm):
    constraint = JsonSchema(entry["schema"])
    for kind, expected in (("valid", True), ("invalid", False)):
        jsonschema.Draft202012Validator.check_schema(entry["schema"])
        assert jsonschema.Draft202012Validator(entry["schema"]).is_valid(entry[kind]) is expected
        for indent in (None, 2):
            assert member(constraint, json.dumps(entry[kind], indent=indent), smollm) is expected


def test_white_space_between_parts_can_be_chosen(smollm):
    schema = {"type": "array", "items": {"type": "integer"}}
    texts = ("[1,2]", "[1, 2]", "[1,  2]", "[1,\n2]")
    for whitespace, expected in ((None, (1, 1, 1, 1)), (" ?", (1, 1, 0, 0)), ("", (1, 0, 0, 0))):
        constraint = JsonSchema(schema, whitespace)
        assert [member(constraint, text, smollm) for text in texts] == list(map(bool, expected)), whitespace
    assert member(JsonSchema(True, ""), '{"a":[1]}', smollm)
    with pytest.raises(UsageError, match="unclosed group"):
        JsonSchema(schema, "(")


def member(constraint, text, lm):
    states = [constraint.start(lm)]
    for token in lm.tokenizer(text, add_special_tokens=False)["input_ids"]:
        if not constraint.allowed(states)[0, token]:
            return False
        states = constraint.advance(states, [token])
    return constraint.accepts(states)[0]


def test_random_members_of_a_schema_are_valid_json(smollm):
    """Draws from the masks, from tokens that end something where they may, cut where the text is a member."""
    rng, checked = np.random.default_rng(0), 0
    ends = smollm.tokenizer.convert_tokens_to_ids(
        ['"', '",', '"}', "}", "]", "},", ",", "0", "1", "-", ".", ":", "Ġ", "a"]
    )
    for entry in SCHEMAS:
        constraint = JsonSchema(entry["schema"])
        state, tokens = constraint.start(smollm), list[int]()
        while len(tokens) < 80 and not constraint.accepts([state])[0]:
            allowed = constraint.allowed([state])[0].numpy()
            quick = [token for token in ends if allowed[token]] if rng.random() < 0.9 else []
            tokens.append(int(rng.choice(quick or np.flatnonzero(allowed))))
            (state,) = constraint.advance([state], tokens[-1:])
        if constraint.accepts([state])[0]:
            checked += 1
            assert jsonschema.Draft202012Validator(entry["schema"]).is_valid(json.loads(smollm.decode(tokens)))
    assert checked >= 10


def test_a_vocabulary_is_read_once(smollm, monkeypatch):
    Regex("a").start(smollm)
    monkeypatch.setattr("dts.constraints.guided._read", None)
    assert Regex("b").start(smollm).vocabulary is Regex("c").start(smollm).vocabulary


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"properties": {"a/b": {"items": {"not": {}}}}}, 'no support for "not" at #/properties/a~1b/items'),
        ({"properties": {"not": {"uniqueItems": True}}}, 'no support for "uniqueItems" at #/properties/not'),
        (
            {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"c": {"format": "foo", "type": "string"}}}}},
            "Unknown format: foo at #/$defs/n/properties/c",
        ),
        ({"anyOf": [{"type": "string"}, {"type": "strin"}]}, "Invalid type: strin at #/anyOf/1"),
        ({"items": {"oneOf": [{"type": "string"}, {"type": "string"}]}}, '"oneOf" with parts that overlap'),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable schema"),
        ({"enum": []}, "Unsatisfiable schema"),
        (False, "Unsatisfiable schema"),
        (3, "give a dict"),
        ("{", "is no JSON"),
        ({"a": {1}}, "is no JSON"),
        ({"const": float("nan")}, "is no JSON"),
    ],
)
def test_a_bad_schema_is_named_with_its_place(schema, said):
    with pytest.raises(UsageError, match=re.escape(said)) as raised:
        JsonSchema(schema)
    assert "\n" not in str(raised.value) and str(raised.value).startswith("constraint=JsonSchema")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Regex("a("), "unclosed group"),
        (lambda: Regex("(?=a)b"), "look-around"),
        (lambda: Regex(r"(a)\1"), "backreferences are not supported"),
        (lambda: Regex(3), "give text"),
        (lambda: Regex("\ud800"), "half of a surrogate pair"),
        (lambda: Grammar("start: x"), 'unknown name: "x"'),
        (lambda: Grammar('foo: "a"'), "no start rule"),
        (lambda: Grammar("start: /a(/"), "unclosed group"),
        (lambda: Choice([]), "at least one text"),
        (lambda: Choice("abc"), "at least one text"),
        (lambda: Choice([1]), "give text"),
    ],
)
def test_a_bad_constraint_is_named(make, said):
    with pytest.raises(UsageError, match=re.escape(said)) as raised:
        make()
    assert "\n" not in str(raised.value) and str(raised.value).startswith("constraint=")


def test_an_empty_language_is_named(worded):
    with pytest.raises(UsageError, match=r"constraint=Regex\('\[a&&b\]'\) allows no text"):
        Regex("[a&&b]").start(worded)
    with pytest.raises(UsageError, match=r"constraint=Choice\(\['x'\]\) allows no text"):
        Choice(["x"]).start(worded)  # no token begins with x


def test_a_tokenizer_whose_bytes_are_unknown_is_named(tiny_lm):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(UsageError, match="tiny has the tokenizer ByteTokenizer, which does not tell them"):
        Regex("a").start(tiny_lm)
    with pytest.raises(UsageError, match="table has no tokenizer"):
        Regex("a").start(TableModel(lambda prefix: np.zeros(3), 3))
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    lm = SimpleNamespace(tokenizer=words, vocab_size=2, eos_ids=frozenset(), name="words")
    with pytest.raises(UsageError, match=r"those of words's tokenizer .* are not known"):
        Regex("a").start(lm)


class Exhausted:
    """A matcher of llguidance that has met a limit of its own."""

    def deep_copy(self):
        return self

    def consume_token(self, token):
        return False

    def is_error(self):
        return True

    def stop_reason(self):
        return "ParserTooComplex"

    def compute_bitmask(self):
        return bytes(4)


def test_a_grammar_that_is_too_large_is_named_and_no_dead_end(worded):
    constraint = Regex("a")
    state = GuidedState(constraint.start(worded).vocabulary, Exhausted())
    for read in (lambda: constraint.advance([state], [1]), lambda: constraint.allowed([state])):
        with pytest.raises(UsageError, match=r"constraint=Regex\('a'\): llguidance gave up .*ParserTooComplex"):
            read()


def test_without_llguidance_the_command_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UnavailableError, match=r"pip install 'maxent-decoding\[constraints\]'"):
        Regex("a")


def test_what_is_no_constraint_is_refused():
    for wrong in ("[a-z]", 3, Regex, Texts, SimpleNamespace(start=print, advance=print, allowed=print)):
        with pytest.raises(UsageError, match=r"give one of dts\.constraints"):
            check_constraint(wrong, None)
    check_constraint(Texts([(1, 2)], 3), None)
