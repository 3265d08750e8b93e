"""The driver's calls, with a driver that is played: its memory is a tensor's on the CPU, its handles are numbers."""

import ctypes
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from ch07_sglang_radix.disaggregation import peer_memory
from ch07_sglang_radix.disaggregation.messages import HANDLE, Block
from ch07_sglang_radix.disaggregation.peer_memory import CudaMemory

BLOCK = 4096  # bytes of the one block of cudaMalloc
PEER_ACCESS_UNSUPPORTED = 217


class Driver:
    """Every function takes what the driver's takes, and returns 0 or a number of an error."""

    def __init__(self, capable=1, refuses=0):
        self.memory, self.capable, self.refuses = torch.zeros(BLOCK, dtype=torch.uint8), capable, refuses
        self.contexts, self.opened, self.said = [], 0, []
        self.cuIpcOpenMemHandle_v2 = partial(self._open)  # a function's argtypes can be set

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 4711 + device
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.contexts.append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, context):
        context._obj.value = self.contexts.pop()
        return 0

    def cuPointerGetAttribute(self, into, which, pointer):
        assert self.contexts == [4711]
        assert which == 10
        into._obj.value = self.capable
        return 0

    def cuMemGetAddressRange_v2(self, base, size, pointer):
        base._obj.value, size._obj.value = self.memory.data_ptr(), BLOCK
        return 0

    def cuIpcGetMemHandle(self, handle, base):
        assert base.value == self.memory.data_ptr(), "of the block, not of the tensor in it"
        ctypes.memmove(handle, bytes(range(HANDLE)), HANDLE)
        return 0

    def _open(self, base, handle, flags):
        assert bytes(handle) == bytes(range(HANDLE))
        assert (self.contexts, flags) == ([4711], 1)
        if self.refuses:
            return self.refuses
        self.opened += 1
        base._obj.value = self.memory.data_ptr()
        return 0

    def cuIpcCloseMemHandle(self, base):
        assert base.value == self.memory.data_ptr()
        self.opened -= 1
        return 0

    def cuGetErrorString(self, code, into):
        into._obj.value = b"peer access is not supported between these two devices"
        return 0


@pytest.fixture
def memory(monkeypatch):
    """memory(driver) -> a CudaMemory of a card that is a CPU."""

    def make(driver):
        monkeypatch.setattr(peer_memory.ctypes, "CDLL", lambda name: driver)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="4f1c"))
        made = CudaMemory(torch.device("cuda", 0))
        made.device = torch.device("cpu")
        return made

    return make


def test_what_one_exports_the_other_reads_at_its_offset(memory):
    driver = Driver()
    mine = driver.memory[512:1024].view(torch.float32).view(4, 32)
    one = memory(driver)
    block = one.export(mine)
    assert block == Block(bytes(range(HANDLE)), 512, 512, BLOCK)
    opened = one.open(block)
    mine[1, 3] = 7.5
    assert opened.view(torch.float32).view(4, 32)[1, 3] == 7.5, "the same memory, not a copy"
    again = one.open(block)
    one.close(opened)
    one.close(again)
    assert (driver.opened, driver.contexts) == (0, []), "two links may have opened the same"


@pytest.mark.parametrize("beyond", [False, True])
def test_memory_that_has_no_handle_of_its_own_is_refused(memory, beyond):
    driver = Driver(capable=int(beyond))
    mine = torch.zeros(BLOCK + 4, dtype=torch.uint8) if beyond else driver.memory[:8]
    if beyond:
        driver.memory = mine[:BLOCK]
    with pytest.raises(ValueError, match=r"not in one block of cudaMalloc \(the driver's has 4,096 bytes\)") as caught:
        memory(driver).export(mine)
    assert "\n" not in str(caught.value)
    assert not driver.contexts


def test_what_the_driver_says_is_said(memory):
    one = memory(driver := Driver(refuses=PEER_ACCESS_UNSUPPORTED))
    with pytest.raises(RuntimeError, match=r"cuIpcOpenMemHandle_v2: peer access is not supported .* \(217\)"):
        one.open(Block(bytes(range(HANDLE)), 0, 8, BLOCK))
    assert not driver.contexts
