import os

# Where Python was told to keep no compiled files, as in many containers, each of some hundred processes would compile this
# repository anew: half a second of a core, more than all else that a forked one does before its work.
os.environ["PYTHONDONTWRITEBYTECODE"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import multiprocessing.util
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels are tested without a GPU, too

import transformers
from hypothesis import is_hypothesis_test, settings

from ch07_sglang_radix.serving import child
from common.distributed import spawn
from common.parallel_state import shutdown_tensor_parallel
from tests import parts, quick, warm
from tests.oracle import SMALL, save_random
from tests.ranks import RankPool

settings.register_profile("long", max_examples=3000, deadline=None)  # pytest --hypothesis-profile=long
torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def pytest_addoption(parser):
    parser.addoption("--write-seconds", action="store_true", help="how long each test took, for quick.py")


def pytest_configure(config):
    sys.dont_write_bytecode = False  # as the environment has it now
    settings.register_profile("all", max_examples=100, deadline=None)
    settings.register_profile("test", max_examples=10, deadline=None)
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("test" if _is_quick(config) else "all")


def _is_quick(config) -> bool:
    return config.getoption("-m") == "not thorough"


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    """Mark what starts several ranks, and what is thorough: what needs more than two, and what quick.py leaves out. Tests of one
    number of ranks stand together, the others first: a worker keeps two pools of ranks only, and one takes seconds to start."""
    seen: Counter[str] = Counter()
    measured = quick.read()
    for item in items:
        size = _number_of_ranks(item)
        if size:
            item.add_marker(pytest.mark.ranks)
        name = quick.function_of(item.nodeid)
        every = quick.every(name, measured, drawn=is_hypothesis_test(getattr(item, "obj", None)))
        if size > 2 or not every or seen[name] % every:
            item.add_marker(pytest.mark.thorough)
        seen[name] += 1
    items.sort(key=_number_of_ranks)  # stable


def _number_of_ranks(item) -> int:
    """0 for a test in one process."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    starts = "ranks" in set(getattr(item, "fixturenames", ())) - set(params) or "torchrun" in item.name
    files = ("test_demo.py", "test_parallel_state.py", "test_started_ranks.py", "test_spawn.py", "test_launch.py")
    if not starts and item.path.name not in files:
        return 0
    return next((size for name in ("size", "answers") if isinstance(size := params.get(name), int) and size > 0), 2)


def pytest_terminal_summary(terminalreporter, config):
    """How long each part took (parts.py); what `make test` and `make test-all` cover, in a line each."""
    reports = [report for kind in ("", "passed", "failed", "error") for report in terminalreporter.getreports(kind)]
    if config.getoption("--write-seconds"):
        quick.write(reports)
    if took := parts.said(reports):
        terminalreporter.write_line(took)
    if _is_quick(config):
        terminalreporter.write_line(
            "covered: what takes half a second, and the core of what takes longer, on one and two ranks, and a notebook. "
            "`make test-all` adds all else: three and four ranks, real sizes, all commands of the READMEs, all notebooks."
        )
    elif "notebooks" in config.args:
        terminalreporter.write_line(
            "covered: everything, on one to four ranks, with all commands of the READMEs and all notebooks."
        )


@pytest.fixture(autouse=True)
def no_group_left_over():
    """A test that picked a device for the process must not pick it for the next one."""
    yield
    shutdown_tensor_parallel()


@pytest.fixture(scope="session", autouse=True)
def forked():
    """The ranks and replicas that an engine in this process starts are forked (warm.py): 1.1 CPU seconds each, not 2.9.

    That they start as Python processes do is held by notebooks, test_spawn.py's scripts and a server of test_life_and_death.py.
    """
    multiprocessing.util.get_temp_dir()  # made now: some tests have a temporary folder of their own, which must stay empty
    with pytest.MonkeyPatch.context() as patch:
        for module in (spawn, child):
            patch.setattr(module, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": warm.Popen}))
        yield


@pytest.fixture(scope="session")
def ranks():
    """ranks(R) -> a RankPool of R processes, started on first use and kept; at most two sizes at a time."""
    pools: dict[int, RankPool] = {}

    def get(size: int) -> RankPool:
        if size not in pools or pools[size].broken:
            while len(pools) > 1:
                pools.pop(next(iter(pools))).close()
            pools[size] = RankPool(size)
        return pools[size]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(name) -> folder with random weights in that config (see oracle.SMALL), made once."""
    made = {}

    def get(name: str):
        assert name in SMALL
        if name not in made:
            made[name] = save_random(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def copy(checkpoint, tmp_path):
    """copy(name) -> a copy of that checkpoint, to be changed."""
    return lambda name: Path(shutil.copytree(checkpoint(name), tmp_path / name))
