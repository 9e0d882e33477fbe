"""What a person at the terminal sees while a run is under way."""

from __future__ import annotations

from typing import Any, TextIO

from tqdm import tqdm

from dts.evaluation.records import RolloutRecord

FORMAT = "{desc}: {n_fmt}/{total_fmt} |{bar:20}| {elapsed}<{remaining}{postfix}"


class Progress:
    """One line: jobs finished of all, rollouts, tokens per second, best reward of this search, time left."""

    def __init__(self, total: int, done: int, *, shown: bool, file: TextIO | None = None) -> None:
        """`shown=False` writes nothing. The time left is estimated from the jobs of this process, not `done` ones."""
        self._bar: tqdm[Any] = tqdm(
            total=total, initial=done, disable=not shown, file=file, bar_format=FORMAT, dynamic_ncols=True, smoothing=0
        )
        self._rollouts = 0

    def note(self, text: str) -> None:
        """What happens now."""
        self._bar.set_description_str(text)

    def rollout(self, record: RolloutRecord) -> None:
        self._rollouts += 1
        rate = record["tokens"] / record["time"] if record["time"] else 0
        self._bar.set_postfix_str(
            f"{self._rollouts} rollouts, {rate:.0f} tokens/s, best reward {record['best_so_far']:.3f}", refresh=False
        )
        self._bar.update(0)  # redraws when the last drawing is old enough

    def job(self) -> None:
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
