"""Where the time of a start goes."""

import time


class Laps(dict[str, float]):
    """{what was done: seconds}, in order; a lap is what has passed since the one before, or since this was made.

    Of an executor: weights (and all that is asked before one is read), tokenizer, forms (how matrices lie, on a CPU), pages (and
    tables), and on a GPU kernels (compiled or loaded), products (who multiplies: measured), graphs (recorded) and warm-up.
    """

    def __init__(self):
        super().__init__()
        self._began = time.perf_counter()

    def lap(self, what: str) -> None:
        before, self._began = self._began, time.perf_counter()
        self[what] = self.get(what, 0.0) + self._began - before
