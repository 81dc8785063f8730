"""What GPU kernels of any op need."""
