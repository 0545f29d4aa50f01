"""The child of `hasten.bench.sandbox`, run as a script of its own with the standard library alone: one limited program.

Standard input holds {"program", "seconds", "memory_bytes", "file_bytes", "token"}; what came of the program is written as
JSON to the descriptor named by the first argument, with the guards that could be set. Nothing of hasten is imported here.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import runpy
import struct
import sys
from typing import Any

# What is refused: processes, programs, sockets, signals to others, tracing, changes of modes, owners and attributes (which
# Landlock does not cover), kernel facilities that go around these. name: (x86_64, aarch64); -1 where there is no such call.
CALLS = {
    "clone": (56, 220), "fork": (57, -1), "vfork": (58, -1), "clone3": (435, 435), "execve": (59, 221),
    "execveat": (322, 281), "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "io_uring_setup": (425, 425), "bpf": (321, 280),
    "userfaultfd": (323, 282), "perf_event_open": (298, 241), "keyctl": (250, 219), "add_key": (248, 217),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51),
    "reboot": (169, 142), "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, -1), "fchown": (93, 55), "lchown": (94, -1), "fchownat": (260, 54), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "utime": (132, -1), "utimes": (235, -1), "utimensat": (280, 88), "futimesat": (261, -1),
    "setpriority": (141, 140), "setrlimit": (160, 164), "prlimit64": (302, 261), "setsid": (112, 157),
    "setpgid": (109, 154), "mq_open": (240, 180), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
    "sethostname": (170, 161), "settimeofday": (164, 170), "clock_settime": (227, 112), "swapon": (167, 224),
    "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104), "memfd_create": (319, 279),
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of CALLS, audit architecture
_WRITES = 0x1FFFE & ~0x000C  # Landlock's rights from WRITE_FILE to IOCTL_DEV without reading (READ_FILE 4, READ_DIR 8)
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # file rights known to each version of Landlock


def limits(asked: dict[str, Any]) -> list[str]:
    """Set resource limits and return what they guard."""
    seconds = int(asked["seconds"])
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, asked["memory_bytes"], asked["memory_bytes"]),
        (resource.RLIMIT_FSIZE, asked["file_bytes"], asked["file_bytes"]),
        (resource.RLIMIT_NOFILE, 32, 32),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))
    guards = ["cpu time", "size of files", "open files"]
    if sys.platform == "linux":
        guards.insert(1, "memory")  # macOS takes the limit and does not keep it
    if os.geteuid() != 0:  # the superuser's processes are not counted
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        guards.append("processes")
    return guards


def landlock(folder: str) -> bool:
    """Allow changes of files below `folder` alone, and to /dev/null; whether this kernel does it."""
    if sys.platform != "linux":
        return False
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    version = call(444, None, 0, 1)
    if version < 1:
        return False
    handled = _WRITES & ((1 << _RIGHTS.get(version, 16)) - 1)
    attributes = struct.pack("=QQ", handled, 3 if version >= 4 else 0)  # and TCP's bind and connect, from version 4 on
    rules = call(444, attributes, len(attributes) if version >= 4 else 8, 0)
    if rules < 0:
        return False
    for path, rights in ((folder, handled), ("/dev/null", handled & 0x4002)):  # a file takes WRITE_FILE and TRUNCATE
        at = os.open(path, os.O_PATH | os.O_CLOEXEC)
        done = call(445, rules, 1, struct.pack("=Qi", rights, at), 0)
        os.close(at)
        if done < 0:
            return False
    done = call(446, rules, 0)
    os.close(rules)
    return bool(done == 0)


def no_new_privileges() -> None:
    """What both Landlock and seccomp ask for: no program may ever give this process more rights."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)


def seccomp() -> bool:
    """Refuse the calls of CALLS with EPERM; whether this kernel and processor do it."""
    machine = _MACHINES.get(platform.machine()) if sys.platform == "linux" else None
    if machine is None:
        return False
    column, architecture = machine
    numbers = [one[column] for one in CALLS.values() if one[column] >= 0]
    load, equal, above, give = 0x20, 0x15, 0x35, 0x06  # BPF: load word, jump if equal, jump if at least, return
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | 1, 0x80000000
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    code += [(above, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # x86's second table of the same calls
    for number in numbers:
        code += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    code.append((give, 0, 0, allow))
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in code))
    filter_ = struct.pack("@HP", len(code), ctypes.addressof(program))
    return bool(ctypes.CDLL(None, use_errno=True).prctl(22, 2, filter_, 0, 0) == 0)


def main() -> None:
    """Set all guards, run the program, say what came of it."""
    out = int(sys.argv[1])
    asked = json.loads(sys.stdin.buffer.read())
    path = os.path.join(os.getcwd(), "solution.py")
    with open(path, "w", encoding="utf-8") as file:
        file.write(asked["program"])
    guards = limits(asked)
    no_new_privileges()
    if landlock(os.getcwd()):
        guards.append("files outside its folder")
    if seccomp():
        guards = [*dict.fromkeys((*guards, "processes", "network", "signals"))]
    os.write(out, json.dumps({"guards": guards}).encode() + b"\n")
    sys.argv, outcome = [path], {"kind": "passed", "note": ""}
    try:
        runpy.run_path(path, run_name="solution")
    except AssertionError as error:
        outcome = {"kind": "wrong", "note": f"AssertionError: {error}"}
    except MemoryError:
        outcome = {"kind": "memory", "note": "MemoryError"}
    except SystemExit as error:
        outcome = {"kind": "error", "note": f"it left by exit({error.code!r}) before its tests were done"}
    except BaseException as error:  # noqa: BLE001 - whatever a program raises is its outcome
        outcome = {"kind": "error", "note": f"{type(error).__name__}: {error}"}
    outcome["note"], outcome["token"] = str(outcome["note"])[:300], asked["token"]
    os.write(out, json.dumps(outcome).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
