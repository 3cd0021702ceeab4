"""Triton kernels: emitted source, its launch, and its ahead-of-time compilation."""
