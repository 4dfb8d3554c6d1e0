"""Triton kernels, one file per op: the GPU backend where no CUDA compiler was at hand."""
