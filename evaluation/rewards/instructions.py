"""Verifiable instructions: share of those that a text follows, read as the text grows.

The kinds, their names and their arguments are those of IFEval (Zhou et al., arXiv 2311.07911), as far as characters
decide them: none needs a tokenizer of sentences or a detector of languages. Each check reads new text once and knows
at each point whether the instruction is met for good, can still be met, or is lost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dts.errors import UsageError
from dts.evaluation.rewards.text import TextReward

RELATIONS = ("at least", "less than")
ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
FEW = 8  # up to so many occurrences, those that are there count as progress


class Check(Protocol):
    """One instruction, on notes that only it reads."""

    def empty(self) -> Any: ...

    def read(self, notes: Any, piece: str) -> Any:
        """Notes after more text, O(len(piece))."""

    def bounds(self, notes: Any) -> tuple[bool, bool]:
        """Whether it is met whatever follows, and whether it can be met."""

    def met(self, notes: Any) -> bool:
        """Whether it is met if the text ends here."""

    def progress(self, notes: Any) -> float:
        """How far it is, in [0, 1]: a guide."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Notes of `Count`."""

    tail: str = ""  # what a match that is not decided may begin in, and one character before
    start: int = 0  # where in `tail` it may begin
    count: int = 0


class Count:
    """Matches of a pattern, at least or less than `n`. No match is longer than `width` characters."""

    def __init__(
        self, pattern: str, width: int, n: int, relation: str = "at least", *, flags: int = re.IGNORECASE,
        lower: bool = False,
    ) -> None:  # fmt: skip
        """lower: the text is made lower case before it is searched."""
        if relation not in RELATIONS:
            raise UsageError(f"relation={relation!r} is not known; give {' or '.join(map(repr, RELATIONS))}")
        self._pattern, self._width, self._n = re.compile(pattern, 0 if lower else flags), width, n
        self._less, self._lower = relation == "less than", lower

    def empty(self) -> Seen:
        return Seen()

    def read(self, notes: Seen, piece: str) -> Seen:
        text = notes.tail + (piece.lower() if self._lower else piece)
        # A match at the end of the text may not be one of a whole word: it waits for what follows.
        found = [m.end() for m in self._pattern.finditer(text, notes.start) if m.end() < len(text)]
        begin = max(found[-1] if found else notes.start, len(text) - self._width)
        keep = max(begin - 1, 0)
        return Seen(text[keep:], begin - keep, notes.count + len(found))

    def _count(self, notes: Seen) -> int:
        return notes.count + sum(1 for _ in self._pattern.finditer(notes.tail, notes.start))

    def bounds(self, notes: Seen) -> tuple[bool, bool]:
        reached = notes.count >= self._n
        return (False, not reached) if self._less else (reached, True)

    def met(self, notes: Seen) -> bool:
        return (self._count(notes) < self._n) == self._less

    def progress(self, notes: Seen) -> float:
        met = self.met(notes)
        return float(met) if met or self._less or self._n > FEW else min(self._count(notes), self._n) / self._n


class Every:
    """All of several checks."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self._checks = checks

    def empty(self) -> tuple[Any, ...]:
        return tuple(check.empty() for check in self._checks)

    def read(self, notes: tuple[Any, ...], piece: str) -> tuple[Any, ...]:
        return tuple(check.read(note, piece) for check, note in zip(self._checks, notes, strict=True))

    def bounds(self, notes: tuple[Any, ...]) -> tuple[bool, bool]:
        low, high = zip(*map(lambda check, note: check.bounds(note), self._checks, notes), strict=True)
        return all(low), all(high)

    def met(self, notes: tuple[Any, ...]) -> bool:
        return all(map(lambda check, note: check.met(note), self._checks, notes))

    def progress(self, notes: tuple[Any, ...]) -> float:
        return sum(map(lambda check, note: check.progress(note), self._checks, notes)) / len(notes)


class Case:
    """No letter of the other case, and one of this. Notes: whether one of this was seen, whether one of the other."""

    def __init__(self, *, upper: bool) -> None:
        self._upper = upper

    def empty(self) -> tuple[bool, bool]:
        return False, False

    def read(self, notes: tuple[bool, bool], piece: str) -> tuple[bool, bool]:
        seen, broken = notes
        cased = [c for c in piece if c.isupper() or c.islower() or c.istitle()]
        own = [c for c in cased if (c.isupper() if self._upper else c.islower())]
        return seen or bool(own), broken or len(own) < len(cased)

    def bounds(self, notes: tuple[bool, bool]) -> tuple[bool, bool]:
        return False, not notes[1]

    def met(self, notes: tuple[bool, bool]) -> bool:
        return notes == (True, False)

    def progress(self, notes: tuple[bool, bool]) -> float:
        return float(not notes[1])


class Quoted:
    """In double quotation marks. Notes: the first and the last character that is no space, and if these are two."""

    def empty(self) -> tuple[str, str, bool]:
        return "", "", False

    def read(self, notes: tuple[str, str, bool], piece: str) -> tuple[str, str, bool]:
        first, _, two = notes
        stripped = piece.strip()
        if not stripped:
            return notes
        return first or stripped[0], stripped[-1], two or bool(first) or len(stripped) > 1

    def bounds(self, notes: tuple[str, str, bool]) -> tuple[bool, bool]:
        return False, notes[0] in ("", '"')

    def met(self, notes: tuple[str, str, bool]) -> bool:
        return notes == ('"', '"', True)

    def progress(self, notes: tuple[str, str, bool]) -> float:
        return 1.0 if self.met(notes) else 0.5 * (notes[0] == '"')


class Ending:
    """The last words, before spaces and quotation marks. Notes: the end of the text."""

    def __init__(self, phrase: str) -> None:
        self._phrase = phrase.strip().lower()
        if not self._phrase or self._phrase.strip('"') != self._phrase:
            raise UsageError(f"end_phrase={phrase!r}: give some words, without quotation marks around them")

    def empty(self) -> str:
        return ""

    def read(self, notes: str, piece: str) -> str:
        text = notes + piece
        after = len(text) - len(self._core(text))
        return text[-(len(self._phrase) + after) :]

    @staticmethod
    def _core(text: str) -> str:
        return text.rstrip().rstrip('"')

    def bounds(self, notes: str) -> tuple[bool, bool]:
        return False, True

    def met(self, notes: str) -> bool:
        return self._core(notes).lower().endswith(self._phrase)

    def progress(self, notes: str) -> float:
        end = self._core(notes).lower()
        sizes = range(min(len(self._phrase), len(end)), 0, -1)
        return next((size for size in sizes if end.endswith(self._phrase[:size])), 0) / len(self._phrase)


class Title:
    """Words in double angular brackets, in one line. Notes: the line from its first `<<` on; None once it is met."""

    _title = re.compile(r"<<[^\n]+>>")

    def empty(self) -> str | None:
        return ""

    def read(self, notes: str | None, piece: str) -> str | None:
        if notes is None:
            return None
        *lines, line = (notes + piece).split("\n")
        if ">" in piece and any(map(self._found, [*lines, line])):
            return None
        start = line.find("<<")
        return line[start:] if start >= 0 else line[-1:]

    def _found(self, line: str) -> bool:
        match = self._title.search(line)
        return match is not None and bool(match[0].lstrip("<").rstrip(">").strip())

    def bounds(self, notes: str | None) -> tuple[bool, bool]:
        return notes is None, True

    def met(self, notes: str | None) -> bool:
        return notes is None

    def progress(self, notes: str | None) -> float:
        return 1.0 if notes is None else 0.5 * notes.startswith("<<")


@dataclass(frozen=True, slots=True)
class Marks:
    """Notes of the checks that read one character after another."""

    count: int = 0
    state: str = ""  # where within a form the text is
    filled: bool = False  # whether the part under way has content
    broken: bool = False
    word: str = ""


class Form:
    """A form of markup, read one character after another."""

    def step(self, notes: Marks, char: str) -> Marks:
        raise NotImplementedError

    def sure(self, notes: Marks) -> int:
        """How many there are, whatever follows."""
        return notes.count

    def count(self, notes: Marks) -> int:
        """How many there are if the text ends here."""
        return notes.count


class Forms:
    """So many forms of markup, all kinds together: at least `n`, or exactly."""

    def __init__(self, n: int, *forms: Form, exact: bool = False) -> None:
        self._n, self._forms, self._exact = n, forms, exact

    def empty(self) -> tuple[Marks, ...]:
        return (Marks(),) * len(self._forms)

    def read(self, notes: tuple[Marks, ...], piece: str) -> tuple[Marks, ...]:
        return tuple(self._read(form, note, piece) for form, note in zip(self._forms, notes, strict=True))

    @staticmethod
    def _read(form: Form, note: Marks, piece: str) -> Marks:
        for char in piece:
            note = form.step(note, char)
        return note

    def bounds(self, notes: tuple[Marks, ...]) -> tuple[bool, bool]:
        sure = sum(map(lambda form, note: form.sure(note), self._forms, notes))
        if self._exact:
            return False, sure <= self._n and not any(note.broken for note in notes)
        return sure >= self._n, True

    def _count(self, notes: tuple[Marks, ...]) -> int:
        return sum(map(lambda form, note: form.count(note), self._forms, notes))

    def met(self, notes: tuple[Marks, ...]) -> bool:
        if self._exact:
            return self._count(notes) == self._n and not any(note.broken for note in notes)
        return self._count(notes) >= self._n

    def progress(self, notes: tuple[Marks, ...]) -> float:
        return float(self.bounds(notes)[1]) * min(self._count(notes), self._n) / max(self._n, 1)


class Placeholders(Form):
    """`[words]` in one line."""

    def step(self, notes: Marks, char: str) -> Marks:
        if char == "]" and notes.state:
            return Marks(notes.count + 1)
        return replace(notes, state="" if char == "\n" else notes.state or ("[" if char == "[" else ""))


class Emphasis(Form):
    """`*words*` in one line; with two stars `**words**`. States: stars so far; "close": one of two closing stars."""

    def __init__(self, stars: int) -> None:
        self._open = "*" * stars

    def step(self, notes: Marks, char: str) -> Marks:
        if notes.state == self._open:
            return self._inside(notes, char)
        if notes.state != "close":
            return Marks(notes.count, notes.state + "*" if char == "*" else "")
        if char == "*":
            return Marks(notes.count + notes.filled)
        if notes.word or char == "\n":
            return Marks(notes.count)
        return Marks(notes.count, self._open, not char.isspace(), word="x")  # of three stars the last two open

    def _inside(self, notes: Marks, char: str) -> Marks:
        if char == "\n":
            return Marks(notes.count)
        if char != "*":
            return replace(notes, filled=notes.filled or not char.isspace(), word="x")
        if self._open == "*":
            return Marks(notes.count + notes.filled)
        return replace(notes, state="close")


class Bullets(Form):
    """Lines that begin with a dash, or with one star, which takes the next line with it if nothing follows in its own:
    `^\\s*-.*$` and `^\\s*\\*[^\\*].*$`. States: "" where a line begins, "mark" after its star, "line" in the rest."""

    def __init__(self, mark: str) -> None:
        self._mark = mark

    def step(self, notes: Marks, char: str) -> Marks:
        if notes.state == "mark":
            return Marks(notes.count + (char != "*"), "line")
        if notes.state == "line":
            return replace(notes, state="" if char == "\n" else "line")
        if char == self._mark:
            return Marks(notes.count + 1, "line") if char == "-" else Marks(notes.count, "mark")
        return replace(notes, state="" if char.isspace() else "line")


class Paragraphs(Form):
    """Parts between `***`, none of them empty but the first or the last. `word`: "later" after the first."""

    def step(self, notes: Marks, char: str) -> Marks:
        if char != "*":
            return replace(notes, state="", filled=notes.filled or bool(notes.state) or not char.isspace())
        if notes.state != "**":
            return replace(notes, state=notes.state + "*")
        broken = notes.broken or (not notes.filled and notes.word == "later")
        return Marks(notes.count + notes.filled, broken=broken, word="later")

    def sure(self, notes: Marks) -> int:
        return notes.count + notes.filled

    def count(self, notes: Marks) -> int:
        return notes.count + (notes.filled or bool(notes.state))


@dataclass(frozen=True, slots=True)
class Begun:
    """Notes of `FirstWord`."""

    place: int = 1  # of the part under way, empty ones counted
    count: int = 0  # parts with words before it
    filled: bool = False
    newline: bool = False  # whether the last character may begin an empty line
    word: str = ""  # the first word of the part in question
    done: bool = False  # whether that word is complete


class FirstWord:
    """So many parts between empty lines, the `nth` of which begins with a word."""

    _stops = frozenset(".,?!'\"")

    def __init__(self, num_paragraphs: int, nth_paragraph: int, first_word: str) -> None:
        self._n, self._nth, self._word = num_paragraphs, nth_paragraph, first_word.lower()

    def empty(self) -> Begun:
        return Begun()

    def read(self, notes: Begun, piece: str) -> Begun:
        for char in piece:
            notes = self._step(notes, char)
        return notes

    def _step(self, notes: Begun, char: str) -> Begun:
        if char == "\n" and notes.newline:
            done = notes.done or (notes.place == self._nth)
            return Begun(notes.place + 1, notes.count + notes.filled, word=notes.word, done=done)
        notes = replace(notes, newline=char == "\n", filled=notes.filled or not char.isspace())
        if notes.place != self._nth or notes.done:
            return notes
        return replace(notes, done=True) if char.isspace() and notes.word else self._letter(notes, char)

    def _letter(self, notes: Begun, char: str) -> Begun:
        return notes if char.isspace() else replace(notes, word=notes.word + char)

    def _right(self, notes: Begun) -> bool:
        word = notes.word.lstrip("'").lstrip('"')
        end = next((i for i, c in enumerate(word) if c in self._stops), len(word))
        return "".join(c.lower() for c in word[:end]) == self._word

    def bounds(self, notes: Begun) -> tuple[bool, bool]:
        right = self._right(notes) if notes.done else True
        return False, right and notes.count + notes.filled <= self._n

    def met(self, notes: Begun) -> bool:
        count = notes.count + notes.filled
        return count == self._n and self._nth <= count and bool(notes.word) and self._right(notes)

    def progress(self, notes: Begun) -> float:
        if not self.bounds(notes)[1]:
            return 0.0
        count = notes.count + notes.filled
        return (min(count, self._n) + (bool(notes.word) and self._right(notes))) / (self._n + 1)


def _words(keywords: Sequence[str]) -> Every:
    return Every([Count(re.escape(word), len(word), 1) for word in keywords])


def _forbidden(forbidden_words: Sequence[str]) -> Every:
    return Every([Count(rf"\b{re.escape(word)}\b", len(word), 1, "less than") for word in forbidden_words])


def _postscript(postscript_marker: str) -> Count:
    patterns = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    if postscript_marker not in patterns:
        raise UsageError(f"postscript_marker={postscript_marker!r}: give {' or '.join(patterns)}")
    return Count(patterns[postscript_marker], 8, 1, lower=True)


INSTRUCTIONS: Mapping[str, Callable[..., Check]] = {
    "keywords:existence": _words,
    "keywords:forbidden_words": _forbidden,
    "keywords:frequency": lambda keyword, frequency, relation: Count(
        re.escape(keyword), len(keyword), frequency, relation
    ),
    "keywords:letter_frequency": lambda letter, let_frequency, let_relation: Count(
        re.escape(letter.lower()), 1, let_frequency, let_relation, lower=True
    ),
    "length_constraints:number_words": lambda num_words, relation: Count(r"(?<!\w)\w", 1, num_words, relation),
    "length_constraints:number_paragraphs": lambda num_paragraphs: Forms(num_paragraphs, Paragraphs(), exact=True),
    "length_constraints:nth_paragraph_first_word": FirstWord,
    "detectable_content:number_placeholders": lambda num_placeholders: Forms(num_placeholders, Placeholders()),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda num_bullets: Forms(
        num_bullets, Bullets("*"), Bullets("-"), exact=True
    ),
    "detectable_format:constrained_response": lambda: Count(
        "|".join(map(re.escape, ANSWERS)), max(map(len, ANSWERS)), 1, flags=0
    ),
    "detectable_format:number_highlighted_sections": lambda num_highlights: Forms(
        num_highlights, Emphasis(1), Emphasis(2)
    ),
    "detectable_format:multiple_sections": lambda section_spliter, num_sections: Count(
        re.escape(section_spliter) + r"\s?\d", len(section_spliter) + 2, num_sections, flags=0
    ),
    "detectable_format:title": Title,
    "startend:end_checker": lambda end_phrase: Ending(end_phrase),
    "startend:quotation": Quoted,
    "change_case:english_capital": lambda: Case(upper=True),
    "change_case:english_lowercase": lambda: Case(upper=False),
    "punctuation:no_comma": lambda: Count(",", 1, 1, "less than"),
}
"""By name; the arguments are called as in the `kwargs` of IFEval."""


def _check(kind: str, arguments: Mapping[str, Any]) -> Check:
    try:
        return INSTRUCTIONS[kind](**arguments)
    except (AttributeError, TypeError) as error:
        raise UsageError(
            f"instruction {kind!r} does not take the arguments {dict(arguments)} ({error}); give those of IFEval"
        ) from error


class Instructions(TextReward):
    """Share of instructions that the text follows; an empty text follows none.

    instructions: pairs of a name out of `INSTRUCTIONS` and its arguments. "In English" is not checked.
    """

    def __init__(self, instructions: Sequence[tuple[str, Mapping[str, Any]]], name: str = "instructions") -> None:
        if not instructions:
            raise UsageError("instructions=[]: give at least one")
        for kind, _ in instructions:
            if kind not in INSTRUCTIONS:
                raise UsageError(f"instruction {kind!r} is not known; choose from {', '.join(INSTRUCTIONS)}")
        self.name = name
        self._checks = [_check(kind, arguments) for kind, arguments in instructions]

    def empty(self) -> tuple[bool, tuple[Any, ...]]:
        """Whether there is more than spaces, and the notes of the checks."""
        return False, tuple(check.empty() for check in self._checks)

    def read(self, notes: tuple[bool, tuple[Any, ...]], piece: str) -> tuple[bool, tuple[Any, ...]]:
        read = tuple(check.read(note, piece) for check, note in zip(self._checks, notes[1], strict=True))
        return notes[0] or bool(piece.strip()), read

    def worth(self, notes: tuple[bool, tuple[Any, ...]]) -> tuple[float, float]:
        bounds = list(map(lambda check, note: check.bounds(note), self._checks, notes[1]))
        return self._share(low for low, _ in bounds), self._share(high for _, high in bounds)

    def likely(self, notes: tuple[bool, tuple[Any, ...]]) -> float:
        """What is met, and how far the rest is."""
        return self._share(map(lambda check, note: check.progress(note), self._checks, notes[1]))

    def final(self, notes: tuple[bool, tuple[Any, ...]]) -> float:
        return self._share(self._met(notes))

    def _met(self, notes: tuple[bool, tuple[Any, ...]]) -> list[bool]:
        return [notes[0] and check.met(note) for check, note in zip(self._checks, notes[1], strict=True)]

    def followed(self, text: str) -> list[bool]:
        """Which instructions a whole text follows."""
        return self._met(self.read(self.empty(), text))

    def _share(self, values: Iterable[float]) -> float:
        return math.fsum(values) / len(self._checks)
