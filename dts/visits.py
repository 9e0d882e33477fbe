"""How often paths entered each node of a tree, and how many of them finished below it."""

from __future__ import annotations

from array import array

from dts.tree import NONE, ROOT, Tree


class Visits:
    """Two columns beside the tree's, indexed by node."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.entered = array("i")  # paths sent through, under way or finished; counted by the policies
        self.finished = array("i")  # finished sequences below
        self.grow()

    def grow(self) -> None:
        """Rows for nodes that were added since: each was entered by the path that made it."""
        for node in range(len(self.entered), len(self.tree)):
            self.entered.append(0 if node == ROOT else 1)
            self.finished.append(0)

    def enter(self, node: int) -> None:
        """Count a path in at once, so that paths decoded together spread out."""
        self.grow()
        self.entered[node] += 1

    def close(self, leaf: int) -> bool:
        """Count a finished sequence into `leaf` and all its ancestors; False where it was counted before."""
        self.grow()
        if self.finished[leaf]:
            return False
        node = leaf
        while node != NONE:
            self.finished[node] += 1
            node = self.tree.parent[node]
        return True
