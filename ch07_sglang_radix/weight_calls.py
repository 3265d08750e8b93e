"""Weights and memory of a running engine, under SGLang's names: what Engine and ReplicaEngine have in common.

    engine.pause_generation("retract")                        abort, retract or in_place
    engine.update_weights_from_disk(folder, weight_version="step 7")
    engine.continue_generation()                              meta_info["weight_version"] says "step 7" from here on

Who does it is the wing adapters/ (weight_updater.py), on every rank; it comes when the first of these is called. An update happens
on all ranks or on none: ValueError says in one line why not, and then the old weights answer as before.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from safetensors.torch import save

from ch07_sglang_radix.scheduler import PAUSE_MODES, TPScheduler
from common.distributed.update_group import MAX_MEMBERS, reach, refuse_size
from common.memory_occupation import TAGS
from common.values import choice, flag, host_name, texts, walked, whole

WEIGHT_UPDATER = "ch07_sglang_radix.adapters.weight_updater"  # in a wing that comes when it is asked for
ACTIONS = ("checksum", "snapshot", "compare")
GROUP = "weight_update_group"  # SGLang's default name
EXCHANGES = (
    "update_weights_from_disk", "update_weights_from_tensor", "update_weights_from_distributed",
    "init_weights_update_group", "destroy_weights_update_group", "update_weight_version", "get_weights_by_name",
    "weights_checker", "release_memory_occupation", "resume_memory_occupation", "finish_update",
)  # fmt: skip
Told = dict[str, Any]


class WeightCalls(ABC):
    """Each returns what it did. Raises ValueError, with nothing changed, for whatever is wrong with the call or the weights."""

    def update_weights_from_disk(
        self, model_path: str, load_format: str | None = None, *, flush_cache: bool = True,
        abort_all_requests: bool = False, weight_version: str | None = None, hold: bool = False,
    ) -> Told:  # fmt: skip
        """All weights, from a folder with a checkpoint of the same architecture.

        flush_cache: what the old weights have cached is not found any more; without it the caller must know that it is not used.
        abort_all_requests: end who waits or runs; else there must be nobody, or generation is paused. Requests that were paused
        in_place go on with the K and V of the old weights. weight_version: what meta_info tells from here on. hold: look at
        them and keep them beside the old ones until `finish_update`, so that several engines can change together; no step runs
        meanwhile. Replicas (dp_size > 1) do so by themselves, and refuse it.
        """
        _refuse_formats(load_format)
        options = _options(flush_cache, abort_all_requests, weight_version, hold)
        return self._exchange("update_weights_from_disk", model_path=str(model_path), **options)

    def update_weights_from_tensor(
        self, named_tensors: bytes | Mapping[str, torch.Tensor] | Sequence[tuple[str, torch.Tensor]],
        load_format: str | None = None, *, flush_cache: bool = True, abort_all_requests: bool = False,
        weight_version: str | None = None, hold: bool = False,
    ) -> Told:  # fmt: skip
        """Some weights or all: (name, whole tensor), or a safetensors file's bytes. SGLang sends pickles, which can run code."""
        _refuse_formats(load_format)
        options = _options(flush_cache, abort_all_requests, weight_version, hold)
        return self._exchange("update_weights_from_tensor", as_bytes(named_tensors), **options)

    def finish_update(self, write: bool) -> Told:
        """Write the weights that are held, or drop them."""
        return self._exchange("finish_update", write=flag("write", write))

    def init_weights_update_group(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str = GROUP,
        backend: str = "gloo",
    ) -> Told:  # fmt: skip
        """Join a trainer's group, this engine's rank r as its rank_offset + r (common/distributed/update_group.py)."""
        group = group_to_join(master_address, master_port, rank_offset, world_size, group_name, backend)
        return self._exchange("init_weights_update_group", **group)

    def destroy_weights_update_group(self, group_name: str = GROUP) -> Told:
        return self._exchange("destroy_weights_update_group", group_name=str(group_name))

    def update_weights_from_distributed(
        self, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], group_name: str = GROUP,
        flush_cache: bool = True, load_format: str | None = None, *, abort_all_requests: bool = False,
        weight_version: str | None = None,
    ) -> Told:  # fmt: skip
        """Some weights or all: the trainer broadcasts whole tensors, in this order, while this waits. A failure ends the group."""
        _refuse_formats(load_format)
        options = _options(flush_cache, abort_all_requests, weight_version)
        names, dtypes, sizes = list(texts("names", names)), list(texts("dtypes", dtypes)), [list(one) for one in shapes]
        if not len(names) == len(dtypes) == len(sizes) or len(set(names)) != len(names):
            raise ValueError(
                f"{len(names)} names ({len(set(names))} different), {len(dtypes)} dtypes and {len(sizes)} shapes; give one of "
                "each for every tensor"
            )
        described = {"names": names, "dtypes": dtypes, "shapes": sizes, "group_name": str(group_name)}
        return self._exchange("update_weights_from_distributed", **described, **options)

    def update_weight_version(self, new_version: str, abort_all_requests: bool = True) -> Told:
        """Only the word that meta_info tells."""
        arguments = {
            "new_version": str(new_version),
            "abort_all_requests": flag("abort_all_requests", abort_all_requests),
        }
        return self._exchange("update_weight_version", **arguments)

    def get_weights_by_name(self, name: str, truncate_size: int = 100) -> list | None:
        """A tensor in the name and the shape of a checkpoint, of all ranks together: its first truncate_size rows (or numbers).

        Under torchrun None on all ranks but 0.
        """
        arguments = {"name": str(name), "truncate_size": whole("truncate_size", truncate_size, 1)}
        return self._exchange("get_weights_by_name", **arguments)["parameter"]

    def weights_checker(self, action: str = "checksum") -> Told:
        """checksum: SHA-256 of each parameter on each rank. snapshot: remember them; compare: which have changed since?"""
        return self._exchange("weights_checker", action=choice("action", action, ACTIONS))

    def release_memory_occupation(self, tags: Sequence[str] | None = None) -> Told:
        """Give memory back while nobody asks: weights, kv_cache, cuda_graph; by default all. What is cached is lost."""
        return self._exchange("release_memory_occupation", tags=tags_of(tags))

    def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> Told:
        """Take it again; weights come back as they were. Requests are refused until nothing is away."""
        return self._exchange("resume_memory_occupation", tags=tags_of(tags))

    @abstractmethod
    def _exchange(self, op: str, payload: bytes | None = None, /, **arguments: Any) -> Told:
        """Have all ranks do it between two steps. payload: what is too large for a note."""


class EngineWeights(WeightCalls):
    """For an engine with ranks of its own: the note `weights` on each of them, and the wing behind it."""

    def _let_weights_change(self, scheduler: TPScheduler) -> None:
        self._updater = None
        self._away: list[str] = []  # of its memory
        scheduler.control.notes["weights"] = self._on_this_rank

    def _let_weights_go(self) -> None:
        """At the end: the trainer's groups, and files of an engine that ends in its sleep."""
        if self._updater is not None:
            self._updater.close()
            self._updater = None

    def pause_generation(self, mode: str = PAUSE_MODES[0]) -> int:
        """No step runs until continue_generation; returns how many requests it has met. abort: they end; retract: they are
        computed again afterwards, with whatever weights there are then; in_place: they keep their pages and go on."""
        return self._at_rest(lambda: self.scheduler.pause(mode))

    def continue_generation(self) -> None:
        self._at_rest(self.scheduler.resume)

    def _exchange(self, op: str, payload: bytes | None = None, /, **arguments: Any) -> Told:
        if self.disaggregation_mode != "null":
            raise ValueError(
                f"{op} with disaggregation_mode={self.disaggregation_mode}: pages of the old weights would reach a half that has "
                "the new ones; start both halves anew"
            )

        def together() -> Told:
            scheduler = self.scheduler
            self._weight_updater.payload = payload  # here: another thread's is not to be taken for it
            if scheduler.replica.rank == 0:
                scheduler.settle_all()  # first: the others must hear of its tokens before they hear of this
            if scheduler.replica.spawned or self._loop:
                return scheduler.control.together("weights", op=op, **arguments)
            return self._on_this_rank(op, **arguments)  # every rank's script has come here

        told = self._at_rest(together)
        if not told["success"]:
            raise ValueError(told["message"])
        return told

    @property
    def _weight_updater(self) -> Any:
        if self._updater is None:
            self._updater = import_module(WEIGHT_UPDATER).WeightUpdater(self.scheduler)
        return self._updater

    def _on_this_rank(self, op: str, **arguments: Any) -> Told:
        if op not in EXCHANGES:
            raise ValueError(f"unknown exchange {op}")
        told = getattr(self._weight_updater, op)(**arguments)
        self._away = told.get("away", self._away)
        return told

    def _refuse_while_asleep(self) -> None:
        if self._away:
            raise ValueError(
                f"this engine is asleep, without its {' and '.join(self._away)}; call resume_memory_occupation() first"
            )


def group_to_join(
    master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str = GROUP,
    backend: str = "gloo", ranks: int | None = None,
) -> Told:  # fmt: skip
    """The arguments, as they should be, once somebody listens there; ValueError within seconds. ranks: those here, if known.

    It waits for the network, and is called where nobody else waits for it: not in an event loop, nor between two steps.
    """
    if backend != "gloo":
        raise ValueError(f"backend={backend!r}: new weights are looked at in the CPU's memory first; use gloo")
    size = whole("world_size", world_size, 2, MAX_MEMBERS)
    offset = whole("rank_offset", rank_offset, 1, size - 1, f", of world_size={size}: rank 0 is the trainer's")
    host, port = host_name("master_address", master_address), whole("master_port", master_port, 1, 65535)
    if ranks is not None:
        refuse_size(size, offset, ranks)
    reach(host, port)
    return {
        "master_address": host, "master_port": port, "rank_offset": offset, "world_size": size,
        "group_name": str(group_name),
    }  # fmt: skip


def as_bytes(named_tensors: Any) -> bytes:
    """Of a safetensors file. Raises ValueError for what is no tensor, and for a name that comes twice."""
    if isinstance(named_tensors, bytes | bytearray | memoryview):
        return bytes(named_tensors)
    given = list(named_tensors.items()) if isinstance(named_tensors, Mapping) else named_tensors
    pairs = walked("named_tensors", given, "pairs (name, tensor), or safetensors' bytes")
    tensors = {}
    for one in pairs:
        if not (isinstance(one, tuple | list) and len(one) == 2 and isinstance(one[1], torch.Tensor)):
            raise ValueError(
                "named_tensors holds something else than pairs (name, tensor); give those, or safetensors' bytes"
            )
        tensors[str(one[0])] = one[1].detach().cpu().clone().contiguous()  # safetensors writes no memory twice
    if len(tensors) != len(pairs):
        raise ValueError(f"named_tensors has {len(pairs)} pairs and {len(tensors)} names; give each tensor once")
    return save(tensors)


def tags_of(tags: Any) -> list[str]:
    """Raises ValueError for a tag that there is not, and for none at all."""
    chosen = list(TAGS) if tags is None else list(texts("tags", tags))
    if not chosen:
        raise ValueError(f"tags is empty; name some of {', '.join(TAGS)}, or leave it out for all")
    for tag in chosen:
        choice("tags", tag, TAGS)
    return sorted(set(chosen))


def _options(
    flush_cache: bool, abort_all_requests: bool, weight_version: str | None, hold: bool = False
) -> dict[str, Any]:  # fmt: skip
    return {
        "flush_cache": flag("flush_cache", flush_cache),
        "abort_all_requests": flag("abort_all_requests", abort_all_requests),
        "weight_version": None if weight_version is None else str(weight_version),
    } | ({"hold": True} if flag("hold", hold) else {})


def _refuse_formats(load_format: str | None) -> None:
    if load_format not in (None, "auto"):
        raise ValueError(f"load_format={load_format!r}: safetensors alone are read; leave it out")
