"""Measurements and proofs about kernels: ahead-of-time compilation, timing, comparison."""
