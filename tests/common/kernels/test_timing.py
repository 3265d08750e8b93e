"""How kernels are timed, as far as that needs no GPU."""

from types import SimpleNamespace

import pytest
import torch

from common.kernels import timing


@pytest.fixture
def recorded_on(monkeypatch):
    """The streams of all recordings, which record nothing."""
    streams = []

    def record(call, before, stream, pool):
        streams.append(stream)
        return SimpleNamespace(pool=lambda: "pool", replay=lambda: None), None

    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 1.0)
    monkeypatch.setattr(timing, "record", record)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    timing._stream.cache_clear()
    yield streams
    timing._stream.cache_clear()


def test_all_recordings_on_a_device_take_one_stream(recorded_on, monkeypatch):
    """The library keeps memory for each that it has seen."""
    for device in (0, 1, 0):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        timing.timed_in_turn([[int], [int, int]])
    assert [stream.device for stream in recorded_on] == [0, 0, 1, 1, 0, 0]
    assert len({id(stream) for stream in recorded_on}) == 2
