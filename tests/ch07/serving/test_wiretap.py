"""A tap between the processes: it sees every message, changes none, and leaves nothing behind."""

import json
import tempfile
import urllib.request
from collections import Counter

import psutil
import pytest

from ch07_sglang_radix.engine import Engine
from ch07_sglang_radix.serving.messages import BatchStr, BatchTokenIDs, encode
from ch07_sglang_radix.serving.wiretap import since, tapped

BODY = {"text": "What is a radix cache?", "sampling_params": {"max_new_tokens": 6}, "rid": "r"}


def ask(url, **more):
    with urllib.request.urlopen(f"{url}/generate", json.dumps(BODY | more).encode(), timeout=200) as answer:
        return answer.read()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """(answers, what was seen of each, pids, where the sockets were)."""
    folder = tmp_path_factory.mktemp("t")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        with tapped("--device", "cpu", "--max-total-tokens", "2048") as server:
            hellos = server.clear()
            whole, seen = json.loads(ask(server.url)), server.clear()
            stream, seen_of_stream = ask(server.url, stream=True), server.clear()
            pids = server.pids
    return hellos, whole, seen, stream, seen_of_stream, pids, folder


def test_the_answer_is_the_engine_s(told):
    with Engine(device="cpu") as engine:
        expected = engine.generate(BODY["text"], BODY["sampling_params"], rid="r")
    _, whole, _, stream, *_ = told
    assert whole == expected
    last = json.loads(stream.split(b"\n\n")[-3].removeprefix(b"data: "))
    assert (last["text"], last["output_ids"]) == (expected["text"], expected["output_ids"])


def test_every_hop_is_seen_in_order_and_with_its_bytes(told):
    hellos, _, seen, stream, seen_of_stream, *_ = told
    assert sorted(one.sender for one in hellos if one.name == "Hello") == ["detokenizer", "scheduler"]
    assert [one.at for one in seen] == sorted(one.at for one in seen)
    names = [one.name for one in seen]
    assert names[:3] == ["POST /generate", "TokenizedGenerate", "BatchTokenIDs"]
    assert (names[-2], names[-1]) == ("BatchStr", "answer")
    hops = Counter((one.sender, one.receiver) for one in seen_of_stream)
    assert hops["scheduler", "detokenizer"] == hops["detokenizer", "main"] == 6
    assert sum(one.size for one in seen_of_stream if one.receiver == "client") == len(stream)
    for one in seen_of_stream:
        if isinstance(one.message, BatchTokenIDs | BatchStr):
            assert one.size == len(encode(one.message))
            assert len(one.message.new_ids) == 1
    (first, *_), zero = seen, seen[0].at
    assert since(seen, zero)[0].at == 0
    assert since(seen, zero)[-1].at == pytest.approx(1e3 * (seen[-1].at - first.at))


def test_nothing_is_left(told):
    *_, pids, folder = told
    assert not [who for who, pid in pids.items() if who != "main" and psutil.pid_exists(pid)]
    assert list(folder.iterdir()) == []


def test_a_server_that_does_not_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "model").mkdir()
    with (
        pytest.raises(ValueError, match=r"did not start: scheduler .*config.json"),
        tapped("--model-path", str(tmp_path / "model")),
    ):
        pass
    assert [one.name for one in tmp_path.iterdir()] == ["model"]
