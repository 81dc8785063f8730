"""The sum that `grid_sample`, `ms_deform_attn` and `roi_align` share: readings of maps, weighted and added.

    y(q, m) = Σ_l Σ_t  weight(q, m, t) · map_{l,m}(point(q, m, t))

over levels l and the points t of each level, for a query q and a head m.

The letters of the shapes: B images; S pixels of all levels; Q queries, or q in a block; M heads of
D channels; T points of all levels, P of one level; n coordinates of a point; K corners, the pixels
that one point reads. `*M` is the axis of heads. `grid_sample` leaves it out, because XLA's CPU
backend copies arrays that have an axis of size 1. The features may have B = 1 where the points have
more: all then read the same maps.
"""

from dcn_jax.ops.weighted_reads.levels import Level, Operands
from dcn_jax.ops.weighted_reads.sum import sum_readings

__all__ = ["Level", "Operands", "sum_readings"]
