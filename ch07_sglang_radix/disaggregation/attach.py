"""Make an engine one half: what Engine calls, on every rank, if it has a disaggregation_mode."""

from collections.abc import Callable
from typing import Any
from zlib import crc32

import torch

from ch07_sglang_radix.disaggregation import orders
from ch07_sglang_radix.disaggregation.bootstrap import BootstrapServer
from ch07_sglang_radix.disaggregation.cuda_ipc import CudaIpcTransport
from ch07_sglang_radix.disaggregation.decode import Decode
from ch07_sglang_radix.disaggregation.kv_manager import KVManager
from ch07_sglang_radix.disaggregation.messages import VERSION
from ch07_sglang_radix.disaggregation.prefill import Prefill
from ch07_sglang_radix.disaggregation.shm import ShmTransport
from ch07_sglang_radix.disaggregation.tcp import HOST, TcpTransport
from ch07_sglang_radix.disaggregation.transport import Handler, Transport
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.server_args import ServerArgs
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.parallel_state import gather

TRANSPORTS = {"tcp": TcpTransport, "shm": ShmTransport, "cuda_ipc": CudaIpcTransport}


class Disaggregation:
    """One rank's part of it. side: rank 0's; bootstrap: of the prefill side's rank 0. transport: instead of the flag's. Raises
    ValueError for a port in use, or a transport that this machine has not."""

    def __init__(
        self, scheduler: TPScheduler, args: ServerArgs, transport: Callable[[Handler], Transport] | None = None
    ):
        wrapper, self.mode = scheduler.wrapper, args.disaggregation_mode
        self.manager = KVManager(wrapper, self.mode)
        self.manager.transport = (transport or TRANSPORTS[args.disaggregation_transfer_backend])(self.manager)
        if args.disaggregation_transfer_backend == "cuda_ipc" and self.mode == "prefill":
            wrapper.kv_cache.mapped_by = "a decode engine that reads pages by CUDA IPC"
        scheduler.control.wings[orders.WING] = self.manager.obey
        addresses = self._addresses()
        self.side: Prefill | Decode | None = None
        self.bootstrap: BootstrapServer | None = None
        if scheduler.replica.rank > 0:
            return
        mine = what_it_is(wrapper) | {"backend": args.disaggregation_transfer_backend}
        if self.mode == "prefill":
            route = mine | {"ranks": wrapper.tp.size, "addresses": addresses}
            self.bootstrap = BootstrapServer(route, args.disaggregation_bootstrap_port)
            self.side = Prefill(scheduler, self.manager, args.disaggregation_timeout)
        else:
            limits = args.disaggregation_timeout, args.num_reserved_decode_tokens, args.disaggregation_deflect_tokens
            self.side = Decode(scheduler, self.manager, *limits, mine)

    def _addresses(self) -> list[str]:
        """Of all ranks' transports, on rank 0."""
        port = torch.tensor([int(self.manager.transport.address.rpartition(":")[2])])
        ports = gather(port, self.manager.tp, "ports")  # COMM gather [1]: where each rank can be reached
        return [f"{HOST}:{int(one)}" for one in ports or ()]

    def info(self) -> dict[str, Any]:
        """For get_server_info."""
        told = {"disaggregation_mode": self.mode, "kv_bytes_moved": self.manager.pages.bytes_moved}
        if self.bootstrap:
            told |= {"disaggregation_bootstrap_port": self.bootstrap.port}
        return told | ({"disaggregation_queues": self.side.counts()} if self.side else {})

    def close(self) -> None:
        """The other side sees every link go."""
        if self.bootstrap:
            self.bootstrap.close()
        self.manager.transport.close()


def what_it_is(wrapper: TPRadixAttentionModelWrapper) -> dict[str, Any]:
    """What must be equal on both sides (bootstrap.py), whatever their numbers of ranks; of deterministic engines these, too: they
    cut the sums. The checksum is of the last norm, which no cut touches: two models of one shape have different ones."""
    config, norm, cache = wrapper.config, wrapper.model.model.norm.weight, wrapper.kv_cache
    layers, planes = cache.kv.shape[:2]
    check = crc32(norm.detach().float().cpu().numpy().tobytes())
    model = (
        f"{config.architecture} of {layers} layers, {config.num_kv_heads} KV heads, {planes} x {cache.head_dim} numbers of each "
        f"a token, vocabulary {config.vocab_size} (CRC {check:08x})"
    )
    kv_dtype, *scales = cache.fingerprint().split(" ", 1)
    if scales:  # of the layers: by them codes become numbers
        kv_dtype += f" (CRC of its scales {crc32(scales[0].encode()):08x})"
    deterministic = "off"
    if wrapper.deterministic:  # then the bits must be equal, too
        deterministic = f"on, tp_size={wrapper.tp.size}, {wrapper.tp.device.type}, {wrapper.dtype}"
    return {
        "version": VERSION, "model": model, "page_size": wrapper.page_size, "kv_cache_dtype": kv_dtype,
        "enable_deterministic_inference": deterministic,
    }  # fmt: skip
