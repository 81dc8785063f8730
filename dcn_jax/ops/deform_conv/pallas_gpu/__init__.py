"""`deform_conv` as fused GPU kernels."""
