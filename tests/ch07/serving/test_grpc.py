"""The gRPC service: what it answers is what HTTP answers, and its generated code is current."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from ch07_sglang_radix.serving.grpc import sglang_scheduler_pb2 as pb
from ch07_sglang_radix.serving.grpc.service import METHODS, SERVICE, serve_grpc
from ch07_sglang_radix.serving.io_struct import GenerateRequest
from tests.ch07.serving.running import ONE_PROCESS, InThisProcess, a_server

ROOT = Path(__file__).parents[3]
PROTO = "ch07_sglang_radix/serving/grpc/sglang_scheduler.proto"
IDS, LENGTH = [5, 6, 7, 8, 9], 12


@pytest.fixture(scope="module")
def here():
    running = InThisProcess({"max_total_tokens": 2048}, api_key="k", admin_api_key="a")
    yield running
    running.end()


@pytest.fixture(scope="module")
def address(here):
    server, port = here.run(serve_grpc(here.manager, "127.0.0.1", 0))
    yield f"127.0.0.1:{port}"
    here.run(server.stop(0))


def call(address, name, request, key="k"):
    """The response, or for Generate the list of them."""
    _, _, response = METHODS[name]
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    with grpc.insecure_channel(address) as channel:
        kind = channel.unary_stream if name == "Generate" else channel.unary_unary
        method = kind(f"/{SERVICE}/{name}", type(request).SerializeToString, response.FromString)
        answer = method(request, metadata=metadata, timeout=200)
        return list(answer) if name == "Generate" else answer


def wanted(ids=IDS, stream=False, rid="", **params):
    return pb.GenerateRequest(
        request_id=rid, tokenized=pb.TokenizedInput(input_ids=ids), stream=stream,
        sampling_params=pb.SamplingParams(**({"max_new_tokens": LENGTH} | params)),
    )  # fmt: skip


def over_http(here, **params):
    request = GenerateRequest(input_ids=IDS, sampling_params={"max_new_tokens": LENGTH, "temperature": 0, **params})
    return here.run(here.manager.answer(request))


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_that_of_http(here, address, stream):
    responses = call(address, "Generate", wanted(stream=stream, rid=f"r{stream}", ignore_eos=True))
    last = responses[-1].complete
    assert list(last.output_ids) == over_http(here, ignore_eos=True)["output_ids"]
    assert (last.prompt_tokens, last.completion_tokens, last.finish_reason) == (len(IDS), LENGTH, "length")
    assert {response.request_id for response in responses} == {f"r{stream}"}
    chunks = [response.chunk for response in responses[:-1]]
    assert [token for chunk in chunks for token in chunk.token_ids] == (list(last.output_ids) if stream else [])
    if stream:
        assert [chunk.completion_tokens for chunk in chunks] == sorted(chunk.completion_tokens for chunk in chunks)


def test_several_answers_say_which_they_are(address):
    responses = call(address, "Generate", wanted(stream=True, n=3, temperature=1.2, max_new_tokens=4, ignore_eos=True))
    ends = [response.complete for response in responses if response.HasField("complete")]
    assert sorted(end.index for end in ends) == [0, 1, 2]
    for end in ends:
        chunks = [r.chunk for r in responses if r.HasField("chunk") and r.chunk.index == end.index]
        assert [token for chunk in chunks for token in chunk.token_ids] == list(end.output_ids)


def test_what_ended_it_is_told(here, address):
    second = over_http(here)["output_ids"][1]
    (response,) = call(address, "Generate", wanted(stop_token_ids=[second]))
    assert response.complete.finish_reason == "stop"
    assert response.complete.matched_token_id == second


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (wanted([]), "empty"), (wanted([1 << 20]), "token"), (wanted(top_p=3.0), "top_p"),
        (wanted(max_new_tokens=10**6), "max_new_tokens"),
    ],
    ids=["empty", "vocabulary", "top_p", "length"],
)  # fmt: skip
def test_what_cannot_run_is_an_invalid_argument(address, request_, said):
    with pytest.raises(grpc.RpcError) as caught:
        call(address, "Generate", request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert said in caught.value.details()


@pytest.mark.parametrize(
    ("name", "key"), [("Generate", ""), ("Generate", "x"), ("FlushCache", "k"), ("Abort", "k"), ("GetServerInfo", "")]
)
def test_a_wrong_key_opens_nothing(address, name, key):
    with pytest.raises(grpc.RpcError) as caught:
        call(address, name, METHODS[name][1](), key)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_probes_and_operators(here, address):
    assert call(address, "HealthCheck", pb.HealthCheckRequest(), key="").healthy
    info = call(address, "GetModelInfo", pb.GetModelInfoRequest())
    assert (info.served_model_name, info.is_generation) == ("tiny-qwen", True)
    told = json.loads(call(address, "GetServerInfo", pb.GetServerInfoRequest()).json)
    assert told["max_total_num_tokens"] == 2048
    assert call(address, "FlushCache", pb.FlushCacheRequest(), key="a").success
    assert not call(address, "Abort", pb.AbortRequest(request_id="nobody"), key="a").success


def test_a_client_that_hangs_up_has_its_request_aborted(here, address):
    async def leave():
        async with grpc.aio.insecure_channel(address) as channel:
            method = channel.unary_stream(
                f"/{SERVICE}/Generate", pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString
            )
            going = method(
                wanted(stream=True, max_new_tokens=1500, ignore_eos=True), metadata=(("authorization", "Bearer k"),)
            )
            await going.read()
            going.cancel()
        for _ in range(100):
            if not here.manager.num_in_flight:
                return
            await asyncio.sleep(0.05)

    asyncio.run(leave())
    assert here.manager.num_in_flight == 0


def test_a_port_in_use_is_one_line(here, address):
    with pytest.raises(ValueError, match="cannot be served over gRPC; another --grpc-port"):
        here.run(serve_grpc(here.manager, *address.split(":")))


def test_the_generated_code_is_current(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", f"--python_out={tmp_path}", PROTO], cwd=ROOT, check=True
    )
    made = PROTO.replace(".proto", "_pb2.py")
    assert (tmp_path / made).read_bytes() == (ROOT / made).read_bytes(), "run `make grpc`"


def test_a_server_answers_both_and_ends_in_good_order():
    with a_server("--grpc-port", "0", *ONE_PROCESS) as server:
        address = server.said(r"grpc://(\S+)")
        assert call(address, "HealthCheck", pb.HealthCheckRequest()).healthy
        (response,) = call(address, "Generate", wanted(ignore_eos=True))
        over = server.generate(
            input_ids=IDS, sampling_params={"max_new_tokens": LENGTH, "ignore_eos": True, "temperature": 0}
        )
        assert list(response.complete.output_ids) == over["output_ids"]
        assert server.end() == 0
