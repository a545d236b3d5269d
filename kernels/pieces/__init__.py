"""What kernels share, of whichever operation."""
