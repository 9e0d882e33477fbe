"""A trainer whose examples are trees: each goes through the model in one pass, and once more through the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

import dts
from dts.errors import UnavailableError
from dts.models.huggingface import HFModel
from dts.rewards import Prompt
from dts.training.health import Meter, Watch
from dts.training.packed import Packed, check_packing, tree_logits
from dts.training.parts import Parts
from dts.training.sampling import decoder_of, stream

try:
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments
    from trl.trainer.utils import disable_dropout_in_model, use_adapter
except ImportError as error:
    raise UnavailableError(f"training needs trl ({error}); run: pip install 'maxent-decoding[train]'") from error

REFERENCE = "ref"  # the frozen copy of a warm start's adapter, by the name that TRL gives it


class Numbers(Dataset[int]):
    """0 to n - 1: which example, for trainers that hold the examples themselves."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return index


class Objective(Protocol):
    """What is trained for."""

    def prepare(self, trainer: TreeTrainer, examples: Any) -> Sequence[Any]:
        """What the losses of an optimizer step are taken on: of each of its examples, before the first pass."""

    def loss(self, trainer: TreeTrainer, model: Any, ready: Any) -> torch.Tensor:
        """The loss of one example, a scalar. model: as it is to be called, for gradients."""


class TreeTrainer(Trainer):
    """The mean loss of the examples of a pass. Dropout is off, and the reference is where the run starts."""

    def __init__(self, examples: Sequence[Any], objective: Objective, **options: Any) -> None:
        super().__init__(train_dataset=Numbers(len(examples)), data_collator=_numbers, **options)
        self.examples, self.objective, self.meter = examples, objective, Meter()
        self._ready: dict[int, Any] = {}  # by number: what the objective prepared for this step
        self._lm: HFModel | None = None
        self._checked = 0  # positions up to which the model was seen to take trees
        self.model_accepts_loss_kwargs = False  # the loss is divided by the passes of a step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        numbers = [number for batch in batches for number in batch["numbers"].tolist()]
        ready = self.objective.prepare(self, [self.examples[number] for number in numbers])
        self._ready = dict(zip(numbers, ready, strict=True))
        return batches, items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        numbers = inputs["numbers"].tolist()
        return torch.stack([self.objective.loss(self, model, self._ready[number]) for number in numbers]).mean()

    @property
    def lm(self) -> HFModel:
        """The policy as something to decode with: one for the whole run, as its self-check is of the first weights."""
        self._lm = self._lm or decoder_of(self)
        return self._lm

    def both(self, model: Any, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the policy, and of the reference without gradients, [rows, V] each."""
        plain = self.accelerator.unwrap_model(model)
        with torch.no_grad(), use_adapter(plain, REFERENCE if REFERENCE in plain.peft_config else None):
            self._check(plain, packed)
            reference = tree_logits(plain, packed)
        return tree_logits(model, packed).float(), reference.float()

    def _check(self, model: Any, packed: Packed) -> None:
        longest = len(packed.prompt_ids) + max(packed.depths())
        if longest > self._checked:
            check_packing(model, packed)
            self._checked = longest

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # a guess from `input_ids`, which are not there

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, **self.meter.take()}, start_time)


def _numbers(examples: Sequence[int]) -> dict[str, torch.Tensor]:
    return {"numbers": torch.tensor(examples)}


def adapted(model: Any, lora: Any, arguments: dict[str, Any]) -> Any:
    """The model with a new adapter, or (lora: None) with a frozen copy of the adapter it has, as the reference."""
    if lora is not None:
        model = get_peft_model(model, lora)
    else:
        model.add_adapter(REFERENCE, model.peft_config["default"])
        for name, parameter in model.named_parameters():
            if ".default." in name:
                model.get_parameter(name.replace(".default.", f".{REFERENCE}.")).data.copy_(parameter.data)
    if arguments["gradient_checkpointing"]:
        model.enable_input_require_grads()
    disable_dropout_in_model(model)
    return model


def tree_trainer(parts: Parts, examples: Sequence[Any], objective: Objective, **arguments: Any) -> TreeTrainer:
    """A ready trainer. A warm start is its own reference. arguments: of `TrainingArguments`, over those of the run."""
    arguments = {**parts.arguments, **arguments}
    return TreeTrainer(
        examples,
        objective,
        model=adapted(parts.model, parts.lora, arguments),
        args=TrainingArguments(**arguments, remove_unused_columns=False, label_names=[]),
        processing_class=parts.tokenizer,
        callbacks=[Watch(parts.config.model)],
    )


def step_requests(trainer: TreeTrainer, prompts: Sequence[Prompt]) -> list[dts.Request]:
    """The prompts of an optimizer step; what is drawn depends on the seed and the step alone, so that a resumed run
    draws what an uninterrupted one draws."""
    key = (trainer.args.seed, trainer.state.global_step)
    return [
        dts.Request(prompt, seed=stream(*key, index, trainer.args.process_index))
        for index, prompt in enumerate(prompts)
    ]
