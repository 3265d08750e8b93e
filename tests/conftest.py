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


def pytest_itemcollected(item):
    """Mark what starts several ranks: `make test` runs that by itself, and the rest two at a time."""
    starts = "ranks" in getattr(item, "fixturenames", ()) or "torchrun" in item.name
    if starts or item.path.name in ("test_demo.py", "test_parallel_state.py", "test_started_ranks.py", "test_spawn.py"):
        item.add_marker(pytest.mark.ranks)


def pytest_collection_modifyitems(items):
    """Tests of one number of ranks together: only two pools are kept, and a new one takes seconds to start."""
    items.sort(key=_number_of_ranks)  # stable


def _number_of_ranks(item) -> int:
    if not item.get_closest_marker("ranks"):
        return 0
    size = item.callspec.params.get("size") if hasattr(item, "callspec") else None
    return size if isinstance(size, int) else 2


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
