"""One rank's half of the work, with links that are played: orders in, messages out, bytes on the right pages."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ch07_sglang_radix.disaggregation import orders
from ch07_sglang_radix.disaggregation.kv_manager import KVManager
from ch07_sglang_radix.disaggregation.messages import VERSION, Done, Fail, Hello, Metadata, Reserve, Write
from ch07_sglang_radix.disaggregation.orders import Order
from ch07_sglang_radix.disaggregation.rooms import State
from common.layers.heads import HeadLayout

LAYERS, PAGES, PAGE, HEADS, DIM = 2, 12, 4, 2, 3
ROOM, SLOT = 77, 5


class Link:
    """peer None: the other end has not said who it is."""

    def __init__(self, peer=None):
        self.peer, self.said, self.payloads = peer, [], []

    def send(self, message, payload=None, size=0):
        self.said.append(message)
        if payload:
            data = payload()
            assert len(data) == size
            self.payloads.append((message, data))


def a_rank(mode, rank=0, ranks=1):
    heads = HeadLayout.of(HEADS, HEADS, rank, ranks).kv_heads
    kv = torch.zeros(LAYERS, 2, PAGES, PAGE, len(heads), DIM)
    tp = SimpleNamespace(rank=rank, size=ranks, device=torch.device("cpu"))
    wrapper = SimpleNamespace(
        kv_cache=SimpleNamespace(tensors=(kv,)), tp=tp, config=SimpleNamespace(num_kv_heads=HEADS), table=None
    )
    manager, links = KVManager(wrapper, mode), {}
    manager.transport = SimpleNamespace(connect=lambda address: links.setdefault(address, Link()))
    return manager, links, kv, heads


def obey(manager, *given):
    return manager.obey(orders.encode([Order(kind, words) for kind, words in given]))


def reserve(manager, addresses, pages=(7, 8)):
    meet = (orders.MEET, (0, *orders.as_words(addresses)))
    obey(manager, meet, (orders.RESERVE, (ROOM, 0, SLOT, 0, 0, *pages)))


def hello(mode, rank, ranks):
    return Hello(VERSION, mode, rank, ranks)


def test_pages_of_two_ranks_land_on_the_right_heads_of_three():
    """Every head of every page is a number of its own; what decode rank j has afterwards is what its cut says."""
    senders = [a_rank("prefill", i, 2) for i in range(2)]
    for _, _, kv, heads in senders:
        for local, head in enumerate(heads):
            for page in range(PAGES):
                kv[:, :, page, :, local] = 100 * page + head
    for j in range(3):
        decode, links, kv, heads = a_rank("decode", j, 3)
        reserve(decode, "a b")
        for i, address in enumerate(("a", "b")):
            if address not in links:
                continue
            back = Link(hello("decode", j, 3))
            manager = senders[i][0]
            manager.take(back, Reserve(ROOM + j, SLOT, 0, [7, 8], 0), None)
            for peer in range(3):  # the other decode ranks have reserved, too
                if peer != j:
                    manager.take(Link(hello("decode", peer, 3)), Reserve(ROOM + j, SLOT, 0, [7, 8], 0), None)
            obey(manager, (orders.SEND, (ROOM + j, 1, 2, 3)))
            links[address].peer = hello("prefill", i, 2)
            for message, data in back.payloads:
                mine = Write(ROOM, message.pages)
                into = decode.place(links[address], mine, len(data))
                into[:] = data
                decode.take(links[address], mine, into)
        for local, head in enumerate(heads):
            assert (kv[:, :, 7, :, local] == 200 + head).all()
            assert (kv[:, :, 8, :, local] == 300 + head).all()
        assert (kv[:, :, [0, 1, 2, 3, 4, 5, 6, 9, 10, 11]] == 0).all(), "no other page"
        if j:
            assert decode.states([ROOM]) == [State.SUCCESS]


def test_who_has_everything_says_so_though_a_connection_comes_last():
    """Prefill's rank 1 has no heads for decode's rank 0, which reserves there all the same (rooms.told_by)."""
    manager, links, kv, _ = a_rank("decode", 0, 2)
    reserve(manager, "a b", pages=(7,))
    links["a"].peer = hello("prefill", 0, 2)
    write = Write(ROOM, [7])
    manager.take(links["a"], write, manager.place(links["a"], write, kv[:, :, :1].numel() * 4))
    manager.take(links["a"], Metadata(SLOT, ROOM, 1, 0, 0), None)
    assert manager.states([ROOM]) == [State.BOOTSTRAPPING], "prefill's rank 1 has not said who it is"
    assert not any(Done(ROOM) in link.said for link in links.values())
    links["b"].peer = hello("prefill", 1, 2)
    assert manager.states([ROOM]) == [State.SUCCESS]
    assert manager.states([ROOM]) == [State.SUCCESS]
    assert [link.said.count(Done(ROOM)) for link in links.values()] == [1, 1], "once"


def test_a_write_into_a_closed_room_goes_nowhere():
    manager, links, kv, _ = a_rank("decode")
    reserve(manager, "a")
    links["a"].peer = hello("prefill", 0, 1)
    write, size = Write(ROOM, [7]), kv[:, :, :1].numel() * 4
    into = manager.place(links["a"], write, size)
    into[:] = np.full(size, 1, dtype=np.uint8)
    obey(manager, (orders.CLOSE, (ROOM, 1, *orders.as_words("over"))))
    assert links["a"].said[-1] == Fail(ROOM, "over")
    manager.take(links["a"], write, into)
    assert not kv.any(), "its bytes came before, and were looked at after"
    assert manager.place(links["a"], write, size) is None
    assert not manager.rooms()


def test_a_payload_of_another_size_is_refused_with_both_numbers():
    manager, links, kv, _ = a_rank("decode")
    reserve(manager, "a")
    links["a"].peer = hello("prefill", 0, 1)
    size = kv[:, :, :1].numel() * 4
    with pytest.raises(ValueError, match=f"1 pages of 2 heads are {size:,} bytes here, and {size + 4:,} are announced"):
        manager.place(links["a"], Write(ROOM, [7]), size + 4)
    assert manager.place(links["a"], Write(ROOM, [9]), size) is None, "a page that nobody has reserved"


def test_a_reservation_that_comes_too_late_is_answered():
    manager, _, _, _ = a_rank("prefill")
    manager.states([ROOM])
    obey(manager, (orders.CLOSE, (ROOM, 1, *orders.as_words("aborted"))))
    link = Link(hello("decode", 0, 1))
    manager.take(link, Reserve(ROOM, SLOT, 0, [7], 0), None)
    assert link.said == [Fail(ROOM, "aborted")]
    assert not manager.rooms()


def test_a_room_that_nobody_has_asked_about_is_forgotten_with_its_link():
    manager, _, _, _ = a_rank("prefill")
    link = Link(hello("decode", 0, 1))
    manager.take(link, Reserve(ROOM, SLOT, 0, [7], 0), None)
    assert manager.rooms()
    manager.lost(link, "closed")
    assert not manager.rooms()
    assert manager.states([ROOM]) == [State.FAILED], "its request comes later, and hears so"
    assert manager.why(ROOM) == "rank 0 of the decode side is gone: closed"


@pytest.mark.parametrize("rank", [0, 1])
def test_who_is_turned_away_hears_why_from_rank_0_at_rank_0(rank):
    """Else another prefill rank may hear of it sooner, and its side fails before rank 0 knows the reason."""
    decode, links, _, _ = a_rank("decode", rank, 2)
    obey(decode, (orders.MEET, (0, *orders.as_words("a b"))), (orders.TURN_AWAY, (ROOM, 0, *orders.as_words("why"))))
    assert {address: link.said for address, link in links.items()} == (
        {} if rank else {"a": [Fail(ROOM, "why")], "b": []}
    )
    assert rank or decode.knows(0), "or the next room would take the engine for one that is lost"


def test_a_long_prompt_goes_in_several_messages(monkeypatch):
    manager, _, kv, _ = a_rank("prefill")
    monkeypatch.setattr("ch07_sglang_radix.disaggregation.kv_manager.MOST_BYTES", 2 * kv[:, :, :1].numel() * 4)
    link = Link(hello("decode", 0, 1))
    manager.take(link, Reserve(ROOM, SLOT, 0, [1, 2, 3, 4, 5], 0), None)
    obey(manager, (orders.SEND, (ROOM, 1, 5, 6, 7, 8, 9)))
    assert [message.pages for message in link.said] == [[1, 2], [3, 4], [5]]
    assert obey(manager, (orders.POLL, (ROOM,))) == [State.TRANSFERRING]
    manager.take(link, Done(ROOM), None)
    assert obey(manager, (orders.POLL, (ROOM,))) == [State.SUCCESS]


def test_a_room_that_two_decode_engines_reserve_is_the_first_one_s():
    manager, _, _, _ = a_rank("prefill")
    first, second = Link(hello("decode", 0, 1)), Link(hello("decode", 0, 1))
    manager.take(first, Reserve(ROOM, SLOT, 0, [7, 8], 0), None)
    manager.take(second, Reserve(ROOM, SLOT, 0, [3], 0), None)
    manager.take(second, Fail(ROOM, "of the second"), None)
    assert [type(said) for said in second.said] == [Fail], "or it would wait for its pages until its time is over"
    assert "another decode engine's" in second.said[0].why
    assert manager.states([ROOM]) == [State.WAITING_FOR_INPUT]
    obey(manager, (orders.SEND, (ROOM, 1, 4, 5)))
    assert [said.pages for said in first.said] == [[7, 8]]
    assert len(second.said) == 1
