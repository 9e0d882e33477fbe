"""The constraints that `llguidance` serves: JSON schemas, regular expressions, grammars and choices."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from dts.constraints.schemas import fault_in
from dts.errors import UnavailableError, UsageError, shown

# Every tokenization of a text belongs to the language. Without this, forced text is allowed in one tokenization only.
OPTIONS = '%llguidance {"no_forcing": true}\n'
GAVE_UP = ("ParserTooComplex", "LexerTooComplex")  # what llguidance says where a limit of its own was reached


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Vocabulary:
    """The tokens of one model, as llguidance knows them."""

    tokenizer: Any  # an `LLTokenizer`
    size: int  # ids that the model may produce


class GuidedState:
    """A path's place in a grammar. Its mask is made once, when it is asked for."""

    __slots__ = ("accepts", "mask", "matcher", "vocabulary")

    def __init__(self, vocabulary: Vocabulary, matcher: Any) -> None:
        """matcher: an `LLMatcher`; nobody else moves it."""
        self.vocabulary, self.matcher = vocabulary, matcher
        self.accepts = not matcher.is_error() and bool(matcher.is_accepting())
        self.mask: bytes | None = None  # a bit for each id, the lowest first


class Guided:
    """A grammar that llguidance reads. It is compiled once for each vocabulary."""

    def __init__(self, lark: str) -> None:
        self._grammar = _llguidance().LLMatcher.grammar_from_lark(OPTIONS + lark)
        self._starts: WeakKeyDictionary[Vocabulary, GuidedState] = WeakKeyDictionary()
        self._masks: dict[bytes, bytes] = {}  # equal masks are one object: inside free words nearly all are equal

    def start(self, lm: Any) -> GuidedState:
        """See `Constraint`. The tokenizer has to be a fast one of Hugging Face, on bytes or with byte fallback."""
        vocabulary = vocabulary_of(lm)
        found = self._starts.get(vocabulary)
        if found is None:
            matcher = _llguidance().LLMatcher(vocabulary.tokenizer, self._grammar, log_level=0)
            if matcher.is_error():
                raise UsageError(f"constraint={shown(self)}: {_reason(matcher.get_error())}")
            found = self._starts[vocabulary] = GuidedState(vocabulary, matcher)
        if not found.accepts and not self.allowed([found])[0].any():
            raise UsageError(f"constraint={shown(self)} allows no text; give one that at least one text satisfies")
        return found

    def advance(self, states: Sequence[GuidedState], tokens: Sequence[int]) -> list[GuidedState]:
        return [self._after(state, token) for state, token in zip(states, tokens, strict=True)]

    def _after(self, state: GuidedState, token: int) -> GuidedState:
        matcher = state.matcher.deep_copy()  # shares the grammar and the lexer
        matcher.consume_token(token)
        self._check_limits(matcher)
        return GuidedState(state.vocabulary, matcher)

    def allowed(self, states: Sequence[GuidedState]) -> torch.Tensor:
        packed = np.frombuffer(b"".join([self._mask(state) for state in states]), np.uint8)
        bits = np.unpackbits(
            packed.reshape(len(states), -1), axis=1, count=states[0].vocabulary.size, bitorder="little"
        )
        return torch.from_numpy(bits.view(np.bool_))

    def _mask(self, state: GuidedState) -> bytes:
        if state.mask is None:
            dead = state.matcher.is_error()
            mask = state.matcher.compute_bitmask()
            self._check_limits(state.matcher)
            if dead or state.matcher.is_error():  # then it holds EOS alone
                mask = bytes(len(mask))
            state.mask = self._masks.setdefault(mask, mask)
        return state.mask

    def accepts(self, states: Sequence[GuidedState]) -> list[bool]:
        return [state.accepts for state in states]

    def _check_limits(self, matcher: Any) -> None:
        if matcher.is_error() and matcher.stop_reason() in GAVE_UP:
            raise UsageError(
                f"constraint={shown(self)}: llguidance gave up in the middle of a text ({matcher.stop_reason()}); "
                "give a simpler constraint"
            )


class JsonSchema(Guided):
    """Texts that are JSON and valid under a schema: a dict, True, or JSON text. Properties come in the order of the
    schema. See llguidance's `docs/json_schema.md` for the keywords."""

    def __init__(self, schema: Mapping[str, Any] | bool | str, whitespace: str | None = None) -> None:
        """whitespace: a regular expression for the white space between parts, such as " ?", which keeps small models
        from writing white space without end; None: all that JSON allows. Raises `UsageError` for a schema that is no
        JSON, has a keyword that is not supported (named, with its place), or that nothing satisfies."""
        self._schema = _as_schema(schema)
        schema_grammar = _llguidance().LLMatcher.grammar_from_json_schema
        if fault := fault_in(self._schema, lambda part: _problem(schema_grammar(json.dumps(part)))):
            raise UsageError(f"constraint=JsonSchema: {fault}; leave it out, or judge it by a reward")
        read = self._schema
        if whitespace is not None:
            Regex(whitespace)  # raises where it is none
            own = self._schema if isinstance(self._schema, dict) else {}
            read = {**own, "x-guidance": {"whitespace_pattern": whitespace}}
        super().__init__(f"start: %json {json.dumps(read)}")

    def __repr__(self) -> str:
        return f"JsonSchema({json.dumps(self._schema)})"


class Regex(Guided):
    """Texts that match a regular expression as a whole, in the syntax of Rust's crate `regex`: no look-around and no
    back-references; `\\d` and `\\w` hold for all of Unicode."""

    def __init__(self, pattern: str) -> None:
        """Raises `UsageError` for a pattern that does not compile."""
        self._pattern = _as_text("Regex", pattern)
        lark = f"start: /{_llguidance().regex_to_lark(pattern, '')}/"
        if problem := _problem(_llguidance().LLMatcher.grammar_from_lark(lark)):
            raise UsageError(f"constraint={shown(self)} is no regular expression of Rust's syntax: {problem}")
        super().__init__(lark)

    def __repr__(self) -> str:
        return f"Regex({self._pattern!r})"


class Grammar(Guided):
    """Texts of a context-free grammar, in llguidance's variant of Lark (its `docs/syntax.md`), from the rule `start`
    on."""

    def __init__(self, lark: str) -> None:
        """Raises `UsageError` for a grammar that does not compile."""
        self._lark = _as_text("Grammar", lark)
        if problem := _problem(_llguidance().LLMatcher.grammar_from_lark(lark)):
            raise UsageError(f"constraint={shown(self)} is no grammar in Lark's syntax: {problem}")
        super().__init__(lark)

    def __repr__(self) -> str:
        return f"Grammar({self._lark!r})"


class Choice(Guided):
    """One of these texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Raises `UsageError` for no texts."""
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise UsageError(f"constraint=Choice({shown(texts)}) is not allowed; give a list of at least one text")
        self._texts = [_as_text("Choice", text) for text in texts]
        rule = " | ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(self._texts))
        super().__init__(f"start: {rule}")

    def __repr__(self) -> str:
        return f"Choice({self._texts!r})"


# -- input -------------------------------------------------------------------------------------------------------------


def _as_text(kind: str, text: Any) -> str:
    if not isinstance(text, str):
        raise UsageError(f"constraint={kind}({shown(text)}) is not allowed; give text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"constraint={kind}({shown(text)}) holds half of a surrogate pair; drop it") from error
    return text


def _as_schema(schema: Any) -> Any:
    """A schema as JSON has it."""
    try:
        parsed = json.loads(schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(f"constraint=JsonSchema({shown(schema)}) is no JSON: {error}") from error
    if not isinstance(parsed, (dict, bool)):
        raise UsageError(f"constraint=JsonSchema({shown(schema)}) is not allowed; give a dict, or its JSON text")
    return parsed


def _problem(grammar: str) -> str | None:
    """What is wrong with a grammar; None where nothing is."""
    failed, messages = _llguidance().LLMatcher.validate_grammar_with_warnings(grammar)
    return _reason(messages[0]) if failed else None


def _reason(message: str) -> str:
    """One line of a message of llguidance, which shows source and position over several."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("error: ")), None)
    return said.removeprefix("error: ") if said else lines[0]


# -- the engine --------------------------------------------------------------------------------------------------------


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UnavailableError(
            "the constraints of dts.constraints need llguidance; run: pip install 'maxent-decoding[constraints]'"
        ) from error
    return llguidance


@dataclass(slots=True)
class _Known:
    """Vocabularies by tokenizer, ids and EOS: llguidance takes a second to read one. Shared by threads."""

    lock: threading.Lock
    found: WeakKeyDictionary[Any, dict[tuple[int, tuple[int, ...]], Vocabulary]]


_KNOWN = _Known(threading.Lock(), WeakKeyDictionary())


def vocabulary_of(lm: Any) -> Vocabulary:
    """The model's tokens with their bytes. Raises `UsageError` where these are not known."""
    tokenizer = getattr(lm, "tokenizer", None)
    if not hasattr(tokenizer, "backend_tokenizer"):
        kind = "no tokenizer" if tokenizer is None else f"the tokenizer {type(tokenizer).__name__}"
        raise UsageError(
            f"constraint= needs the bytes of each token; {lm.name} has {kind}, which does not tell them; give the "
            "model a fast tokenizer of transformers, or a constraint on token ids (dts.constraints.Constraint)"
        )
    key = lm.vocab_size, tuple(sorted(lm.eos_ids))
    with _KNOWN.lock:
        of_tokenizer = _KNOWN.found.setdefault(tokenizer, {})
        if key not in of_tokenizer:
            of_tokenizer[key] = _read(lm, tokenizer)
        return of_tokenizer[key]


def _read(lm: Any, tokenizer: Any) -> Vocabulary:
    _llguidance()
    from llguidance.hf import from_tokenizer

    try:
        found = from_tokenizer(
            tokenizer, n_vocab=max(lm.vocab_size, len(tokenizer)), eos_token=sorted(lm.eos_ids) or None
        )
    except ValueError as error:
        raise UsageError(
            f"constraint= needs the bytes of each token; those of {lm.name}'s tokenizer {type(tokenizer).__name__} "
            f"are not known ({_reason(str(error))}); give a constraint on token ids (dts.constraints.Constraint)"
        ) from error
    return Vocabulary(found, lm.vocab_size)
