"""The system calls refused to a sandboxed program, as a filter for the kernel (seccomp BPF). A program gets one process, so
that the memory limit of a process is the limit of the program; threads are allowed."""

from __future__ import annotations

import errno
import platform
import struct

from frpo_nemo.errors import ConfigError

# Name -> number on x86_64, aarch64 (None: it has no such call). These fail with EPERM.
_REFUSED = {
    # Another process. Only `clone` is examined further, because it also starts threads.
    "fork": (57, None),
    "vfork": (58, None),
    # Memory that no limit of the process counts.
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mq_open": (240, 180),
    "io_setup": (206, 0),
    "vmsplice": (278, 75),
    # A listening socket holds what others sent it; and some networks have no namespaces, such as AF_VSOCK's.
    "socket": (41, 198),
    # Namespaces, in which a process may mount; io_uring, which bypasses this filter.
    "unshare": (272, 97),
    "setns": (308, 268),
    "io_uring_setup": (425, 425),
    # A program that computes a function doesn't need these, and the kernel has had holes here.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_CLONE_THREAD = 0x10000
_X32 = 0x40000000  # x86_64's calls under other numbers
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, audit architecture

_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_ABOVE, _JUMP_IF_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, little-endian
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000


def bpf_filter() -> bytes:
    """Return the filter for this machine, an array of struct sock_filter. Raises ConfigError on a processor other than
    x86_64 and aarch64."""
    if platform.machine() not in _MACHINES:
        raise ConfigError(f"the sandbox knows the system calls of x86_64 and aarch64; this is {platform.machine()}")
    column, architecture = _MACHINES[platform.machine()]
    program = [(_LOAD, 0, 0, _ARCHITECTURE), (_JUMP_IF_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL)]
    program += [(_LOAD, 0, 0, _NUMBER), (_JUMP_IF_ABOVE, 0, 1, _X32), (_RETURN, 0, 0, _FAIL | errno.EPERM)]
    for numbers in _REFUSED.values():
        if numbers[column] is not None:
            program += [(_JUMP_IF_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _FAIL | errno.EPERM)]
    # Its flags are in memory, where a filter cannot look; without clone3, libc falls back to clone.
    program += [(_JUMP_IF_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _FAIL | errno.ENOSYS)]
    program += [(_JUMP_IF_EQUAL, 1, 0, _CLONE[column]), (_RETURN, 0, 0, _ALLOW)]
    program += [(_LOAD, 0, 0, _FIRST_ARGUMENT), (_JUMP_IF_SET, 1, 0, _CLONE_THREAD)]
    program += [(_RETURN, 0, 0, _FAIL | errno.EPERM), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)
