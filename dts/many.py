"""`decode_many`: many prompts, one batch."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dts.decoding import as_scorer, check_arguments, check_prompt, encoded, tightest
from dts.errors import DTSError, UnavailableError, UsageError, shown
from dts.lm import Batch, LanguageModel, Session
from dts.memory import REMEDY, first_line, is_out_of_memory
from dts.results import Result, Rollout
from dts.rewards import Context, Prompt, Reward
from dts.settings import Budget, Decoding, as_stops, check_whole

if TYPE_CHECKING:
    from dts.search import Method, Search
    from dts.search.many import Many

AnyReward = Reward | Callable[..., Any]
Outcome = Result | Exception
AHEAD = 4  # results that may wait for their turn, in multiples of the prompts in flight


def decode_many(
    lm: LanguageModel,
    prompts: Iterable[Prompt],
    *,
    method: Method,
    reward: AnyReward | Sequence[AnyReward | None] | None = None,
    batch_size: int = 64,
    width: int = 4,
    as_completed: bool = False,
    errors: str = "raise",
    progress: bool = False,
    max_new_tokens: int = 48,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: str | Sequence[str] = (),
    logits_processor: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    max_kv_bytes: int | None = None,
    budget: Budget | None = None,
    total_budget: Budget | None = None,
    on_rollout: Callable[[int, Rollout], None] | None = None,
) -> Generator[Any, None, None]:
    """Search for completions of every prompt; the paths of all searches under way share each forward call.

    Prompt i gets what `decode(lm, prompt, batch_size=width, seed=seed + i, ...)` returns, up to rounding in the order
    of additions. Yields results in the order of the prompts.

    prompts: any iterable; it is read as places become free. reward: one for all, or a list with one for each prompt.
    batch_size: paths in flight over all prompts. width: paths of one search, so batch_size // width prompts are in
    flight. as_completed: yield pairs (index, result) in the order in which prompts finish.
    errors: "raise", or "return" to get a prompt's exception in the place of its result.
    progress: show a progress bar. max_kv_bytes: bound on the keys and values of all prompts together; half of the free
    memory if not given. budget: limits for each prompt. total_budget: limits for all together; when one is used up,
    searches under way end with what they have, and no more prompts are taken.
    on_rollout: called with a prompt's index and each of its rollouts.
    The other options are those of `decode`.

    Closing the generator frees everything. Raises what `decode` raises, with the index of the prompt, after the results
    of the prompts before it; `UsageError` for no prompts at all, or for another number of rewards.
    """
    batch_size, width = _check_sizes(batch_size, width)
    settings = Decoding(
        max_new_tokens, min_new_tokens, temperature, top_k, top_p, as_stops(stop), seed, width, logits_processor
    )
    check_arguments(lm, method, max_kv_bytes, budget, on_rollout)
    _check_choices(prompts, errors, total_budget)
    source = Source(
        lm, iter(prompts), _scorers(reward, prompts), settings, tightest(method.budget(), budget),
        chat_template_kwargs, on_rollout,
    )  # fmt: skip
    engine = Engine(lm, method, batch_size // width, width, settings.max_new_tokens, max_kv_bytes, total_budget)
    bar = _bar(len(prompts) if isinstance(prompts, Sized) else None, progress)
    return _results(source, engine, bar, as_completed=as_completed, keep_errors=errors == "return")


def _bar(count: int | None, progress: bool) -> Callable[[], tqdm[Any]]:
    """A progress bar, shown once the first result is asked for."""
    return lambda: tqdm(total=count, unit="prompt", disable=not progress)


def _check_sizes(batch_size: int, width: int) -> tuple[int, int]:
    batch_size = check_whole("batch_size", batch_size, 1, allowed="a whole number >= 1")
    width = check_whole("width", width, 1, allowed="a whole number >= 1")
    if width > batch_size:
        raise UsageError(
            f"width={width} is larger than batch_size={batch_size}, the paths of all prompts together; "
            "lower width or raise batch_size"
        )
    return batch_size, width


def _check_choices(prompts: Any, errors: Any, total_budget: Any) -> None:
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise UsageError(f"prompts={shown(prompts)} is not allowed; give a list or another iterable of prompts")
    if isinstance(prompts, Sized) and len(prompts) == 0:
        raise UsageError("prompts is empty: give at least one prompt")
    if errors not in ("raise", "return"):
        raise UsageError(f"errors={shown(errors)} is not allowed; give 'raise' or 'return'")
    if total_budget is not None and not isinstance(total_budget, Budget):
        raise UsageError(
            f"total_budget={shown(total_budget)} is not allowed; "
            "give dts.Budget(tokens=, seconds=, reward_calls=, ...) or None"
        )


def _scorers(reward: Any, prompts: Any) -> Reward | list[Reward]:
    """One reward for all prompts, or one for each."""
    if not isinstance(reward, (list, tuple)):
        return as_scorer(reward)
    if isinstance(prompts, Sized) and len(prompts) != len(reward):
        raise UsageError(
            f"reward has {len(reward)} entries for {len(prompts)} prompts; give one for each, or one for all"
        )
    return [as_scorer(one) for one in reward]


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt that is ready to be decoded."""

    index: int
    prompt_ids: tuple[int, ...]
    begin: Callable[[Session], Search]


@dataclass
class Source:
    """The prompts, read one by one."""

    lm: LanguageModel
    prompts: Iterator[Prompt]
    scorers: Reward | list[Reward]
    settings: Decoding
    limits: Budget
    chat_template_kwargs: Mapping[str, Any] | None
    on_rollout: Callable[[int, Rollout], None] | None
    taken: int = 0
    ended: bool = False
    failure: Exception | None = None  # of the prompts themselves; raised after the results of those that came

    @property
    def width(self) -> int:
        return self.settings.batch_size or 1

    def next(self) -> Task | tuple[int, Exception] | None:
        """The next prompt, or what is wrong with it; None after the last one."""
        if self.ended:
            return None
        try:
            prompt = next(self.prompts)
        except StopIteration:
            self._end(self._problem_at_the_end())
            return None
        except Exception as error:
            self._end(UsageError(f"prompts raised {type(error).__name__} at index {self.taken}: {error}"), error)
            return None
        index = self.taken
        if isinstance(self.scorers, list) and index >= len(self.scorers):
            self._end(UsageError(f"reward has {len(self.scorers)} entries, but prompts has more; give one for each"))
            return None
        self.taken += 1
        try:
            return self._task(index, prompt)
        except Exception as error:
            return index, error

    def _task(self, index: int, prompt: Prompt) -> Task:
        from dts.search import Search  # as in `decode`

        ids = tuple(encoded(self.lm, prompt, self.chat_template_kwargs))
        check_prompt(self.lm, ids, self.settings.max_new_tokens)
        context = Context(prompt, ids, self.lm.decode)
        scorer = self.scorers[index] if isinstance(self.scorers, list) else self.scorers
        settings = dataclasses.replace(self.settings, seed=self.settings.seed + index)
        tell = None if self.on_rollout is None else _with_index(self.on_rollout, index)

        def begin(session: Session) -> Search:
            return Search(self.lm, session, context, scorer, settings, self.limits, self.width, tell)

        return Task(index, ids, begin)

    def _end(self, failure: Exception | None, cause: Exception | None = None) -> None:
        self.ended, self.failure = True, failure
        if failure is not None:
            failure.__cause__ = cause

    def _problem_at_the_end(self) -> Exception | None:
        if not self.taken:
            return UsageError("prompts is empty: give at least one prompt")
        if isinstance(self.scorers, list) and len(self.scorers) != self.taken:
            return UsageError(f"reward has {len(self.scorers)} entries for {self.taken} prompts; give one for each")
        return None


def _with_index(on_rollout: Callable[[int, Rollout], None], index: int) -> Callable[[Rollout], None]:
    return lambda rollout: on_rollout(index, rollout)


@dataclass(frozen=True, slots=True)
class Engine:
    """What the prompts run on."""

    lm: LanguageModel
    method: Method
    prompts: int  # in flight
    width: int
    max_new_tokens: int
    max_kv_bytes: int | None
    total_budget: Budget | None

    def open(self) -> Many:
        from dts.search.many import Many, OneByOne  # as in `decode`

        options: dict[str, Any] = {
            "prompts": self.prompts, "width": self.width, "max_new_tokens": self.max_new_tokens,
            "max_kv_bytes": self.max_kv_bytes,
        }  # fmt: skip
        together: Callable[..., Batch | None] | None = getattr(self.lm, "batch", None)
        batch = together(**options) if together is not None else None
        return Many(batch if batch is not None else OneByOne(self.lm, **options), self.method, self.total_budget)


@dataclass
class Turns:
    """Outcomes that wait for those of earlier prompts, at most `ahead` of them."""

    ahead: int
    turn: int = 0
    waiting: dict[int, Outcome] = dataclasses.field(default_factory=dict)

    def may_take(self, index: int) -> bool:
        return index < self.turn + self.ahead

    def ready(self) -> Iterator[Outcome]:
        while self.turn in self.waiting:
            self.turn += 1
            yield self.waiting.pop(self.turn - 1)


def _results(
    source: Source, engine: Engine, bar: Callable[[], tqdm[Any]], *, as_completed: bool, keep_errors: bool
) -> Generator[Any, None, None]:
    """What `decode_many` yields."""
    turns = Turns(AHEAD * engine.prompts)
    with (
        bar() as shown_bar,
        contextlib.closing(
            _outcomes(source, engine, turns.may_take if not as_completed else lambda index: True, shown_bar)
        ) as outcomes,
    ):
        for index, outcome in outcomes:
            shown_bar.update()
            if isinstance(outcome, Exception):
                outcome = _named(index, outcome)
            turns.waiting[index] = outcome
            for now in [turns.waiting.pop(index)] if as_completed else turns.ready():
                if isinstance(now, Exception) and not keep_errors:
                    raise now
                yield (index, now) if as_completed else now
    if source.failure is not None:
        raise source.failure


def _outcomes(
    source: Source, engine: Engine, may_take: Callable[[int], bool], bar: tqdm[Any]
) -> Generator[tuple[int, Outcome], None, None]:
    """Every prompt's outcome, in the order in which they end."""
    many: Many | None = None
    task: Task | None = None
    started = time.perf_counter()
    try:
        while True:
            while (task or may_take(source.taken)) and not (many is not None and many.spent):
                taken = task or source.next()
                if not isinstance(taken, Task):
                    if taken is None:
                        break
                    yield taken
                    continue
                task, many = taken, engine.open() if many is None else many
                try:
                    if not many.add(task.index, task.prompt_ids, task.begin):
                        break
                except UsageError as error:  # it can never fit
                    yield task.index, error
                task = None
            if many is None or not len(many):
                return
            yield from sorted(many.step(), key=lambda ended: isinstance(ended[1], Exception))
            bar.set_postfix_str(f"{many.tokens / (time.perf_counter() - started):.0f} tokens/s", refresh=False)
    finally:
        if many is not None:
            many.close()


def _named(index: int, error: Exception) -> Exception:
    """The error with the index of its prompt."""
    if not isinstance(error, DTSError) and is_out_of_memory(error):
        named: Exception = UnavailableError(f"prompt {index}: out of memory ({first_line(error)}); {REMEDY}")
    elif isinstance(error, DTSError):
        named = copy.copy(error)
        named.args = (f"prompt {index}: {error}", *error.args[1:])
    else:
        error.add_note(f"at prompt {index} of decode_many")
        return error
    named.__cause__ = error
    return named
