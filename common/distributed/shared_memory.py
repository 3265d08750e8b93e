"""All-reduce between CPU ranks of one host, through memory that all of them have mapped. Opt-in: all_reduce="shm".

A decode step on CPU ranks sends 2L + 1 messages of a few kilobytes. Gloo carries each through sockets of the loopback
device: system calls, and a thread to be woken on either side. Two processes of one host can do without: one file, mapped by
all ranks, has for each rank a line that says how far it is, and two slots for messages, of odd and of even rounds:

    lines  [R, 128 bytes]        round | what the message is, in odd and in even rounds | has left
    slots  [2, R, CHUNK bytes]   the message itself

    a round of a rank: copy x into my slot of this side | FENCE | write the round into my line
                       look at the others' lines until all have written it | FENCE | add up all slots in the order of the ranks

All ranks add the same numbers in the same order, so their sums are equal bit for bit. Messages above CHUNK go in pieces, a round
each, while others still add up the piece before. A side is written again two rounds later; by then nobody reads it any more:
whoever wrote round n + 1 into its line had read all of round n, and I enter round n + 2 only after I have seen n + 1 in all lines.
One trip, no second meeting; kernels/all_reduce.py has the same two sides between GPUs.

Memory order. What must hold: who sees a round in a line sees the whole message (1), and has read it before its own next round
shows (2). Python has no fences, so one is made of what it has. `_fence` releases and takes a lock that nobody else uses:

- what is guaranteed. POSIX (Base Definitions 4.12) lists the calls that "synchronize memory"; sem_post, sem_wait,
  pthread_mutex_lock and pthread_mutex_unlock are among them, and CPython's lock is made of them (Python/thread_pthread.h; newer
  versions have a compare-exchange of their own, sequentially consistent). They are calls into a library: no compiler moves a
  load or a store over them, and Python itself keeps the order of statements.
- x86. A core shows its stores in their order, and does its loads in theirs (TSO); (1) and (2) need no more. glibc's memcpy may
  write past that order (non-temporal, in large copies), and ends with an sfence; the lock's instruction is a full barrier too.
- ARM. Loads and stores may pass each other. Release is a store-release (all before it is there first), taking is a
  load-acquire (all after it comes later), and a load-acquire does not pass an earlier store-release (ARMv8 manual B2.3,
  [L]; po; [A]): release first, then take, and nothing crosses the pair in either direction. The other way round, take and
  then release, both neighbours could slip in between the two and pass each other there.
- what no document guarantees: that the store of a round, an aligned 8-byte word through a memoryview, is one store. It is a
  memcpy of constant size, of which every compiler makes one; and a word torn in halves would do no harm before round 2**32.

It was run and stress-tested on x86; on ARM there is the argument, and no test has run.

A rank that waits looks LOOKS times, and then sleeps a little between looks. To yield instead (sched_yield) is quicker where the
ranks have the machine to themselves, and on a busy one it is a disaster: who yields goes to the end of the line behind others'
whole slices, while a sleeper that wakes goes to the front. Where the cores are taken by other work gloo, which only ever
sleeps, can be the faster of the two.

A peer that died is told from one that is slow by asking the system, one that left in good order by its line; one that is
stopped, or stays away, uses up the time that gloo would give it. All end as RuntimeError, and collectives.py names the rank as it
does for gloo.
"""

import mmap
import os
import sys
import tempfile
import threading
import time

import torch
import torch.distributed as dist

from common.distributed.processes import DEAD, fate

CHUNK = 256 << 10  # bytes of a round: a slot of each of two ranks, and x, stay in a core's second cache
LINE = 128  # bytes: no two ranks write into one cache line, which Apple's cores have that long
ROUND, WHAT, LEFT = 0, 1, 3  # words of a line; WHAT has one for each side
LOOKS = 300  # some 20 us of them: a peer with the same work is rarely later
NAP_S = 1e-6  # asked for; Linux makes 60 us of it
LOOK_AT_PROCESSES_EVERY_S = 0.1
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)
PATH_BYTES = 1024
MOST_SHAPES = 256  # whose views are kept


class SharedMemoryAllReduce:
    """x [...] on each rank -> the sum, in x; `fits(x)` says for which x. Made by `meet_in_shared_memory`.

    pids: {rank in the world: pid} of the members, to name one that does not answer within timeout_s, and ask the system about it.
    Raises RuntimeError if a peer is dead, has left, stays away, or sends another message than this rank.
    """

    def __init__(self, memory: mmap.mmap, rank: int, pids: dict[int, int], timeout_s: float):
        self._rank, self._timeout_s, self._peers = rank, timeout_s, list(pids.items())
        self._lines = memoryview(memory).cast("q")
        self._slots = torch.frombuffer(memory, dtype=torch.uint8)[_head(len(pids)) :].view(2, len(pids), CHUNK)
        self._views: dict[tuple[int, torch.dtype], list[list[torch.Tensor]]] = {}
        self._others = [r for r in range(len(pids)) if r != rank]
        self._round = 0
        self._gate = threading.Lock()
        self._gate.acquire()

    @staticmethod
    def fits(x: torch.Tensor) -> bool:
        return x.device.type == "cpu" and x.dtype in DTYPES and x.is_contiguous() and x.numel() > 0

    @staticmethod
    def fits_norm(x: torch.Tensor) -> bool:
        """Is there one kernel for a sum and the norm after it? Not on a CPU."""
        return False

    @staticmethod
    def fits_merge(answers) -> bool:
        """Nor for parts of an attention and what they make."""
        return False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        flat, size = x.detach().view(-1), x.element_size()
        what = (flat.numel() * size << 8) + DTYPES.index(x.dtype)
        if flat.numel() * size <= CHUNK:
            self._add_up(flat, what)
        else:
            for piece in flat.split(CHUNK // size):
                self._add_up(piece, what)
        return x

    def close(self) -> None:
        """Say that no more will come; who waits for it is told at once."""
        self._fence()
        self._lines[self._rank * LINE // 8 + LEFT] = 1

    def _add_up(self, x: torch.Tensor, what: int) -> None:
        now = self._round + 1
        side, mine = now & 1, self._rank * LINE // 8
        slots = self._slots_of(x)[side]
        slots[self._rank].copy_(x)
        self._lines[mine + WHAT + side] = what
        self._fence()
        self._lines[mine + ROUND] = now
        self._round = now
        for rank in self._others:
            self._wait_for(rank, now)
        self._fence()
        for rank in self._others:
            if (theirs := self._lines[rank * LINE // 8 + WHAT + side]) != what:
                raise RuntimeError(f"rank {self._peers[rank][0]} sends {_shown(theirs)}, this rank {_shown(what)}")
        if len(slots) > 2 and x.element_size() == 2:  # rounded once, and not at every addition
            total = slots[0].float()
            for part in slots[1:]:
                total += part
            x.copy_(total)
            return
        torch.add(slots[0], slots[1], out=x)
        for part in slots[2:]:
            x += part

    def _slots_of(self, x: torch.Tensor) -> list[list[torch.Tensor]]:
        """[side][rank] -> that slot, as a tensor like x; kept, since a step sends the same shapes again and again."""
        key = x.numel(), x.dtype
        if key not in self._views:
            if len(self._views) == MOST_SHAPES:
                self._views.clear()
            room = self._slots[:, :, : x.numel() * x.element_size()]
            self._views[key] = [[slot.view(x.dtype) for slot in side] for side in room]
        return self._views[key]

    def _fence(self) -> None:
        """Every load and store before it comes before every one after it; see the top of this file."""
        self._gate.release()
        self._gate.acquire()

    def _wait_for(self, rank: int, now: int) -> None:
        lines, at = self._lines, rank * LINE // 8
        for _ in range(LOOKS):
            if lines[at + ROUND] >= now:
                return
        began = time.monotonic()
        look = began + LOOK_AT_PROCESSES_EVERY_S
        while lines[at + ROUND] < now:
            time.sleep(NAP_S)
            if (clock := time.monotonic()) < look:
                continue
            look = clock + LOOK_AT_PROCESSES_EVERY_S
            name, pid = self._peers[rank]
            gone = "has left" if lines[at + LEFT] else fate(pid)
            self._fence()
            if lines[at + ROUND] >= now:  # that was its last word
                return
            if gone in ("has left", DEAD):
                raise RuntimeError(f"rank {name} {gone}")
            if clock - began > self._timeout_s:
                raise RuntimeError(f"no answer of rank {name} in {self._timeout_s:g} s")


def meet_in_shared_memory(
    rank: int, members: dict[int, tuple[int, int]], control_group, timeout_s: float
) -> SharedMemoryAllReduce:
    """Collective over `control_group`, whose members are {rank in the world: (host, pid)}. Leaves no file behind.

    Raises ValueError, on every rank alike, if the ranks are not all on one host, or this has no room for the slots.
    """
    hosts = len({host for host, _ in members.values()})
    if hosts > 1:
        raise ValueError(
            f'all_reduce="shm" is memory of one host, but the {len(members)} ranks run on {hosts}; leave it out (gloo)'
        )
    size, path, failed = _head(len(members)) + 2 * len(members) * CHUNK, None, None
    letter = torch.zeros(PATH_BYTES, dtype=torch.uint8)
    if rank == 0:
        try:
            path = _new_file(size)
            letter[: len(os.fsencode(path))] = torch.tensor(list(os.fsencode(path)), dtype=torch.uint8)
        except OSError as error:
            failed = error
    dist.broadcast(letter, group_src=0, group=control_group)  # COMM broadcast [1024]: where the shared memory is
    name, memory = bytes(letter.tolist()).rstrip(b"\0"), None
    try:
        memory = _map(name, size) if name else None
    except (OSError, ValueError) as error:
        failed = error
    there = torch.tensor([int(memory is not None)])
    dist.all_reduce(there, op=dist.ReduceOp.MIN, group=control_group)  # COMM all-reduce [1]: has every rank mapped it?
    if path:
        _forget(path)
    if not there:
        why = f" ({failed})" if failed else ""
        raise ValueError(f'all_reduce="shm" finds no {size:,} bytes that all ranks share{why}; leave it out (gloo)')
    return SharedMemoryAllReduce(memory, rank, {r: pid for r, (_, pid) in members.items()}, timeout_s)


def _head(ranks: int) -> int:
    """Bytes of the lines, in whole pages."""
    return -(-ranks * LINE // mmap.PAGESIZE) * mmap.PAGESIZE


def _new_file(size: int) -> str:
    """Of this user alone, in memory where the system has a folder for that; every byte is there, or OSError says so now."""
    folder = None
    if sys.platform == "linux":  # has a folder that lies in memory
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    handle, path = tempfile.mkstemp(prefix="all-reduce-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(bytes(size))
    except OSError:
        _forget(path)
        raise
    return path


def _map(name: bytes, size: int) -> mmap.mmap:
    with open(name, "r+b") as file:
        return mmap.mmap(file.fileno(), size)


def _forget(path: str) -> None:
    """What is mapped stays, without a name; only Windows keeps the file, which it will not delete under a mapping."""
    try:
        os.unlink(path)
    except OSError:
        return


def _shown(what: int) -> str:
    return f"{what >> 8} bytes of {str(DTYPES[what & 255]).removeprefix('torch.')}"
