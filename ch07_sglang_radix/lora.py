"""What the core knows of LoRA adapters: how they are asked for, and whom to ask about them. All else is in adapters/.

It imports nothing that brings torch: a wrong argument is told at once.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from common.values import choice, flag, shown, text, texts, walked, whole

POLICIES = ("lru", "fifo")
BACKENDS = ("auto", "torch_native", "triton")
# what SGLang has beside them: the way out, and its own defaults
ELSEWHERE = {
    "enable_lora_overlap_loading": "an adapter is read between two steps; leave it out",
    "lora_drain_wait_threshold": "who has waited for 4 prefill steps gets a place, always (adapters/gate.py); leave it out",
    "max_lora_chunk_size": "segments are as long as they are; leave it out",
    "lora_use_virtual_experts": "experts have no adapters here; leave it out",
    "experts_shared_outer_loras": "experts have no adapters here; leave it out",
    "lora_strict_loading": "files that do not fit are refused, always; leave it out",
}
IDLE = {
    "enable_lora_overlap_loading": False, "lora_drain_wait_threshold": 0.0, "max_lora_chunk_size": 16,
    "lora_use_virtual_experts": False, "lora_strict_loading": False,
}  # fmt: skip
FORMS = 'NAME=FOLDER, FOLDER, or {"lora_name": ..., "lora_path": ..., "pinned": ...}'


class LoRARef(NamedTuple):
    """An adapter by its name; SGLang's word (srt/lora/lora_registry.py)."""

    name: str
    path: str
    pinned: bool = False

    def words(self) -> dict[str, str | bool]:
        """As JSON, in SGLang's words."""
        return {"lora_name": self.name, "lora_path": self.path, "pinned": self.pinned}


class LoRABook(Protocol):
    """Rank 0's, filled by the wing. slots: of each adapter that a step may use now, by identity."""

    slots: Mapping[str, int]

    def acquire(self, name: str) -> str:
        """The identity of the adapter that has this name now. Raises ValueError, in one line, if none has."""
        ...

    def content(self, identity: str) -> str | None:
        """What tells its files from any others, wherever an engine reads them; None if there is no such adapter."""
        ...


def lora_ref(name: Any, path: Any, pinned: Any = False) -> LoRARef:
    """Raises ValueError for a name that could not stand behind a model's, base:name."""
    name = text("lora_name", name, empty=False)
    if name != name.strip() or not name.isprintable():
        raise ValueError(f"lora_name={shown(name)} must be printable and not begin or end with a space")
    return LoRARef(
        name, text("lora_path", str(path) if isinstance(path, Path) else path, empty=False), flag("pinned", pinned)
    )


def lora_refs(given: Any) -> list[LoRARef]:
    """lora_paths in any of SGLang's forms: {name: folder}, or a list of FORMS; a folder alone is its own name.

    Raises ValueError for what is none of them, and for two of one name.
    """
    if given is None:
        return []
    if isinstance(given, Mapping):
        refs = [lora_ref(name, path) for name, path in given.items()]
    elif isinstance(given, str):
        raise ValueError(f"lora_paths={shown(given)} must be {{name: folder}}, or a list of {FORMS}")
    else:
        refs = [_one(value) for value in walked("lora_paths", given, f"{{name: folder}}, or a list of {FORMS}")]
    names = [ref.name for ref in refs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"lora_paths has {names.count(name)} adapters of the name {shown(name)}; give each a name of its own"
            )
    return refs


def _one(value: Any) -> LoRARef:
    if isinstance(value, LoRARef):
        return value
    if isinstance(value, Path):
        return lora_ref(str(value), value)
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"lora_paths holds {shown(value)}, which is no JSON; give {FORMS}") from None
    if isinstance(value, str):
        name, given, path = value.partition("=")
        return lora_ref(name, path if given else name)
    if isinstance(value, Mapping) and {"lora_name", "lora_path"} <= set(value) <= {"lora_name", "lora_path", "pinned"}:
        return lora_ref(value["lora_name"], value["lora_path"], value.get("pinned", False))
    raise ValueError(f"lora_paths holds {shown(value)}; give {FORMS}")


def lora_names(lora_path: Any, count: int, enabled: bool) -> list[str | None]:
    """The adapter of each of `count` prompts: one name for all, or a list with None for the base. Names are looked up later."""
    if lora_path is None:
        return [None] * count
    several = (
        [lora_path] * count
        if isinstance(lora_path, str)
        else walked("lora_path", lora_path, "a name, or one for each prompt")
    )
    if len(several) != count:
        raise ValueError(
            f"lora_path has {len(several)} names for {count} prompts; give one for each, None for the base"
        )
    names = [None if one is None else text("lora_path", one, empty=False) for one in several]
    if any(names) and not enabled:
        raise ValueError(
            f"lora_path={shown(next(filter(None, names)))} asks for an adapter, and there are none here; start with "
            "enable_lora and lora_paths"
        )
    return names


def checked_lora(args: Any) -> dict[str, Any]:
    """The fields of ServerArgs that are about adapters, of one kind each. Adapters that are named switch them on, as in SGLang.

    lora_paths: loaded at the start, {name: folder} or a list of FORMS. max_loras_per_batch: adapters that run together at most,
    and slots on the device. max_lora_rank, lora_target_modules: what the slots have room for; by default what those in lora_paths
    need, and without any, rank 16 of all linear layers. max_loaded_loras: adapters in the ranks' memory at most.
    lora_eviction_policy: lru or fifo, who leaves a slot. lora_backend: auto, torch_native, triton (common/layers/lora.py).
    Raises ValueError.
    """
    refs = lora_refs(args.lora_paths)
    enabled = flag("enable_lora", args.enable_lora) or bool(refs)
    per_batch = whole("max_loras_per_batch", args.max_loras_per_batch, 1)
    limits = {
        name: None if getattr(args, name) is None else whole(name, getattr(args, name), 1)
        for name in ("max_lora_rank", "max_loaded_loras")
    }
    choice("lora_eviction_policy", args.lora_eviction_policy, POLICIES)
    choice("lora_backend", args.lora_backend, BACKENDS)
    targets = args.lora_target_modules
    targets = None if targets is None else texts("lora_target_modules", targets)
    if enabled:
        refuse_too_few(refs, per_batch, limits["max_loaded_loras"])
        _refuse_what_is_not_combined(args)
    paths = tuple(ref.words() for ref in refs)
    return limits | {
        "enable_lora": enabled, "max_loras_per_batch": per_batch, "lora_paths": paths or None,
        "lora_target_modules": targets or None,
    }  # fmt: skip


def _refuse_what_is_not_combined(args: Any) -> None:
    for name, reason in (
        ("attn_dp_size", "rows of a step are cut over ranks"), ("cp_size", "rows of a step are cut over ranks"),
    ):  # fmt: skip
        if getattr(args, name) > 1:
            raise ValueError(f"enable_lora with {name}={getattr(args, name)}: {reason}; use one of the two")


def one_voice(said: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """What each replica has said of a load or an unload, by its rank -> the same as of one engine: done on all, or refused."""
    wrong = {rank: one["error_message"] for rank, one in sorted(said.items()) if not one["success"]}
    first, *others = (one["loaded_adapters"] for one in said.values())
    loaded = {name: path for name, path in first.items() if all(name in names for names in others)}
    return {"success": not wrong, "error_message": one_reason(wrong, len(said)), "loaded_adapters": loaded}


def one_reason(wrong: Mapping[int, str], replicas: int) -> str:
    """What is wrong with some of the replicas, by their ranks: said once if it is the same of all."""
    if len(wrong) == replicas and len(set(wrong.values())) == 1:
        return next(iter(wrong.values()))
    return "; ".join(f"replica {rank}: {one}" for rank, one in wrong.items())


def refuse_unknown(names: Iterable[str | None], loaded: Collection[str]) -> None:
    """Raises ValueError for an adapter that nobody has loaded."""
    for name in names:
        if name is not None and name not in loaded:
            known = ", ".join(sorted(loaded)) or "none"
            raise ValueError(f"lora_path={shown(name)} is not loaded; loaded: {known}")


def refuse_too_few(refs: Sequence[LoRARef], per_batch: int, loaded: int | None) -> None:
    """Raises ValueError for limits that leave no place for an adapter that is not pinned, or for one of those given."""
    if loaded is not None and loaded < per_batch:
        raise ValueError(
            f"max_loaded_loras={loaded} is less than max_loras_per_batch={per_batch}; a batch uses what is loaded: use "
            f"at least {per_batch}"
        )
    if loaded is not None and len(refs) > loaded:
        raise ValueError(f"lora_paths has {len(refs)} adapters, max_loaded_loras={loaded}; use at least {len(refs)}")
    pinned = sum(ref.pinned for ref in refs)
    if pinned >= per_batch:
        raise ValueError(
            f"{pinned} adapters are pinned and max_loras_per_batch={per_batch}; the others would never get a place: use at least "
            f"{pinned + 1}"
        )
