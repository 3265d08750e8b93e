"""Weights exchanged between two steps, on every rank of an engine: all of them, or none.

    rank 0                                       every other rank
    settle what is on its way (weight_calls.py)
    note "weights", op, arguments       ->       the same op
      stage: read or receive, look, cut            stage                          common/models/new_weights.py
      say what is wrong         <- all-gather ->   say what is wrong
      if nobody has said anything: write           write
      flush the tree, tell the version             tell the version

Staging may fail on one rank alone: its disk is full of another file, its memory is short, the trainer has died before its last
message reached it. As nothing has been written by then, all that is needed is that everybody hears of it: each rank says what it
has found, also that it has found nothing, and all come to the same end. An op never raises: a rank that follows would die of it.

What the old weights have cached goes. Pages that no running request holds are free at once; those of requests that were paused
in_place stay with them and are set apart in the tree, where nobody else finds them. SGLang 0.5.23 (srt/managers/
scheduler_components/weight_updater.py) asserts that the flush succeeds, so there in_place wants flush_cache=false.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.weight_calls import Told
from common.distributed.messages import agree, share_all
from common.distributed.update_group import UpdateGroup, reach, refuse_size
from common.executor import DTYPES
from common.memory_occupation import PAGES, WEIGHTS, MemoryOccupation
from common.models.held_weights import checksums, shape_of, whole_tensor
from common.models.json_file import name_shown
from common.models.new_weights import Staged, refuse_a_misfit_of, stage_checkpoint, stage_tensors
from common.parallel_state import broadcast


class OldOnes(NamedTuple):
    """What an update has to do with what is there."""

    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None
    hold: bool = False


class WeightUpdater:
    """On every rank. Each op returns a dictionary with `success` and `message`, equal on all ranks but for what only rank 0 has."""

    def __init__(self, scheduler: TPScheduler):
        self.scheduler, self.executor = scheduler, scheduler.wrapper
        self.replica = scheduler.replica
        self.world = (
            self.executor.parallel.world
        )  # under torchrun with replicas, the ranks of all: they update together
        self.occupation = MemoryOccupation(self.executor)
        self.payload: bytes | None = None  # rank 0's, of the op that comes next
        self._groups: dict[str, UpdateGroup] = {}
        self._snapshot: dict[str, str] | None = None
        self._updates = 0  # a name for what each has set apart
        self._held: tuple[Staged, OldOnes] | None = None  # looked at, and neither written nor dropped yet

    def close(self) -> None:
        for group in self._groups.values():
            group.leave()
        self._groups = {}
        self.occupation.forget_the_copy()

    # --- new weights

    def update_weights_from_disk(self, model_path: str, **options: Any) -> Told:
        executor = self.executor
        return self._update(
            lambda: stage_checkpoint(executor.model, model_path, executor.dtype, executor.stage, executor.moe),
            **options,
        )

    def update_weights_from_tensor(self, **options: Any) -> Told:
        """Rank 0 has the bytes of a safetensors file, and every rank gets all of it: which part is its own, it knows."""
        payload, self.payload = self.payload, None
        size = torch.tensor([len(payload or b"")])
        if self.replica.size > 1:
            broadcast(size, self.replica, "weights")  # COMM broadcast [1]: bytes to come
        data = torch.empty(int(size), dtype=torch.uint8)
        if payload:
            data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        if self.replica.size > 1 and len(data):
            broadcast(data, self.replica, "weights")  # COMM broadcast [bytes]: a safetensors file
        return self._update(lambda: self._stage(_read(data)), **options)

    def update_weights_from_distributed(
        self, names: list[str], dtypes: list[str], shapes: list[list[int]], group_name: str, **options: Any
    ) -> Told:
        """First whether they fit, by what is said of them; then all of them; then what they hold."""
        described: dict[str, torch.Tensor] = {}

        def look() -> None:
            self._refuse_to_begin(OldOnes(**options))
            self._group(group_name)
            for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
                described[name] = torch.empty(shape, dtype=_dtype(name, dtype), device="meta")
            refuse_a_misfit_of(self.executor.model, described, group_name)

        def receive() -> Staged:
            group = self._group(group_name)
            return self._stage(
                {name: group.broadcast(torch.empty(x.shape, dtype=x.dtype)) for name, x in described.items()}
            )

        _, wrong = self._agree(look)
        told = _failed(wrong) if wrong else self._update(receive, **options)
        if not told["success"]:  # the trainer may be in the middle of a broadcast that nobody takes
            self.destroy_weights_update_group(group_name)
        return told

    def _stage(self, tensors: dict[str, torch.Tensor]) -> Staged:
        executor = self.executor
        return stage_tensors(executor.model, tensors, executor.dtype, executor.moe, "new weights")

    def _update(self, stage: Callable[[], Staged], **options: Any) -> Told:
        old = OldOnes(**options)

        def staged() -> Staged:
            self._refuse_to_begin(old)
            return stage()

        ours, wrong = self._agree(staged, lambda one: one.digest)
        if wrong:
            return _failed(wrong)
        if not old.hold:
            return self._write(ours, old)
        self._held, self.scheduler.weights_held = (ours, old), True
        return {"success": True, "message": f"{ours.tensors} tensors held", "digest": ours.digest}

    def finish_update(self, write: bool) -> Told:
        """Of one that is held. Writing cannot fail: all ranks have all they need."""
        if self._held is None:
            return _failed("no update is held; give hold=True to one")
        (ours, old), self._held, self.scheduler.weights_held = self._held, None, False
        return self._write(ours, old) if write else {"success": True, "message": "the old weights answer"}

    def _write(self, ours: Staged, old: OldOnes) -> Told:
        paused = self._make_way(old)
        ours.write()
        for call in self.scheduler.at_new_weights:
            call()
        if self.executor.images is not None:  # made by the old tower
            self.executor.images.forget()
        if old.weight_version is not None:
            self.scheduler.weight_version = old.weight_version
        what = f"{ours.tensors} tensors on {self.world.size} rank(s), weight_version={self.scheduler.weight_version}"
        return {"success": True, "message": what, "num_paused_requests": paused}

    def _refuse_to_begin(self, old: OldOnes) -> None:
        if self.executor.images is not None:
            raise ValueError(
                "this model sees images, and keeps what its tower has made of them; start a new engine instead"
            )
        if WEIGHTS in self.occupation.away:
            raise ValueError("the weights are away; call resume_memory_occupation(['weights']) first")
        if self._held is not None:
            raise ValueError("another update is held; write or drop it first, with finish_update")
        scheduler = self.scheduler
        if self.replica.rank > 0 or scheduler.paused or old.abort_all_requests:
            return
        if scheduler.everybody:
            raise ValueError(
                f"{len(scheduler.everybody)} request(s) wait or run, and would go on with other weights; call "
                "pause_generation first, or give abort_all_requests=True"
            )

    def _make_way(self, old: OldOnes) -> int:
        """Rank 0, when it is certain: end who shall end, let nobody find the old pages. How many go on afterwards."""
        self._updates += 1
        scheduler = self.scheduler
        if self.replica.rank > 0:
            return 0
        for req in scheduler.everybody if old.abort_all_requests else ():
            scheduler.abort(req.rid)
        if old.flush_cache:
            for rank in scheduler.data_ranks:
                rank.memory.sessions.forget_all()
                mark = ("weights before update", self._updates)
                rank.tree.set_apart(mark)
                for req in rank.admitted:
                    req.extra_key = (mark, req.extra_key)
        return len(scheduler.everybody)

    def update_weight_version(self, new_version: str, abort_all_requests: bool) -> Told:
        if abort_all_requests and self.replica.rank == 0:
            for req in self.scheduler.everybody:
                self.scheduler.abort(req.rid)
        self.scheduler.weight_version = new_version
        return {"success": True, "message": f"weight_version={new_version}", "new_version": new_version}

    # --- the trainer's group

    def init_weights_update_group(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str
    ) -> Told:
        def look() -> None:
            if group_name in self._groups:
                raise ValueError(f"group {group_name} is there already; destroy_weights_update_group first")
            refuse_size(world_size, rank_offset, self.world.size)
            reach(master_address, master_port)  # from here, too: before any of them waits for the others

        def join() -> UpdateGroup:
            return UpdateGroup(master_address, master_port, rank_offset + self.world.rank, world_size, group_name)

        _, wrong = self._agree(look)
        group, wrong = (None, wrong) if wrong else self._agree(join)
        if wrong:
            if group:
                group.leave()
            return _failed(wrong)
        self._groups[group_name] = group
        return {"success": True, "message": f"{world_size} members in group {group_name}"}

    def destroy_weights_update_group(self, group_name: str) -> Told:
        group = self._groups.pop(group_name, None)
        if group is None:
            return _failed(f"there is no group {group_name}; init_weights_update_group makes one")
        group.leave()
        return {"success": True, "message": f"left group {group_name}"}

    def _group(self, name: str) -> UpdateGroup:
        if name not in self._groups:
            raise ValueError(f"there is no group {name}; init_weights_update_group makes one")
        return self._groups[name]

    # --- what is held

    def get_weights_by_name(self, name: str, truncate_size: int) -> Told:
        executor = self.executor
        shape = shape_of(executor.model, name)
        if shape is None:
            return _failed(
                f"{name_shown(name)}: {executor.config.architecture} has no such tensor; use the names of a checkpoint"
            )
        if WEIGHTS in self.occupation.away:
            return _failed("the weights are away; call resume_memory_occupation(['weights']) first")
        try:
            whole = whole_tensor(executor.model, name, shape, executor.moe, self.replica)
        except ValueError as error:  # all ranks', or rank 0's once the messages have been sent
            return _failed(str(error))
        return {
            "success": True,
            "message": name,
            "parameter": None if whole is None else whole[:truncate_size].tolist(),
        }

    def weights_checker(self, action: str) -> Told:
        """Each rank's own parameters, under their names here; what a compare has found wrong on any rank."""
        if WEIGHTS in self.occupation.away:
            return _failed("the weights are away; call resume_memory_occupation(['weights']) first")
        sums = checksums(self.executor.model)
        if action == "snapshot":
            self._snapshot = sums
            return {"success": True, "message": f"{len(sums)} parameters a rank remembered"}
        if action == "checksum":
            return {"success": True, "message": action, "payload": {"ranks": share_all(sums, self.replica)}}
        if self._snapshot is None:
            return _failed("there is no snapshot to compare with; ask for one first")
        changed = share_all([name for name, one in sums.items() if self._snapshot[name] != one], self.replica)
        if not any(changed):
            return {"success": True, "message": "equal to the snapshot on every rank"}
        first = next(names[0] for names in changed if names)
        return _failed(f"{len(set().union(*changed))} parameters have changed since the snapshot, {first} among them")

    # --- memory

    def release_memory_occupation(self, tags: list[str]) -> Told:
        def prepare() -> None:
            if self.replica.rank == 0 and self.scheduler.busy:
                raise ValueError(
                    f"{len(self.scheduler.everybody)} request(s) wait or run; memory is given back when nobody does"
                )
            if PAGES in tags and (reader := self.occupation.executor.kv_cache.mapped_by):
                raise ValueError(
                    f"kv_cache cannot be given back: its pages are mapped by {reader}; leave it out of tags"
                )
            if self._held is not None:
                raise ValueError("an update is held; write or drop it first, with finish_update")
            if WEIGHTS in set(tags) - self.occupation.away:
                self.occupation.keep_a_copy()

        _, wrong = self._agree(prepare)
        if wrong:
            if WEIGHTS not in self.occupation.away:
                self.occupation.forget_the_copy()
            return _failed(wrong)
        if self.replica.rank == 0 and PAGES in tags:
            for rank in self.scheduler.data_ranks:
                rank.memory.flush()
        self.occupation.release(set(tags))
        return self._away()

    def resume_memory_occupation(self, tags: list[str]) -> Told:
        _, wrong = self._agree(lambda: self.occupation.resume(set(tags)))
        if wrong:
            return _failed(f"{wrong}; nothing is awake: make room, and try again")
        self.occupation.awake(set(tags))
        return self._away()

    def _away(self) -> Told:
        away = sorted(self.occupation.away)
        return {"success": True, "message": f"away: {', '.join(away) or 'nothing'}", "away": away}

    # --- inside

    def _agree(self, work: Callable[[], Any], facts: Callable[[Any], Any] = lambda _: None) -> tuple[Any, str | None]:
        """(this rank's result, what went wrong on any rank). facts: what must be equal on all."""
        other = "has read other weights than rank 0; give all ranks the same files"
        return agree(work, self.world, other, facts)


def _failed(message: str) -> Told:
    return {"success": False, "message": message}


def _read(data: torch.Tensor) -> dict[str, torch.Tensor]:
    try:
        return load(data.numpy().tobytes())
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"new weights are no safetensors: {error}; send the bytes of such a file") from None


def _dtype(name: str, dtype: str) -> torch.dtype:
    found = DTYPES.get(dtype.removeprefix("torch."))
    if found is None:
        raise ValueError(f"{name} is announced as {dtype}; use {', '.join(DTYPES)}")
    return found
