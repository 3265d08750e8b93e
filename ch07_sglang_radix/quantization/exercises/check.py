"""Which exercises of the wing `quantization` are started, and which are right?

    python -m ch07_sglang_radix.quantization.exercises.check [NUMBER] [--solutions]

Exit code 1 if one that was started is wrong.
"""

from common.teaching.exercises import Exercises

EXERCISES = Exercises("ch07_sglang_radix.quantization.exercises")

if __name__ == "__main__":
    EXERCISES.main(__doc__)
