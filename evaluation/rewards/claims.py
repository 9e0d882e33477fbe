"""Claims in a text, checked against facts that were computed from the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dts.evaluation.rewards.text import TextReward

# "isn't" is read as "isn" and "t".
NEGATIONS = frozenset(
    {"not", "no", "non", "never", "without", "neither", "nor", "cannot", "isn", "aren", "wasn", "weren", "doesn", "don",
     "didn", "hasn", "haven", "hadn", "couldn", "wouldn"}
)  # fmt: skip
LONGEST = 32  # characters of a word that are kept; longer ones are in no vocabulary
WAITING = 4  # claims of a sentence that may wait for their subject


@dataclass(frozen=True, slots=True)
class Claimed:
    """Notes of `ClaimReward`."""

    word: str = ""  # the one that may continue
    before: tuple[str, ...] = ()  # at most three words before it, in this sentence
    subject: str = ""  # the fact that this sentence speaks of now
    waiting: tuple[str, ...] = ()  # claims whose subject may follow: "a gentle breeze"
    right: frozenset[str] = frozenset()  # facts claimed rightly
    wrong: frozenset[str] = frozenset()  # facts claimed wrongly


class ClaimReward(TextReward):
    """Share of facts that the text states rightly, each judged by its first claim; in [0, 1].

    `vocabulary` maps fact -> claim -> words, or pairs of words, that make the claim; `facts` maps fact -> true claim.
    `subjects` maps fact -> words: a claim about such a fact counts only in a sentence with one of them, for the
    nearest subject before it, or else the next one after it. Facts without subjects are claimed anywhere. A claim
    one or two words after a negation is no claim. A fact never claimed earns nothing; a wrong first claim cannot be
    taken back, so the reward is monotone.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, Mapping[str, Sequence[str]]],
        facts: Mapping[str, str],
        subjects: Mapping[str, Sequence[str]] | None = None,
        name: str = "faithfulness",
    ) -> None:
        self.name = name
        self._facts = dict(facts)
        named = {fact: words for fact, words in (subjects or {}).items() if fact in facts}
        self._subjects = {word: fact for fact, words in named.items() for word in words}
        self._claims: dict[str, dict[str, str]] = {}  # phrase -> fact -> claim
        for fact in facts:
            for claim, phrases in vocabulary[fact].items():
                for phrase in phrases:
                    self._claims.setdefault(phrase, {})[fact] = claim
        self._free = {phrase: [f for f in known if f not in named] for phrase, known in self._claims.items()}

    def empty(self) -> Claimed:
        return Claimed()

    def read(self, notes: Claimed, piece: str) -> Claimed:
        for character in piece.lower():
            if character.isalpha():
                notes = replace(notes, word=(notes.word + character)[:LONGEST])
                continue
            if notes.word:
                notes = self._close(notes)
            if character in ".!?;\n":
                notes = replace(notes, before=(), subject="", waiting=())
        return notes

    def _close(self, notes: Claimed) -> Claimed:
        """Notes after the end of a word."""
        word, before = notes.word, notes.before
        if word == "t" and NEGATIONS & set(before[-1:]):
            return replace(notes, word="")
        notes = replace(notes, word="", before=(*before, word)[-3:])
        if word in self._subjects:
            notes = self._enter(notes, self._subjects[word])
        phrase = next((text for text in (" ".join((*before[-1:], word)), word) if text in self._claims), "")
        start = len(before) - 1 if phrase != word else len(before)
        if not phrase or NEGATIONS & set(before[max(start - 2, 0) : start]):
            return notes
        for fact in self._free[phrase]:
            notes = self._judge(notes, fact, phrase)
        if notes.subject in self._claims[phrase]:
            return self._judge(notes, notes.subject, phrase)
        return replace(notes, waiting=(*notes.waiting, phrase)[-WAITING:])

    def _enter(self, notes: Claimed, fact: str) -> Claimed:
        """Notes after a subject: the claims that waited for it are made, the others wait on."""
        for phrase in notes.waiting:
            if fact in self._claims[phrase]:
                notes = self._judge(notes, fact, phrase)
        rest = tuple(phrase for phrase in notes.waiting if fact not in self._claims[phrase])
        return replace(notes, subject=fact, waiting=rest)

    def _judge(self, notes: Claimed, fact: str, phrase: str) -> Claimed:
        if fact in notes.right or fact in notes.wrong:
            return notes
        if self._facts[fact] == self._claims[phrase][fact]:
            return replace(notes, right=notes.right | {fact})
        return replace(notes, wrong=notes.wrong | {fact})

    def worth(self, notes: Claimed) -> tuple[float, float]:
        count = len(self._facts)
        return len(notes.right) / count, (count - len(notes.wrong)) / count

    def final(self, notes: Claimed) -> float:
        return self.worth(self._close(notes) if notes.word else notes)[0]

    def claimed(self, text: str) -> Claimed:
        """What a whole text claims."""
        notes = self.read(Claimed(), text)
        return self._close(notes) if notes.word else notes
