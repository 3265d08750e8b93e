"""What goes to which replica, and what the manager hears of them, without any process."""

from types import SimpleNamespace

import msgspec
import pytest

from ch07_sglang_radix.parallelism.data_parallel_controller import DataParallelController
from ch07_sglang_radix.serving.messages import (
    VERSION,
    Abort,
    BatchStr,
    BatchTokenizedGenerate,
    Control,
    ControlReply,
    Event,
    Hello,
    Leave,
    Lost,
    TokenizedGenerate,
)  # fmt: skip

NOTHING = msgspec.Raw(msgspec.msgpack.encode([]))
END = {"type": "length", "length": 1}


class Pipe:
    def __init__(self):
        self.sent = []

    def send(self, message):
        self.sent.append(message)

    def taken(self):
        taken, self.sent = self.sent, []
        return taken


class Replicas:
    """A controller, and what reaches its three schedulers and the detokenizer."""

    def __init__(self, method="round_robin"):
        self.pipes, self.texts = [Pipe(), Pipe(), Pipe()], Pipe()
        self.controller = DataParallelController(method, self.pipes, None, self.texts)
        self.send, self.take = self.controller.send, self.controller.take

    def where(self):
        """Replica of each ticket that was sent since the last look."""
        found = {}
        for rank, pipe in enumerate(self.pipes):
            for message in pipe.taken():
                for one in message.requests if isinstance(message, BatchTokenizedGenerate) else [message]:
                    found[one.ticket] = rank
        return found

    def end(self, ticket, rank, new_ids=(1,)):
        rows = [[""], [list(new_ids)], [END], [0], [NOTHING], [NOTHING]]
        return self.take(BatchStr(1, [ticket], *rows, dp_rank=rank))

    def reply(self, rank, value=None, error=None):
        """To the newest Control that this replica has."""
        return self.take(ControlReply(self.pipes[rank].sent[-1].number, value, error))


def request(ticket, ids=(5, 6), **more):
    return TokenizedGenerate(ticket, str(ticket), list(ids), {}, {}, **more)


@pytest.fixture
def three():
    return Replicas()


def test_a_batch_is_spread_and_what_goes_to_one_replica_goes_together(three):
    three.send(BatchTokenizedGenerate([request(i) for i in range(5)]))
    assert [type(message) for pipe in three.pipes for message in pipe.sent] == [
        BatchTokenizedGenerate, BatchTokenizedGenerate, TokenizedGenerate
    ]  # fmt: skip
    assert three.where() == {0: 0, 3: 0, 1: 1, 4: 1, 2: 2}


def test_an_abort_finds_its_request_until_that_has_ended(three):
    three.send(request(7))
    three.send(request(8))
    three.where()
    three.send(Abort(8))
    assert [pipe.taken() for pipe in three.pipes] == [[], [Abort(8)], []]
    assert three.end(8, 1).tickets == [8], "and the manager hears of it"
    three.send(Abort(8))
    three.send(Abort(99))
    assert [pipe.sent for pipe in three.pipes] == [[], [], []]


def test_loads_are_what_is_on_its_way_with_the_tokens_that_came():
    replicas = Replicas("total_tokens")
    replicas.send(request(0, [1] * 10))
    replicas.send(request(1, [1] * 8))
    replicas.send(request(2, [1] * 5))
    assert replicas.where() == {0: 0, 1: 1, 2: 2}
    replicas.take(BatchStr(1, [2], [""], [[1] * 4], [None], [0], [NOTHING], [NOTHING], dp_rank=2))
    assert {rank: load.tokens for rank, load in replicas.controller.balancer.loads.items()} == {0: 10, 1: 8, 2: 9}
    replicas.send(request(3))
    assert replicas.where() == {3: 1}
    replicas.end(0, 0)
    replicas.send(request(4))
    assert replicas.where() == {4: 0}


def test_a_session_stays_where_it_began_and_begins_anew_if_that_is_lost(three):
    for ticket in range(4):
        three.send(request(2 * ticket, session="s"))
        three.send(request(2 * ticket + 1))
    where = three.where()
    assert {where[2 * ticket] for ticket in range(4)} == {0}
    assert {where[2 * ticket + 1] for ticket in range(4)} == {0, 1, 2}
    three.controller.lose(0, "gone")
    three.send(request(20, session="s"))
    three.send(request(21))
    three.send(request(22, session="s"))
    where = three.where()
    assert where[20] == where[22] != 0


def test_a_session_that_is_closed_may_begin_elsewhere_and_all_hear_of_it(three):
    three.send(request(0, session="s"))
    three.where()
    three.send(Control(1, "close_session", {"name": "s"}))
    assert [[message.op for message in pipe.taken()] for pipe in three.pipes] == [["close_session"]] * 3
    three.send(request(1, session="s"))
    assert three.where() == {1: 1}


def test_probes_take_turns_and_count_nowhere(three):
    for ticket in range(4):
        three.send(request(ticket, probe=True))
    assert three.where() == {0: 0, 1: 1, 2: 2, 3: 0}
    assert all(load.requests == 0 for load in three.controller.balancer.loads.values())
    three.end(1, 1)
    three.send(request(9))
    assert three.where() == {9: 0}, "nor has a probe taken a turn of the policy's"


@pytest.mark.parametrize(
    ("op", "values", "merged"),
    [
        ("abort", [0, 2, 1], 3),
        ("pause", [1, 0, 0], 1),
        ("flush_cache", [True, True, True], True),
        ("flush_cache", [True, False, True], False),
        ("ping", [True, True, True], True),
        ("resume", [None, None, None], None),
        ("start_profile", ["a", "b", "c"], "a"),
    ],
)
def test_a_wish_reaches_all_and_has_one_answer(three, op, values, merged):
    three.send(Control(70, op, {"x": 1}))
    assert all((pipe.sent[-1].op, pipe.sent[-1].arguments) == (op, {"x": 1}) for pipe in three.pipes)
    assert three.reply(1, values[1]) is None
    assert three.reply(0, values[0]) is None
    assert three.reply(2, values[2]) == ControlReply(70, merged)


def test_who_could_not_do_it_is_named(three):
    three.send(Control(1, "step", {"steps": 1}))
    three.reply(0, 3)
    three.reply(1, error="not paused")
    assert three.reply(2, 4) == ControlReply(1, error="replica 1: not paused")
    three.send(Control(2, "step", {"steps": 1}))
    assert [three.reply(rank, error="not paused") for rank in range(3)][-1] == ControlReply(2, error="not paused")


def said(error="", *loaded):
    return {"success": not error, "error_message": error, "loaded_adapters": dict.fromkeys(loaded, "folder")}


LOADING = Control(7, "load_lora_adapter", {"lora_name": "a", "lora_path": "folder", "pinned": True})
TAKEN = "all 2 places are taken"


def test_an_adapter_is_loaded_on_all_or_on_none(three):
    three.send(LOADING)
    assert [three.reply(rank, said("", "a")) for rank in range(3)][-1] == ControlReply(7, said("", "a"))
    three.send(LOADING)
    replies = [three.reply(0, said("", "a")), three.reply(1, said(TAKEN)), three.reply(2, said("", "a"))]
    assert replies == [None] * 3, "those that have it must give it up first"
    undo = [(pipe.sent[-1].op, pipe.sent[-1].arguments) for pipe in three.pipes]
    assert undo == [("unload_lora_adapter", {"lora_name": "a"}), (LOADING.op, LOADING.arguments), undo[0]]
    assert three.reply(2, said()) is None
    assert three.reply(0, said()) == ControlReply(7, said(f"replica 1: {TAKEN}"))


def test_what_no_replica_could_load_is_told_once_and_nothing_is_undone(three):
    three.send(LOADING)
    assert [three.reply(rank, said(TAKEN, "b")) for rank in range(3)][-1] == ControlReply(7, said(TAKEN, "b"))
    assert all(pipe.sent[-1].op == LOADING.op for pipe in three.pipes)


@pytest.mark.parametrize("dies", [0, 1, 2])
def test_who_dies_while_an_adapter_is_undone_is_not_waited_for(three, dies):
    three.send(LOADING)
    for rank, error in enumerate(["", TAKEN, ""]):
        three.reply(rank, said(error))
    told = three.controller.lose(dies, "died")
    for rank in {0, 2} - {dies}:
        assert told[1:] == []
        told += [reply] if (reply := three.reply(rank, said())) else []
    assert told[1:] == [ControlReply(7, said(f"replica 1: {TAKEN}"))]


UPDATE = Control(8, "update_weights_from_disk", {"model_path": "folder"})


def held(digest="d"):
    return {"success": True, "message": "50 tensors held", "digest": digest}


def test_weights_are_written_once_all_replicas_hold_the_same(three):
    three.send(UPDATE)
    assert all(pipe.sent[-1].arguments == {"model_path": "folder", "hold": True} for pipe in three.pipes)
    assert [three.reply(rank, held()) for rank in range(3)] == [None] * 3
    assert all(
        (pipe.sent[-1].op, pipe.sent[-1].arguments) == ("finish_update", {"write": True}) for pipe in three.pipes
    )
    written = {"success": True, "message": "50 tensors", "num_paused_requests": 2}
    assert [three.reply(rank, written) for rank in range(3)] == [
        None, None, ControlReply(8, written | {"num_paused_requests": 6})
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"error": "no room"}, "replica 1: no room"),
        ({"value": held("e")}, "replica 1 has read other weights than replica 0; give all the same files"),
    ],
)
def test_weights_that_one_replica_cannot_hold_are_dropped_by_all(three, wrong, words):
    three.send(UPDATE)
    assert [three.reply(0, held()), three.reply(1, **wrong), three.reply(2, held())] == [None] * 3
    for rank, pipe in enumerate(three.pipes):
        if rank != 1 or "value" in wrong:
            assert (pipe.sent[-1].op, pipe.sent[-1].arguments) == ("finish_update", {"write": False})
            told = three.reply(rank, {"success": True, "message": "the old weights answer"})
    assert told == ControlReply(8, error=words)


def test_weights_that_no_replica_can_read_are_told_once_and_nothing_is_dropped(three):
    three.send(UPDATE)
    told = [three.reply(rank, error="no folder") for rank in range(3)]
    assert told == [None, None, ControlReply(8, error="no folder")]
    assert all(pipe.sent[-1].op == UPDATE.op for pipe in three.pipes)


@pytest.mark.parametrize("fails", [[0], [1], [2], [1, 2]])
def test_a_replica_that_cannot_write_is_named_for_the_others_have_written(three, fails):
    three.send(UPDATE)
    for rank in range(3):
        three.reply(rank, held())
    written = {"success": True, "message": "50 tensors", "num_paused_requests": 0}
    told = [three.reply(rank, *((None, "no room") if rank in fails else (written,))) for rank in range(3)]
    assert told == [None, None, ControlReply(8, error=f"replica {fails[0]}: no room; replicas differ, start anew")]


def test_a_replica_that_dies_with_new_weights_in_hand_is_not_waited_for(three):
    three.send(UPDATE)
    for rank in (0, 1):
        three.reply(rank, held())
    assert len(three.controller.lose(2, "died")) == 1, "the other two go on to write"
    written = {"success": True, "message": "50 tensors", "num_paused_requests": 0}
    assert three.reply(0, written) is None
    assert three.reply(1, written) == ControlReply(8, written)


def test_all_flush_or_none(three):
    three.send(request(0))
    three.where()
    three.send(Control(1, "flush_cache"))
    assert {pipe.sent[-1].op for pipe in three.pipes} == {"ping"}
    assert [three.reply(rank, True) for rank in range(3)][-1] == ControlReply(1, False)


def test_server_info_adds_up_and_keeps_each(three):
    def info(n):
        counted = dict.fromkeys(("free_tokens", "evictable_tokens", "protected_tokens", "held_tokens"), n)
        counted |= {"waiting": n, "running": 0, "prompt_tokens": 10 * n, "cached_tokens": n, "evicted_tokens": 0}
        return counted | {
            "retractions": 0,
            "max_total_num_tokens": 64,
            "steps": {"prefill": n},
            "page_size": 4,
            "hit_rate": 0.1,
        }

    three.send(Control(1, "server_info"))
    for rank in range(2):
        three.reply(rank, info(rank))
    said = three.reply(2, info(2)).value
    assert (said["max_total_num_tokens"], said["free_tokens"], said["steps"], said["page_size"]) == (
        192,
        3,
        {"prefill": 3},
        4,
    )
    assert said["hit_rate"] == pytest.approx(0.1)
    assert [(one["dp_rank"], one["free_tokens"]) for one in said["replicas"]] == [(0, 0), (1, 1), (2, 2)]


def test_a_page_shows_the_first_that_lives(three):
    three.controller.lose(0, "gone")
    three.send(Control(1, "xray", {"on": True}))
    assert [len(pipe.sent) for pipe in three.pipes] == [0, 1, 0]
    assert three.reply(1, None) == ControlReply(1)


def test_ready_is_said_once_by_all(three):
    facts = {"pids": [1], "max_total_num_tokens": 64, "page_size": 4, "device": "cuda:0"}
    assert three.take(Hello(VERSION, "scheduler", 11, facts, 1)) is None
    assert three.take(Hello(VERSION, "detokenizer", 12)).who == "detokenizer"
    assert three.take(Hello(VERSION, "scheduler", 10, facts | {"pids": [2, 3]}, 0)) is None
    said = three.take(Hello(VERSION, "scheduler", 13, facts | {"max_total_num_tokens": 48}, 2))
    assert said.facts == {"pids": [2, 3, 1, 1], "max_total_num_tokens": 48, "page_size": 4, "device": "cuda:0"}
    assert said.version == VERSION


def test_a_replica_without_a_gpu_where_others_have_one_is_named(three):
    facts = {"pids": [1], "max_total_num_tokens": 64}
    three.take(Hello(VERSION, "scheduler", 1, facts | {"device": "cuda:0"}, 0))
    three.take(Hello(VERSION, "scheduler", 1, facts | {"device": "cuda:0"}, 1))
    with pytest.raises(
        ValueError, match=r"replica 1 runs on cuda, replica 2 runs on cpu: each of 3 replicas wants GPUs of its own"
    ):
        three.take(Hello(VERSION, "scheduler", 1, facts | {"device": "cpu"}, 2))


def test_one_strange_version_is_told():
    replicas = Replicas()
    facts = {"pids": [1], "max_total_num_tokens": 64, "device": "cpu"}
    for rank, version in enumerate((VERSION, VERSION + 1, VERSION)):
        said = replicas.take(Hello(version, "scheduler", 1, facts, rank))
    assert said.version == VERSION + 1


def test_a_lost_replica_takes_its_own_requests_and_no_others(three):
    three.send(BatchTokenizedGenerate([request(i) for i in range(6)]))
    three.send(request(6, probe=True))
    three.where()
    assert three.controller.lose(0, "scheduler_0 has died") == [Lost(0, "scheduler_0 has died", [0, 3, 6])]
    assert three.texts.taken() == [Leave()], "for the detokenizer, which waits for three"
    assert three.end(3, 0) is not None, "what was still on its way hurts nobody"
    assert three.take(Event("step_state", 1, 0)) is None
    assert three.take(Event("step_state", 1, 1)) is not None
    three.send(BatchTokenizedGenerate([request(10 + i) for i in range(4)]))
    assert set(three.where().values()) == {1, 2}
    three.send(Abort(3))
    three.send(Leave())
    assert [pipe.taken() for pipe in three.pipes] == [[], [Leave()], [Leave()]]


def test_the_others_go_on_unless_it_was_the_last_or_some_have_not_begun(three):
    heard = []
    manager = SimpleNamespace(state="starting", take=heard.append)
    assert not three.controller.outlives(0, "gone", manager)
    assert heard == []
    manager.state = "ready"
    assert three.controller.outlives(0, "gone", manager)
    manager.state = "draining"
    assert three.controller.outlives(1, "gone", manager)
    assert [message.dp_rank for message in heard] == [0, 1]
    assert not three.controller.outlives(2, "gone", manager)


def test_a_wish_does_not_wait_for_the_dead(three):
    three.send(Control(1, "abort"))
    three.reply(1, 2)
    three.reply(2, 3)
    assert three.controller.lose(0, "gone")[1:] == [ControlReply(1, 5)]
    three.send(Control(2, "xray"))
    assert three.controller.lose(1, "gone")[1:] == [ControlReply(2, error="gone")]
    assert three.take(ControlReply(0, 1)) is None, "a reply after its end"
