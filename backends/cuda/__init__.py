"""Target ``cuda``: registered, so that programs can be lowered for it; it emits nothing yet."""

from mqc.backends.cuda.target import CudaTarget

__all__ = ["CudaTarget"]
