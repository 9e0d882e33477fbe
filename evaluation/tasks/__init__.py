"""Tasks: prompts, label-free rewards and metrics, each described by a YAML file next to this one."""

from dts.evaluation.tasks.base import Example, Task
from dts.evaluation.tasks.registry import TASKS, load_task

__all__ = ["TASKS", "Example", "Task", "load_task"]
