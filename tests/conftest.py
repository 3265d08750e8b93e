import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from hypothesis import settings

from common.parallel_state import shutdown_tensor_parallel
from tests.oracle import SMALL, save_random
from tests.ranks import RankPool

settings.register_profile("long", max_examples=3000)  # pytest --hypothesis-profile=long
torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


SEVERAL_RANKS = ("test_readme.py", "test_demo.py", "test_parallel_state.py")  # files that start them by themselves


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    """What starts several ranks runs in one worker, one after the other: ranks beside ranks only wait for each other."""
    for item in items:
        if "ranks" in item.fixturenames or item.path.name in SEVERAL_RANKS:
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture(autouse=True)
def no_group_left_over():
    """A test that picked a device for the process must not pick it for the next one."""
    yield
    shutdown_tensor_parallel()


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
