"""Hard constraints: the language L that a completion has to belong to.

The whole model is four methods. `start` gives the state of the empty completion; `advance` the states after one more
token each; `allowed` the tokens that may come next; `accepts` says whether a completion may end here. The search keeps
one state per tree node. States are values: `advance` returns new ones and never changes the old, because several
children grow from the same parent.

`JsonSchema`, `Regex`, `Grammar` and `Choice` are built on `llguidance`, which makes a mask over the vocabulary in Rust.
They speak of the completion's text, whatever its tokens. Any object with the four methods serves as well.
"""

from dts.constraints.constraint import Constraint, State, check_constraint
from dts.constraints.guided import Choice, Grammar, JsonSchema, Regex

__all__ = ["Choice", "Constraint", "Grammar", "JsonSchema", "Regex", "State", "check_constraint"]
