"""Memory of a GPU that another process of this host reads: CUDA IPC, by four calls of the driver.

    block = memory.export(tensor)      here     what another process needs to know: a handle of 64 bytes, an offset, lengths
    there = memory.open(block)         there    the same bytes as a tensor of that process's own GPU; kernels read it over NVLink
    memory.close(there)                there    unmapped

A handle stands for a whole block of cudaMalloc, and torch's allocator cuts its blocks up: so the offset is asked of the driver.
What was mapped in pieces (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True) or made by cudaMallocAsync has no handle and is
refused. A tensor that was opened calls the reader's GPU its device, though the bytes lie on another one: kernels run where the
reader is, and the other card need not be visible to it (NCCL relies on the same: "CUDA 10.1 and later can use P2P with invisible
devices", src/transport/p2p.cc). SGLang 0.5.23 and vLLM open all-reduce buffers in this way, by ctypes and cudart
(srt/distributed/device_communicators/cuda_wrapper.py). torch's own sharing (UntypedStorage._share_cuda_) would do it, too, with
a counter of references in a file, whose other half dies with a peer.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from ch07_sglang_radix.disaggregation.messages import HANDLE, Block

LIBRARY = "libcuda.so.1"  # the driver's, on Linux; CUDA IPC is not to be had elsewhere
LEGACY_IPC_CAPABLE = 10  # CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE
LAZY_ENABLE_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS

Pointer = ctypes.c_uint64  # CUdeviceptr


class PeerMemory(Protocol):
    uuid: str

    def export(self, tensor: torch.Tensor) -> Block:
        """Raises ValueError if it cannot be shared."""
        ...

    def open(self, block: Block) -> torch.Tensor:
        """[nbytes] uint8. Raises RuntimeError, with the driver's reason, if this process cannot map it."""
        ...

    def close(self, opened: torch.Tensor) -> None:
        """Nobody may use it any more."""
        ...


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = (("reserved", ctypes.c_char * HANDLE),)


class CudaMemory:
    """device: this process's GPU. uuid: its name, the same in every process. Raises ValueError if it is none, or there is no
    driver of NVIDIA's."""

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ValueError(
                "disaggregation_transfer_backend=cuda_ipc moves pages from GPU to GPU, and this engine computes on "
                f"{device.type}; use tcp or shm"
            )
        self.device = device
        self._base_of: dict[int, Pointer] = {}  # of each address that was opened; two links may have opened the same
        try:
            self._driver = ctypes.CDLL(LIBRARY)
        except OSError:
            raise ValueError(
                f"disaggregation_transfer_backend=cuda_ipc calls {LIBRARY}, which is not here; use tcp or shm"
            ) from None
        self._driver.cuIpcOpenMemHandle_v2.argtypes = (ctypes.POINTER(Pointer), _Handle, ctypes.c_uint)
        self.uuid = str(torch.cuda.get_device_properties(device).uuid)
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device.index)

    def export(self, tensor: torch.Tensor) -> Block:
        base, size, capable, handle = Pointer(), ctypes.c_size_t(), ctypes.c_int(), _Handle()
        pointer = Pointer(tensor.data_ptr())
        with self._current():
            self._call("cuPointerGetAttribute", ctypes.byref(capable), LEGACY_IPC_CAPABLE, pointer)
            self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), pointer)
            block = Block(bytes(HANDLE), pointer.value - base.value, tensor.nbytes, size.value)
            if not capable.value or not fits(block):
                raise ValueError(
                    f"{tensor.nbytes:,} bytes of pages are not in one block of cudaMalloc (the driver's has {size.value:,} bytes); "
                    "unset PYTORCH_CUDA_ALLOC_CONF, or use --disaggregation-transfer-backend shm"
                )
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), base)
        return Block(bytes(handle), block.offset, block.nbytes, block.block)

    def open(self, block: Block) -> torch.Tensor:
        base = Pointer()
        with self._current():
            handle = _Handle.from_buffer_copy(block.handle)
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(base), handle, LAZY_ENABLE_PEER_ACCESS)
        at = base.value + block.offset
        storage = torch._C._construct_storage_from_data_pointer(at, self.device, block.nbytes)
        opened = torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage, 0, (block.nbytes,), (1,))
        self._base_of[at] = base
        return opened

    def close(self, opened: torch.Tensor) -> None:
        with self._current():
            self._call("cuIpcCloseMemHandle", self._base_of[opened.data_ptr()])

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The driver's calls are about the thread's context, and a thread of ours begins without one."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: object) -> None:
        if code := getattr(self._driver, name)(*arguments):
            why = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(why))
            raise RuntimeError(f"{name}: {(why.value or b'unknown error').decode()} ({code})")


def fits(block: Block) -> bool:
    return block.offset + block.nbytes <= block.block
