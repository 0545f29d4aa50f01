"""How much memory this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def available_bytes() -> int:
    """Bytes that can be allocated without swapping: what the system reports, or less under a container's limit.

    Where the system does not say (no /proc/meminfo), half of the physical memory is assumed.
    """
    free: int | None = None
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except OSError:
        free = None
    if free is None:
        pages = getattr(os, "sysconf", lambda name: 0)("SC_PHYS_PAGES")
        page = getattr(os, "sysconf", lambda name: 4096)("SC_PAGE_SIZE")
        free = pages * page // 2 if pages > 0 else 4 * 2**30
    for limit_file, used_file in _CGROUP:
        limit, used = _number(limit_file), _number(used_file)
        if limit is not None and used is not None:
            free = min(free, max(0, limit - used))
    return free
