"""What the peers' own code answers to a task's problem: its-hub and treequest, for `benchmarks/tasks.py --methods`.

    pip install -e '.[peers,tasks]' treequest==0.3.3      # an environment of its own is best

They run in this process, on the same model and with the same reward of the text so far as every other method, at
temperature 1, with as many paths as `--budget` says:
- its-hub best-of-n: n whole answers. Where all are equal, it asks no reward.
- its-hub particle filter: n particles by steps of 16 tokens, weights reward / (1 - reward), resampled after each step.
- treequest AB-MCTS-A: n answers, each from the prompt or as a second turn that shows an answer and its score and asks
  for a better one.
Both talk to a model that takes a text and continues it, so each of their requests sends all tokens of its text through
the model again. These count, as they would at a server without a prefix cache; padding of the batch does not.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peers import its_hub_rewards, its_hub_server
from transformers import StoppingCriteriaList

from dts.models.huggingface import HFModel
from dts.rewards import Context, Finished, Prompt, Reward

STEP = 16  # tokens between two resamplings
END = "\u0003"  # after a text that ended by itself: its-hub knows the end of a text by what stands in it
BETTER = "This answer has a score of {:.2f}; 1 is best. Write a better one."


@dataclass
class Model:
    """Continues a prompt, and counts."""

    lm: HFModel
    prompt: Prompt
    stop: tuple[str, ...]
    tokens: int = 0  # positions that went through the model, those of prompts each time

    def complete(self, texts: list[str], limit: int) -> list[str]:
        """What follows the prompt and each of these beginnings of an answer."""
        head = self.lm.encode(self.prompt)
        return self.follow([head + self.ids(text) for text in texts], limit)

    def ids(self, text: str) -> list[int]:
        return list(self.lm.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def follow(self, prompts: list[list[int]], limit: int) -> list[str]:
        pad, longest = self.lm.tokenizer.eos_token_id, max(map(len, prompts))
        rows = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])

        def stopped(ids: torch.Tensor, _: Any, **options: Any) -> torch.Tensor:
            texts = [self.lm.decode(row[longest:].tolist()) for row in ids]
            return torch.tensor([any(stop in text for stop in self.stop) for text in texts], device=ids.device)

        out = self.lm.model.generate(
            input_ids=rows.to(self.lm.device), attention_mask=mask.to(self.lm.device), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, max_new_tokens=limit, pad_token_id=pad, eos_token_id=sorted(self.lm.eos_ids),
            stopping_criteria=StoppingCriteriaList([stopped] if self.stop else []),
        )  # fmt: skip
        return [self._text(ids, new) for ids, new in zip(prompts, out[:, longest:].tolist(), strict=True)]

    def _text(self, ids: list[int], new: list[int]) -> str:
        """Cut at its end; what went through the model for it is counted."""
        end = next((place for place, token in enumerate(new) if token in self.lm.eos_ids), len(new))
        text = self.lm.decode(new[:end])
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        drawn = end if places or end == len(new) else end + 1  # after a stop the rest is padding
        self.tokens += len(ids) + drawn - 1  # the last token is not read
        return text[: min(places)] + END if places else text + END * (end < len(new))


def judge(lm: HFModel, prompt: Prompt, reward: Reward) -> Callable[[str], float]:
    """The reward of a text, as of a finished one."""
    context = Context(prompt, tuple(lm.encode(prompt)), lm.decode)

    def judged(text: str) -> float:
        text = text.replace(END, "")
        if hasattr(reward, "score_text"):
            return float(reward.score_text(text))
        return float(reward.finish([reward.start(context)], [Finished((), text)])[0])

    return judged


def best_of_n(model: Model, reward: Callable[[str], float], n: int, limit: int) -> str:
    from its_hub import BestOfN
    from its_hub.core.orchestrator import LMOrchestrator

    whole, _ = its_hub_rewards(reward)
    server = its_hub_server()(model.complete, batched=True, max_tokens=limit)
    return str(BestOfN(whole, LMOrchestrator(max_concurrency=-1)).infer(server, "", n)["content"])


def particle_filter(model: Model, reward: Callable[[str], float], n: int, limit: int) -> str:
    from its_hub.core.algorithms.particle_gibbs import ParticleFiltering
    from its_hub.core.lms.step_generation import StepGeneration

    _, by_steps = its_hub_rewards(reward)
    server = its_hub_server()(model.complete, batched=True)
    # It makes one step more than max_steps.
    steps = StepGeneration(max_steps=max(limit // STEP, 1) - 1, tokens_per_step=min(STEP, limit), temperature=1.0,
                           stop_token=END)  # fmt: skip
    return str(ParticleFiltering(steps, by_steps).infer(server, "", n)["content"])


def ab_mcts(model: Model, reward: Callable[[str], float], n: int, limit: int) -> str:
    import treequest

    def generate(parent: str | None) -> tuple[str, float]:
        ids = model.lm.encode(model.prompt if parent is None else followed_up(model.prompt, parent, reward(parent)))
        (text,) = model.follow([ids], limit)
        return text, reward(text)

    algorithm = treequest.ABMCTSA()
    tree = algorithm.init_tree()
    for _ in range(n):
        tree = algorithm.step(tree, {"answer": generate}, inplace=True)
    ((best, _),) = treequest.top_k(tree, algorithm, k=1)
    return str(best)


def followed_up(prompt: Prompt, answer: str, score: float) -> list[dict[str, str]]:
    """The conversation after an answer."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [*turns, {"role": "assistant", "content": answer.replace(END, "")},
            {"role": "user", "content": BETTER.format(score)}]  # type: ignore[list-item]  # fmt: skip


PEERS: dict[str, Callable[[Model, Callable[[str], float], int, int], str]] = {
    "its-hub best-of-n": best_of_n,
    "its-hub particle filter": particle_filter,
    "treequest AB-MCTS": ab_mcts,
}


def answered(
    name: str, lm: HFModel, prompt: Prompt, reward: Reward, n: int, limit: int, stop: tuple[str, ...], seed: int
) -> dict[str, Any]:
    """The answer of a peer, in the fields of a record of `benchmarks/tasks.py`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model, judged = Model(lm, prompt, stop), judge(lm, prompt, reward)
    text = PEERS[name](model, judged, n, limit)
    plain = text.replace(END, "")
    ids = model.ids(plain)[:limit]
    head = lm.encode(prompt)
    return {
        "text": plain, "reward": judged(plain), "logprob": log_prob(lm, head, ids), "n_tokens": len(ids),
        "prompt_tokens": len(head), "tokens": model.tokens - len(head), "rollouts": n,
    }  # fmt: skip


@torch.inference_mode()
def log_prob(lm: HFModel, head: list[int], ids: list[int]) -> float:
    """Of the text, without the token that ends it. This pass is not the peer's, and not counted."""
    if not ids:
        return 0.0
    logits = lm.model(torch.tensor([head + ids], device=lm.device)).logits[0, len(head) - 1 : -1].double()
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(ids, device=lm.device)[:, None]).sum())
