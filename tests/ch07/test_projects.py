"""The project's grader: all points for the solution, none for the starter, the right complaint for a plausible mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ch07_sglang_radix import engine, prefill_adder, radix_cache, schedule_policy, scheduler_state
from ch07_sglang_radix.projects.grade import PROJECTS
from ch07_sglang_radix.projects.swap import PRODUCT, in_place
from common.teaching.grading import load, stubs_of

ROOT = Path(__file__).parents[2]
(PROJECT,) = PROJECTS
SOLUTION = PROJECT.file(solution=True)


def judge_of(name: str):
    (judge,) = [part.judge for part in PROJECT.parts if part.name == name]
    return judge


@pytest.mark.parametrize("part", [part for part in PROJECT.parts if part.points], ids=lambda part: part.name)
def test_the_solution_gets_all_points(part):
    found = part.judge(load(SOLUTION))
    assert isinstance(found, str) or found[0] == 1, found


def test_the_points_are_a_hundred():
    assert sum(part.points for part in PROJECT.parts) == 100


def test_the_untouched_starter_gets_0_and_hears_what_to_write():
    argv = [sys.executable, "-m", "ch07_sglang_radix.projects.grade", "radix_cache", "--file", str(PROJECT.file())]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    if not stubs_of(PROJECT.file()):
        pytest.skip("the reader has begun")
    assert done.returncode == 1
    assert "not started: RadixCache.match_prefix, RadixCache.insert, " in done.stdout
    assert done.stdout.rstrip().endswith("0 of 100 points")


def test_the_reader_s_tree_is_everywhere_while_it_is_in_place_and_nowhere_afterwards():
    mine = load(SOLUTION).RadixCache
    homes = (radix_cache, scheduler_state, prefill_adder, schedule_policy)
    assert engine.Engine  # with it all of them are there
    with in_place(mine):
        assert [home.RadixCache for home in homes if hasattr(home, "RadixCache")] == [mine] * len(homes)
    assert {home.RadixCache for home in homes} == {PRODUCT}


def test_helpers_of_the_product_are_out_of_reach(tmp_path):
    text = """from ch07_sglang_radix.projects.frame import TreeFrame


class RadixCache(TreeFrame):
    def match_prefix(self, ids, extra_key=None):
        return self._split(self.root, 1)
"""
    (tmp_path / "radix_cache.py").write_text(text, encoding="utf-8")
    with pytest.raises(NotImplementedError, match="the product's answer"):
        judge_of("engine: shared beginnings")(load(tmp_path / "radix_cache.py"))


BESIDE = "beside the product's tree"
# (what to write instead in the solution, part that finds it, words of its complaint)
WRONG = [
    (("upper.lock_ref, upper.hit_count = node.lock_ref, node.hit_count", "upper.hit_count = node.hit_count"), BESIDE, "got "),
    (("upper.lock_ref, upper.hit_count = node.lock_ref, node.hit_count", "upper.lock_ref = node.lock_ref"),
     BESIDE, "the tree: got "),
    (("        self.splits += 1\n", ""), BESIDE, "splits: got 0, wanted 1"),
    (("// self.page_size * self.page_size\n\n    def split", "\n\n    def split"), BESIDE, "got "),
    (("node.hit_count += end > inserted_len", "node.hit_count += 1"), BESIDE, "the tree: got "),
    (("node.priority = max(node.priority, priority)", "node.priority = priority"), BESIDE, "the tree: got "),
    (("            self.inserted += len(rest)\n", ""), BESIDE, "inserted: got 0"),
    (("or rank != self.rank(leaf)", ""), BESIDE, "got "),
    (("            self.stand_in_line(parent)\n", ""), BESIDE, "got "),
    (("            self.pool.free(leaf.value)\n", ""), BESIDE, "free pages: got "),
    (("and node.lock_ref == 0 and", "and"), BESIDE, "got "),
    (("            child.last_access_time = now\n", ""), BESIDE, "got "),
    (("self.name(key, extra_key)", "self.name(key, None)"), BESIDE, "got "),
    (("        return known\n\n    def walk", "        return len(key)\n\n    def walk"), BESIDE, "says how much was there: got "),
    (("parent, leaf.parent = leaf.parent, None", "parent = leaf.parent"), BESIDE, "got "),
    (("                self.stand_in_line(node)\n            node = node.parent", "            node = node.parent"),
     BESIDE, "got "),
    (("unlocked more often", "unlocked too often"),
     "tests/ch07/test_radix_cache.py", " of 14 pass; test_unlocking_too_often_is_an_error: "),
    (("            node.lock_ref += 1\n            node = node.parent\n", "            node.lock_ref += 1\n"),
     "tests/ch07/test_radix_cache.py", "test_split_inherits_the_lock: still busy after 3 seconds, or it ended the process"),
    (("        gone = 0\n        while", "        import os\n        os._exit(3)\n        while"), "tests/ch07/test_eviction.py",
     "0 of 22 pass; test_order[lru-expected0]: still busy after 3 seconds, or it ended the process"),
    (("rest.copy(), value[known : len(key)].copy()", "rest, value[known : len(key)]"), "engine: shared beginnings", ""),
    (("        return known\n\n    def walk", "        return 0\n\n    def walk"), BESIDE, "says how much was there: got 0"),
    (("path[-1] if path else self.root)", "self.root)"), "engine: shared beginnings", ""),
    (("np.concatenate(slots), path", "np.concatenate(slots)[:0], path"), "tokens found", ""),
    (("gone < num_slots and self.line", "self.line"), "tokens found", "prompt tokens found in the tree with"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "part", "words"), WRONG)
def test_a_plausible_mistake_is_found(change, part, words, tmp_path, monkeypatch):
    if "still busy" in words:
        monkeypatch.setattr("ch07_sglang_radix.projects.judge_radix_cache.ONE_TEST", 3)
    text, (old, new) = SOLUTION.read_text(encoding="utf-8"), change
    assert old in text
    (tmp_path / "radix_cache.py").write_text(text.replace(old, new), encoding="utf-8")
    try:
        found = judge_of(part)(load(tmp_path / "radix_cache.py"))
    except Exception as error:  # the grader makes a line of any
        share, said = 0.0, f"{type(error).__name__}: {error}"
    else:
        share, said = (1.0, found) if isinstance(found, str) else found
    assert share < 1
    assert words in said
    assert {home.RadixCache for home in (radix_cache, scheduler_state)} == {PRODUCT}, (
        "the product's is back in any case"
    )


def test_a_tree_that_looks_at_every_leaf_is_too_slow(tmp_path):
    """Not a matter of the machine: it takes tens of times as long, where three are allowed."""
    text = SOLUTION.read_text(encoding="utf-8")
    (tmp_path / "radix_cache.py").write_text(text.replace(
        "            rank, _, leaf = heapq.heappop(self.line)\n",
        "            self.line = sorted((self.rank(n), i, n) for i, n in enumerate(self.nodes()) if self.may_go(n))\n"
        "            rank, _, leaf = heapq.heappop(self.line)\n",
    ), encoding="utf-8")  # fmt: skip
    share, said = judge_of("speed")(load(tmp_path / "radix_cache.py"))
    assert share == 0
    assert "times the reference's time; at most 3 wanted" in said


def test_without_the_repository_s_tests_the_grader_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("ch07_sglang_radix.projects.judge_radix_cache.ROOT", tmp_path)
    with pytest.raises(AssertionError, match="got no such file, wanted the repository's own tests"):
        judge_of("tests/ch07/test_radix_cache.py")(load(SOLUTION))
    assert os.environ.get("PROJECT_FILE") is None
