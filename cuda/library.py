"""libmqc_cuda.so from Python: argument structs, loading, errors. Imports neither torch nor CUDA.

The structs mirror include/mqc_cuda.h (a test compares them). Every function of the library is a
method of :class:`Library` with the same name without the prefix; a status other than MQC_OK raises
:class:`KernelError` with the library's own sentence.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_uint32, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import Any

from mqc.errors import MqcError

ABI_VERSION = 3
FILE_NAME = "libmqc_cuda.so"
_UNSUPPORTED = 2
_DEVICE = 3
_DRIVER = "update the NVIDIA driver to one of CUDA 13, or rebuild with its CUDA's nvcc (12.5 on)"
PATH_VARIABLE = "MQC_CUDA_LIBRARY"
"""Environment variable that names another library file."""


class KernelError(MqcError):
    """The kernel library is missing, does not fit, or refused a call."""


class UnsupportedError(KernelError):
    """The arguments are valid, but the library has no kernel for them on this device."""


class DType(IntEnum):
    """mqc_dtype."""

    BF16 = 1
    F16 = 2
    F32 = 3
    I8 = 4


class Modality(IntEnum):
    """mqc_modality."""

    NONE = 0
    COUNT = 1
    MASK = 2


class LinearKernel(IntEnum):
    """mqc_linear_kernel."""

    AUTO = 0
    MMA_8 = 1
    MMA_16 = 2
    MMA_32 = 3
    MMA_64 = 4
    MMA_128 = 5
    WGMMA = 6


class Activation(IntEnum):
    """mqc_activation."""

    IDENTITY = 0
    SILU = 1
    GELU = 2
    GELU_TANH = 3
    RELU = 4
    QUICK_GELU = 5


class Rotary(IntEnum):
    """mqc_rotary."""

    NONE = 0
    HALF = 1
    INTERLEAVED = 2


class Arguments(ctypes.Structure):
    """Base of the structs: sets `size`, takes fields by keyword."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(size=ctypes.sizeof(type(self)), **fields)


def _fields(text: str) -> list[tuple[str, Any]]:
    """``_fields_`` from lines "type name name ..."."""
    kinds = {
        "u32": c_uint32,
        "i32": c_int32,
        "i64": c_int64,
        "f32": c_float,
        "ptr": c_void_p,
    }
    rows = [line.split() for line in text.strip().splitlines()]
    return [(name, kinds[kind]) for kind, *names in rows for name in names]


class LinearArgs(Arguments):
    """mqc_linear_args."""

    _fields_ = _fields("""
        u32 size
        i32 kernel layout dtype modality_kind split_columns split_k x_dtype
        i64 rows n k rows_per_sequence x_stride y_stride residual_stride x_split_stride
        ptr x w w_scale x_scale modality bias x_split w_split residual y workspace
        i64 workspace_bytes
    """)


class NormArgs(Arguments):
    """mqc_norm_args."""

    _fields_ = _fields("""
        u32 size
        i32 dtype modality_kind
        f32 eps
        i64 rows columns rows_per_sequence x_stride xq_stride h_stride
        ptr x scale modality xq h
    """)


class ActivationArgs(Arguments):
    """mqc_activation_args."""

    _fields_ = _fields("""
        u32 size
        i32 dtype modality_kind activation gated hadamard_base hadamard_log2 split_columns
        i64 rows columns rows_per_sequence x_stride xq_stride y_stride x_split_stride
        ptr x scale modality hadamard split xq y x_split
    """)


class RotaryArgs(Arguments):
    """mqc_rotary_args."""

    _fields_ = _fields("""
        u32 size
        i32 dtype cache_dtype rotary batch tokens q_heads kv_heads head_dim rotary_dim table_dtype
        i32 reserved
        i64 capacity q_stride k_stride v_stride
        ptr q k v cos sin past key_cache value_cache key_scale value_scale
    """)


class RotateArgs(Arguments):
    """mqc_rotate_args."""

    _fields_ = _fields("""
        u32 size
        i32 dtype rotary heads head_dim rotary_dim table_dtype reserved
        i64 rows angle_rows x_stride y_stride
        ptr x cos sin y
    """)


class AttentionArgs(Arguments):
    """mqc_attention_args."""

    _fields_ = _fields("""
        u32 size
        i32 dtype cache_dtype batch tokens q_heads kv_heads head_dim splits
        f32 scale
        i64 capacity q_stride out_stride mask_stride
        ptr q key_cache value_cache key_scale value_scale mask past out workspace
        i64 workspace_bytes
    """)


class EmbeddingArgs(Arguments):
    """mqc_embedding_args."""

    _fields_ = _fields("""
        u32 size
        i32 dtype table_dtype reserved
        i64 rows columns vocabulary
        ptr ids table scale y
    """)


class TopKArgs(Arguments):
    """mqc_top_k_args."""

    _fields_ = _fields("""
        u32 size
        i32 dtype k reserved
        i64 rows columns x_stride
        ptr x values indices workspace
        i64 workspace_bytes
    """)


STRUCTS: dict[str, type[Arguments]] = {
    "mqc_linear_args": LinearArgs,
    "mqc_norm_args": NormArgs,
    "mqc_activation_args": ActivationArgs,
    "mqc_rotary_args": RotaryArgs,
    "mqc_rotate_args": RotateArgs,
    "mqc_attention_args": AttentionArgs,
    "mqc_embedding_args": EmbeddingArgs,
    "mqc_top_k_args": TopKArgs,
}

_LAUNCHES = {
    "linear": LinearArgs,
    "rms_norm_quantize": NormArgs,
    "activation_quantize": ActivationArgs,
    "rotary_cache": RotaryArgs,
    "rotate": RotateArgs,
    "attention": AttentionArgs,
    "embedding": EmbeddingArgs,
    "top_k": TopKArgs,
}
_WORKSPACES = {"linear": LinearArgs, "attention": AttentionArgs, "top_k": TopKArgs}


class Library:
    """A loaded libmqc_cuda.so.

    Args:
        path: the shared library.

    Raises:
        KernelError: where it cannot be loaded, or was built for another version of the ABI.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.native = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelError(
                f"the kernel library {path} cannot be loaded: {error}",
                hint="rebuild it with: python -m mqc.cuda.build",
            ) from error
        self.path = path
        version = int(self.native.mqc_abi_version())
        if version != ABI_VERSION:
            raise KernelError(
                f"the kernel library {path} has ABI {version}, this version of mqc uses "
                f"{ABI_VERSION}",
                hint="rebuild it with: python -m mqc.cuda.build",
            )
        self.native.mqc_last_error.restype = c_char_p
        for name, struct in _LAUNCHES.items():
            function = getattr(self.native, f"mqc_{name}")
            function.argtypes, function.restype = [POINTER(struct), c_void_p], c_int
        for name, struct in _WORKSPACES.items():
            function = getattr(self.native, f"mqc_{name}_workspace")
            function.argtypes, function.restype = [POINTER(struct), POINTER(c_int64)], c_int
        choice = self.native.mqc_linear_choice
        choice.argtypes = [POINTER(LinearArgs), POINTER(c_int32), POINTER(c_int32)]

    def check(self, status: int) -> None:
        """Raise KernelError unless the status is MQC_OK; its subclass for what has no kernel."""
        if status:
            kind = UnsupportedError if status == _UNSUPPORTED else KernelError
            raise kind(self.native.mqc_last_error().decode(errors="replace"))

    def check_device(self) -> None:
        """Raise KernelError unless the current device can run the kernels."""
        status = self.native.mqc_check_device()
        if not status:
            return
        hint = "use a GPU of another generation" if status == _DEVICE else _DRIVER
        raise KernelError(self.native.mqc_last_error().decode(errors="replace"), hint=hint)

    def launch(self, name: str, arguments: Arguments, stream: int = 0) -> None:
        """Enqueue ``mqc_<name>`` on a stream (a cudaStream_t as an integer)."""
        self.check(getattr(self.native, f"mqc_{name}")(ctypes.byref(arguments), stream))

    def workspace(self, name: str, arguments: Arguments) -> int:
        """Bytes of workspace of ``mqc_<name>`` for these arguments on the current device."""
        size = c_int64()
        function = getattr(self.native, f"mqc_{name}_workspace")
        self.check(function(ctypes.byref(arguments), ctypes.byref(size)))
        return size.value

    def linear_choice(self, arguments: LinearArgs) -> tuple[LinearKernel, int]:
        """The kernel and the number of blocks along k that AUTO takes."""
        kernel, split = c_int32(), c_int32()
        function = self.native.mqc_linear_choice
        self.check(function(ctypes.byref(arguments), ctypes.byref(kernel), ctypes.byref(split)))
        return LinearKernel(kernel.value), split.value


def library_path() -> Path | None:
    """The library file: $MQC_CUDA_LIBRARY, or the one built beside this module, or None."""
    given = os.environ.get(PATH_VARIABLE)
    if given:
        return Path(given)
    built = Path(__file__).resolve().parent / FILE_NAME
    return built if built.is_file() else None


def load() -> Library:
    """The library that `library_path` names.

    Raises:
        KernelError: where there is none, or it does not fit.
    """
    path = library_path()
    if path is None:
        raise KernelError(
            f"the CUDA kernel library {FILE_NAME} was not built",
            hint="install CUDA's nvcc 12.5 or later and run: python -m mqc.cuda.build",
        )
    return Library(path)
