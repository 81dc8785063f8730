"""What knows nothing of deformable convolution."""
