"""CUDA kernels of mergekern._cuda, on torch's current stream, one file per op."""
