"""Multi-scale deformable attention: sums of values read at learned locations on several maps.

Read `call` (what a call is), `reference` (the formula in twenty lines), `xla` (the same, lean and
fast), `api` (what users call). README.md tells why it is so.
"""

from dcn_jax.ops.ms_deform_attn.api import ms_deform_attn

__all__ = ["ms_deform_attn"]
