"""Which exercises of chapter 6 are started, and which are right?

    python -m ch06_tp_vllm.exercises.check [NUMBER] [--solutions]

Exit code 1 if one that was started is wrong.
"""

from common.teaching.exercises import Exercises

EXERCISES = Exercises("ch06_tp_vllm.exercises")

if __name__ == "__main__":
    EXERCISES.main(__doc__)
