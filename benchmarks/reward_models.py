"""Tokens that pass through a reward model during a search, and whether its scores are those of plain transformers.

    python benchmarks/reward_models.py --rollouts 32 --tokens 32

The reward is a scalar head with random weights on a tiny random Llama and on SmolLM2-135M; both read the decoding
model's ids. Prompts are chat messages, given as ids: a prompt given as messages would add the tokens that close the
reply to each text that is scored. One JSON line for each reward model, prompt and search.

`sent`: tokens that the reward model read. `distinct`: tokens of the prompt and of the tree of all texts that were
scored. `rerun`: what the same scores cost when each text is read from its first token. `rerun_steps`: the same for
finished texts and those at the ends of steps (every --step tokens) alone, although the search with a value model asks
at each token. `error`: largest distance to the scores of plain transformers over --checked of the texts or more;
`spread`: standard deviation of all scores.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

import dts
from dts.evaluation.tasks import load_task
from dts.search import MaxEnt

SEARCHES = {
    "finished texts": lambda rollouts: MaxEnt(rollouts, 16.0, search="best"),
    "each token": lambda rollouts: MaxEnt(rollouts, 16.0, search="best", values="online", lookahead=0),
}


class Recorded(dts.ModelReward):
    """Remembers what was scored, and how."""

    scored: dict[tuple[int, ...], float]

    def finish(self, states: Any, finished: Any) -> list[float]:
        values = super().finish(states, finished)
        self.scored |= dict(zip((done.token_ids for done in finished), values, strict=True))
        return values


def tiny(lm: Any) -> Any:
    """A random Llama of two layers with a score head, for the vocabulary of `lm`."""
    config = LlamaConfig(
        vocab_size=lm.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=1, initializer_range=0.3,
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config).eval()


def headed(lm: Any) -> Any:
    """The decoding model's own body with a random score head."""
    model = AutoModelForSequenceClassification.from_config(tiny_config(lm)).eval()
    model.model.load_state_dict(lm.decoder.state_dict())
    return model


def tiny_config(lm: Any) -> Any:
    config = type(lm.model.config)(**lm.model.config.to_dict())
    config.num_labels = 1
    return config


MODELS = {"tiny": tiny, "smollm2": headed}


def counts(reward: Recorded, prompt: list[int], longest: int, step: int, eos: frozenset[int]) -> dict[str, int]:
    """Tokens of the ways to get the recorded scores."""
    texts = {tuple(token for token in ids if token not in eos): ids for ids in reward.scored}
    ended = [text for text, ids in texts.items() if len(ids) == longest or ids[-1] in eos]
    steps = [text for text in texts if len(text) % step == 0]
    return {
        "texts": len(texts),
        "sent": reward.tokens,
        "distinct": len(prompt) + len({text[:end] for text in texts for end in range(1, len(text) + 1)}),
        "rerun": sum(len(prompt) + len(text) for text in texts),
        "rerun_steps": sum(len(prompt) + len(text) for text in {*ended, *steps}),
    }


@torch.inference_mode()
def error(reward: Recorded, model: Any, prompt: list[int], eos: frozenset[int], checked: int) -> float:
    """Largest distance to plain transformers, over about so many texts."""
    chosen = list(reward.scored.items())[:: max(1, len(reward.scored) // checked)]
    rows = [([*prompt, *(token for token in ids if token not in eos)], value) for ids, value in chosen]
    return max(abs(float(model(torch.tensor([ids])).logits[0, 0]) - value) for ids, value in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--step", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=[*SEARCHES])
    parser.add_argument("--checked", type=int, default=64, help="texts that plain transformers reads again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lm: Any = dts.load("smollm2-135m", device="cpu")
    prompts = [lm.encode(example.prompt) for example in load_task("keyword", num_samples=options.prompts).examples]
    for name in options.models:
        model = MODELS[name](lm)
        for index, prompt in enumerate(prompts):
            for asked in options.searches:
                reward = Recorded(model, lm.tokenizer)
                reward.scored = {}
                result = dts.decode(
                    lm, prompt, reward=reward, method=SEARCHES[asked](options.rollouts), max_new_tokens=options.tokens,
                    seed=index,
                )  # fmt: skip
                row = counts(reward, prompt, options.tokens, options.step, lm.eos_ids)
                ratio = round(row["rerun_steps"] / row["sent"], 1)
                about = {"reward_model": name, "prompt": index, "prompt_tokens": len(prompt), "asked_about": asked}
                found = {"tree_tokens": len(result.tree) - 1, **row, "fewer_than_steps": ratio}
                found["spread"] = round(statistics.pstdev(reward.scored.values()), 3)
                found["error"] = error(reward, model, prompt, lm.eos_ids, options.checked)
                print(json.dumps({**about, **found}), flush=True)


if __name__ == "__main__":
    main()
