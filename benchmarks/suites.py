"""Suites: which workloads are measured, in which dtypes, and which of them side by side."""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.workloads import BATCHES, FAMILY, FIVE, GPU, KINDS, LAYERS, MAPS, RESNET, TEN

DTYPES = ("float32", "bfloat16", "float16")


class Comparison(NamedTuple):
    """Workloads and dtypes whose runs take turns, so that their times can be compared."""

    workloads: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32",)

    @property
    def with_peer(self) -> bool:
        """Sizes are compared with each other only; a workload by itself with the peer too."""
        return len(self.workloads) == 1


def singly(workloads: Sequence[str], dtypes: tuple[str, ...] = ("float32",)) -> tuple[Comparison, ...]:
    """Each workload by itself."""
    return tuple(Comparison((name,), dtypes) for name in workloads)


COMPILED = ("reach", "ahead")  # suites that compile stacks of layers too
SUITES = {
    "cpu": singly([*FIVE, *(name for name in RESNET if name not in FIVE), "stride2", "dcnv1", *KINDS]),
    "five": singly(FIVE),
    "kinds": singly(KINDS),
    "scaling": (Comparison(BATCHES), Comparison(MAPS)),
    "reach": (*singly(FIVE, ("float32", "bfloat16")), *singly(KINDS), Comparison(BATCHES), Comparison(MAPS)),
    "ahead": (*singly(TEN, ("float32", "bfloat16")), Comparison(BATCHES), Comparison(MAPS)),
    "family": singly(FAMILY),
    "layers": singly(LAYERS),
    "gpu": singly(GPU, DTYPES),
    "race": (),  # race.py has its own workloads
}
