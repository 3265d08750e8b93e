"""Exercise 2: Keys of whole pages (10 minutes).

Read  "The radix tree" and "Pages and pools" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.exercises.check 2

With pages of P tokens a page is shared as a whole or not at all. Three small functions are all that the tree needs
for that; the check puts yours into the real one. With P = 4, may 1 2 3 4 and 1 2 3 5 be siblings? What then
tells them apart?

    ids, a, b    int64 arrays [n]; a and b are whole pages
    returns      aligned: ids without the page at the end that is not full
                 child_key: a value that can be a key of a dict, the same for two keys (whole pages, at least one)
                 exactly if they have something to share
                 common_length: how many leading tokens of a and b can be shared

    P = 2: 1 2 3 is cut to 1 2; 1 2 3 4 and 1 2 9 9 have the same child_key and share 2 tokens; 1 2 and 1 9 share none
"""

from collections.abc import Hashable

import numpy as np


def aligned(ids: np.ndarray, page_size: int) -> np.ndarray:
    raise NotImplementedError  # your turn


def child_key(key: np.ndarray, page_size: int) -> Hashable:
    raise NotImplementedError  # your turn


def common_length(a: np.ndarray, b: np.ndarray, page_size: int) -> int:
    raise NotImplementedError  # your turn
