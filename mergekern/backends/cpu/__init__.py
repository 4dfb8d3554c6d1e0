"""C++ kernels of mergekern._cpu, one file per op, over chunks of elements in a thread pool."""
