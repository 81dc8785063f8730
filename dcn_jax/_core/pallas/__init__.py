"""What Pallas kernels of any op need."""
