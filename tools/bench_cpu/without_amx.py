"""Run this process as if the processor had no AMX: the kernel refuses the tile registers.

A program has to ask Linux for the tile registers (``arch_prctl(ARCH_REQ_XCOMP_PERM)``) and must go
on without them where it gets none. A seccomp filter refuses that one call.
"""

from __future__ import annotations

import ctypes
import errno
import struct

_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_ARCH_PRCTL, _REQUEST_STATE = 158, 0x1023
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


def refuse_amx() -> None:
    """Make every later request for AMX state fail, in this process and its children (x86-64)."""
    program = [
        (_LOAD, 0, 0, 0),  # the system call's number
        (_JUMP_EQUAL, 0, 3, _ARCH_PRCTL),
        (_LOAD, 0, 0, 16),  # its first argument
        (_JUMP_EQUAL, 0, 1, _REQUEST_STATE),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    instructions = ctypes.create_string_buffer(code)
    header = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(program), ctypes.addressof(instructions))
    )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(
        _SET_SECCOMP, _MODE_FILTER, header, 0, 0
    ):
        raise OSError(ctypes.get_errno(), "the filter that refuses AMX cannot be set")
