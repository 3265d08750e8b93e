"""Exercise 2: An order in which nobody waits for ever (25 minutes).

Read  "Two stages" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.parallelism.exercises.check 2

`stages` stages stand in a ring: each sends one message to the next one, the last one to stage 0 (its tokens), and receives one
from the stage before. Here a send WAITS until the other side receives, as NCCL's does once its few buffers are full. If all
send first, nobody ever receives: all wait for ever.

Part 1, `order`: for stage 0, 1, ... the two things it does, in order, "send" and "receive", such that all get done, for any
number of stages of at least 2; and in which as many messages as possible travel at the same time: no chain in which one
message waits for the next all around the ring. With an odd number of stages two neighbours must do the same first; that is fine.

Part 2, `stuck`: given such orders, whatever they are, which stages wait for ever? Return their numbers, in order. A message
is delivered once its sender is at "send" and its receiver at "receive"; then both go on.

    order(4)                                                          ->  neighbours take turns: no two wait for the same
    stuck([["send", "receive"], ["send", "receive"]])                 ->  [0, 1]
    stuck([["send", "receive"], ["receive", "send"]])                 ->  []
"""


def order(stages: int) -> list[list[str]]:
    raise NotImplementedError  # your turn


def stuck(orders: list[list[str]]) -> list[int]:
    raise NotImplementedError  # your turn
