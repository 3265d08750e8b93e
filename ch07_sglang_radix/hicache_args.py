"""SGLang's arguments about lower tiers of the radix tree: the host's memory, and a disk below it. They are used in quantization/.

It imports nothing that brings torch: a wrong argument is told at once.
"""

from typing import Any

from common.values import choice, flag, path, real, shown, whole

WRITE_POLICIES = ("write_through", "write_through_selective", "write_back")
PREFETCH_POLICIES = ("timeout", "wait_complete", "best_effort")
BACKENDS = ("file",)
IO_BACKENDS = ("direct",)
# what SGLang has beside them: the way out, and its own defaults
ELSEWHERE = {
    "hicache_mem_layout": "a page lies in one piece on the host, always (page_first); leave it out",
    "hicache_storage_backend_extra_config": "use hicache_storage_dir, hicache_storage_quota and hicache_prefetch_threshold",
    "enable_lmcache": "use enable_hierarchical_cache",
}
IDLE = {"hicache_mem_layout": "page_first", "enable_lmcache": False}


def check_hicache(args: Any) -> dict[str, Any]:
    """The fields of ServerArgs that are about lower tiers.

    enable_hierarchical_cache: what the device evicts stays in the host's memory, and comes back from there. hicache_ratio: room in
    the host, in multiples of the device's pages; hicache_size: or in GB on each rank. hicache_write_policy: when a node is copied
    to the host: as soon as it is computed, once a second request has come for it, or when the device evicts it. hicache_io_backend:
    direct copies are the only ones here.

    hicache_storage_backend: "file" keeps pages in files below the host's memory; they outlive the engine, and several engines may
    share them. hicache_storage_dir: the folder (SGLang: SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR). hicache_storage_quota: GB that it
    may hold. hicache_storage_prefetch_policy: how long a request waits for pages that are read from there: at most 1 s and 0.25 s
    more for each 1024 tokens, until all are there, or a step. hicache_prefetch_threshold: fewer tokens are computed. Raises
    ValueError.
    """
    enabled = flag("enable_hierarchical_cache", args.enable_hierarchical_cache)
    kept = {
        "enable_hierarchical_cache": enabled,
        "hicache_ratio": real("hicache_ratio", args.hicache_ratio, 0, 1000, open_below=True),
        "hicache_size": real("hicache_size", args.hicache_size, 0, 1e6),
        "hicache_storage_dir": path("hicache_storage_dir", args.hicache_storage_dir),
        "hicache_storage_quota": real("hicache_storage_quota", args.hicache_storage_quota, 0, 1e6, open_below=True),
        "hicache_prefetch_threshold": whole("hicache_prefetch_threshold", args.hicache_prefetch_threshold, 1),
    }
    choice("hicache_write_policy", args.hicache_write_policy, WRITE_POLICIES)
    choice("hicache_io_backend", args.hicache_io_backend, IO_BACKENDS)
    choice("hicache_storage_prefetch_policy", args.hicache_storage_prefetch_policy, PREFETCH_POLICIES)
    if args.hicache_storage_backend is not None:
        choice("hicache_storage_backend", args.hicache_storage_backend, BACKENDS)
        if not enabled:
            raise ValueError(
                f"hicache_storage_backend={args.hicache_storage_backend} stands below the host's memory; give "
                "enable_hierarchical_cache, too"
            )
        if kept["hicache_storage_dir"] is None:
            raise ValueError(
                "hicache_storage_backend=file without hicache_storage_dir; name the folder that it may use"
            )
    elif kept["hicache_storage_dir"] is not None:
        raise ValueError(
            f"hicache_storage_dir={shown(kept['hicache_storage_dir'])} without hicache_storage_backend; give "
            "hicache_storage_backend='file', or leave it out"
        )
    if enabled:
        _refuse_what_is_not_combined(args, kept)
    refuse_a_file_for_each_token(args, args.page_size)
    return kept


def refuse_a_file_for_each_token(args: Any, page_size: int | None) -> None:
    """page_size: None if it is the device's default, which is asked about again when the device is known."""
    if args.hicache_storage_backend is not None and page_size == 1:
        raise ValueError(
            "hicache_storage_backend=file with page_size=1 writes a file for each token, "
            f"{args.hicache_prefetch_threshold} of them for the shortest prompt that is looked for (hicache_prefetch_threshold); use "
            "page_size=16 or more"
        )


def _refuse_what_is_not_combined(args: Any, kept: dict[str, Any]) -> None:
    if args.disable_radix_cache:
        raise ValueError(
            "enable_hierarchical_cache with disable_radix_cache: the tiers are the tree's; leave one of the two out"
        )
    if not kept["hicache_size"] and kept["hicache_ratio"] <= 1:
        raise ValueError(
            f"hicache_ratio={kept['hicache_ratio']} is a host that holds no more than the device, and with it nothing that is "
            "evicted there; use more than 1"
        )
    for name in ("pp_size", "attn_dp_size", "cp_size"):
        if getattr(args, name) > 1:
            raise ValueError(
                f"enable_hierarchical_cache with {name}={getattr(args, name)}: a page's copies are ordered for ranks that all "
                "follow one tree in step; use tp_size, ep_size and dp_size"
            )
    if args.disaggregation_mode != "null":
        raise ValueError(
            f"enable_hierarchical_cache with disaggregation_mode={args.disaggregation_mode}: pages that come from another engine "
            "have no lower tier; use one of the two"
        )
    if args.speculative_algorithm not in (None, "NGRAM"):
        raise ValueError(
            f"enable_hierarchical_cache with speculative_algorithm={args.speculative_algorithm}: a draft's own pages are not "
            "copied; use NGRAM, or one of the two"
        )
