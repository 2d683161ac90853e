"""What a run finds on its machine: cores, alone or as a container's share, and file systems without locks."""

import errno
import fcntl
import os

import pytest

from ppdensecl import machine
from ppdensecl.engine import device, run_folder
from ppdensecl.errors import UserError


@pytest.mark.parametrize("cores, processes, where, expected", [(2, 1, "cpu", 1), (64, 8, "gpu:0", 7), (96, 4, "gpu:3", 8), (2, 4, "gpu:0", 1)])
def test_the_data_workers_suit_the_machine(monkeypatch, tmp_path, cores, processes, where, expected):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores))
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", str(processes))
    assert device.workers(where) == expected


@pytest.mark.parametrize("files, expected", [
    ({"cpu.max": "150000 100000\n"}, 2), ({"cpu.max": "max 100000\n"}, 64), ({"cpu.max": "6400000000 100000\n"}, 64), ({}, 64),
    ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64)])
def test_a_containers_share_of_the_cores_counts(monkeypatch, tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64))
    assert machine.cores() == expected


def test_a_file_system_without_locks_does_not_end_the_run(tmp_path, monkeypatch):
    def lockf(file, how):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "lockf", lockf)
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        run_folder.take(tmp_path / str(number), None, False).close()
        assert "without locks" in (tmp_path / str(number) / "train.log").read_text()
    for number, words in ((errno.EAGAIN, "another run is writing"), (errno.EROFS, "cannot be written")):
        with pytest.raises(UserError, match=words):
            run_folder.take(tmp_path / str(number), None, False)
