"""The label that a text commits to, valued by a verifier that saw only the input."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dts.evaluation.rewards.text import TextReward


def shown(label: str) -> str:
    """A label as prompts show it: words with spaces."""
    return label.replace("_", " ")


@dataclass(frozen=True, slots=True)
class Commit:
    """Notes of `LabelParser`: the end of the text so far, and the label once it is certain."""

    tail: str = ""
    label: str | None = None


class LabelParser:
    """Finds the first `<marker> <label>` of a text; what follows changes nothing.

    `marker` is a regular expression such as `answer ?:`; up to 8 spaces, quotes or stars may stand between it and
    the label. Case, and space against underscore, do not matter. A label counts as a whole word, so it is certain only
    when something else follows: "walkings" is no label, and "walking" may begin "walking upstairs".
    """

    def __init__(self, labels: Sequence[str], marker: str) -> None:
        self._labels = {_plain(label): label for label in sorted(labels, key=len, reverse=True)}
        self._marker = re.compile(rf"(?:{marker})[\W_]{{0,8}}", re.IGNORECASE)
        self._keep = max(map(len, self._labels)) + 48  # characters: marker, separators and label

    def read(self, notes: Commit, piece: str, *, last: bool = False) -> Commit:
        """Notes after more text. `last` says that no more will come, so an open label is taken as it stands."""
        if notes.label is not None:
            return notes
        text = notes.tail + piece
        for match in self._marker.finditer(text):
            rest = _plain(text[match.end() :])
            if any(name.startswith(rest) for name in self._labels) and not last:
                break  # this marker is still undecided, so later ones must wait
            label = next((label for name, label in self._labels.items() if _begins(rest, name)), None)
            if label is not None:
                return Commit("", label)
        return Commit(text[-self._keep :], None)

    def find(self, text: str) -> str | None:
        """The label that a whole text commits to."""
        return self.read(Commit(), text, last=True).label


def _begins(text: str, name: str) -> bool:
    """Whether a text starts with a name as a whole word."""
    return text.startswith(name) and not text[len(name) : len(name) + 1].isalnum()


def _plain(text: str) -> str:
    return re.sub(r"[_\s]", " ", text.lower())


class LabelReward(TextReward):
    """`format_weight` for committing to a valid label, the rest times a verifier's probability of that label.

    Both are earned when the label is complete. In [0, 1]; 0 for a text that commits to none. The probabilities come
    from the input window; they are the same whatever the right answer is.
    """

    def __init__(
        self,
        parser: LabelParser,
        probabilities: Mapping[str, float],
        format_weight: float = 0.2,
        name: str = "verifier",
    ) -> None:
        self.name = name
        self._parser = parser
        self._values = {label: format_weight + (1 - format_weight) * p for label, p in probabilities.items()}
        self._best = max(self._values.values())

    def empty(self) -> Commit:
        return Commit()

    def read(self, notes: Commit, piece: str) -> Commit:
        return self._parser.read(notes, piece)

    def worth(self, notes: Commit) -> tuple[float, float]:
        if notes.label is None:
            return 0.0, self._best
        return self._values[notes.label], self._values[notes.label]

    def final(self, notes: Commit) -> float:
        label = self._parser.read(notes, "", last=True).label
        return 0.0 if label is None else self._values[label]
