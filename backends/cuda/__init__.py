"""Target ``cuda``: lowering, artifacts and runtime over the kernels of ``mqc.cuda``."""

from mqc.backends.cuda.target import CudaTarget

__all__ = ["CudaTarget"]
