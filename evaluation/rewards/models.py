"""Two rewards that another model gives, under their older names; `dts.ModelReward` has more kinds."""

from __future__ import annotations

from typing import Any

from dts.models.readings import COMPLETION, WHOLE
from dts.models.rewards import ModelReward


class ClassifierReward(ModelReward):
    """Score of a sequence-classification model: the probability of `label`, or a reward model's raw output.

    `label` is a name or an index of the model's labels; None takes the single output of a reward model as it is.
    `with_prompt` puts the prompt before the completion, by the tokenizer's chat template where the prompt is messages.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        label: str | int | None,
        *,
        with_prompt: bool = False,
        batch_size: int = 16,
        name: str = "classifier",
    ) -> None:
        kind: dict[str, Any] = {"kind": "scalar"} if label is None else {"kind": "classifier", "label": label}
        template = WHOLE if with_prompt else COMPLETION
        super().__init__(model, tokenizer, **kind, template=template, batch_size=batch_size, name=name)


class LikelihoodReward(ModelReward):
    """Mean log-probability per token, in nats, that a language model gives to the completion after the prompt.

    At most 0; -perplexity's logarithm. `lm` comes from `dts.load` and may be another model than the one that decodes,
    with its own tokenizer. An empty completion has the log-probability of ending at once.
    """

    def __init__(self, lm: Any, *, batch_size: int = 8, name: str = "likelihood") -> None:
        super().__init__(lm.model, lm.tokenizer, "likelihood", batch_size=batch_size, name=name)
