"""A source's pictures once and for all in one LMDB file, reduced in size where that is wanted.

`prepare` writes OUTPUT.partial and renames it when every record has been read back. What a transaction has written is safe:
killed at any moment, the same call goes on where it was. The keys are

    000000042/n01440764/a.jpg   the picture's number in the source and the end of its name: the order stays the source's
    __meta__                    JSON: what it was made from, the options, how far it is, whether it is done
    __meta__/crc32/000000040    numbers and CRC-32s of the pictures that one transaction wrote, of which 40 is the first
    __meta__/bad/000000043      JSON: name and reason of a picture that was left out

No paddle in here: the worker processes are forked.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import time
import zlib
from dataclasses import dataclass

import lmdb
import numpy as np
from tqdm import tqdm

from ppdensecl import __version__
from ppdensecl.data.containers import META, PARTIAL, close_lmdb, read_meta
from ppdensecl.data.records import JPEG_SIDE, Encoder, encoded
from ppdensecl.errors import UserError

COMMIT_PICTURES, COMMIT_BYTES = 256, 32 << 20  # of one transaction: the work that a kill loses
MAP_SIZE = 1 << 26  # of a new database, in bytes; doubled whenever it is full
_CRC, _BAD = META + b"/crc32/", META + b"/bad/"
_CRCS = np.dtype([("index", "<i8"), ("crc32", "<u4")])


@dataclass
class Summary:
    pictures: int  # in the cache
    reduced: int  # of these
    bad: list  # (name, reason) of each picture that was left out
    bytes_before: int  # of the pictures in the cache, in the source
    bytes_after: int  # of the file
    resumed: int  # pictures that were there before this call
    seconds: float  # of this call


def prepare(source, output, short_side=0, quality=95, workers=0, max_bad_fraction=0.01, progress=False):
    """Writes a source's pictures to the LMDB file `output`, which LmdbSource reads. Returns a Summary.

    Args:
        source: pictures, see `sources.py`.
        output: the file to make; OUTPUT.bad.txt will list the pictures that were left out, if any.
        short_side: pictures with a longer short side are reduced to it and stored as JPEG; 0 for none. All others are
            stored byte for byte, whatever their format.
        quality: of these JPEGs.
        workers: processes that read, decode and encode; 0 does it in this one.
        max_bad_fraction: of the pictures that may be undecodable and so be left out.
        progress: shows a bar where there is a terminal.

    Raises UserError for bad options, for what cannot be written, for damage, and for an output made from something else.
    """
    began, output = time.monotonic(), os.path.realpath(output)
    _check_options(short_side, quality, workers, max_bad_fraction)
    made_from = {"source": type(source).__name__, "fingerprint": source.fingerprint(), "count": len(source),
                 "short_side": short_side, "quality": quality if short_side else None}
    if os.path.lexists(output):
        meta, bad = _finished(output, made_from)
        return _summary(output, meta, bad, meta["pictures"], began)
    partial = output + PARTIAL
    with _locked(partial):
        with _opened(partial) as environment:
            meta, bad = _state(environment)
            if meta is None:
                if environment.stat()["entries"]:
                    raise UserError(f"{partial}: is somebody else's LMDB; choose another --output")
                meta = {"ppdensecl": __version__, "made_from": made_from, "pictures": 0, "reduced": 0, "bytes_before": 0,
                        "next": 0, "done": False}
            _check_same(partial, meta, made_from)
            resumed = meta["pictures"]
            _commit(environment, meta, [])
            if not meta["done"]:
                encode = Encoder(source, short_side, quality)
                bad = _fill(environment, meta, encode, bad, workers, max_bad_fraction, output, progress)
        if not meta["done"]:
            _verify(partial, meta, progress)
            with _opened(partial) as environment:
                meta["done"] = True
                _commit(environment, meta, [])
        _rename(partial, output)
    return _summary(output, meta, bad, resumed, began)


def _check_options(short_side, quality, workers, max_bad_fraction):
    for option, value, low, high in (("--short-side", short_side, 0, JPEG_SIDE), ("--quality", quality, 1, 100),
                                     ("--workers", workers, 0, 1024), ("--max-bad-fraction", max_bad_fraction, 0, 1)):
        if not low <= value <= high:
            raise UserError(f"{option} is {value}; it should be from {low} to {high}")


def _summary(output, meta, bad, resumed, began):
    left_out = [tuple(bad[index]) for index in sorted(bad)]
    return Summary(meta["pictures"], meta["reduced"], left_out, meta["bytes_before"], os.path.getsize(output), resumed,
                   time.monotonic() - began)


# --- the file ---------------------------------------------------------------------------------------------------------


def _finished(output, made_from):
    """What _state tells of an output that is there already. Raises UserError if it is not what would be made."""
    meta = None
    close_lmdb(output)
    if os.path.isfile(output):
        with contextlib.suppress(lmdb.Error), lmdb.open(output, subdir=False, lock=False, readonly=True) as environment:
            meta, bad = _state(environment)
    if meta is None:
        raise UserError(f"{output}: is there already and no cache of pictures; choose another --output")
    _check_same(output, meta, made_from)
    return meta, bad


def _check_same(path, meta, made_from):
    names = {"source": "--source", "fingerprint": "names of the pictures", "count": "number of pictures",
             "short_side": "--short-side", "quality": "--quality"}
    before = meta["made_from"]
    other = [f"{names[key]} {str(before.get(key))[:13]} (now {str(value)[:13]})" for key, value in made_from.items()
             if before.get(key) != value]
    if other:
        raise UserError(f"{path}: was made from something else: {', '.join(other)}; use the same arguments, choose another "
                        "--output or delete it")


@contextlib.contextmanager
def _locked(partial):
    """Keeps a second process away. The lock is this process's own: workers that outlive it for a moment do not hold it."""
    close_lmdb(partial)
    try:
        file = open(f"{partial}-lock", "w")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{partial}: another process is writing it; wait for its end or choose another --output") from None
    except OSError as error:
        raise UserError(f"{partial}: cannot be written ({error.strerror}); choose another --output") from None
    with file:
        yield
        os.unlink(file.name)


@contextlib.contextmanager
def _opened(path, **options):
    """The LMDB. lock=False: `_locked` does it. Each commit is synced."""
    environment = None
    try:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        options = options or {"map_size": max(MAP_SIZE, 1 << size.bit_length())}
        environment = lmdb.open(path, subdir=False, lock=False, readahead=False, **options)
        yield environment
    except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError, lmdb.PageNotFoundError):
        raise UserError(f"{path}: is damaged; delete it and start again") from None
    except lmdb.Error as error:
        reason = str(error).rpartition(": ")[2]
        raise UserError(f"{path}: cannot be written or read ({reason}); what is in it is whole: free some space, then the same "
                        "command goes on") from None
    finally:
        if environment is not None:
            environment.close()


def _state(environment):
    """(meta or None, {number: (name, reason)} of the pictures left out so far)."""
    bad = {}
    with environment.begin() as transaction:
        cursor = transaction.cursor()
        for key, value in cursor if cursor.set_range(_BAD) else ():
            if not key.startswith(_BAD):
                break
            bad[int(key[len(_BAD):])] = tuple(json.loads(value))
        return read_meta(transaction), bad


def _commit(environment, meta, records):
    """Writes records and `meta` in one transaction, all or nothing."""
    good = [record for record in records if record.data is not None]
    checksums = np.array([(record.index, zlib.crc32(record.data)) for record in good], _CRCS)
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for record in records:
                    if record.data is None:
                        transaction.put(_BAD + b"%09d" % record.index, json.dumps(record.bad).encode())
                    else:
                        transaction.put(record.key, record.data)
                        transaction.delete(_BAD + b"%09d" % record.index)
                if good:
                    transaction.put(_CRC + b"%09d" % good[0].index, checksums.tobytes())
                transaction.put(META, json.dumps(meta).encode())
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])


def _verify(partial, meta, progress):
    """Reads every record back and compares its checksum with that of the bytes that were to be written."""
    with open(partial, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, if the system lets go of its copy
    with _opened(partial, readonly=True) as environment, environment.begin(buffers=True) as transaction:
        cursor = transaction.cursor()
        cursor.set_range(_CRC)
        written = itertools.takewhile(lambda item: item[0][:len(_CRC)] == _CRC, cursor)
        parts = [np.frombuffer(value, _CRCS) for _, value in written]
        expected = np.sort(np.concatenate([np.empty(0, _CRCS), *parts]), order="index")
        wanted = ((b"%09d" % index, checksum) for index, checksum in expected.tolist())
        cursor.first()
        records = itertools.takewhile(lambda item: item[0][:len(META)] != META, cursor)
        records = tqdm(records, "reading back", meta["pictures"], unit=" pictures", disable=None if progress else True)
        found = ((bytes(key[:9]), zlib.crc32(value)) for key, value in records)
        for one, other in itertools.zip_longest(found, wanted):
            if one != other:
                raise UserError(f"{partial}: the record of picture {int((other or one)[0])} is damaged, its checksum is wrong; "
                                "delete the file and start again, and have the disk and the memory of this machine checked")
    if len(expected) != meta["pictures"]:
        raise UserError(f"{partial}: has {len(expected)} records of {meta['pictures']} pictures; delete it and start again")


def _rename(partial, output):
    try:
        os.replace(partial, output)
        folder = os.open(os.path.dirname(output), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); the whole cache is in {partial}") from None
    close_lmdb(output)  # of an earlier file of the name


# --- the pictures -----------------------------------------------------------------------------------------------------


def _fill(environment, meta, encode, earlier_bad, workers, max_bad_fraction, output, progress):
    """Writes all that is missing and tries the pictures again that could not be read; returns those that still cannot."""
    count = len(encode.source)
    missing = [*sorted(earlier_bad), *range(meta["next"], count)]
    bad = {}
    with contextlib.closing(encoded(encode, missing, workers)) as records:
        shown = tqdm(records, total=count, initial=count - len(missing), unit=" pictures", smoothing=0.05,
                     disable=None if progress else True)
        for batch in _batches(shown):
            good = [record for record in batch if record.data is not None]
            bad.update((record.index, record.bad) for record in batch if record.data is None)
            meta["pictures"] += len(good)
            meta["reduced"] += sum(record.reduced for record in good)
            meta["bytes_before"] += sum(record.before for record in good)
            meta["next"] = max(meta["next"], batch[-1].index + 1)
            _commit(environment, meta, batch)
            if len(bad) > max_bad_fraction * count:
                break
    _report(bad, count, max_bad_fraction, meta, output)
    return bad


def _batches(records):
    """Lists of records, each for one transaction."""
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += len(record.data or b"")
        if len(batch) == COMMIT_PICTURES or size >= COMMIT_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _report(bad, count, max_bad_fraction, meta, output):
    """Writes OUTPUT.bad.txt; raises UserError for too many."""
    listing = f"{output}.bad.txt"
    try:
        if bad:
            with open(listing, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(f"{name}\t{reason}\n" for name, reason in bad.values())
        elif os.path.exists(listing):
            os.unlink(listing)
    except OSError as error:
        raise UserError(f"{listing}: cannot be written ({error.strerror}); free some space, then the same command goes "
                        "on") from None
    if len(bad) > max_bad_fraction * count:
        shown = ", ".join(name for name, _ in list(bad.values())[:10])
        raise UserError(f"{len(bad)} of {count} pictures cannot be decoded, more than --max-bad-fraction {max_bad_fraction} "
                        f"allows: {shown}{', …' if len(bad) > 10 else ''} (reasons in {listing}); repair them or raise "
                        "--max-bad-fraction, then the same command goes on")
    if not meta["pictures"]:
        raise UserError(f"none of {count} pictures can be decoded (reasons in {listing}); choose another --root")
