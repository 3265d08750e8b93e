"""Pipes: in order, with a timeout, for threads and for event loops; over sockets and in memory alike."""

import asyncio
import shutil
import tempfile
import threading
from pathlib import Path

import pytest

from ch07_sglang_radix.serving.channels import MemoryPipe, ipc, new_folder, open_pull, open_push
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
        push.send(Abort(i))
    assert [pull.receive(5).ticket for _ in range(100)] == list(range(100))
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
        push.send(Abort(1))
        first = await pull.receive_async()
        waiting = asyncio.create_task(pull.receive_async())
        await asyncio.sleep(0.02)
        assert not waiting.done()
        threading.Thread(target=lambda: push.send(Abort(2))).start() if kind == "memory" else push.send(Abort(2))
        second = await asyncio.wait_for(waiting, 10)
        for one in {id(push): push, id(pull): pull}.values():
            one.close()
        return first.ticket, second.ticket

    assert asyncio.run(main()) == (1, 2)


def test_a_waiter_that_is_cancelled_takes_nothing_with_it():
    async def main():
        pipe = MemoryPipe()
        waiting = asyncio.create_task(pipe.receive_async())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        pipe.send(Abort(7))
        return await asyncio.wait_for(pipe.receive_async(), 5)

    assert asyncio.run(main()).ticket == 7


def test_sockets_have_room_under_a_deep_temporary_folder(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 40) / ("e" * 40)
    deep.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    folder = new_folder()
    try:
        assert folder.stat().st_mode & 0o777 == 0o700
        pull = open_pull(ipc(folder, "scheduler_999"))
        pull.close()
    finally:
        shutil.rmtree(folder)
    assert list(deep.iterdir()) == []


def test_sockets_are_in_the_reader_s_temporary_folder_where_they_fit(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        assert new_folder().parent == Path(short)
