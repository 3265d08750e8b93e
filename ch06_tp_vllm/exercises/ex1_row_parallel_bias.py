"""Exercise 1: Row-parallel bias (10 minutes).

Read  "Toy split" in the chapter; Shoeybi et al. 2019 (Megatron-LM), section 3
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 1

R ranks hold W [out, in] cut along `in` and x [T, in] cut alike: rank r has the r-th of R equal, contiguous parts. Each
rank multiplies what it holds and gets a partial sum; the all-reduce adds them up. The layer has a bias [out]. Where does
it go?

    x, weight, bias    NumPy arrays [T, in], [out, in], [out]; R divides `in`; they stay as they are
    returns            a list of R arrays [T, out], rank 0's first, whose sum is x @ weight.T + bias; one rank alone
                       adds the bias

    x [[1, 2]], weight [[3, 4]], bias [10], 2 ranks: [[3]] and [[8]], with 10 more in one of the two
"""

import numpy as np


def partial_sums(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    raise NotImplementedError  # your turn
