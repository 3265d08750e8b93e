"""What a bounded process does in the tests: tells what it was told, fails, ends, sleeps."""

import os
import time

from common.bounded.answer_lines import answer_lines

told = []


def answer(say=None, sleep=0.0, end=False, error=None):
    if end:
        os._exit(3)
    time.sleep(sleep)
    if error:
        return {"error": error}
    told.append(say)
    return {"told": told, "pid": os.getpid()}


def serve():
    answer_lines(answer)
