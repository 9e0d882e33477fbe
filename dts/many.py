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

from dts.constraints.constraint import Constraint, check_constraint
from dts.decoding import (
    as_scorer,
    check_arguments,
    check_budget,
    check_engine,
    check_prompt,
    encoded,
    target_of,
    tightest,
)
from dts.errors import DTSError, UnavailableError, UsageError, shown
from dts.lm import Batch, LanguageModel, Session
from dts.memory import REMEDY, first_line, is_out_of_memory
from dts.results import Result, Rollout
from dts.rewards import Context, Prompt, Reward
from dts.settings import Budget, Decoding, as_stops, check_whole

if TYPE_CHECKING:
    from dts.search import Method
    from dts.search.many import Lane, Many

AnyReward = Reward | Callable[..., Any]
Outcome = Result | Exception
Ended = tuple[int, Outcome]  # the index of a prompt and what became of it
LATER: Any = object()  # `prompts` may yield it for "none at the moment": it is asked again once those in flight moved
AHEAD = 4  # results that may wait for their turn, in multiples of the prompts in flight


# Fields of `Decoding` that a request may set; the others are fields of `Request`.
OWN = frozenset(field.name for field in dataclasses.fields(Decoding)) - {"seed", "constraint"}


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt of `decode_many` with settings of its own. None: what the call says."""

    prompt: Prompt
    reward: AnyReward | None = None
    seed: int | None = None  # instead of the call's seed + index
    budget: Budget | None = None  # on top of the call's
    name: str | None = None  # in messages; "prompt 3" if not given
    constraint: Constraint | None = None
    method: Method | None = None
    # Options of `decode` by name, such as temperature; max_new_tokens and batch_size, the paths of this search, up to
    # the call's max_new_tokens and width
    settings: Mapping[str, Any] | None = None
    stopped: Callable[[], bool] | None = None  # asked before each step: whether to end with what was found


def decode_many(
    lm: LanguageModel,
    prompts: Iterable[Prompt | Request],
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
    require_eos: bool = False,
    constraint: Constraint | None = None,
    constraint_mode: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    max_kv_bytes: int | None = None,
    budget: Budget | None = None,
    total_budget: Budget | None = None,
    on_rollout: Callable[[int, Rollout], None] | None = None,
) -> Results:
    """Search for completions of every prompt; the paths of all searches under way share each forward call.

    Prompt i gets what `decode(lm, prompt, batch_size=width, seed=seed + i, ...)` returns, up to rounding in the order
    of additions. Yields results in the order of the prompts.

    prompts: any iterable; it is read as places become free. A `Request` in it is a prompt with a reward, a seed, a
    method or other settings of its own. An iterable that has no prompt yet may yield `dts.many.LATER`, as long as
    others are in flight. reward: one for all, or a list with one for each prompt.
    batch_size: paths in flight over all prompts. width: paths of one search, so batch_size // width prompts are in
    flight. as_completed: yield pairs (index, result) in the order in which prompts finish.
    errors: "raise", or "return" to get a prompt's exception in the place of its result.
    progress: show a bar. max_kv_bytes: bound on the keys and values of all together; half of the free memory if not
    given. budget: limits for each prompt. total_budget: limits for all; the first one used up ends the searches.
    on_rollout: called with a prompt's index and each of its rollouts. The other options are those of `decode`.

    Closing the iterator frees everything. After an exception, Ctrl-C too, its `waiting` has what was finished and not
    yielded. Raises what `decode` raises, with the index of the prompt, after the results of those before it;
    `UsageError` for no prompts at all, or for another number of rewards.
    """
    batch_size, width = _check_sizes(batch_size, width)
    settings = Decoding(
        max_new_tokens, min_new_tokens, temperature, top_k, top_p, as_stops(stop), seed, width, logits_processor,
        require_eos, constraint, constraint_mode,
    )  # fmt: skip
    check_arguments(lm, method, max_kv_bytes, budget, on_rollout, settings)
    _check_choices(prompts, errors, total_budget)
    source = Source(
        lm, iter(prompts), _scorers(reward, prompts), method, settings, budget, chat_template_kwargs, on_rollout
    )
    engine = Engine(lm, batch_size // width, width, settings.max_new_tokens, max_kv_bytes, total_budget)
    return Results(source, engine, _bar(prompts, progress), as_completed=as_completed, keep_errors=errors == "return")


def _bar(prompts: Any, progress: bool) -> Callable[[], tqdm[Any]]:
    """A progress bar, shown once the first result is asked for."""
    count = len(prompts) if isinstance(prompts, Sized) else None
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
    check_budget("total_budget", total_budget)


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
    begin: Callable[[Session], Lane]


@dataclass
class Source:
    """The prompts, read one by one."""

    lm: LanguageModel
    prompts: Iterator[Prompt | Request]
    scorers: Reward | list[Reward]
    method: Method
    settings: Decoding
    budget: Budget | None
    chat_template_kwargs: Mapping[str, Any] | None
    on_rollout: Callable[[int, Rollout], None] | None
    taken: int = 0
    ended: bool = False
    failure: Exception | None = None  # of the prompts themselves; raised after the results of those that came
    names: dict[int, str] = dataclasses.field(default_factory=dict)  # of requests that have one, by index

    def next(self) -> Task | tuple[int, Exception] | None:
        """The next prompt, or what is wrong with it; None after the last one, and where none waits."""
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
        if prompt is LATER:
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

    def _task(self, index: int, given: Prompt | Request) -> Task:
        from dts.search import Search  # as in `decode`
        from dts.search.many import Lane

        request = given if isinstance(given, Request) else Request(given)
        if request.name is not None:
            self.names[index] = request.name
        check_budget("budget", request.budget)
        check_constraint(request.constraint, self.lm)
        method = self.method if request.method is None else request.method
        settings, variables = self._settings(index, request)
        check_engine(self.lm, method, settings)
        ids = tuple(encoded(self.lm, request.prompt, variables))
        check_prompt(self.lm, ids, settings.max_new_tokens)
        context = Context(request.prompt, ids, self.lm.decode)
        limits = tightest(tightest(method.budget(), self.budget), request.budget)
        scorer, width = self._scorer(index, request), settings.batch_size or 1
        tell = None if self.on_rollout is None else _with_index(self.on_rollout, index)

        def begin(session: Session) -> Lane:
            left = _after_shared(self.lm, limits, session, ids)
            target = target_of(method)
            search = Search(self.lm, session, context, scorer, settings, left, width, tell, target)
            return Lane(search, method, method.start(search), request.stopped or _never)

        return Task(index, ids, begin)

    def _settings(self, index: int, request: Request) -> tuple[Decoding, Mapping[str, Any] | None]:
        """Of one prompt, and the variables of its chat template."""
        own, call = dict(request.settings or {}), self.settings
        variables = own.pop("chat_template_kwargs", self.chat_template_kwargs)
        if unknown := set(own) - OWN:
            raise UsageError(f"settings of a request: {shown(min(unknown))} is unknown; give {', '.join(sorted(OWN))}")
        own["seed"] = call.seed + index if request.seed is None else request.seed
        own["constraint"] = call.constraint if request.constraint is None else request.constraint
        settings = dataclasses.replace(call, **own)
        for option in ("max_new_tokens", "batch_size"):
            if getattr(settings, option) > getattr(call, option):
                raise UsageError(
                    f"{option}={getattr(settings, option)} of a request is more than the call's "
                    f"{getattr(call, option)}; raise {'width' if option == 'batch_size' else option} of the call"
                )
        return settings, variables

    def _scorer(self, index: int, request: Request) -> Reward:
        if request.reward is not None:
            return as_scorer(request.reward)
        return self.scorers[index] if isinstance(self.scorers, list) else self.scorers

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


def _after_shared(lm: Any, limits: Budget, session: Session, ids: tuple[int, ...]) -> Budget:
    """The limits of a search whose prompt begins like a neighbour's: what it need not send counts against them, so that
    it ends where it would end alone. What the caller keeps in the cache does not, as in `decode`."""
    if limits.tokens is None or not session.usage.cached_tokens:
        return limits
    kept = lm.kept(ids) if hasattr(lm, "kept") else None
    shared = max(0, session.usage.cached_tokens - (0 if kept is None else len(kept)))
    return dataclasses.replace(limits, tokens=max(1, limits.tokens - shared))


def _never() -> bool:
    return False


def _with_index(on_rollout: Callable[[int, Rollout], None], index: int) -> Callable[[Rollout], None]:
    return lambda rollout: on_rollout(index, rollout)


@dataclass(frozen=True, slots=True)
class Engine:
    """What the prompts run on."""

    lm: LanguageModel
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
        return Many(batch if batch is not None else OneByOne(self.lm, **options), self.total_budget)


class Results(Iterator[Any]):
    """What `decode_many` returns: an iterator over its results."""

    def __init__(
        self, source: Source, engine: Engine, bar: Callable[[], tqdm[Any]], *, as_completed: bool, keep_errors: bool
    ) -> None:
        self._source, self._engine, self._bar = source, engine, bar
        self._as_completed, self._keep_errors = as_completed, keep_errors
        self._turn = 0  # the next index in the order of the prompts
        self._waiting: dict[int, Outcome] = {}
        self._run = self._yielded()

    def __next__(self) -> Any:
        return next(self._run)

    def close(self) -> None:
        """Drop the searches under way and free their memory."""
        self._run.close()

    @property
    def waiting(self) -> dict[int, Outcome]:
        """What is finished and not yielded yet, by the index of the prompt. In order these are results that wait for
        an earlier prompt; after Ctrl-C or an error they can be had here."""
        return dict(self._waiting)

    def _may_take(self, index: int) -> bool:
        return self._as_completed or index < self._turn + AHEAD * self._engine.prompts

    def _yielded(self) -> Generator[Any, None, None]:
        with (
            self._bar() as bar,
            contextlib.closing(_outcomes(self._source, self._engine, self._may_take, bar, self._take)) as steps,
        ):
            for _ in steps:
                while (index := self._next_index()) is not None:
                    outcome = self._waiting.pop(index)
                    self._turn = index + 1
                    bar.update()
                    if isinstance(outcome, Exception) and not self._keep_errors:
                        raise outcome
                    yield (index, outcome) if self._as_completed else outcome
        if self._source.failure is not None:
            raise self._source.failure

    def _next_index(self) -> int | None:
        """The prompt whose turn it is; None where it is not finished."""
        if self._as_completed:
            return next(iter(self._waiting), None)
        return self._turn if self._turn in self._waiting else None

    def _take(self, ended: Iterable[Ended]) -> None:
        """Prompts that have ended; among those of one step, results come before errors."""
        for index, outcome in sorted(ended, key=lambda one: isinstance(one[1], Exception)):
            name = self._source.names.pop(index, f"prompt {index}")
            self._waiting[index] = _named(name, outcome) if isinstance(outcome, Exception) else outcome


def _outcomes(
    source: Source,
    engine: Engine,
    may_take: Callable[[int], bool],
    bar: tqdm[Any],
    take: Callable[[Iterable[Ended]], None],
) -> Generator[None, None, None]:
    """Decode every prompt. `take` gets those that have ended, also when a step is interrupted; yields after each."""
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
                    take([taken])
                    yield
                    continue
                task, many = taken, engine.open() if many is None else many
                try:
                    if not many.add(task.index, task.prompt_ids, task.begin):
                        break
                except UsageError as error:  # it can never fit
                    take([(task.index, error)])
                    yield
                task = None
            if many is None or not len(many):
                if not source.ended and not (many is not None and many.spent):
                    raise UsageError("prompts yielded LATER with nothing in flight; wait for a prompt instead")
                return
            take(many.step())
            yield
            bar.set_postfix_str(f"{many.tokens / (time.perf_counter() - started):.0f} tokens/s", refresh=False)
    finally:
        if many is not None:
            take(many.ended)
            many.close()


def _named(name: str, error: Exception) -> Exception:
    """The error with the name of its prompt."""
    if not isinstance(error, DTSError) and is_out_of_memory(error):
        named: Exception = UnavailableError(f"{name}: out of memory ({first_line(error)}); {REMEDY}")
    elif isinstance(error, DTSError):
        named = copy.copy(error)
        named.args = (f"{name}: {error}", *error.args[1:])
    else:
        error.add_note(f"at {name} of decode_many")
        return error
    named.__cause__ = error
    return named
