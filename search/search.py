"""A search over one prompt: it grows a tree of tokens with the model, scores it with the reward, and keeps records.

It knows no algorithm. A `Method` starts a run, which works on the tree through this object; `dts.search.run` forwards
the nodes that the run asks for.
"""

from __future__ import annotations

import collections
import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from dts.errors import ModelError, UsageError, shown
from dts.lm import PROMPT_SLOT, LanguageModel, Session, Stored
from dts.processors import Processors
from dts.results import Completion, Rollout
from dts.rewards import Context, Finished, Reward, State
from dts.search.readings import alone, distributions, draw, measure, most_likely
from dts.search.scoring import BudgetSpent, Scoring
from dts.search.weights import Members
from dts.settings import Budget, Decoding
from dts.stops import Stops, special_tokens
from dts.target import Target
from dts.tree import NONE, ROOT, Tree


class Search:
    """The state of one search over one prompt: the tree, the model's session, the reward, the records."""

    def __init__(
        self,
        lm: LanguageModel,
        session: Session,
        context: Context,
        reward: Reward,
        decoding: Decoding,
        budget: Budget,
        batch_size: int,
        on_rollout: Callable[[Rollout], None] | None = None,
        target: Target | None = None,
    ) -> None:
        """target: of the method, if it has one."""
        self.lm, self.session, self.reward, self.decoding = lm, session, reward, decoding
        self.budget, self.batch_size, self._on_rollout = budget, batch_size, on_rollout
        self.members = Members(decoding.constraint, lm, session.usage) if decoding.constraint is not None else None
        self.masks = (decoding.constraint_mode or ("mask" if target is None else "condition")) == "mask"
        self.target = None if target is None else target.among(decoding, masked=self.masks)
        power = target.row_power if target else 1.0
        self.weighs = power != 1 or self.members is not None  # rows are weights other than p
        self.tree, self.usage = Tree(power, measured=self.weighs), session.usage
        self.rollouts: list[Rollout] = []
        self._decode, self._prompt_ids = context.decode, context.prompt_ids
        self._finished_by: dict[int, str] = {}
        self._scoring, self._started = Scoring(reward, self.usage), time.perf_counter()
        self._states: list[State] = [self._scoring.start(context)]  # reward state by node
        self._rows: dict[int, tuple[torch.Tensor, int]] = {}  # p by node, kept until the next forward call
        self._log_kept: dict[int, tuple[torch.Tensor, int]] = {}  # see `weigh`, kept as long
        self._drafted: dict[int, list[int]] = {}  # drafts by node, for the draws that follow
        self._ahead: dict[tuple[int, int], State] = {}  # reward states that a glance has computed, kept as long
        self._stops = Stops(decoding.stop, context.decode, special_tokens(lm) if decoding.stop else {})
        self._process = Processors(decoding.logits_processor or ())
        self.tree.slot[ROOT] = PROMPT_SLOT
        self._stored: Stored | None = session if isinstance(session, Stored) else None
        if self._stored is not None:
            self._stored.seed(decoding.seed)
        self._bound([ROOT], self._states)

    # -- the model -------------------------------------------------------------------------------------------------

    def evaluate(self, nodes: Sequence[int]) -> None:
        """Forward `nodes`, all in one call: each is a token whose parent was evaluated."""
        self.place(nodes, self.session.extend(*self.edges(nodes)))

    def edges(self, nodes: Sequence[int]) -> tuple[list[int], list[int]]:
        """What `Session.extend` needs to forward `nodes`: parents' slots and tokens."""
        tree = self.tree
        return [tree.slot[tree.parent[n]] for n in nodes], [tree.token[n] for n in nodes]

    def place(self, nodes: Sequence[int], slots: Sequence[int]) -> None:
        """`nodes` went through the model and are held in these slots."""
        for node, slot in zip(nodes, slots, strict=True):
            self.tree.slot[node] = slot
        self.usage.unique_tokens += len(nodes)
        self.forget()

    def forget(self) -> None:
        """Let go of what is kept between two forward calls."""
        self._rows.clear()
        self._log_kept.clear()
        self._ahead.clear()

    def end(self) -> None:
        """Let go of what only a search under way needs."""
        self.forget()
        self._scoring.forget()

    def evaluated(self, node: int) -> bool:
        """Whether the next-token distribution of `node` is at hand."""
        return self.tree.slot[node] != NONE

    def probabilities(self, nodes: Sequence[int]) -> torch.Tensor:
        """p(. | node) in float64, [len(nodes), V], of evaluated nodes, or the weights of the target. Not to be written
        to. Rows that list the likeliest tokens only have one more column, the mass of the others (`dts.lm.Stored`)."""
        p = distributions([(self, nodes)])
        wrong = p.isnan().any(-1) if self.weighs else p[:, 0].isnan()  # softmax makes the whole row NaN
        if wrong.any():
            raise self.no_distribution(nodes[int(wrong.nonzero()[0, 0])])
        return p

    def logits(self, nodes: Sequence[int]) -> torch.Tensor:
        """What the model and the logits processors say after these evaluated nodes, [len(nodes), V]."""
        logits = self.session.logits([self.tree.slot[n] for n in nodes])
        if self.decoding.logits_processor is not None:
            logits = self._process(self.tree, self._prompt_ids, nodes, logits)
        return logits

    def unread(self, nodes: Sequence[int]) -> list[int]:
        """Those of these nodes whose p is not kept, each once."""
        return [n for n in dict.fromkeys(nodes) if n not in self._rows]

    def keep(self, nodes: Sequence[int], p: torch.Tensor, first: int, log_kept: torch.Tensor | None = None) -> None:
        """Keep p of these nodes until the next forward call: rows of `p` [B, V], from `first` on; with `log_kept` [B],
        see `weigh`."""
        self._rows.update((node, (p, first + index)) for index, node in enumerate(nodes))
        if log_kept is not None:
            self._log_kept.update((node, (log_kept, first + index)) for index, node in enumerate(nodes))

    def log_kept(self, nodes: Sequence[int]) -> torch.Tensor:
        """See `weigh`; zeros where rows are not normalised, [len(nodes)]."""
        found = [self._log_kept.get(node) for node in nodes]
        return torch.stack([torch.zeros((), dtype=torch.double) if one is None else one[0][one[1]] for one in found])

    def measured(self, nodes: Sequence[int], masses: Sequence[Sequence[float]]) -> None:
        """The weights after these nodes, which were just evaluated, sum to this: its log, and that of the p-mass which
        a mask kept. Raises `UsageError` where nothing may follow the prompt."""
        for node, (log_mass, log_kept) in zip(nodes, masses, strict=True):
            self.tree.measure(node, log_mass, log_kept)
        if self.tree.outside[ROOT]:
            raise UsageError(
                f"constraint={shown(self.decoding.constraint)} allows no token after this prompt that the model may "
                "write; look at the constraint, min_new_tokens, top_k and top_p"
            )

    def measure(self, nodes: Sequence[int]) -> None:
        """Note in the tree what the weights after these nodes, which were just evaluated, sum to. Runs that are made of
        steps (`GeneratorRun`) do so by themselves."""
        if self.weighs and nodes:
            alone(measure(self, nodes))

    def read(self, nodes: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        """Where p of these nodes is kept: a tensor [B, V] and a row of it."""
        return [self._rows[n] for n in nodes]

    def too_early(self, nodes: Sequence[int]) -> list[int]:
        """The rows in which EOS must not come yet."""
        depth, least = self.tree.depth, self.decoding.min_new_tokens
        return [row for row, node in enumerate(nodes) if depth[node] < least]

    def no_distribution(self, node: int) -> ModelError:
        """What to raise where p is NaN: one logit is NaN or infinite, or all are minus infinity."""
        text = self._decode([*self._prompt_ids, *self.tree.tokens(node)])
        return ModelError(
            f"{self.lm.name} gave logits with NaN or infinities, or none that is allowed, at node {node} of the tree, "
            f"{self.tree.depth[node]} tokens after the prompt, after {text[-200:]!r}; try dtype float32, or look at "
            "the weights and the logits processor"
        )

    def glance(self, nodes: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """What each of these nodes would promise after one more token, without the model. The reward's states are kept
        for the tokens that are drawn before the next forward call."""
        pairs = list(zip(nodes, tokens, strict=True))
        states = self._states_after(pairs)
        self._ahead.update(zip(pairs, states, strict=True))
        return self._scoring.promise(states)

    def _states_after(self, pairs: Sequence[tuple[int, int]]) -> list[State]:
        """The reward's states after these (node, token) pairs."""
        missing = [pair for pair in pairs if pair not in self._ahead]
        new = self._scoring.extend([self._states[node] for node, _ in missing], [token for _, token in missing])
        found = dict(zip(missing, new, strict=True))
        return [found[pair] if pair in found else self._ahead[pair] for pair in pairs]

    # -- growing the tree ------------------------------------------------------------------------------------------

    def draw(
        self, nodes: Sequence[int], uniforms: Sequence[float], tilts: Sequence[Mapping[int, float]] = ()
    ) -> list[int]:
        """A new child for each of these evaluated nodes: a token that was no child before the call, drawn from p by
        inverse transform of `uniforms`. `tilts`, one for each node, are logs of factors on p by token.

        A node may be named several times; draws from it are independent, and equal ones share a child.
        """
        return alone(draw(self, nodes, uniforms, tilts))

    def most_likely(self, nodes: Sequence[int]) -> list[int]:
        """A new child for each of these evaluated nodes: the likeliest token that is no child yet."""
        return alone(most_likely(self, nodes))

    def grow(
        self, nodes: Sequence[int], tokens: Sequence[int], log_p: Sequence[float], rest: Sequence[float]
    ) -> list[int]:
        """The children of `nodes` with these new tokens; equal ones are one child. log_p: of the tokens. rest: log of
        the mass that stays outside the children."""
        if max(tokens) >= self.lm.vocab_size:
            return self.take(nodes, tokens)
        pairs = list(zip(nodes, tokens, strict=True))
        most = math.inf if self.weighs else 0.0
        new = {pair: (log, min(left, most)) for pair, log, left in zip(pairs, log_p, rest, strict=True)}
        child_of = dict(zip(new, self._add(new), strict=True))
        return [child_of[pair] for pair in pairs]

    def take(self, nodes: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """The children of these evaluated nodes that hold the given tokens, of p > 0: old ones where there are some."""
        if self._stored is not None and max(tokens) >= self.lm.vocab_size:
            tokens = self._named(self._stored, nodes, tokens)
        pairs = list(zip(nodes, tokens, strict=True))
        child_of = {pair: self.tree.child_with(*pair) for pair in pairs}
        new = [pair for pair, child in child_of.items() if child == NONE]
        if new:
            row = {node: i for i, node in enumerate(dict.fromkeys(node for node, _ in new))}
            p = self.probabilities(list(row))
            held = {node: [self.tree.token[child] for child in self.tree.children(node)] for node in row}
            for node, token in new:
                held[node].append(token)
            outside = p.clone()
            for node, i in row.items():
                outside[i, held[node]] = 0.0
            most = math.inf if self.weighs else 0.0
            rest = [min(mass, most) for mass in outside.sum(-1).log().tolist()]
            log_p = p[[row[node] for node, _ in new], [token for _, token in new]].log().tolist()
            entries = {pair: (lp, rest[row[pair[0]]]) for pair, lp in zip(new, log_p, strict=True)}
            child_of.update(zip(new, self._add(entries), strict=True))
        return [child_of[pair] for pair in pairs]

    def _named(self, stored: Stored, nodes: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """These tokens, with draws in the place of the one that stands for all that a row does not list."""
        unlisted = [place for place, token in enumerate(tokens) if token >= self.lm.vocab_size]
        drawn = stored.others([self.tree.slot[nodes[place]] for place in unlisted])
        self._rows.clear()  # they list more now
        named = dict(zip(unlisted, drawn, strict=True))
        return [named.get(place, token) for place, token in enumerate(tokens)]

    def drafts(self, nodes: Sequence[int]) -> Sequence[int]:
        """For each of these nodes the token that the engine has drawn there for this draw; NONE where there is none.
        Empty where there are none at all."""
        if self._stored is None:
            return ()
        found = []
        for node in nodes:
            waiting = self._drafted.get(node)
            draft = waiting.pop(0) if waiting else self._stored.draft(self.tree.slot[node])
            found.append(NONE if draft is None else draft)
        return found

    def drafted(self, node: int) -> int | None:
        """The child that the engine's next draft after this node is; NONE where it is none yet, and the next draw there
        makes it one. None where there is no draft. The caller's paths are draws from p."""
        draft = self._stored.draft(self.tree.slot[node]) if self._stored is not None else None
        if draft is None:
            return None
        child = self.tree.child_with(node, draft)
        if child == NONE:
            self._drafted.setdefault(node, []).append(draft)
        return child

    def expect(self, nodes: Sequence[int]) -> None:
        """Paths that are draws from p wait at these nodes, one for each time that a node is named."""
        if self._stored is not None:
            waiting = collections.Counter(zip(*self.edges(nodes), strict=True))
            self._stored.expect(waiting, to_end=not self.decoding.stop)

    def _place_stored(self, stored: Stored, children: Sequence[int]) -> None:
        """Children that the engine has told about need no request."""
        tree, placed = self.tree, 0
        for child in children:
            slot = stored.stored(tree.slot[tree.parent[child]], tree.token[child])
            if slot is not None:
                tree.slot[child] = slot
                placed += 1
        self.usage.unique_tokens += placed
        if placed:
            self.forget()  # what is kept until the next forward call would be all rows of a tail

    def _add(self, new: dict[tuple[int, int], tuple[float, float]]) -> list[int]:
        tree = self.tree
        children = [tree.add(parent, token, log_p, rest) for (parent, token), (log_p, rest) in new.items()]
        states = self._states_after(list(new))
        self._states.extend(states)
        self._bound(children, states)
        if self.members is not None:
            self.members.extend([parent for parent, _ in new], [token for _, token in new])
        for child in children:
            reason = self._complete(child)
            if reason:
                self._end_at(child, reason)
        self.usage.generated_tokens += len(children)
        if self._stored is not None:
            self._place_stored(self._stored, children)
        return children

    def _end_at(self, node: int, reason: str) -> None:
        """A sequence is complete, or leads nowhere: one that is no member of the constraint is no completion."""
        tree, member = self.tree, self.members is None or reason == "eos" or self.members.accepts(node)
        self._finished_by[node] = reason
        tree.terminal[node] = member
        tree.outside[node] = not member or (self.decoding.require_eos and reason == "length")

    def _bound(self, nodes: Sequence[int], states: Sequence[State]) -> None:
        """Write what the reward says of these nodes into the tree."""
        tree = self.tree
        for node, earned, upper, promise in zip(nodes, *self._scoring.bounds(states), strict=True):
            tree.earned[node], tree.upper[node], tree.promise[node] = earned, upper, promise

    def _complete(self, node: int) -> str | None:
        tree, decoding = self.tree, self.decoding
        if tree.token[node] in self.lm.eos_ids:
            return "eos"
        if decoding.stop and self._stops.reached(tree.parent[node], node, tree.token[node]):
            return "stop"
        return "length" if tree.depth[node] >= decoding.max_new_tokens else None

    # -- finished sequences ----------------------------------------------------------------------------------------

    def record(self, leaves: Sequence[int], start_depths: Sequence[int]) -> None:
        """Score complete sequences and record one rollout each. Raises `BudgetSpent` after those that the budget lets
        the reward score, from the first on."""
        scored = self._score_first(leaves)
        for leaf, start_depth in list(zip(leaves, start_depths, strict=True))[:scored]:
            self._record(leaf, start_depth)
        if scored < len(leaves):
            raise BudgetSpent

    def score(self, leaves: Sequence[int]) -> None:
        """Reward complete sequences. A leaf reached again keeps its reward. Raises `BudgetSpent` as `record` does."""
        if self._score_first(leaves) < len(leaves):
            raise BudgetSpent

    def scored(self, leaf: int) -> bool:
        """Whether a complete sequence has its reward."""
        return not math.isnan(self.tree.reward[leaf])

    def _score_first(self, leaves: Sequence[int]) -> int:
        """Reward the first of these leaves, as many as the budget allows; returns how many."""
        tree, calls = self.tree, self._calls_left()
        new = [leaf for leaf in dict.fromkeys(leaves) if not self.scored(leaf)]
        allowed = len(new) if calls == math.inf else self._scoring.within([self.finished(leaf) for leaf in new], calls)
        for leaf, reward in zip(new[:allowed], self.rewards(new[:allowed]), strict=True):
            tree.reward[leaf] = reward
        return len(leaves) if allowed == len(new) else list(leaves).index(new[allowed])

    def rewards(self, nodes: Sequence[int]) -> list[float]:
        """The reward of each of these prefixes if its sequence ended there. Raises `BudgetSpent` where the budget does
        not allow all of them."""
        texts = [self.finished(node) for node in nodes]
        return self._scoring.finish([self._states[node] for node in nodes], texts, self._calls_left())

    def scores_so_far(self, nodes: Sequence[int]) -> list[float]:
        """The same of unfinished texts: nan where the reward fails on one, as some do on half a text."""
        texts = [self.finished(node) for node in nodes]
        return self._scoring.so_far([self._states[node] for node in nodes], texts, self._calls_left())

    def scores_after(self, nodes: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """The same of these prefixes with one more token."""
        pairs = list(zip(nodes, tokens, strict=True))
        states = self._states_after(pairs)
        self._ahead.update(zip(pairs, states, strict=True))
        return self._scoring.so_far(states, self._finished_after(pairs), self._calls_left())

    def _calls_left(self) -> float:
        return self.budget.reward_calls_left(self.usage)

    def _finished_after(self, pairs: Sequence[tuple[int, int]]) -> list[Finished]:
        """Prefixes with one more token each that need not be in the tree, as if they ended there."""
        log_p: dict[tuple[int, int], tuple[float, ...]] = {}
        if self._scoring.needs_log_probs:
            tried: dict[int, list[int]] = {}
            for node, token in pairs:
                tried.setdefault(node, []).append(token)
            for (node, tokens), row in zip(tried.items(), self.probabilities(list(tried)), strict=True):
                before, kept = self.tree.log_probs(node), self.tree.log_kept[node]
                for token, log in zip(tokens, row[tokens].log().tolist(), strict=True):
                    log_p[node, token] = (*before, log / self.tree.power + kept)
        ids = [(*self.tree.tokens(node), token) for node, token in pairs]
        return [Finished(row, self._text(row), log_p.get(pair, ())) for row, pair in zip(ids, pairs, strict=True)]

    def _text(self, ids: Sequence[int]) -> str:
        """Without EOS."""
        return self._decode(ids[:-1] if ids[-1] in self.lm.eos_ids else ids)

    def _record(self, leaf: int, start_depth: int) -> None:
        reward = self.tree.reward[leaf]
        rollout = Rollout(
            index=len(self.rollouts),
            reward=reward,
            best_so_far=max(reward, self.rollouts[-1].best_so_far) if self.rollouts else reward,
            nodes=len(self.tree),
            seconds=self.seconds,
            tokens=self.usage.forwarded_tokens,
            length=self.tree.depth[leaf],
            start_depth=start_depth,
            leaf=leaf,
            text=self.finished(leaf).text,
        )
        self.rollouts.append(rollout)
        if self._on_rollout is not None:
            self._on_rollout(rollout)

    def finished(self, leaf: int) -> Finished:
        """The complete sequence that ends at `leaf`."""
        ids = self.tree.tokens(leaf)
        log_probs = self.tree.log_probs(leaf) if self._scoring.needs_log_probs else ()
        return Finished(ids, self._stops.cut(leaf, self._text(ids)), log_probs)

    def completion(self, leaf: int) -> Completion:
        """A scored leaf as the user sees it."""
        done, tree = self.finished(leaf), self.tree
        reason, log_probs = self._finished_by[leaf], tree.log_probs(leaf)
        return Completion(done.text, done.token_ids, tree.reward[leaf], tree.log_prob(leaf), reason, log_probs)

    def check_members(self) -> None:
        """Everything was tried. Raises `UsageError` where a constraint was given and no completion is in it."""
        if self.members is not None and not self.tree.leaves():
            raise UsageError(
                f"constraint={shown(self.decoding.constraint)} holds for no completion of up to max_new_tokens="
                f"{self.decoding.max_new_tokens} tokens that the model may write; raise max_new_tokens or loosen it"
            )

    def belongs(self, leaf: int) -> bool:
        """Whether a scored leaf is in the target."""
        return not self.tree.outside[leaf]

    # -- budget ----------------------------------------------------------------------------------------------------

    def exhausted(self, next_tokens: int = 0) -> bool:
        """Whether a budget is used up, or would be exceeded by forwarding `next_tokens` more."""
        return self.budget.spent(self.usage, len(self.rollouts), self.seconds, next_tokens)

    def rng(self, index: int) -> np.random.Generator:
        """The random stream of the `index`-th path: the same whatever is decoded beside it."""
        return np.random.default_rng([self.decoding.seed, index])

    @property
    def seconds(self) -> float:
        """Since the search started."""
        return time.perf_counter() - self._started

    def fork(self) -> Search:
        """A search that continues from here with a tree of its own, on the same model session: what it computes is
        counted in the same `usage`, without a limit."""
        other = copy.copy(self)
        other.budget, other._scoring = Budget(), Scoring(self.reward, self.usage)
        if self._stored is not None:
            other.session = other._stored = self._stored.fork()
        other.tree = self.tree.copy()
        other.rollouts, other._states = list(self.rollouts), list(self._states)
        other._finished_by, other._rows, other._log_kept, other._ahead = dict(self._finished_by), {}, {}, {}
        other.members = self.members.copy() if self.members is not None else None
        other._drafted = {}
        other._stops, other._process = self._stops.copy(), self._process.copy()
        return other
