"""Ranks that rank 0 starts itself: whoever makes it, however it ends, they come, follow and go with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import torch
from nbclient import NotebookClient

from ch07_sglang_radix import Engine
from common import parallel_state
from common.distributed import spawn
from common.distributed.messages import share
from common.distributed.spawn import BEREAVED, Follower, SpawnedRanks, start_ranks
from common.parallel_state import RankFailure, TPGroup, initialize_tensor_parallel, shutdown_tensor_parallel
from tests.common.distributed.followers import start, total

ROOT = Path(__file__).parents[3]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SCRIPT = """
from tests.common.distributed.followers import start, total
tp = start(2)
print("the total is", total([1, 10], tp))
"""
POSIX = pytest.mark.skipif(os.name != "posix", reason="sends signals")


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch, tmp_path):
    """A process that torchrun did not start; every temporary folder that a start makes lies in tmp_path."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(parallel_state, "_state", None)
    monkeypatch.setattr(spawn.tempfile, "tempdir", str(tmp_path))


def pids(tp: TPGroup) -> list[int]:
    return [pid for _, pid in tp.peers[1:]]


def gone(processes: list[int], within_s: float = 60.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(pid) for pid in processes):
            return True
        time.sleep(0.05)
    return False


def temporary(folder: Path) -> dict[str, str]:
    return {"TMPDIR": str(folder), "TEMP": str(folder)}


# --- who starts them


@pytest.mark.parametrize("how", ["a script without a guard", "python -c", "standard input"])
def test_a_bare_script_gets_its_ranks_and_leaves_none_behind(how, tmp_path):
    if how == "a script without a guard":
        (tmp_path / "bare.py").write_text(SCRIPT, encoding="utf-8")
        argv, text = [str(tmp_path / "bare.py")], None
    else:
        argv, text = (["-c", SCRIPT], None) if how == "python -c" else (["-"], SCRIPT)
    env = ENV | temporary(tmp_path)
    done = subprocess.run(
        [sys.executable, *argv],
        input=text,
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "the total is [3, 30]\n"
    assert not list(tmp_path.glob("ranks-*"))


def test_a_notebook_gets_its_ranks_again_each_time_a_cell_is_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cell = nbformat.v4.new_code_cell(SCRIPT)
    again = nbformat.v4.new_code_cell(SCRIPT + "print([pid for _, pid in tp.peers])")
    notebook = nbformat.v4.new_notebook(cells=[cell, again])
    NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(tmp_path)}}).execute()
    first, second = (cell.outputs[0].text.splitlines() for cell in notebook.cells)
    assert (first[0], second[0]) == ("the total is [3, 30]",) * 2
    assert gone([int(second[1].strip("[]").split(", ")[1])])  # with the kernel


def test_ranks_start_in_the_folder_of_rank_0_and_import_what_it_imports(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import os, common.parallel_state\n"
        "def follow(file): raise ValueError(os.getcwd() + '|' + open(file).read() + '|' + common.parallel_state.__file__)\n",
        encoding="utf-8",
    )
    (tmp_path / "common.py").write_text("raise SystemExit('the wrong one')", encoding="utf-8")
    (tmp_path / "note.txt").write_text("read", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        spawn, "subprocess", subprocess
    )  # a process that Python starts: what it imports first counts here
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    ranks = start_ranks(Follower("mine:follow", {"file": Path("note.txt")}), 2)
    with pytest.raises(RankFailure) as error:
        ranks.meet(0)
    assert str(error.value).endswith(f" has died at its start: {tmp_path}|read|{parallel_state.__file__}")
    ranks.close()


# --- start and end


def test_start_and_shut_down_ten_times():
    for i in range(10):
        tp = start(2)
        assert total([i, 1], tp) == [3 * i, 3]
        children = pids(tp)
        shutdown_tensor_parallel()
        assert gone(children, within_s=60)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_engines_on_two_gpus_start_and_shut_down_again_and_again():
    """CUDA graphs hold the group, and symmetric memory remembers the first start: neither may stop the next one."""
    params = {"max_new_tokens": 24, "temperature": 0.0}
    with Engine(device="cuda", dtype="float32") as engine:
        want = engine.generate("What is a radix cache?", params)["output_ids"]
    for _ in range(3):
        with Engine(tp_size=2, device="cuda", dtype="float32") as engine:
            assert engine.generate("What is a radix cache?", params)["output_ids"] == want


def test_all_ranks_follow():
    assert total([1, 10, 100], start(3)) == [6, 60, 600]


def test_a_second_start_ends_the_ranks_of_the_first():
    first, second = start(2), start(2)
    assert gone(pids(first), within_s=60)
    with pytest.raises(RankFailure, match="rank 0: broadcast 'task': the other ranks have ended; make a new engine"):
        total([1], first)
    shutdown_tensor_parallel(first)  # its owner lets go of it late: the second goes on
    assert total([1], second) == [3]


def test_one_rank_beside_them_disturbs_nobody():
    tp = start(2)
    alone = initialize_tensor_parallel(device="cpu")
    assert (alone.size, alone.control_group) == (1, None)
    shutdown_tensor_parallel(alone)
    assert total([1], tp) == [3]


def test_a_follower_waits_longer_than_a_collective_may_take():
    tp = start(2, timeout_s=5)  # to meet, too
    time.sleep(7)
    assert total([2], tp) == [6]


def test_results_are_not_sent_to_ranks_that_run_no_script():
    tp = start(2)
    with tp.ledger.recording() as ledger:
        assert share({"a": 1}, tp) == {"a": 1}
    assert ledger.entries == []
    assert total([1], tp) == [3]


# --- what is refused, before anything is started


@pytest.fixture
def no_process(monkeypatch):
    monkeypatch.setattr(spawn.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a process was started"))


def test_arguments_that_are_no_json_are_refused_by_name(no_process):
    with pytest.raises(ValueError, match=r"^model=<object .*> cannot be sent to the other ranks; use plain values"):
        initialize_tensor_parallel(2, device="cpu", follower=Follower("any:thing", {"size": 2, "model": object()}))


def test_more_ranks_than_the_machine_can_bear_are_refused(no_process):
    with pytest.raises(
        ValueError, match=r"^tensor_parallel_size=100000 would start 99999 processes; this machine takes"
    ):
        start(100_000)


@pytest.mark.parametrize("size", [0, -1, "2", 2.0])
def test_a_size_that_is_none_is_refused(no_process, size):
    with pytest.raises(ValueError, match=f"tensor_parallel_size={size} but 1 process"):
        initialize_tensor_parallel(size, device="cpu", follower=Follower("any:thing", {}))


def test_too_few_gpus_are_refused(no_process, monkeypatch):
    monkeypatch.setattr(parallel_state.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"device=cuda but local rank 0 finds 1 GPU\(s\) for 2 rank\(s\)"):
        initialize_tensor_parallel(2, device="cuda", follower=Follower("any:thing", {}))


def test_under_torchrun_nothing_is_started(no_process, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2 but 1 process\(es\) run"):
        start(2)


# --- a rank that goes wrong


def test_a_rank_that_dies_is_named_in_the_call_that_misses_it():
    tp = start(3, "die")
    with pytest.raises(
        RankFailure, match=rf"rank 0: all_reduce 'total' \[1\] failed: rank 2 \(pid {pids(tp)[1]}\) has died"
    ):
        total([1], tp)
    shutdown_tensor_parallel()
    assert gone(pids(tp), within_s=60)


def test_what_a_rank_says_before_it_dies_is_part_of_the_error(capfd):
    with pytest.raises(RankFailure, match=r"rank 1 \(pid \d+\) has died at its start: rank 1 does not like the model"):
        start(2, "refuse")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("no_such_module:follow", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("tests.common.distributed.followers:nothing", "AttributeError: module .* has no attribute 'nothing'"),
    ],
)
def test_a_rank_that_cannot_start_is_named(target, words):
    with pytest.raises(RankFailure, match=rf"rank 1 \(pid \d+\) has died at its start: {words}"):
        initialize_tensor_parallel(2, device="cpu", follower=Follower(target, {}))
    assert parallel_state._spawned is None


def test_a_rank_that_stays_away_is_ended_with_the_others(tmp_path):
    tp = start(3, "stay away", timeout_s=10)
    with pytest.raises(RankFailure, match="failed: no peer on this host is dead, so one is stuck or unreachable"):
        total([1], tp)
    shutdown_tensor_parallel()
    assert gone(pids(tp), within_s=60)
    assert not list(tmp_path.glob("ranks-*"))


def test_of_several_nodes_the_dead_of_this_one_are_told_unless_they_went_because_of_others(tmp_path):
    ranks = SpawnedRanks(tmp_path, 6, range(2, 6), node_rank=1)
    ranks.members = SimpleNamespace(watch=None, lost=None, where="node 1 (host b)", leave=lambda: None)
    codes = [None, BEREAVED, 0]
    ranks.processes = [SimpleNamespace(pid=70 + i, poll=lambda i=i: codes[i]) for i in range(3)]
    for rank in (3, 4, 5):
        (tmp_path / f"{rank}.ready").touch()
    ranks.meet(2)
    assert ranks.members.watch() is None
    codes[0] = -9
    assert ranks.members.watch() == "rank 3 (pid 70) on node 1 (host b) has died"
    ranks.last_words_file(3).write_text("why", encoding="utf-8")
    assert ranks.members.watch() == "rank 3 (pid 70) on node 1 (host b) has died: why"


# --- rank 0 goes


def working(folder: Path) -> tuple[subprocess.Popen, list[int]]:
    """A script in a session of its own whose three ranks work, and the pids of ranks 1 and 2."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.common.distributed.followers", "work for ever"], cwd=ROOT, env=ENV | temporary(folder),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    return process, [int(word) for word in process.stdout.readline().split()[2:]]


def test_ranks_end_with_a_rank_0_that_is_killed(tmp_path):
    process, children = working(tmp_path)
    assert len(children) == 2
    process.kill()
    assert process.communicate(timeout=100) == ("", "")
    assert gone(children)
    assert not list(tmp_path.glob("ranks-*"))


def test_ranks_end_with_a_rank_0_that_is_killed_before_they_can_hear_it(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.common.distributed.followers", "load for ever"],
        cwd=ROOT,
        env=ENV | temporary(tmp_path),
    )
    children = []
    while len(children) < 2:  # they sleep, and no socket connects them with anybody
        children = [child.pid for child in psutil.Process(process.pid).children()]
        time.sleep(0.05)
    time.sleep(1.5)
    process.kill()
    process.wait()
    assert gone(children)
    assert not list(tmp_path.glob("ranks-*"))


@POSIX
@pytest.mark.parametrize(("to", "name"), [("all", "SIGINT"), ("rank 0", "SIGINT"), ("rank 0", "SIGTERM")])
def test_ctrl_c_ends_all_in_one_line(name, to, tmp_path):
    process, children = working(tmp_path)
    number = signal.Signals[name]
    if to == "all":  # what a terminal does
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out, err) == (1, "", f"stopped ({name})\n")
    assert gone(children)
    assert not list(tmp_path.glob("ranks-*"))
