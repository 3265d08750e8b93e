"""Which exercises of the wing `parallelism` are started, and which are right?

    python -m ch07_sglang_radix.parallelism.exercises.check [NUMBER] [--solutions]

Exit code 1 if one that was started is wrong.
"""

from common.teaching.exercises import Exercises

EXERCISES = Exercises("ch07_sglang_radix.parallelism.exercises")

if __name__ == "__main__":
    EXERCISES.main(__doc__)
