"""Decoding on a GPU: the library of kernels, what it is asked to do, and the queue in front of it."""
