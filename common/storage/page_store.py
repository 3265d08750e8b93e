"""Pages in files: the tier below the host's memory. A file holds one page of one rank, and proves that it does.

    "KVPG" version key (32 bytes) two lengths  |  text: the form of a page  |  payload  |  SHA-256 of all before

A page is read in one call, straight to where it belongs, with what stands before and behind it (scatter).

Written under a name that nobody looks for, then renamed: a file has its name when it is whole, or never. Whoever is killed in the
middle leaves a file that nobody reads, and that is removed later. A crash of the whole machine may leave a named file without its
end, a disk may lose bits: the checksum finds both. What is not exactly what it should be is removed and counted, and counts as not
there: its tokens are computed again, and never read from it.

The folder holds `quota` bytes. When more has been written, the files that were used least recently go (a file's time is set when
it is read, to the minute). Several engines may use one folder: names tell what is inside (page_keys.py), so two that write the
same page write the same bytes, and one that is gone is a miss. SGLang 0.5.23: HiCacheFile in srt/mem_cache/hicache_storage.py,
files of bare payload.
"""

import os
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from itertools import count
from pathlib import Path

MAGIC, VERSION, LENGTH = b"KVPG", 1, 32  # the last: of a checksum
HEAD = struct.Struct("<4sI32sIQ")
END, PART = ".kv", ".part"  # of a page's file, and of one that is being written
ABANDONED_S = 600  # a file that has been written for so long is nobody's any more
LEFT = 0.9  # of the quota, after files have gone: else the next page would be one too many
FRESH_S = 60  # a file that was used since then need not be told that it is used
# nobody waits for a pipe's other end, and no byte is changed; each where the system has it
READ_AT_ONCE = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
AT_ONCE = 1024  # buffers of a readv at most (Linux's IOV_MAX)
LOOKS = 16  # the folder is looked through whenever a 16th of its quota was written


class PageStore:
    """The files of one rank. seed: see page_keys.py; form: says what a page is, for people and for a last check.

    Threads may call it. Raises ValueError for a folder that cannot be made or written to.
    """

    def __init__(self, folder: str | Path, seed: bytes, form: str, quota: int):
        self.folder, self.seed, self.form, self.quota = Path(folder), seed, form.encode(), quota
        self._folder = os.path.join(self.folder, "")
        self.written = self.read_pages = self.damaged = self.removed = self.failed = 0  # pages since the beginning
        self._lock, self._number, self._since = (
            threading.Lock(),
            count(),
            quota,
        )  # bytes since the folder was looked through
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self._part("probe")
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            why = error.strerror or error  # without the name of the probe
            raise ValueError(
                f"hicache_storage_dir={folder} cannot be used: {why}; name another folder, or allow this user to write there"
            ) from None
        self._make_room(0)

    def key(self, chained: bytes, seed: bytes | None = None) -> bytes:
        """Of the seed that the store has now, or of the one that it had when something was ordered."""
        return sha256((seed or self.seed) + chained).digest()

    def path(self, chained: bytes) -> Path:
        return Path(self._at(self.key(chained)))

    def _at(self, key: bytes) -> str:
        """A text and no Path: a prompt has a thousand of them."""
        return f"{self._folder}{key.hex()}{END}"

    def leading(self, chained: Sequence[bytes], seed: bytes | None = None) -> int:
        """How many of these pages, from the first one on, have a file."""
        for i, one in enumerate(chained):
            if not os.path.exists(self._at(self.key(one, seed))):
                return i
        return len(chained)

    def write(self, chained: bytes, payload: Sequence[memoryview], seed: bytes | None = None) -> bool:
        """False if it could not be written: then it is not there."""
        key, length = self.key(chained, seed), sum(map(len, payload))
        path = Path(self._at(key))
        part = self._part(path.stem)
        try:
            if path.exists():
                os.utime(path)
                return True
            head = HEAD.pack(MAGIC, VERSION, key, len(self.form), length) + self.form
            with open(part, "xb") as file:
                for piece in (head, *payload, _checksum(head, payload)):
                    file.write(piece)
                size = file.tell()
            os.replace(part, path)
        except OSError:  # the disk is full, or another system holds the name for its reader
            self._count("failed")
            with suppress(OSError):
                part.unlink()
            return False
        self._count("written")
        self._make_room(size)
        return True

    def read(self, chained: bytes, into: Sequence[memoryview], seed: bytes | None = None) -> bool:
        """Fill `into`; False if the page is not there, or not what it should be. Then `into` holds anything."""
        key = self.key(chained, seed)
        path, wanted = self._at(key), HEAD.pack(MAGIC, VERSION, key, len(self.form), sum(map(len, into)))
        try:
            descriptor = os.open(path, READ_AT_ONCE)
        except OSError:  # not there; or this process may open no more files, a reason to compute, and none to remove it
            return False
        try:
            whole = _holds(descriptor, wanted + self.form, into)
            old = time.time() - os.fstat(descriptor).st_mtime > FRESH_S
        except OSError:
            whole = False
        finally:
            os.close(descriptor)
        if not whole:
            self._count("damaged")
            with suppress(OSError):
                os.unlink(path)
            return False
        if old:
            with suppress(OSError):
                os.utime(path)
        self._count("read_pages")
        return True

    def _part(self, name: str) -> Path:
        return self.folder / f"{name}.{os.getpid()}.{next(self._number)}{PART}"

    def _count(self, what: str) -> None:
        with self._lock:
            setattr(self, what, getattr(self, what) + 1)

    def _make_room(self, written: int) -> None:
        """Every now and then, so that others who write here are seen too."""
        with self._lock:
            self._since += written
            if self._since < self.quota / LOOKS:
                return
            self._since = 0
        found = []
        try:
            entries = list(os.scandir(self.folder))
        except OSError:  # the folder is gone, or must not be listed: nothing can be removed then
            return
        for entry in entries:
            with suppress(OSError):  # somebody else has removed it
                stat = entry.stat()
                if entry.name.endswith(PART) and time.time() - stat.st_mtime > ABANDONED_S:
                    os.unlink(entry.path)
                elif entry.name.endswith(END):
                    found.append((stat.st_mtime_ns, stat.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        if total <= self.quota:
            return
        for _, size, path in sorted(found):
            if total <= LEFT * self.quota:
                break
            with suppress(OSError):
                os.unlink(path)
                self._count("removed")
            total -= size


def _holds(descriptor: int, head: bytes, into: Sequence[memoryview]) -> bool:
    """Is this the head, as much payload as there is room for, and the checksum of both, and then the end?"""
    first, last = bytearray(len(head)), bytearray(LENGTH + 1)  # a byte more than there should be
    buffers = [memoryview(first), *into, memoryview(last)]
    wanted = sum(map(len, buffers)) - 1
    got = _scatter(descriptor, buffers[:AT_ONCE])
    while got < wanted:  # the end of the file, most likely; or a system that gives less than it has
        more = _scatter(descriptor, _behind(buffers, got)[:AT_ONCE])
        if not more:
            return False
        got += more
    return got == wanted and first == head and last[:LENGTH] == _checksum(head, into)


def _checksum(head: bytes, payload: Sequence[memoryview]) -> bytes:
    whole = sha256(head)
    for piece in payload:
        whole.update(piece)
    return whole.digest()


def _behind(buffers: Sequence[memoryview], at: int) -> list[memoryview]:
    """What of them comes behind their first `at` bytes."""
    rest = []
    for buffer in buffers:
        rest += [buffer[at:]] if at < len(buffer) else []
        at = max(at - len(buffer), 0)
    return rest


def _one_after_another(descriptor: int, buffers: Sequence[memoryview]) -> int:
    """What readv does, where the system has none: fill these buffers from where the file stands; how many bytes it were."""
    got = 0
    for buffer in buffers:
        data = os.read(descriptor, len(buffer))
        buffer[: len(data)] = data
        got += len(data)
        if len(data) < len(buffer):
            break
    return got


_scatter = getattr(os, "readv", _one_after_another)
