"""Files that are either whole or not there."""

import contextlib
import os

from ppdensecl.errors import UserError


@contextlib.contextmanager
def replacing(path, named=None):
    """Context: a binary file that takes the place of `path` once it is complete on the disk, and not before.

    `named` is what an error calls it. Raises UserError where it cannot be written; what was there before stays then.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{named or path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
