"""The projects' graders: all points for the solution, none for the starter, the right complaint for a plausible mistake."""

import ast
import re
from pathlib import Path

import pytest

from ch06_tp_vllm.projects.grade import FOLDER, PROJECTS
from common.teaching.grading import load, stubs_of
from tests import warm

ROOT = Path(__file__).parents[2]
PROJECT = {project.name: project for project in PROJECTS}
SCORED = [(project, part) for project in PROJECTS for part in project.parts if part.points]


def names(value) -> str:
    return getattr(value, "name", str(value))


@pytest.mark.parametrize(("project", "part"), SCORED, ids=names)
def test_the_solution_gets_all_points(project, part):
    found = part.judge(load(project.file(solution=True)))
    assert isinstance(found, str) or found[0] == 1, found


@pytest.mark.parametrize("project", PROJECTS, ids=names)
def test_the_points_are_a_hundred(project):
    assert sum(part.points for part in project.parts) == 100


@pytest.mark.parametrize("project", PROJECTS, ids=names)
def test_the_untouched_starter_gets_0_and_hears_what_to_write(project):
    done = warm.run(["-m", "ch06_tp_vllm.projects.grade", project.name, "--file", str(project.file())], ROOT)
    if not stubs_of(project.file()):
        pytest.skip("the reader has begun")
    assert done.returncode == 1
    assert "not started: " in done.stdout
    assert done.stdout.rstrip().endswith("0 of 100 points")


@pytest.mark.parametrize("project", PROJECTS, ids=names)
def test_starter_and_solution_define_the_same_class(project):
    trees = [ast.parse(project.file(solution).read_text(encoding="utf-8")) for solution in (False, True)]
    starter, solution = ([node.name for node in tree.body if isinstance(node, ast.ClassDef)] for tree in trees)
    assert starter == solution


def test_the_questions_are_those_of_demo_9():
    judge = (FOLDER / "judge_same_step_sharing.py").read_text(encoding="utf-8")
    demo = (ROOT / "ch06_tp_vllm" / "demo_9_llm.py").read_text(encoding="utf-8")
    asked = re.search(r"QUESTIONS = \((.+?)\n\)", judge, re.DOTALL).group(1).partition("\n")[2]
    assert re.findall(r'"(.+?)"', asked) == re.findall(
        r'"(.+?)"', re.search(r"QUESTIONS = \[(.+?)\n\]", demo, re.DOTALL).group(1)
    )


# (project, what to write instead in the solution, part that finds it, words of its complaint)
SCHEDULE, SHARING = "schedule", "same_step_sharing"
WRONG = [
    # the prefill of everybody comes in the way of those who decode
    (SCHEDULE, ("self.max_num_batched_tokens - sum(step.values())", "10**9"), "one budget for all", "got "),
    (SCHEDULE, ("for request in list(self.running):", "for request in list(self.running)[::-1]:"), "one budget for all", "step 2"),
    (SCHEDULE, ("num_new = budget if self.enable_chunked_prefill else 0", "num_new = budget"), "without chunked prefill", "step 1"),
    (SCHEDULE, ("num_new = budget if self.enable_chunked_prefill else 0", "num_new = 0"), "one budget for all", "step 1"),
    (SCHEDULE, ("while self.waiting and self.free_rows and", "while self.waiting and"), "rows", "IndexError"),
    (SCHEDULE, ("computed = self.blocks.get_computed_blocks(request)", "computed = []"),
     "cached prefixes", "the same prompt of 12 again"),
    (SCHEDULE, ("            request.num_cached_tokens = cached", "            pass"),
     "cached prefixes", "num_cached_tokens of both"),
    (SCHEDULE, ("blocks_needed(request, request.num_tokens, computed)", "blocks_needed(request, cached + num_new, computed)"),
     "the gate", "of which 4 are free, then 3; five steps"),
    (SCHEDULE, ("blocks_needed(request, request.num_tokens, computed)", "blocks_needed(request, request.num_tokens)"),
     "the gate", "shares 4 of them"),
    (SCHEDULE, ("blocks_needed(request, request.num_tokens, computed)",
                "blocks_needed(request, max(cached + num_new, len(request.prompt_token_ids)), computed)"),
     "the gate", "r1 was sent back with 15 tokens"),
    (SCHEDULE, ("allocate_slots(request, cached + num_new, computed)", "allocate_slots(request, request.num_tokens, computed)"),
     "the gate", "blocks of 20 tokens named, 16 computed"),
    (SCHEDULE, ("newest = self.running.pop()", "newest = self.running.pop(0)"), "out of blocks", "is the oldest request sent back"),
    (SCHEDULE, ("self.waiting.insert(0, newest)", "self.waiting.append(newest)"), "out of blocks", "waiting: it is at the head"),
    (SCHEDULE, ("self.waiting.insert(0, newest)", "pass"), "out of blocks", "running and waiting requests together"),
    (SCHEDULE, ("            self.release(newest)\n", ""), "out of blocks", "got "),
    (SCHEDULE, ("RequestStatus.PREEMPTED, 0", "RequestStatus.PREEMPTED, newest.num_computed_tokens"), "out of blocks",
     "blocks, num_computed_tokens and row of r1"),
    (SCHEDULE, ("            self.num_preemptions += 1\n", ""), "out of blocks", "got "),
    (SCHEDULE, ("        self.settle()  #", "        pass  #"), "tokens that nobody has seen yet", "got "),
    (SCHEDULE, (" and request.num_tokens < request.max_tokens", ""), "tokens that nobody has seen yet", "draw behind its end"),
    (SCHEDULE, ("request.num_blocks_sent, request.drawn_here = 0, False", "pass"),
     "random lives", "num_blocks_sent and drawn_here"),
    (SCHEDULE, ("if r.status is not RequestStatus.RUNNING]", "if False]"),
     "tokens that nobody has seen yet", "which is scheduled"),
    (SCHEDULE, ("            step.pop(newest, None)\n", "            step[newest] = 1\n"), "out of blocks", "which is scheduled"),
    (SCHEDULE, ("return SchedulerOutput(", "return list("), "one request", "got TypeError"),
    (SCHEDULE, ("return SchedulerOutput(scheduled, self.num_preemptions - sent_back)", "return None"), "one request",
     "what schedule returns: got 'NoneType', wanted 'SchedulerOutput'"),
    (SCHEDULE, ("return SchedulerOutput(scheduled, self", "return SchedulerOutput([], self"), "one request", "got an empty step"),
    (SCHEDULE, ("while self.waiting and self.free_rows and self._start(self.waiting[0], step):\n                pass",
                "if self.waiting and self.free_rows:\n                self._start(self.waiting[0], step)"),
     "steps and padded tokens", "of the reference at worst"),
    (SHARING, ("        self.cache_full_blocks(request, min(num_tokens, known))\n", ""), "named at allocation", "got 0, wanted 8"),
    (SHARING, ("min(num_tokens, known)", "known"), "only what the step computes", "got "),
    (SHARING, ("min(num_tokens, known)", "num_tokens"), "tokens that are still being drawn", "got "),
    (SHARING, ("            return False\n", "            pass\n"), "no slots, no names", "got "),
    (SHARING, ("        for i in never_filled:\n            self.forget(request.block_table[i])\n", ""), "names taken back",
     "left before its step ran: got 12"),
    (SHARING, ("range(request.num_computed_tokens // self.block_size, request", "range(0, request"), "names taken back",
     "left with 8 of 12 computed: got 0, wanted 8"),
    (SHARING, ("            self.forget(request.block_table[i])\n",
               "            if self.blocks[request.block_table[i]].ref_cnt == 1:\n"
               "                self.forget(request.block_table[i])\n"),
     "names taken back", "held by another too"),
    (SHARING, ("        super().free(request)\n", ""), "names taken back", "free blocks of 16: got "),
    (SHARING, ("        self.cache_full_blocks(request, min(num_tokens, known))\n", ""),
     "tokens found in the first round of demo 9", "0 of 1119 tokens found in the first round (848 wanted)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "part", "words"), WRONG)
def test_a_plausible_mistake_is_found(name, change, part, words, tmp_path):
    project = PROJECT[name]
    text, (old, new) = project.file(solution=True).read_text(encoding="utf-8"), change
    assert text.count(old) >= 1
    (tmp_path / f"{name}.py").write_text(text.replace(old, new), encoding="utf-8")
    (judge,) = [one.judge for one in project.parts if one.name == part]
    try:
        found = judge(load(tmp_path / f"{name}.py"))
    except (AssertionError, IndexError) as error:
        share, said = 0.0, f"{type(error).__name__}: {error}"
    else:
        share, said = (1.0, found) if isinstance(found, str) else found
    assert share < 1
    assert words in said
