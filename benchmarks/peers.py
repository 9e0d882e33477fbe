"""CPU seconds per 100 returned tokens beside peers, as ratios to plain `model.generate(num_return_sequences=N)`.

    python benchmarks/peers.py                                                  # tiny random Llama, a few minutes
    python benchmarks/peers.py --model smollm2-135m --tokens 64 --patience 20   # slow peers run once

Needs the `peers` extra (`pip install -e '.[peers]'`, an environment of its own is best); what is missing is named and
left out. Everything runs in one process, on one thread, on the same Hugging Face model object, in turn within each
repetition, with a fresh prompt of exact length; ratios are medians over repetitions. The output layer gets a bias that
rules out the end token, so that all completions have the same length and no implementation pays for enforcing it.
All guided methods see the same reward, of the text so far.

How each peer is run, so that its own overhead is measured and not a clumsy set-up:
- genlm-control and llamppl: SMC token by token, twisted by the reward, resampling below half the effective sample size,
  batch size N, so that no step waits for a time-out. "cached": `cache_kv(prompt)` first, inside the measured time.
- its-hub talks to a server. Here the server is an adapter around `model.generate` in this process. Like any client of a
  completion server its-hub sends the whole text at every call, and the adapter runs it from the start. "batched": the
  adapter answers concurrent requests in one `generate` call; otherwise one after the other.
MaxEnt makes two waves of N / 2 rollouts by its own default, which costs two short batches instead of one; with 4N
rollouts it makes four waves of N. Its completions share prefixes; returned tokens count each completion in full, as
they do for resampled particles of every implementation.
`forwarded` counts token positions (padding included) that entered the transformer per returned token.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import dts
from dts.models.huggingface import HFModel
from dts.search import BestOfN, MaxEnt, ParticleFilter, Sampling

SCALE = 20.0  # lambda: SMC resamples a few times per run
STEP = 16  # tokens between two resamplings, where a method resamples by steps
WAVES = 4  # of the longer MaxEnt search
GENERATE = "generate"

Run = Callable[[list[int], int], int]  # (prompt ids, new tokens per path) -> tokens returned


def reward(text: str) -> float:
    """The share of vowels. In [0, 1], as its-hub wants it."""
    return sum(map(text.count, "aeiou")) / max(1, len(text))


# -- the models ----------------------------------------------------------------------------------------------------


def tiny_llama() -> HFModel:
    """Random weights and one token per printable character, so that text sent again has as many tokens as before."""
    characters = {chr(code): code - 32 for code in range(32, 127)}
    backend = Tokenizer(models.BPE(vocab=characters, merges=[]))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, eos_token_id=95,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024)  # fmt: skip
    return HFModel(LlamaForCausalLM(config), tokenizer, "tiny-llama")


def never_end(lm: HFModel) -> None:
    """Rule out the end tokens by a bias on the output layer."""
    old = lm.model.get_output_embeddings()
    head = torch.nn.Linear(old.in_features, old.out_features, dtype=old.weight.dtype)
    head.weight = old.weight
    head.bias = torch.nn.Parameter(torch.zeros_like(head.bias), requires_grad=False)
    head.bias[sorted(lm.eos_ids | {lm.tokenizer.eos_token_id})] = -1e4
    lm.model.set_output_embeddings(head)


class Prompts:
    """Random prompts of exact length whose text encodes back to the same ids."""

    def __init__(self, lm: HFModel) -> None:
        texts = {i: lm.tokenizer.decode([i]) for i in range(len(lm.tokenizer))}
        words = {i: text for i, text in texts.items() if re.fullmatch(" [a-z]+", text)}
        words = words or {i: text for i, text in texts.items() if re.fullmatch("[a-z]", text)}
        self._lm, self._words = lm, [i for i, text in words.items() if lm.encode(text) == [i]]

    def draw(self, length: int, seed: int) -> list[int]:
        ids = random.Random(seed).choices(self._words, k=length)
        assert self._lm.encode(self._lm.decode(ids)) == ids
        return ids


class Positions:
    """Counts token positions that enter the transformer."""

    def __init__(self, lm: HFModel) -> None:
        self.count = 0
        lm.decoder.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        ids = arguments[0] if arguments else options["input_ids"]
        self.count += ids.numel()


# -- implementations -----------------------------------------------------------------------------------------------


def plain(lm: HFModel, paths: int) -> dict[str, Run]:
    @torch.inference_mode()
    def generate(ids: list[int], tokens: int) -> int:
        out = lm.model.generate(
            torch.tensor([ids]), do_sample=True, num_return_sequences=paths, max_new_tokens=tokens, top_k=0, top_p=1.0,
            temperature=1.0, pad_token_id=lm.tokenizer.eos_token_id,
        )  # fmt: skip
        return out[:, len(ids) :].numel()

    return {GENERATE: generate}


def ours(lm: HFModel, paths: int) -> dict[str, Run]:
    methods = {
        "Sampling": Sampling(paths),
        "BestOfN": BestOfN(paths),
        "ParticleFilter, by token": ParticleFilter(paths, reward_scale=SCALE, segment=1),
        f"ParticleFilter, by {STEP} tokens": ParticleFilter(paths, reward_scale=SCALE, segment=STEP),
        "MaxEnt": MaxEnt(paths, reward_scale=SCALE),
        f"MaxEnt, {WAVES}N rollouts": MaxEnt(WAVES * paths, reward_scale=SCALE),
    }

    def runner(method: Any) -> Run:
        def run(ids: list[int], tokens: int) -> int:
            scored = None if isinstance(method, Sampling) and not isinstance(method, BestOfN) else reward
            width = paths if isinstance(method, MaxEnt) and method.rollouts > paths else None
            result = dts.decode(lm, ids, reward=scored, method=method, max_new_tokens=tokens, batch_size=width)
            assert result.usage.forwarded_tokens == result.usage.unique_tokens
            return sum(rollout.length for rollout in result.rollouts)

        return run

    return {f"ours: {name}": runner(method) for name, method in methods.items()}


def genlm_control(lm: HFModel, paths: int) -> dict[str, Run]:
    from genlm.backend.llm import AsyncTransformer
    from genlm.control import Potential, PromptedLLM, direct_token_sampler

    class Letters(Potential):
        """The twist of a prefix."""

        async def prefix(self, context: list[Any]) -> float:
            return SCALE * reward(b"".join(context).decode(errors="replace"))

        async def complete(self, context: list[Any]) -> float:
            return await self.prefix(context)

    backend = AsyncTransformer(lm.model, lm.tokenizer, batch_size=paths)
    potential = PromptedLLM(backend)
    critic, sampler = Letters(potential.vocab), direct_token_sampler(potential)

    async def smc(ids: list[int], tokens: int, cached: bool) -> int:
        potential.prompt_ids = ids
        if cached:
            backend.cache_kv(ids)
        # max_tokens includes its end marker, which costs a forward pass and is counted as a returned token here.
        found = await sampler.smc(n_particles=paths, ess_threshold=0.5, max_tokens=tokens, critic=critic)
        backend.clear_cache()
        return sum(map(len, found.contexts))

    return {
        "genlm-control: SMC": lambda ids, tokens: asyncio.run(smc(ids, tokens, False)),
        "genlm-control: SMC, cached": lambda ids, tokens: asyncio.run(smc(ids, tokens, True)),
    }


def llamppl(lm: HFModel, paths: int) -> dict[str, Run]:
    from genlm.backend.llm import AsyncTransformer
    from llamppl import CachedCausalLM, LMContext, Model, smc_standard

    model = CachedCausalLM(AsyncTransformer(lm.model, lm.tokenizer, batch_size=paths))

    class Letters(Model):
        def __init__(self, prompt: str, tokens: int) -> None:
            super().__init__()
            self.context, self.tokens = LMContext(model, prompt), tokens

        async def step(self) -> None:
            await self.sample(self.context.next_token())
            value = SCALE * reward(lm.decode(self.context.tokens[self.context.prompt_token_count :]))
            if self.context.token_count == self.tokens:
                self.score(value)
                self.finish()
            else:
                self.twist(value)

    def smc(ids: list[int], tokens: int, cached: bool) -> int:
        if cached:
            model.cache_kv(ids)
        particles = asyncio.run(smc_standard(Letters(lm.decode(ids), tokens), paths, ess_threshold=0.5))
        model.clear_cache()
        return sum(particle.context.token_count for particle in particles)

    return {
        "llamppl: SMC": lambda ids, tokens: smc(ids, tokens, False),
        "llamppl: SMC, cached": lambda ids, tokens: smc(ids, tokens, True),
    }


def its_hub_server() -> Any:
    """Class of servers that answer by a function of this process."""
    from its_hub import AbstractLanguageModel

    @dataclass
    class Server(AbstractLanguageModel):
        """Completes the text it is sent. `batched`: concurrent single requests are answered together."""

        complete: Callable[[list[str], int], list[str]]  # (texts, new tokens of each) -> what follows them
        batched: bool
        max_tokens: int = 0
        _waiting: list[tuple[str, asyncio.Future[dict[str, str]]]] = field(default_factory=list)

        async def agenerate(self, messages: Any, stop: Any = None, **options: Any) -> list[dict[str, str]]:
            texts = ["".join(part.content for part in conversation) for conversation in messages]
            return self._answers(texts, options["max_completion_tokens"])

        async def agenerate_single(self, messages: Any, stop: Any = None, **options: Any) -> dict[str, str]:
            text = "".join(part.content for part in messages)
            if not self.batched:
                return self._answers([text], self.max_tokens)[0]
            answer = asyncio.get_running_loop().create_future()
            self._waiting.append((text, answer))
            count = 0
            while count < len(self._waiting):  # let the other requests arrive
                count = len(self._waiting)
                await asyncio.sleep(0)
            if self._waiting:
                texts, answers = zip(*self._waiting, strict=True)
                self._waiting.clear()
                for future, completed in zip(answers, self._answers(list(texts), self.max_tokens), strict=True):
                    future.set_result(completed)
            return await answer

        def _answers(self, texts: list[str], tokens: int) -> list[dict[str, str]]:
            return [{"role": "assistant", "content": text} for text in self.complete(texts, tokens)]

    return Server


def its_hub_rewards(reward: Callable[[str], float]) -> tuple[Any, Any]:
    """`reward` of whole answers, and of steps."""
    from its_hub import AbstractOutcomeRewardModel, AbstractProcessRewardModel

    class Whole(AbstractOutcomeRewardModel):
        def score(self, messages: Any, **options: Any) -> list[float]:
            return [reward(conversation[-1].content) for conversation in messages]

        async def ascore(self, messages: Any, orchestrator: Any = None, **options: Any) -> list[float]:
            return self.score(messages)

    class Steps(AbstractProcessRewardModel):
        def score(self, prompt: Any, steps: list[str]) -> list[float]:
            return [reward(text) for text in steps]

        async def ascore(self, prompt: Any, steps: list[str]) -> list[float]:
            return self.score(prompt, steps)

    return Whole(), Steps()


@dataclass
class Completions:
    """By `generate`, from texts that are tokenized anew each time."""

    lm: HFModel
    returned: int = 0  # tokens

    @torch.inference_mode()
    def __call__(self, texts: list[str], tokens: int) -> list[str]:
        batch = self.lm.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        out = self.lm.model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=True, temperature=1.0,
            max_new_tokens=tokens, top_k=0, top_p=1.0, pad_token_id=self.lm.tokenizer.eos_token_id,
        )  # fmt: skip
        new = out[:, batch["input_ids"].shape[1] :]
        self.returned += new.numel()
        return self.lm.tokenizer.batch_decode(new)


def its_hub(lm: HFModel, paths: int) -> dict[str, Run]:
    from its_hub import BestOfN
    from its_hub.core.algorithms.particle_gibbs import ParticleFiltering
    from its_hub.core.lms.step_generation import StepGeneration
    from its_hub.core.orchestrator import LMOrchestrator

    server_class, (whole, by_steps) = its_hub_server(), its_hub_rewards(reward)

    def best_of_n(ids: list[int], tokens: int, batched: bool) -> int:
        complete = Completions(lm)
        server = server_class(complete, batched, tokens)
        algorithm = BestOfN(whole, LMOrchestrator(max_concurrency=-1))
        result = algorithm.infer(server, lm.decode(ids), paths, return_response_only=False)
        assert len(result.responses) == paths
        return complete.returned

    def particle_filter(ids: list[int], tokens: int) -> int:
        complete = Completions(lm)
        server = server_class(complete, batched=True)
        # It makes one step more than max_steps.
        steps = StepGeneration(max_steps=tokens // STEP - 1, tokens_per_step=STEP, temperature=1.0)
        found = ParticleFiltering(steps, by_steps).infer(server, lm.decode(ids), paths, return_response_only=False)
        assert len(found.responses) == paths
        return complete.returned

    return {
        "its-hub: best-of-N": lambda ids, tokens: best_of_n(ids, tokens, False),
        "its-hub: best-of-N, batched": lambda ids, tokens: best_of_n(ids, tokens, True),
        f"its-hub: particle filter, by {STEP} tokens": particle_filter,
    }


PEERS: dict[str, Callable[[HFModel, int], dict[str, Run]]] = {
    "genlm-control": genlm_control,
    "llamppl": llamppl,
    "its-hub": its_hub,
}


def implementations(lm: HFModel, paths: int) -> dict[str, Run]:
    """Everything that can run here; says what cannot."""
    found = plain(lm, paths) | ours(lm, paths)
    for package, build in PEERS.items():
        try:
            emit(peer=package, version=importlib.metadata.version(package))
            found |= build(lm, paths)
        except ImportError as error:  # PackageNotFoundError is one
            emit(peer=package, skipped=f"{type(error).__name__}: {error}; pip install 'maxent-decoding[peers]'")
    return found


# -- measuring -----------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """One implementation, one size; one entry per repetition."""

    cpu: list[float] = field(default_factory=list)  # seconds per 100 returned tokens
    wall: list[float] = field(default_factory=list)
    forwarded: list[float] = field(default_factory=list)  # positions per returned token
    seconds: float = 0.0  # CPU seconds of the last run


@contextmanager
def clocks() -> Iterator[list[float]]:
    taken: list[float] = []
    cpu, wall = time.process_time(), time.perf_counter()
    yield taken
    taken += [time.process_time() - cpu, time.perf_counter() - wall]


def measure(
    runs: dict[str, Run], prompts: Prompts, positions: Positions, prompt: int, tokens: int, options: argparse.Namespace
) -> dict[str, Figures]:
    """All implementations in turn, each with a prompt of its own; slow ones are not repeated."""
    figures = {name: Figures() for name in runs}
    for repetition in range(options.repeats):
        for index, (name, run) in enumerate(runs.items()):
            mine = figures[name]
            if mine.seconds > options.patience:
                continue
            ids = prompts.draw(prompt, 1000 * repetition + index)
            positions.count = 0
            with clocks() as taken:
                returned = run(ids, tokens)
            assert returned % (options.paths * tokens) == 0, f"{name} returned {returned} tokens"
            mine.seconds = taken[0]
            mine.cpu.append(100 * taken[0] / returned)
            mine.wall.append(100 * taken[1] / returned)
            mine.forwarded.append(positions.count / returned)
    return figures


def report(figures: dict[str, Figures], **size: Any) -> dict[str, float]:
    """One line per implementation; returns the ratios to plain generate."""
    base = figures[GENERATE]
    ratios = {}
    for name, mine in figures.items():
        ratios[name] = statistics.median(a / b for a, b in zip(mine.cpu, base.cpu, strict=False))
        emit(
            case=name, to_generate=ratios[name], cpu_per_100=statistics.median(mine.cpu),
            wall_per_100=statistics.median(mine.wall), forwarded=statistics.median(mine.forwarded),
            repeats=len(mine.cpu), **size,
        )  # fmt: skip
    return ratios


def table(columns: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(columns.values())))
    lines = ["| CPU time per returned token, generate = 1 | " + " | ".join(columns) + " |"]
    lines.append("|---" + "|---:" * len(columns) + "|")
    for name in names:
        lines.append(f"| {name} | " + " | ".join(f"{column[name]:.2f}" for column in columns.values()) + " |")
    return "\n".join(lines)


def emit(**record: Any) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llama", help="tiny-llama or whatever dts.load knows")
    parser.add_argument("--prompt", type=int, nargs="+", default=[16, 256], help="prompt tokens")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 192], help=f"new tokens, multiples of {STEP}")
    parser.add_argument("--paths", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without", nargs="+", default=[], help="names of implementations to leave out")
    parser.add_argument("--patience", type=float, default=1e9, help="CPU seconds beyond which a run is not repeated")
    options = parser.parse_args()
    if any(tokens % STEP or tokens < STEP for tokens in options.tokens):
        parser.error(f"--tokens must be multiples of {STEP}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    lm = tiny_llama() if options.model == "tiny-llama" else dts.load(options.model)
    never_end(lm)
    prompts, positions, runs = Prompts(lm), Positions(lm), implementations(lm, options.paths)
    runs = {name: run for name, run in runs.items() if name == GENERATE or name not in options.without}
    for run in runs.values():  # warm-up, with our self-check of the architecture
        run(prompts.draw(8, 0), STEP)
    columns = {}
    for prompt in options.prompt:
        for tokens in options.tokens:
            figures = measure(runs, prompts, positions, prompt, tokens, options)
            columns[f"{prompt} + {tokens}"] = report(
                figures, prompt=prompt, length=tokens, paths=options.paths, model=options.model, threads=1
            )
    print(f"\n{options.model}, {options.paths} paths, columns: prompt + new tokens\n\n{table(columns)}")


if __name__ == "__main__":
    main()
