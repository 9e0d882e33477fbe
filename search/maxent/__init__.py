"""Maximum-entropy tree search: the sampler DTS and the optimiser DTS*."""

from dts.search.maxent.method import MaxEnt

__all__ = ["MaxEnt"]
