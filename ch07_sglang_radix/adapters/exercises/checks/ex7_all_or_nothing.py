from types import ModuleType

from common.teaching.expect import expect

WRITTEN, DROPPED, FAILED = ["stage", "write"], ["stage", "drop"], ["stage"]
OTHER = "rank {} has read other weights than rank 0"
# what each rank finds (a digest, or an error), what is said, and what each has been told
CASES = (
    (["a", "a"], None, [WRITTEN, WRITTEN]),
    (["a", ValueError("no such file")], "rank 1: no such file", [DROPPED, FAILED]),
    ([ValueError("truncated"), "a", "a"], "rank 0: truncated", [FAILED, DROPPED, DROPPED]),
    (["a", ValueError("one"), ValueError("two"), "a"], "rank 1: one", [DROPPED, FAILED, FAILED, DROPPED]),
    (["a", "b"], OTHER.format(1), [DROPPED, DROPPED]),
    (["a", "b", "b"], OTHER.format(1), [DROPPED] * 3),
    (["a", "a", "b", "c"], OTHER.format(2), [DROPPED] * 4),
    (["a", "b", ValueError("late")], "rank 2: late", [DROPPED, DROPPED, FAILED]),
    (["a"], None, [WRITTEN]),
)


class Rank:
    def __init__(self, finds: object):
        self.finds, self.told = finds, []

    def stage(self) -> object:
        self.told.append("stage")
        if isinstance(self.finds, ValueError):
            raise self.finds
        return self.finds

    def write(self) -> None:
        self.told.append("write")

    def drop(self) -> None:
        self.told.append("drop")


def check(m: ModuleType) -> None:
    for finds, said, told in CASES:
        shown = ", ".join(
            f"{type(one).__name__}({str(one)!r})" if isinstance(one, ValueError) else repr(one) for one in finds
        )
        ranks = [Rank(one) for one in finds]
        expect(f"update() of ranks that find {shown}", m.update(ranks), said)
        expect(f"what ranks that find {shown} were told", [rank.told for rank in ranks], told)
