"""Exercise 2: Whose first token is it (15 minutes).

Read  "A room" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.disaggregation.exercises.check 2

The first token comes to a slot, which is given to one room after the other. A room may fail and give its slot back while its
metadata is still on its way; so metadata says whose it is, and whoever takes it looks.

    slots      {slot: room that waits there}; changed
    metadata   (slot, room, token)
    returns    ("token", room, token)   it is the waiting room's own: the slot is free again
               ("failed", room, None)   the room that waits there got what is another's: it has failed, and the slot is free again
               ("late", None, None)     nobody waits there: nothing changes

Only the slot says who gets it, and only the number says whether it is right.

    take({3: 77}, (3, 77, 42))  ->  ("token", 77, 42)       and no slot is left
    take({3: 77}, (3, 5, 13))   ->  ("failed", 77, None)    13 is no token of room 77
"""


def take(slots: dict[int, int], metadata: tuple[int, int, int]) -> tuple[str, int | None, int | None]:
    raise NotImplementedError  # your turn
