"""Live tracking through a small interface. The run folder always has the same events, whatever the tracker.

One tracker run per model, or per model, data set and seed where the configuration that it is started with names
`dataset` and `seed`: keys of two never meet. One step of a run is one rollout. Names of figures: `keys`.
"""

from dts.evaluation.tracking.base import NullTracker, RunTracker, Tracker
from dts.evaluation.tracking.choice import TRACKERS, choose_mode, logged_in, make_tracker
from dts.evaluation.tracking.keys import FINAL_KEYS, ROLLOUT_KEYS

__all__ = [
    "FINAL_KEYS",
    "ROLLOUT_KEYS",
    "TRACKERS",
    "NullTracker",
    "RunTracker",
    "Tracker",
    "choose_mode",
    "logged_in",
    "make_tracker",
]
