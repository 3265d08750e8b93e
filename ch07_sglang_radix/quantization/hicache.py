"""Give an engine lower tiers: what Engine calls, on every rank, if it has enable_hierarchical_cache."""

from collections.abc import Hashable
from functools import partial
from hashlib import sha256
from typing import Any

import psutil

from ch07_sglang_radix.invariants import InvariantError
from ch07_sglang_radix.quantization.cache_controller import HiCacheController
from ch07_sglang_radix.quantization.hiradix_cache import HiRadixCache
from ch07_sglang_radix.quantization.prefetch import StoragePrefetch
from ch07_sglang_radix.quantization.storage_controller import StorageController
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.server_args import ServerArgs
from common.attention.host_pool import HostKVPool
from common.distributed.messages import agree, share_all
from common.models.weights_digest import weights_digest
from common.storage.page_store import PageStore

tree_class = HiRadixCache  # what the scheduler of such an engine is made with


class HiCache:
    """One rank's part of it; the tree is rank 0's. Raises ValueError, on every rank alike, where the host has no room for it."""

    def __init__(self, scheduler: TPScheduler, args: ServerArgs):
        wrapper, self.scheduler = scheduler.wrapper, scheduler
        pages = num_host_pages(args, wrapper.num_pages, HostKVPool.bytes_per_page(wrapper.kv_cache), wrapper.page_size)
        pool, wrong = agree(
            partial(_allocate, wrapper.kv_cache, pages, scheduler.replica.size),
            scheduler.replica,
            "has another host pool",
        )
        if wrong:
            raise ValueError(wrong)
        self.controller = HiCacheController(scheduler.control, pool, self._storage(args, pool))
        self.prefetch: StoragePrefetch | None = None
        if scheduler.replica.rank > 0:
            return
        self.tree: HiRadixCache = scheduler.tree
        on_cpu = scheduler.tp.device.type == "cpu"  # where a copy that is ordered is done
        self.tree.connect(self.controller, pages, args.hicache_write_policy, lambda: on_cpu or not scheduler.running)
        if self.controller.storage:
            how = args.hicache_storage_prefetch_policy, args.hicache_prefetch_threshold
            self.prefetch = StoragePrefetch(self.tree, self.controller, *how, self.namespace)
            scheduler.queued.append(self.prefetch.begin)
        scheduler.beside.append(self._before_step)
        scheduler.before_launch.append(lambda plans: self.controller.send())
        scheduler.after_step.append(self.controller.send)
        scheduler.admission.gates.append(self._may_enter)
        if args.check:
            scheduler.after_step.append(partial(check_host, self.tree))
        scheduler.tiers = self

    def _storage(self, args: ServerArgs, pool: HostKVPool) -> StorageController | None:
        if not args.hicache_storage_backend:
            return None
        s, quota, seed = self.scheduler, int(args.hicache_storage_quota * 1e9), self._seed()
        store, wrong = agree(
            lambda: PageStore(args.hicache_storage_dir, seed, self._form, quota),
            s.replica,
            "has another storage folder",
        )
        if wrong:
            raise ValueError(wrong)
        s.at_new_weights.append(self._at_new_weights)
        return StorageController(store, pool, s.replica, writes=not self._alike or s.replica.rank == 0)

    @property
    def _alike(self) -> bool:
        """Is a page the same on every rank? Latent rows are."""
        return self.scheduler.wrapper.config.latent is not None

    @property
    def _form(self) -> str:
        """What a page is made of: engines that keep pages of different forms in one folder do not meet."""
        wrapper = self.scheduler.wrapper
        cache = wrapper.kv_cache
        form = f"{cache.fingerprint()} {[(*x.shape[:2], *x.shape[3:]) for x in cache.tensors]}"
        if wrapper.deterministic:  # what it finds must have the bits that it would compute itself
            form += f" deterministic {wrapper.attention.__name__} {wrapper.dtype}"
        return form

    def _at_new_weights(self) -> None:
        self.controller.storage.store.seed = self._seed()
        if self.prefetch:
            s = self.scheduler
            self.prefetch.at_new_weights([*self.tree.nodes(), *s.admitted, *s.memory.sessions.slots.values()])

    def _seed(self) -> bytes:
        """Who computes, and what: all ranks' weights, what config.json says of them, which heads this rank has, and the form of a
        page. All ranks call it."""
        wrapper, ranks = self.scheduler.wrapper, self.scheduler.replica
        weights = share_all(weights_digest(wrapper.model).hex(), ranks)
        config = (wrapper.folder / "config.json").read_text(encoding="utf-8")
        which = "all" if self._alike else f"{ranks.rank} of {ranks.size}"
        return sha256("\0".join([*weights, config, which, self._form]).encode()).digest()

    def namespace(self, extra_key: Hashable) -> str | None:
        """As other engines call it: an adapter by what its files hold. None for what the tree has set apart."""
        lora = self.scheduler.lora
        if extra_key is None or isinstance(extra_key, str):
            return "base" if extra_key is None else f"salt {extra_key}"
        identity, salt = extra_key
        content = lora.content(identity) if lora and isinstance(identity, str) else None
        return content and f"adapter {content} {'base' if salt is None else f'salt {salt}'}"

    def _before_step(self) -> bool:
        """Nothing keeps the engine busy here: who waits for pages is held at the gate, and what nobody waits for any more is
        looked at when somebody comes, or forgotten with a flush."""
        if self.prefetch:
            self.prefetch.look()  # first: the controller sends what it orders, and it is read from now on
        self.controller.look(not self.scheduler.running)
        return False

    def _may_enter(self, req: Req, matched: int) -> bool:
        return (self.prefetch is None or self.prefetch.may_enter(req)) and self.tree.is_there(req)

    def facts(self) -> dict[str, Any]:
        """For get_server_info, in tokens."""
        tree, disk = self.tree, {}
        if self.prefetch:
            store, P = self.controller.storage.store, tree.page_size
            disk = {
                "storage_written_tokens": store.written * P, "storage_fetched_tokens": self.prefetch.fetched,
                "storage_damaged_pages": store.damaged, "storage_removed_pages": store.removed,
                "storage_failed_writes": store.failed,
            }  # fmt: skip
        return disk | {
            "hicache_write_policy": tree.write_policy, "host_total_tokens": tree.host_pool.size,
            "host_used_tokens": tree.host_pool.size - tree.host_pool.free_slots, "host_stored_tokens": tree.stored,
            "host_loaded_tokens": tree.loaded, "host_evicted_tokens": tree.host_evicted,
        }  # fmt: skip

    def close(self) -> None:
        if self.prefetch:
            self.prefetch.close()
        self.controller.close()


def num_host_pages(args: ServerArgs, device_pages: int, page_bytes: int, page_size: int) -> int:
    """hicache_size GB on each rank, or hicache_ratio times the device's. Raises ValueError for less than the device has."""
    if not args.hicache_size:
        return int(args.hicache_ratio * device_pages)
    pages = int(args.hicache_size * 1e9 // page_bytes)
    if pages <= device_pages:
        least = (device_pages + 1) * page_bytes / 1e9
        raise ValueError(
            f"hicache_size={args.hicache_size} holds {pages * page_size} tokens, the device {device_pages * page_size}: a host "
            f"that holds no more than the device has nothing that is evicted there; use at least {least:.3g}"
        )
    return pages


def _allocate(cache: Any, pages: int, ranks: int) -> HostKVPool:
    wanted, free = pages * HostKVPool.bytes_per_page(cache), psutil.virtual_memory().available // ranks
    if wanted > free:
        raise ValueError(
            f"the host tier wants {wanted / 1e9:.2f} GB for {pages} pages, and this rank's share of free memory is "
            f"{free / 1e9:.2f} GB; use a smaller hicache_ratio or hicache_size"
        )
    return HostKVPool(cache, pages)


def check_host(tree: HiRadixCache) -> None:
    """Conservation in the host's memory: free + the nodes' = all pages, and none has two owners. Raises InvariantError."""
    owner = dict.fromkeys(tree.host_pool.free_pages().tolist(), "the free list")
    for who, pages in tree.host_owners():
        for page in pages.tolist():
            if page in owner:
                raise InvariantError(f"host page {page} has two owners: {owner[page]} and {who}")
            owner[page] = who
    if lost := sorted(set(range(tree.host_pool.num_pages)) - owner.keys()):
        raise InvariantError(f"{len(lost)} of {tree.host_pool.num_pages} host pages belong to nobody: {lost[:8]}")
