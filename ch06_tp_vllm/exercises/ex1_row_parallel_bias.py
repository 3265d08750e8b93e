"""Exercise 1: Row-parallel bias (10 minutes).

Read  common/layers/linear.py, class RowParallelLinear; demo_1_toy_split.py, what_goes_wrong
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 1

R ranks hold W [out, in] cut along `in` and x [T, in] cut alike. Each rank gives a partial sum; the all-reduce
adds them up. The layer has a bias [out]. Where does it go?

    x, weight, bias    NumPy arrays [T, in], [out, in], [out]; R divides `in`
    returns            a list of R arrays [T, out] whose sum is x @ weight.T + bias; one rank alone adds the bias
"""

import numpy as np


def partial_sums(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    raise NotImplementedError  # your turn
