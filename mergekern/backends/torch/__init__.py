"""Plain torch, on any device: the fallback of every op, with the bits of the kernels."""
