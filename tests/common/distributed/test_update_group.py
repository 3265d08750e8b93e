"""A trainer's group: members as threads of this process, which have connections as processes have."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from common.distributed.update_group import UpdateGroup, open_store, refuse_size

SIZE = 4


def join_all(size: int = SIZE, timeout_s: float = 30.0) -> list[UpdateGroup]:
    store = open_store()

    def join(rank: int) -> UpdateGroup:
        return UpdateGroup("127.0.0.1", store.port, rank, size, timeout_s=timeout_s, store=None if rank else store)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(join, range(size)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_member_gets_what_the_trainer_has(dtype):
    groups, x = join_all(), torch.randn(5, 7).to(dtype)
    with ThreadPoolExecutor(SIZE) as pool:
        got = list(
            pool.map(lambda group: group.broadcast(x.clone() if group.rank == 0 else torch.empty_like(x)), groups)
        )
    assert all(torch.equal(one, x) for one in got)
    for group in groups:
        group.leave()
        group.leave()


def test_when_one_leaves_everybody_who_waits_hears_of_it():
    """Also who waits for a rank that waits for the one that has left."""
    groups, said = join_all(), []

    def wait(group: UpdateGroup) -> None:
        with pytest.raises(ValueError, match="group weight_update_group has lost a member") as error:
            group.broadcast(torch.empty(1000))
        said.append(str(error.value))

    threads = [threading.Thread(target=wait, args=(group,), daemon=True) for group in groups[1:]]
    for thread in threads:
        thread.start()
    groups[0].leave()
    for thread in threads:
        thread.join(100)
    assert len(said) == SIZE - 1
    assert not any("\n" in one for one in said)
    with pytest.raises(ValueError, match="is gone; join a new one"):
        groups[1].broadcast(torch.empty(1))


def test_a_trainer_that_sends_nothing_is_given_up():
    groups = join_all(2, timeout_s=3)
    with pytest.raises(ValueError, match="has lost a member"):
        groups[1].broadcast(torch.empty(3))
    groups[0].leave()


def test_who_waits_for_others_in_vain_is_told_how_long():
    store = open_store()
    with pytest.raises(ValueError, match=f"not all 3 members have come to 127.0.0.1:{store.port} within 3 s"):
        UpdateGroup("127.0.0.1", store.port, 1, 3, timeout_s=3)


def test_nobody_at_that_port_is_one_line():
    store = open_store()
    port = store.port
    del store
    with pytest.raises(ValueError, match=rf"^nobody listens at 127.0.0.1:{port} \([^\n]+\); start the trainer first$"):
        UpdateGroup("127.0.0.1", port, 1, 2)


@pytest.mark.parametrize("word", [None, b"", b"SSH-2.0-OpenSSH_9.9\r\n"])
def test_who_listens_and_is_no_store_is_one_line(word):
    """None: silence, for which a TCPStore would wait for ever; an empty word: the connection is closed."""
    taken = []

    def answer() -> None:
        while True:
            try:
                taken.append(listener.accept()[0])
            except OSError:
                return
            if word == b"":
                taken.pop().close()
            elif word:
                taken[-1].sendall(word)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, daemon=True).start()
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(
            ValueError, match=rf"^who listens at {where} is no trainer's store \([^\n]+\); give the port"
        ):
            UpdateGroup("127.0.0.1", int(where.rpartition(":")[2]), 1, 2, timeout_s=2)
    for link in taken:
        link.close()


def test_ranks_must_be_the_last_of_the_group():
    refuse_size(9, 1, 8)
    with pytest.raises(ValueError, match=r"world_size=9, but rank_offset=2 and 8 rank\(s\) here make 10"):
        refuse_size(9, 2, 8)
