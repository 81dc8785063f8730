"""The op as fused GPU kernels."""
