"""The CUDA kernel library: sources, and the Python side that builds and loads them."""
