"""How a model's outputs become a reward: which text it sees, at which places it is read, and what the numbers mean.

One function for each kind of reward model; its options are those of the kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dts.errors import UsageError, shown

Template = str | Sequence[dict[str, str]]
Read = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]

COMPLETION = "{completion}"  # the completion alone
WHOLE = "{prompt}{completion}"  # after its prompt; of chat messages by the chat template
JUDGED = "{prompt}\n\nReply: {completion}\n\nIs this a good reply? Answer Yes or No.\nAnswer:"


def _last(ids: Sequence[int], start: int) -> Sequence[int]:
    return (len(ids) - 1,)


def _only(values: Sequence[float]) -> float:
    return values[-1]


def _as_it_is(text: str) -> str:
    return text


@dataclass(frozen=True, slots=True)
class Reading:
    """What is read, and how."""

    read: Read  # outputs [n, V] and the tokens after them, -1 for none -> [n]
    template: Template
    places: Callable[[Sequence[int], int], Sequence[int]] = _last  # positions in the ids; the completion's start
    combine: Callable[[Sequence[float]], float] = _only
    bounds: tuple[float, float] = (-math.inf, math.inf)
    marked: Callable[[str], str] = _as_it_is  # a completion as the model was trained to see it
    whole: bool = False  # reads the token that ends a sequence, too, and nothing after it


# -- heads -------------------------------------------------------------------------------------------------------------


def classifier(model: Any, tokenizer: Any, *, label: str | int) -> Reading:
    """The probability of a label, by its name or index."""
    index = _label_index(model.config, label)

    def read(outputs: torch.Tensor, following: Sequence[int]) -> torch.Tensor:
        chances = outputs.sigmoid() if outputs.shape[-1] == 1 else outputs.softmax(-1)
        return chances[:, index]

    return Reading(read, COMPLETION, bounds=(0.0, 1.0))


def scalar(model: Any, tokenizer: Any) -> Reading:
    """The only output of a reward model, as it is, after prompt and completion."""
    labels = model.config.id2label
    if len(labels) != 1:
        raise UsageError(
            f"kind='scalar' takes the output of a reward model; this model has {len(labels)} labels: give "
            f"kind='classifier' and label= one of {', '.join(map(str, labels.values()))}"
        )
    return Reading(lambda outputs, following: outputs[:, 0], WHOLE)


def _label_index(config: Any, label: str | int) -> int:
    names = {int(index): str(name) for index, name in config.id2label.items()}
    found = [index for index, name in names.items() if label in (index, name)]
    if not found:
        raise UsageError(f"label={label!r} is none of the model's labels {', '.join(names.values())}")
    return found[0]


# -- process reward models ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Steps:
    """How a process reward model was trained to see steps, and where it says what they are worth.

    The probability of a good step is read at `marker`, which follows each step: of `good` against `bad` where these are
    tokens, else of the head's second label.
    """

    separator: str  # between steps of a completion
    marker: str
    between: str = ""  # from a marker to the next step
    good: str | None = None
    bad: str | None = None
    template: Template = WHOLE

    def mark(self, completion: str) -> str:
        """The completion with a marker after each step, an unfinished last one included."""
        steps = [step.strip() for step in completion.split(self.separator) if step.strip()] or [""]
        return self.between.join(step + self.marker for step in steps)


_QWEN_CHAT = (
    {"role": "system", "content": "Please reason step by step, and put your final answer within \\boxed{}."},
    {"role": "user", "content": "{prompt}"},
    {"role": "assistant", "content": "{completion}"},
)
PRESETS = {
    "qwen2.5-math-prm": Steps("\n\n", "<extra_0>", template=_QWEN_CHAT),
    "math-shepherd": Steps("\n", " ки", "\n", good="+", bad="-", template="{prompt} {completion}"),
}
AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "product": math.prod,
    "mean": lambda values: math.fsum(values) / len(values),
    "last": _only,
}


def prm(model: Any, tokenizer: Any, *, steps: str | Steps, aggregate: str = "min") -> Reading:
    """A process reward model: the probabilities of its steps, in one number.

    steps: a preset's name, or `Steps`. aggregate: min, product, mean or last.
    """
    if isinstance(steps, str) and steps not in PRESETS:
        raise UsageError(f"steps={shown(steps)} is not known; give one of {', '.join(PRESETS)}, or Steps(...)")
    if aggregate not in AGGREGATES:
        raise UsageError(f"aggregate={shown(aggregate)} is not known; give one of {', '.join(AGGREGATES)}")
    form = PRESETS[steps] if isinstance(steps, str) else steps
    marker = _ids(tokenizer, form.marker)[-1]
    if form.good is not None and form.bad is not None:
        columns = [_ids(tokenizer, form.bad)[-1], _ids(tokenizer, form.good)[-1]]
    elif len(model.config.id2label) == 2:
        columns = [0, 1]
    else:
        raise UsageError(f"steps={shown(steps)} needs a head with 2 labels; the model has {len(model.config.id2label)}")

    def places(ids: Sequence[int], start: int) -> list[int]:
        return [place for place in range(start, len(ids)) if ids[place] == marker]

    return Reading(lambda outputs, following: outputs[:, columns].softmax(-1)[:, 1], form.template, places,
                   AGGREGATES[aggregate], (0.0, 1.0), form.mark)  # fmt: skip


# -- language models ---------------------------------------------------------------------------------------------------


def likelihood(model: Any, tokenizer: Any, *, per_token: bool = True) -> Reading:
    """Log-probability of the completion's tokens in nats, the mean of them or, with per_token=False, their sum.

    A template puts the completion after another prompt: "A cheerful story: {completion}".
    """

    def read(outputs: torch.Tensor, following: Sequence[int]) -> torch.Tensor:
        chosen = torch.tensor(list(following), device=outputs.device)
        return outputs.log_softmax(-1).gather(1, chosen[:, None])[:, 0]

    def places(ids: Sequence[int], start: int) -> range:
        return range(max(start, 1) - 1, len(ids) - 1)  # nothing says how likely a first token is

    def combine(values: Sequence[float]) -> float:
        return math.fsum(values) / (len(values) if per_token and values else 1)

    return Reading(read, WHOLE, places, combine, (-math.inf, 0.0), whole=True)


def judge(model: Any, tokenizer: Any, *, yes: str = " Yes", no: str = " No") -> Reading:
    """Log-odds of two answers, one token each, after a question about the completion."""
    answers = [_ids(tokenizer, answer) for answer in (yes, no)]
    if any(len(ids) != 1 for ids in answers) or answers[0] == answers[1]:
        raise UsageError(f"yes={shown(yes)}, no={shown(no)} are {len(answers[0])} and {len(answers[1])} tokens of this "
                         "model; give two answers of one token each, different ones")  # fmt: skip
    (good,), (bad,) = answers
    return Reading(lambda outputs, following: outputs[:, good] - outputs[:, bad], JUDGED)


KINDS: dict[str, Callable[..., Reading]] = {
    "classifier": classifier,
    "scalar": scalar,
    "prm": prm,
    "likelihood": likelihood,
    "judge": judge,
}
VOCABULARY = frozenset(["likelihood", "judge"])  # kinds that read a language model's own logits


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise UsageError(f"{shown(text)} is no token of this model's tokenizer")
    return ids
