"""Label-free rewards. Those that read the text as it grows are monotone: what a path earned, it keeps.

Each sees the completion, and where a task builds it, the task's input (a window, a history). None can see a
reference answer: no constructor takes one, and `dts.rewards.Context` has none.
"""

from dts.evaluation.rewards.claims import Claimed, ClaimReward
from dts.evaluation.rewards.forecast import ForecastReward, NumberParser, Numbers
from dts.evaluation.rewards.generic import Format, Found, Keywords, Length, Repetition
from dts.evaluation.rewards.labels import Commit, LabelParser, LabelReward, shown
from dts.evaluation.rewards.models import ClassifierReward, LikelihoodReward
from dts.evaluation.rewards.text import TextReward

__all__ = [
    "ClaimReward",
    "Claimed",
    "ClassifierReward",
    "Commit",
    "ForecastReward",
    "Format",
    "Found",
    "Keywords",
    "LabelParser",
    "LabelReward",
    "Length",
    "LikelihoodReward",
    "NumberParser",
    "Numbers",
    "Repetition",
    "TextReward",
    "shown",
]
