"""Where the time of a start goes, and what of it Python spends on itself."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import cache_from_source
from pathlib import Path


class Laps(dict[str, float]):
    """{what was done: seconds}, in order; a lap is what has passed since the one before, or since this was made.

    Of an executor: weights (and all that is asked before one is read), tokenizer, forms (what is done with a loaded model: how
    matrices lie on a CPU, batch invariance, torch.compile), pages (and tables), and on a GPU kernels (compiled or loaded),
    products (who multiplies: measured), graphs (recorded) and warm-up.
    """

    def __init__(self):
        super().__init__()
        self._began = time.perf_counter()

    def lap(self, what: str) -> None:
        before, self._began = self._began, time.perf_counter()
        self[what] = self.get(what, 0.0) + self._began - before


@contextmanager
def imports_alone() -> Iterator[None]:
    """For imports: what a module makes stays, so the collector, which looks through all of it again and again, finds nothing. With
    torch among them that was 0.13 s of a second."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def has_bytecode(file: str) -> bool:
    """Whether this interpreter has kept what it makes of a module; else it makes it at each start."""
    return Path(cache_from_source(file)).is_file()
