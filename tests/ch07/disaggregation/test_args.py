"""What is refused before anything runs: layouts that are no half, rooms that are none, a balancer with one side."""

import pytest

from ch07_sglang_radix.disaggregation.lb_args import parse_args
from ch07_sglang_radix.generate_request import GenerateCall, LogprobOptions
from ch07_sglang_radix.handoff import Handoff
from ch07_sglang_radix.scheduler import WORDS
from ch07_sglang_radix.server_args import ServerArgs
from common.request.intake import Intake

ROOM = ("127.0.0.1", 8998, 7)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pp_size": 2, "tp_size": 1}, "pp_size=2 with disaggregation_mode=prefill"),
        ({"dp_size": 2}, "dp_size=2 with disaggregation_mode=prefill"),
        ({"attn_dp_size": 2, "tp_size": 2}, "attn_dp_size=2"),
        ({"cp_size": 2, "tp_size": 2}, "cp_size=2"),
        ({"nnodes": 2, "dist_init_addr": "127.0.0.1:5000"}, "nnodes=2"),
        ({"disaggregation_mode": "both"}, "disaggregation_mode"),
        ({"disaggregation_transfer_backend": "mooncake"}, "use tcp, shm or cuda_ipc"),
        ({"disaggregation_transfer_backend": "cuda_ipc", "device": "cpu"}, "device=cpu; use tcp or shm"),
        ({"disaggregation_bootstrap_port": 70000}, "disaggregation_bootstrap_port=70000"),
        ({"disaggregation_timeout": 0}, "disaggregation_timeout=0"),
        ({"num_reserved_decode_tokens": -1}, "num_reserved_decode_tokens=-1"),
        ({"disaggregation_mode": "decode", "disaggregation_deflect_tokens": -1}, "disaggregation_deflect_tokens=-1"),
        ({"disaggregation_deflect_tokens": 9}, "9 with disaggregation_mode=prefill: it is the decode engine that"),
    ],
)
def test_what_is_no_half_is_refused_in_one_line(given, said):
    with pytest.raises(ValueError, match=said) as caught:
        ServerArgs.of({"disaggregation_mode": "prefill"} | given)
    assert "\n" not in str(caught.value)


def test_a_whole_engine_takes_no_room_and_a_half_takes_nothing_without():
    assert Handoff.of("null", None, None, None) is None
    with pytest.raises(ValueError, match="this one does both"):
        Handoff.of("null", *ROOM)
    for missing in range(3):
        with pytest.raises(ValueError, match="ask the balancer"):
            Handoff.of("decode", *(None if i == missing else value for i, value in enumerate(ROOM)))
    assert Handoff.of("decode", *ROOM) == ("decode", "127.0.0.1", 8998, 7)


@pytest.mark.parametrize(
    ("room", "said"),
    [
        (("10.0.0.1", 8998, 7), "bootstrap_host"),
        (("127.0.0.1", 0, 7), "bootstrap_port=0"),
        (("127.0.0.1", 8998, -1), "bootstrap_room=-1"),
        (("127.0.0.1", 8998, 1 << 63), "bootstrap_room"),
        (("127.0.0.1", 8998, "7"), "bootstrap_room"),
    ],
)
def test_a_room_that_is_none_is_refused(room, said):
    with pytest.raises(ValueError, match=said):
        Handoff.of("prefill", *room)


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_each_answer_has_a_room_of_its_own_and_prefill_computes_one_token_of_it(mode):
    intake = Intake(None, 1000, 512, 4096, 1, WORDS, None)
    params = {"max_new_tokens": 9, "min_new_tokens": 3, "n": 2}
    handoff = Handoff.of(mode, *ROOM)
    call = GenerateCall.of(intake, None, [[1, 2], [3]], params, LogprobOptions(), None, None, 0, None, False, handoff)
    assert [one.handoff.room for one in call.requests] == [7, 8, 9, 10]
    lengths = {(one.params.max_new_tokens, one.params.min_new_tokens) for one in call.requests}
    assert lengths == ({(1, 1)} if mode == "prefill" else {(9, 3)})


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--decode", "http://127.0.0.1:1"], "no prefill server is named; give --prefill URL"),
        (["--prefill", "http://127.0.0.1:1"], "no decode server is named"),
        (["--prefill", "nowhere", "--decode", "http://127.0.0.1:1"], "must be like http://127.0.0.1:30001"),
        (["--prefil", "http://127.0.0.1:1"], "--prefill"),
    ],
)
def test_a_balancer_with_one_side_is_refused(argv, said):
    with pytest.raises(ValueError, match=said):
        parse_args(argv)
