"""Pages that are read where they lie: on a CPU, with memory that a dictionary shares; all but the driver's calls is tested."""

import logging
import secrets
import threading
from types import SimpleNamespace

import pytest
import torch

from ch07_sglang_radix import Engine
from ch07_sglang_radix.adapters.weight_updater import WeightUpdater
from ch07_sglang_radix.disaggregation import cuda_ipc, orders, peer_memory
from ch07_sglang_radix.disaggregation.cuda_ipc import (
    CudaIpcTransport,
    look_whether_it_can_be_read,
    refuse_another_shape,
)
from ch07_sglang_radix.disaggregation.head_slices import head_slices, latent_slices
from ch07_sglang_radix.disaggregation.kv_pages import KVPages, as_words
from ch07_sglang_radix.disaggregation.local_pair import Pair
from ch07_sglang_radix.disaggregation.messages import (
    HANDLE,
    Block,
    Done,
    Fail,
    Kept,
    Metadata,
    Part,
    Pool,
    Ready,
    Reserve,
    Write,
)
from ch07_sglang_radix.disaggregation.peer_memory import CudaMemory
from ch07_sglang_radix.disaggregation.rooms import State
from ch07_sglang_radix.disaggregation.transport import PeerPages
from ch07_sglang_radix.serving.watch import wait_until
from common.attention.kv_cache import PagedKVCache
from common.attention.kv_format import kv_dtype
from common.layers.heads import HeadLayout
from common.tiny_qwen import TINY_QWEN_PATH
from tests.ch07.disaggregation.test_kv_manager import HEADS, PAGE, ROOM, SLOT, Link, a_rank, hello, obey, reserve
from tests.oracle import greedy

PROMPT = list(range(5, 35))


class Dictionary:
    """PeerMemory of one process. refuses: what the driver would say to `open`. lies: others see other bytes than there are."""

    uuid = "GPU-of-nobody"

    def __init__(self, refuses="", lies=False):
        self.refuses, self.lies = refuses, lies
        self.open_now = []

    def export(self, tensor):
        handle = secrets.token_bytes(HANDLE)
        SHARED[handle] = tensor
        return Block(handle, 0, tensor.nbytes, tensor.nbytes)

    def open(self, block):
        if self.refuses:
            raise RuntimeError(self.refuses)
        shared = SHARED[block.handle].view(torch.uint8).view(-1)
        self.open_now.append(shared)
        return shared.clone().zero_() if self.lies else shared

    def close(self, opened):
        self.open_now.pop()


SHARED: dict[bytes, torch.Tensor] = {}


@pytest.fixture
def pair():
    made = []

    def make(decode_memory, kv_cache_dtype="auto"):
        both = {"kv_cache_dtype": kv_cache_dtype}
        prefill = both | {"chunked_prefill_size": 8, "transport": lambda h: CudaIpcTransport(h, Dictionary())}
        decode = both | {"transport": lambda h: CudaIpcTransport(h, decode_memory)}
        made.append(Pair(prefill=prefill, decode=decode))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_tokens_are_transformers_and_no_byte_of_a_page_travels(pair, monkeypatch):
    memory = Dictionary()
    both = pair(memory)
    monkeypatch.setattr(KVPages, "read", None)  # what a payload's bytes are made by
    for prompt in (PROMPT, PROMPT[:11], [*PROMPT[:16], 900, 901]):
        assert both.answer(both.ask(prompt)).output_ids == greedy(TINY_QWEN_PATH, prompt, 6)
        assert both.at_rest()
    assert len(memory.open_now) == 1, "once for all rooms; the probe is closed"
    both.prefill.half.close()
    assert wait_until(lambda: not memory.open_now, 10), "nobody maps the memory of who is gone"


@pytest.mark.parametrize("memory", [Dictionary("peer access is not supported"), Dictionary(lies=True)])
def test_who_cannot_read_says_so_in_one_line_and_gets_bytes(pair, memory, caplog):
    with caplog.at_level(logging.WARNING, logger=cuda_ipc.__name__):
        both = pair(memory)
        assert both.answer(both.ask(PROMPT)).output_ids == greedy(TINY_QWEN_PATH, PROMPT, 6)
        assert both.at_rest()
    (line,) = [one.message for one in caplog.records if "CUDA IPC" in one.message]
    assert line.startswith(
        "CUDA IPC: pages of prefill rank 0 on GPU GPU-of-nobody cannot be read from GPU GPU-of-nobody"
    )
    assert "by way of the host" in line
    assert "\n" not in line
    assert not memory.open_now or memory.lies


def test_an_abort_while_pages_are_read_gives_them_back_on_both_sides(pair):
    both = pair(Dictionary())
    room, numbers = both.ask(PROMPT)
    both.until(lambda: both.sent(room) >= 2)
    both.prefill.scheduler.abort(numbers["prefill"])
    both.until(lambda: numbers["decode"] in both.decode.results)
    assert both.ended((room, numbers), "decode").finish_reason["type"] == "abort"
    assert both.at_rest()
    assert both.answer(both.ask(PROMPT)).output_ids == greedy(TINY_QWEN_PATH, PROMPT, 6)


def test_pages_that_prefill_let_go_while_they_were_read_start_no_answer():
    """All pages came, and the first token; then prefill gives up, before it has heard Done. Its pages may be another's by now."""
    decode, links, kv, _ = a_rank("decode")
    reserve(decode, "a", pages=(7,))
    links["a"].peer = hello("prefill", 0, 1)
    theirs = torch.ones_like(kv)
    decode.take(links["a"], Write(ROOM, [7]), PeerPages([as_words(theirs)], [3]))
    assert (kv[:, :, 7] == 1).all()
    decode.take(links["a"], Metadata(SLOT, ROOM, 1, 0, 0), None)
    assert links["a"].said[-1] == Done(ROOM, read=True)
    assert decode.states([ROOM]) == [State.TRANSFERRING]

    prefill, _, _, _ = a_rank("prefill")
    back = Link(hello("decode", 0, 1))
    prefill.take(back, Reserve(ROOM, SLOT, 0, [7], 0), None)
    prefill.states([ROOM])
    obey(prefill, (orders.CLOSE, (ROOM, 1, *orders.as_words("retracted"))))
    prefill.take(back, Done(ROOM, read=True), None)
    assert back.said == [Fail(ROOM, "retracted")], "and no Kept behind it"
    decode.take(links["a"], back.said[0], None)
    assert decode.states([ROOM]) == [State.FAILED]


def test_a_closed_room_reads_nothing_more():
    decode, links, kv, _ = a_rank("decode")
    reserve(decode, "a", pages=(7,))
    links["a"].peer = hello("prefill", 0, 1)
    obey(decode, (orders.CLOSE, (ROOM, 1, *orders.as_words("over"))))
    decode.take(links["a"], Write(ROOM, [7]), PeerPages([as_words(torch.ones_like(kv))], [3]))
    assert not kv.any()


def test_a_page_that_nobody_reserved_is_not_written():
    decode, links, kv, _ = a_rank("decode")
    reserve(decode, "a", pages=(7,))
    links["a"].peer = hello("prefill", 0, 1)
    decode.take(links["a"], Write(ROOM, [7, 9]), PeerPages([as_words(torch.ones_like(kv))], [3, 4]))
    assert not kv.any()


def test_kept_is_said_of_a_room_that_is_this_peer_s_and_has_not_failed():
    prefill, _, _, _ = a_rank("prefill")
    back, other = Link(hello("decode", 0, 2)), Link(hello("decode", 1, 2))
    prefill.take(back, Reserve(ROOM, SLOT, 0, [7], 0), None)
    prefill.take(other, Done(ROOM, read=True), None)
    assert not other.said, "it has reserved nothing"
    prefill.take(back, Done(ROOM), None)
    assert not back.said, "it got bytes, and asks nothing"
    prefill.take(back, Done(ROOM, read=True), None)
    assert back.said == [Kept(ROOM)]
    prefill.states([ROOM])
    prefill.lost(other, "closed")
    prefill.take(back, Fail(ROOM, "aborted"), None)
    prefill.take(back, Done(ROOM, read=True), None)
    assert back.said == [Kept(ROOM)], "once it has failed its pages may go at any moment"


# --- the plan of copies


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (1, 2), (2, 1), (2, 3), (3, 2), (4, 1), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_heads_are_read_from_whichever_rank_has_them(prefill, decode, dtype):
    layers, pages, dim = 2, 9, 3
    names = (
        torch.randn(layers, 2, pages, PAGE, HEADS, dim)
        .to(dtype)
        .view(torch.uint8)
        .view(layers, 2, pages, PAGE, HEADS, -1)
    )
    cut = lambda rank, ranks: list(HeadLayout.of(HEADS, HEADS, rank, ranks).kv_heads)  # noqa: E731
    theirs = [names[..., cut(i, prefill), :].contiguous().view(dtype) for i in range(prefill)]
    for rank in range(decode):
        mine = torch.zeros(layers, 2, 5, PAGE, len(cut(rank, decode)), dim).to(dtype)
        kv = KVPages([mine])
        for one in head_slices(HEADS, prefill, rank, decode):
            kv.write([4, 0], one, PeerPages([as_words(theirs[one.source])], [8, 2]))
        right = names[..., cut(rank, decode), :]
        seen = mine.view(torch.uint8)
        assert torch.equal(seen[:, :, [4, 0]], right[:, :, [8, 2]])
        assert not seen[:, :, [1, 2, 3]].any(), "no other page"


def test_latent_pages_are_read_whole():
    theirs, mine = torch.randn(2, 1, 6, PAGE, 1, 12), torch.zeros(2, 1, 6, PAGE, 1, 12)
    (one,) = latent_slices(2, 0, 1)
    kv = KVPages([mine])
    kv.write([0], one, PeerPages([as_words(theirs)], [5]))
    assert torch.equal(mine[:, :, 0], theirs[:, :, 5])
    assert kv.bytes_moved == theirs[:, :, 5].nbytes


def test_a_peer_with_fewer_heads_than_its_cut_says_is_refused():
    (one,) = head_slices(2, 1, 0, 1)
    kv = KVPages([torch.zeros(1, 2, 3, PAGE, 2, 4)])
    with pytest.raises(ValueError, match="head 1 of a page is wanted, and the peer's have 1"):
        kv.write([0], one, PeerPages([as_words(torch.zeros(1, 2, 3, PAGE, 1, 4))], [0]))


def test_pages_are_copied_as_words_where_rows_divide_into_them():
    assert as_words(torch.zeros(1, 1, 1, 1, 3, 128, dtype=torch.bfloat16)).dtype is torch.int64
    assert as_words(torch.zeros(1, 1, 1, 1, 3, 3, dtype=torch.bfloat16)).shape == (1, 1, 1, 1, 3, 6)
    assert as_words(torch.zeros(1, 1, 1, 1, 3, dtype=torch.float16)).shape == (1, 1, 1, 1, 3, 2), "scales, one a row"


@pytest.mark.parametrize("by", ["bytes", "reading"])
@pytest.mark.parametrize("name", ["fp8_e4m3", "int8", "int4"])
def test_codes_travel_with_the_scales_of_their_rows(by, name):
    """2 heads on one prefill rank, on 2 decode ranks: what is decoded there is what was encoded here."""
    make = lambda heads: PagedKVCache(2, 8, PAGE, heads, 16, dtype=kv_dtype(name))  # noqa: E731
    theirs = make(2)
    for layer in range(2):
        theirs.write(layer, torch.arange(8 * PAGE), *torch.randn(2, 8 * PAGE, 2, 16))
    source = KVPages(theirs.tensors)
    for rank in range(2):
        mine = make(1)
        there = KVPages(mine.tensors)
        (one,) = head_slices(2, 1, rank, 2)
        bytes_of = source.cut([5, 2], one.heads, None, lambda: True)
        there.write([0, 7], one, bytes_of() if by == "bytes" else PeerPages(source.parts, [5, 2]))
        for layer in range(2):
            slots = torch.arange(PAGE)
            for here, page in ((0, 5), (7, 2)):
                seen = mine.read(layer, here * PAGE + slots)
                right = theirs.read(layer, page * PAGE + slots)
                for got, want in zip(seen, right, strict=True):
                    assert torch.equal(got[:, 0], want[:, rank])
                    assert got.any()


@pytest.mark.parametrize("transport", ["bytes", "reading"])
def test_an_answer_from_codes_is_that_of_one_engine(pair, transport):
    """In int8, whose pages have a second part."""
    options = {"kv_cache_dtype": "int8"}
    with Engine(device="cpu", page_size=4, max_total_tokens=512, **options) as engine:
        right = engine.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 6, "ignore_eos": True})
    both = pair(Dictionary("no" if transport == "bytes" else ""), **options)
    answer = both.answer(both.ask(PROMPT))
    assert (answer.output_ids, answer.finish_reason["type"]) == (right["output_ids"], "length"), answer.finish_reason
    assert both.at_rest()


# --- what a peer says


def a_pool(shape=(2, 2, 12, 4, 2, 3), itemsize=4, nbytes=None, block=1 << 21, probe=4):
    nbytes = nbytes or 4 * torch.Size(shape).numel()
    part = Part(Block(bytes(HANDLE), 512, nbytes, block), list(shape), itemsize)
    return Pool("GPU", [part], Block(bytes(HANDLE), 0, probe, 1 << 21), b"abcd")


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        (a_pool(nbytes=100), "has 4,608 bytes; 100 are announced"),
        (a_pool(block=5000), "from 512 on in a block of 5,000"),
        (a_pool(itemsize=2), "of 2 bytes each has 2,304 bytes; 4,608 are announced"),
        (a_pool(probe=3), "4 marks are announced in a probe of 3"),
        (a_pool(shape=(3, 2, 12, 4, 2, 3)), "mine is"),
        (a_pool(shape=(2, 2, 12, 8, 2, 3)), "mine is"),
        (a_pool(shape=(2, 1, 12, 4, 2, 3)), "mine is"),
        (a_pool(shape=(2, 2, -12, 4, -2, 3)), "a pool"),
        (Pool("GPU", 2 * a_pool().parts, a_pool().probe, b"abcd"), "mine is"),
    ],
)
def test_a_pool_that_contradicts_itself_or_mine_is_refused_before_it_is_mapped(pool, said):
    mine = [torch.zeros(2, 2, 30, 4, 1, 3)]
    refuse_another_shape(a_pool(), mine)
    with pytest.raises(ValueError, match=said):
        refuse_another_shape(pool, mine)


def test_memory_that_shows_other_bytes_is_not_read_from():
    memory = Dictionary()
    probe = torch.arange(4, dtype=torch.uint8)
    pool = Pool("GPU", a_pool().parts, memory.export(probe), bytes([0, 1, 2, 3]))
    look_whether_it_can_be_read(memory, pool)
    probe[2] = 9
    with pytest.raises(RuntimeError, match="not what lies there"):
        look_whether_it_can_be_read(memory, pool)
    assert not memory.open_now


@pytest.mark.parametrize("mine", [[3], [3, 12], [3, -1]])
def test_pages_that_are_none_of_the_pool_s_are_not_read(mine):
    link = SimpleNamespace(_theirs=[torch.zeros(2, 2, 12, 4, 2, 3)])
    with pytest.raises(ValueError, match=f"{len(mine)} pages for 2, or none of 12"):
        cuda_ipc.CudaIpcLink._pages_of(link, Ready(ROOM, [7, 8], mine))
    link._theirs = []
    with pytest.raises(ValueError, match="has not mapped"):
        cuda_ipc.CudaIpcLink._pages_of(link, Ready(ROOM, [7, 8], [1, 2]))


def test_a_page_is_announced_when_its_step_is_over_and_not_before(pair, monkeypatch):
    """The event of the step is waited for in the link's thread, and the engine goes on."""
    computed = threading.Event()
    both = pair(Dictionary())
    monkeypatch.setattr(KVPages, "event", lambda self: SimpleNamespace(synchronize=lambda: computed.wait(20)))
    asked = both.ask(PROMPT)
    both.until(lambda: both.prefill.stage(asked[0]) == "inflight")
    assert not [message for _, message in both.decode.manager.log if type(message).__name__ == "Write"]
    computed.set()
    assert both.answer(asked).output_ids == greedy(TINY_QWEN_PATH, PROMPT, 6)
    assert both.at_rest()


# --- refusals


def test_without_a_gpu_it_is_one_line_that_says_what_to_use():
    with pytest.raises(ValueError, match="this engine computes on cpu; use tcp or shm") as caught:
        CudaMemory(torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_without_the_driver_it_is_one_line_too(monkeypatch):
    monkeypatch.setattr(peer_memory, "LIBRARY", "libcuda.so.of.nobody")
    with pytest.raises(ValueError, match=r"calls libcuda\.so\.of\.nobody, which is not here; use tcp or shm"):
        CudaMemory(torch.device("cuda", 0))


def test_pages_that_are_mapped_elsewhere_are_not_given_back(pair):
    """POST /release_memory_occupation of the prefill side: the other end would read what is somebody else's by then."""
    both = pair(Dictionary())
    scheduler = both.prefill.scheduler
    cache = scheduler.wrapper.kv_cache
    cache.mapped_by = "a decode engine"
    try:
        told = WeightUpdater(scheduler).release_memory_occupation(["kv_cache"])
    finally:
        cache.mapped_by = ""
    assert told == {
        "success": False,
        "message": "kv_cache cannot be given back: its pages are mapped by a decode engine; leave it out of tags",
    }
    assert both.answer(both.ask(PROMPT)).output_ids == greedy(TINY_QWEN_PATH, PROMPT, 6)
