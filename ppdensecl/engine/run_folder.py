"""The folder of a run: one run at a time, and no earlier run's checkpoints lost by mistake."""

import fcntl
import os

from ppdensecl.engine import checkpoint
from ppdensecl.engine.logging import start_logging
from ppdensecl.errors import UserError


def take(folder, resume, overwrite):
    """Makes the folder, logs to it and locks it: returns the lock, to be closed at the end. Raises UserError where another run
    writes to it, where it cannot be written, and where it holds checkpoints that are neither to be resumed nor overwritten."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
        # Not flock: the data workers inherit that one, and one of them outlives a killed run until its batch is made.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        start_logging(folder)
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


def begin(folder, config, overwrite):
    """Writes the config of this run, in place of an earlier run's traces."""
    if overwrite:
        checkpoint.remove_all(folder)
        for log in (folder / "vdl").glob("vdlrecords.*"):
            log.unlink()
        os.truncate(folder / "train.log", 0)
    checkpoint.write_text(folder / "config.yaml", config.to_yaml())
