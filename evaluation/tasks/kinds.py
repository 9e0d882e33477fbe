"""Which code loads a task, by the `kind` in its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dts.evaluation.tasks import captions, forecast, har, instructions, keyword, programs, reasoning, schemas
from dts.evaluation.tasks.base import Task

KINDS: Mapping[str, Callable[..., Task]] = {
    "har": har.load,
    "forecast": forecast.load,
    "m4-caption": captions.load_m4,
    "weather-caption": captions.load_weather_task,
    "keyword": keyword.load,
    "instructions": instructions.load,
    "reasoning": reasoning.load,
    "humaneval": programs.load_humaneval,
    "coding": programs.load_own,
    "json": schemas.load,
}
