"""Prompt lookup: what followed the last tokens when they last occurred may follow again.

    ... | the | sun | is | red | and | ... | the | sun            the last two tokens occurred before:
          `-----------'^                     `-------'            guess "is", "red", "and"

No model and no training: it pays where an answer quotes its prompt or itself (code, tables, summaries), and finds nothing
elsewhere. Saxena 2023.
"""

import numpy as np


def continuation(ids: np.ndarray, count: int, longest: int, shortest: int) -> np.ndarray:
    """ids [n] -> at most `count` guesses of what follows, none where the last tokens are new.

    Of the last tokens `longest` are looked for, then fewer, down to `shortest`; the newest place counts.
    """
    for length in range(min(longest, len(ids) - 1), shortest - 1, -1):
        windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], length)  # each may be followed by something
        found = np.flatnonzero((windows == ids[-length:]).all(axis=1))
        if len(found):
            return ids[found[-1] + length :][:count]
    return ids[:0]
