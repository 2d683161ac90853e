"""The folder of a run: one run at a time, and no earlier run's checkpoints lost by mistake."""

import errno
import fcntl
import os

from ppdensecl.engine import checkpoint
from ppdensecl.engine.logging import LOGGER, start_logging
from ppdensecl.errors import UserError


def take(folder, resume, overwrite):
    """Makes the folder, logs to it and locks it: returns the lock, to be closed at the end. Raises UserError where another run
    writes to it, where it cannot be written, and where it holds checkpoints that are neither to be resumed nor overwritten."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
        locked = _lock(lock)
        start_logging(folder)
        if not locked:
            LOGGER.warning(f"{folder} is on a file system without locks: that no other run writes to it could not be seen")
    except BlockingIOError:
        raise UserError(f"another run is writing to {folder}; wait for it, or give another -o output_dir=…") from None
    except OSError as error:
        raise UserError(f"'output_dir' {folder} cannot be written ({error.strerror}); "
                        "give another one with -o output_dir=…") from None
    checkpoint.remove_unfinished(folder)
    if checkpoint.exists(folder) and not resume and not overwrite:
        raise UserError(f"{folder} holds the checkpoints of an earlier run; add --resume to go on with it, "
                        "--overwrite to delete them, or give another -o output_dir=…")
    return lock


def _lock(file):
    """Whether the file system has locks. Raises BlockingIOError where another run has it."""
    try:
        # Not flock: the data workers inherit that one, and one of them outlives a killed run until its batch is made.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # as Lustre and some network disks
            return False
        raise
    return True


def begin(folder, config, overwrite):
    """Writes the config of this run, in place of an earlier run's traces."""
    if overwrite:
        checkpoint.remove_all(folder)
        for log in (folder / "vdl").glob("vdlrecords.*"):
            log.unlink()
        os.truncate(folder / "train.log", 0)
    checkpoint.write_text(folder / "config.yaml", config.to_yaml())
