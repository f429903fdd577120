"""What this processor can do (layer L1)."""

from __future__ import annotations

import os
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
TOPOLOGY = Path("/sys/devices/system/cpu")
MOST_THREADS = 8
"""Threads taken unasked. They meet at a barrier, and a matrix of 2048 rows has 16 items."""


def cpu_features(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Flags of the first processor as Linux names them; empty where there is no such file."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def default_threads(topology: Path = TOPOLOGY) -> int:
    """Physical cores that this process may use, at most MOST_THREADS.

    Two hardware threads of one core count once: the kernels keep its vector units busy alone.
    """
    if not hasattr(os, "sched_getaffinity"):
        return 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = topology / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        try:
            cores.add(siblings.read_text(encoding="ascii").strip())
        except OSError:
            cores.add(str(cpu))
    return min(len(cores), MOST_THREADS)
