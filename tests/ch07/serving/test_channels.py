"""Pipes: in order, with a timeout, for threads and for event loops; over sockets and in memory alike."""

import asyncio
import threading

import pytest

from ch07_sglang_radix.serving.channels import MemoryPipe, ipc, open_pull, open_push
from ch07_sglang_radix.serving.messages import Abort, Leave


@pytest.fixture(params=["memory", "socket"])
def ends(request, tmp_path_factory):
    if request.param == "memory":
        pipe = MemoryPipe()
        yield pipe, pipe
        return
    address = ipc(tmp_path_factory.mktemp("p"), "s")
    push, pull = open_push(address), open_pull(address)  # in this order: it waits for the other end
    yield push, pull
    push.close()
    pull.close()


def test_messages_come_out_in_order(ends):
    push, pull = ends
    for i in range(100):
        push.send(Abort(str(i)))
    assert [pull.receive(5).rid for _ in range(100)] == [str(i) for i in range(100)]
    assert pull.receive(0) is None


def test_nothing_comes_within_the_time(ends):
    assert ends[1].receive(0.01) is None


def test_who_waits_is_woken_from_another_thread(ends):
    push, pull = ends
    threading.Timer(0.05, push.send, [Leave()]).start()
    assert pull.receive(10) == Leave()


@pytest.mark.parametrize("kind", ["memory", "socket"])
def test_an_event_loop_waits_without_blocking(kind, tmp_path_factory):
    async def main():
        if kind == "memory":
            push = pull = MemoryPipe()
        else:
            address = ipc(tmp_path_factory.mktemp("p"), "s")
            pull, push = open_pull(address, on_event_loop=True), open_push(address)
        push.send(Abort("there already"))
        first = await pull.receive_async()
        waiting = asyncio.create_task(pull.receive_async())
        await asyncio.sleep(0.02)
        assert not waiting.done()
        threading.Thread(target=lambda: push.send(Abort("later"))).start() if kind == "memory" else push.send(
            Abort("later")
        )
        second = await asyncio.wait_for(waiting, 10)
        for one in {id(push): push, id(pull): pull}.values():
            one.close()
        return first.rid, second.rid

    assert asyncio.run(main()) == ("there already", "later")


def test_a_waiter_that_is_cancelled_takes_nothing_with_it():
    async def main():
        pipe = MemoryPipe()
        waiting = asyncio.create_task(pipe.receive_async())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        pipe.send(Abort("a"))
        return await asyncio.wait_for(pipe.receive_async(), 5)

    assert asyncio.run(main()).rid == "a"
