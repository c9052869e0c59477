"""The reference target: plain torch on the CPU, integer-exact; the oracle for all others."""

from mqc.backends.reference.target import ReferenceTarget

__all__ = ["ReferenceTarget"]
