"""Rewards on token ids: a state per path, extended token by token, bounded at every prefix.

The whole model is four steps. `start` gives the state of the empty completion; `extend` the states after one more token
each; `earned`, `upper` and `promise` bound the reward of an unfinished text; `finish` scores finished ones. The search
keeps one state per tree node, so a token is read once however many rollouts pass through it. States are values:
`extend` returns new ones and never changes the old, because several children grow from the same parent.

A function of finished text becomes a reward through `as_reward`. No reward can see a reference answer: neither
`Context` nor `Finished` carries one.
"""

from dts.rewards.combine import CheckMonotone, clip, gate, minimum, weighted_sum
from dts.rewards.confidence import Confidence
from dts.rewards.functions import NO_REWARD, TerminalReward, as_reward
from dts.rewards.reward import Context, Finished, Prompt, Reward, State, checked_finish, promised

__all__ = [
    "NO_REWARD",
    "CheckMonotone",
    "Confidence",
    "Context",
    "Finished",
    "Prompt",
    "Reward",
    "State",
    "TerminalReward",
    "as_reward",
    "checked_finish",
    "clip",
    "gate",
    "minimum",
    "promised",
    "weighted_sum",
]
