"""What a process has of its machine: cores, the memory that it frees, the way to the GPU."""

import ctypes
import os
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_CGROUP = Path("/sys/fs/cgroup")


def cores():
    """CPU cores that this process may use: those of its affinity, or fewer where its container has a share of the time of all."""
    return min(len(os.sched_getaffinity(0)), _quota())


def _quota():
    """The cores' worth of time that the container is given, rounded up."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # cgroup v2: both numbers in one file; v1
        try:
            time, period = map(int, " ".join((_CGROUP / file).read_text() for file in files).split())
        except (OSError, ValueError):  # "max 100000": no limit
            continue
        if time > 0 and period > 0:  # -1: no limit
            return -(-time // period)
    return 2**31


def keep_freed_memory():
    """Lets malloc keep what is freed, for the next array. It would give large blocks back to the system, and get each of them
    again page by page, zeroed: in a step of ResNet-50 on a CPU that is up to half of the time, in a data worker a sixth."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def to_device(array):
    """A numpy array as a tensor on Paddle's device. With paddle.to_tensor alone the host would wait until a GPU has done all that
    it was given, and only then copy. The array may change as soon as this returns: the pinned copy of it is kept by Paddle until
    the GPU has read it."""
    import paddle

    if not paddle.get_device().startswith("gpu"):
        return paddle.to_tensor(array)
    return paddle.to_tensor(array, place=paddle.CUDAPinnedPlace()).cuda(blocking=False)
