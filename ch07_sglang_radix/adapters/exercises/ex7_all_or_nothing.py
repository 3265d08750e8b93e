"""Exercise 7: All ranks or none (20 minutes).

Read  "Weights in flight" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.adapters.exercises.check 7

A rank that has new weights beside one that has old ones does not crash: its sums are of two models, and every token is nonsense.
So weights are staged first, on every rank, and written when it is certain that all can. Each rank of this exercise has

    stage()     reads its part and returns a digest of the whole checkpoint it has read. ValueError says what is wrong with it.
    write()     puts what it has staged where the old weights lie
    drop()      forgets what it has staged; not to be called on a rank whose stage() has failed

`update(ranks)`: ranks in order. All of them stage, whatever the others say: in truth they do so at the same time, and each waits
for a word from every other. If no stage fails and all digests are equal, all of them write, and the result is None. Else nobody
writes, all that is staged is dropped, and the result is one line: that of the first rank that failed, "rank 2: no such file"; or,
if all staged, of the first whose digest is not rank 0's: "rank 1 has read other weights than rank 0".

    update([good, good])                    ->  None, and both have written
    update([good, bad("no such file")])     ->  "rank 1: no such file", and rank 0 has dropped what it had
"""


def update(ranks: list) -> str | None:
    raise NotImplementedError  # your turn
