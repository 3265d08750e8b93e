"""Do the tests bite? One place of a module is changed, the module's own tests run, and at least one of them has to fail.

python -m tests.mutation --sample 120                # as `make mutation` does
python -m tests.mutation --module radix_cache        # every place of one module
python -m tests.mutation --module linear --line 83 --keep

A change is one of: a comparison moved by one or negated, an operator replaced, a number moved by one, True for False, a call
dropped, a condition inverted, None returned. The tests run in one process and stop at the first failure; what takes much longer
than unchanged, or gigabytes, counts as caught, as it might never end. No file is written: an import hook hands the changed module
out, in a process forked from one that has torch and transformers loaded. A seed's sample stays when other lines change: whether a
place belongs to it depends on its own line alone. A survivor that tests/MUTATION.md gives a reason for is `known`.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib.machinery
import importlib.util
import io
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
HEAVY = [
    "torch",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.auto.modeling_auto",
    "hypothesis",
    "pytest",
]
TIMES, SECONDS = 3, 20  # CPU time a change may take: so many times that of the module as it is, and so much more
GIBIBYTES = 6  # of memory

# folder | modules | the tests that they have to themselves
TABLE = """
ch06_tp_vllm      | block_manager                    | ch06/test_block_manager ch06/test_prefix_hits ch06/test_scheduler
ch06_tp_vllm      | scheduler                        | ch06/test_scheduler ch06/test_llm ch06/test_output_processor
ch06_tp_vllm      | llm_engine input_batch output_processor input_processor request |
                    ch06/test_llm ch06/test_output_processor ch06/test_prefix_hits ch06/test_trace
ch07_sglang_radix | radix_cache eviction tree_node   | ch07/test_radix_cache ch07/test_line_of_leaves ch07/test_eviction
ch07_sglang_radix | memory_pool                      | ch07/test_memory_pool ch07/test_radix_cache
ch07_sglang_radix | schedule_policy                  | ch07/test_schedule_policy
ch07_sglang_radix | prefill_adder                    | ch07/test_prefill_adder ch07/test_schedule_policy ch07/test_scheduler
ch07_sglang_radix | tasks                            | ch07/test_tasks
ch07_sglang_radix | request_memory retraction step_tasks |
                    ch07/test_request_memory ch07/test_retraction ch07/test_step_tasks ch07/test_scheduler ch07/test_overlap
ch07_sglang_radix | scheduler scheduler_state admission outcome request schedule_batch |
                    ch07/test_scheduler ch07/test_overlap ch07/test_schedule_policy ch07/test_engine_api
common/attention  | torch_native kv_cache            | common/attention/test_torch_native common/attention/test_shared_prefix
common/attention  | sequence_table                   | common/attention/test_sequence_table
common/attention  | prefix_groups                    | common/attention/test_prefix_groups
common/layers     | linear heads vocab               | common/layers/test_linear common/layers/test_heads common/layers/test_vocab
common/models     | weights                          |
                    common/models/test_weights common/models/test_weights_refused common/models/test_stored_head
common/sampling   | sampler                          | common/sampling/test_sampler common/sampling/test_bad_rows
common/text       | tokenizer                        | common/text/test_tokenizer common/text/test_chat_template
common/text       | detokenizer                      | common/text/test_detokenizer
"""
TESTS: dict[str, list[str]] = {
    f"{folder.strip()}/{module}.py": tests.split()
    for folder, modules, tests in (line.split("|") for line in TABLE.replace("|\n", "|").strip().splitlines())
    for module in modules.split()
}

SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "all": "any", "any": "all"}


@dataclass(frozen=True)
class Mutant:
    """The index-th change of a module; change: what stands there -> what is put there; text: its line of the source."""

    module: str
    index: int
    line: int
    change: str
    text: str

    @property
    def name(self) -> str:
        """Of the place and its change, whatever stands above and below."""
        return f"`{self.module}: {self.change}` in `{self.text}`"


@dataclass(frozen=True)
class Place:
    """container[key] = value is the change; shown(): the node whose text says what stands there."""

    line: int
    shown: Callable[[], ast.AST]
    container: dict | list
    key: str | int
    value: object


def places(tree: ast.AST) -> Iterator[Place]:
    """Every place of a module that can be changed, in an order that is always the same."""
    for node in _code(tree):
        condition = isinstance(node, ast.If | ast.While | ast.IfExp)
        shown = (lambda node=node: node.test) if condition else (lambda node=node: node)
        for change in _changes(node):
            yield Place(node.iter.lineno if isinstance(node, ast.comprehension) else node.lineno, shown, *change)


def _changes(node: ast.AST) -> Iterator[tuple[dict | list, str | int, object]]:
    if isinstance(node, ast.Compare):
        yield from ((node.ops, i, SWAPS[type(op)]()) for i, op in enumerate(node.ops))
    elif isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPS:
        yield vars(node), "op", SWAPS[type(node.op)]()
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        yield vars(node), "value", not node.value if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node, ast.Expr | ast.Return) and node.value and not isinstance(node.value, ast.Constant):
        yield vars(node), "value", ast.Constant(None)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
        yield vars(node.func), "id", NAMES[node.func.id]
    elif isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(node.test, ast.Compare):
        yield vars(node), "test", ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.comprehension):
        yield from ((node.ifs, i, ast.UnaryOp(ast.Not(), test)) for i, test in enumerate(node.ifs))


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that does something: no annotations, no decorators, no error messages."""
    yield node
    if isinstance(node, ast.Raise | ast.JoinedStr):
        return
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list", "msg"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _code(child)


def mutants(module: str) -> list[Mutant]:
    source = (ROOT / module).read_text(encoding="utf-8")
    found, seen = [], Counter()
    for index, place in enumerate(list(places(ast.parse(source)))):
        before, old = ast.unparse(place.shown()), place.container[place.key]
        place.container[place.key] = place.value
        change = " ".join(f"{before} -> {ast.unparse(place.shown())}".split())
        place.container[place.key] = old
        text = source.splitlines()[place.line - 1].strip()
        seen[change, text] += 1
        nth = seen[change, text]  # two constants of a line are two places
        found.append(Mutant(module, index, place.line, change + (f" ({nth})" if nth > 1 else ""), text))
    return found


class Hook(importlib.machinery.SourceFileLoader):
    """Finds and loads one module, changed; all others as ever."""

    def __init__(self, mutant: Mutant):
        super().__init__(mutant.module.removesuffix(".py").replace("/", "."), str(ROOT / mutant.module))
        self.index = mutant.index

    def find_spec(self, fullname, path=None, target=None):
        return (
            importlib.util.spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None
        )

    def get_code(self, fullname):
        tree = ast.parse(Path(self.path).read_text(encoding="utf-8"))
        place = list(places(tree))[self.index]
        place.container[place.key] = place.value
        return compile(ast.fix_missing_locations(tree), self.path, "exec")


def run_tests(mutant: Mutant | None, tests: Sequence[str], results) -> None:
    """In the child: sends pytest's exit status and what it said."""
    import hypothesis  # noqa: PLC0415, so that the command itself starts at once
    import pytest  # noqa: PLC0415

    if mutant:
        sys.meta_path.insert(0, Hook(mutant))
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # making a failing example small takes long
    hypothesis.settings.register_profile("mutation", phases=phases, database=None, derandomize=True)
    options = ["-x", "-q", "--tb=short", "-m", "not ranks", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout=300"]
    options.append("--hypothesis-profile=mutation")  # conftest.py has others
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        status = pytest.main([*options, *(str(ROOT / "tests" / f"{test}.py") for test in tests)])
    results.send((int(status), said.getvalue()))


class Bench:
    """Tries changes one by one, each in a child of a server that has the heavy packages loaded."""

    def __init__(self):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        self.context = multiprocessing.get_context("forkserver" if forks else "spawn")
        self.context.set_forkserver_preload(HEAVY)
        self.seconds: dict[tuple[str, ...], float] = {}  # CPU time of these tests with nothing changed

    def attempt(self, mutant: Mutant) -> tuple[str, str]:
        """(which test caught it, "" if none did; what pytest said)."""
        tests = tuple(TESTS[mutant.module])
        if tests not in self.seconds:
            status, said, self.seconds[tests] = self._run(None, tests, float("inf"))
            if status:
                raise SystemExit(f"{said}\n{mutant.module}: its tests fail as it is")
        status, said, _ = self._run(mutant, tests, TIMES * self.seconds[tests] + SECONDS)
        found = re.search(r"^(?:FAILED|ERROR) (?:\S*?tests/)?(.+?)(?: - .*)?$", said, re.MULTILINE)
        return "" if status == 0 else found.group(1) if found else "its end" if status > 0 else "the limit", said

    def _run(self, mutant: Mutant | None, tests: Sequence[str], limit: float) -> tuple[int, str, float]:
        """(exit status or -1, what pytest said, CPU seconds)."""
        results, theirs = self.context.Pipe(duplex=False)
        child = self.context.Process(target=run_tests, args=(mutant, tests, theirs))
        child.start()
        theirs.close()
        used, held = 0.0, 0
        while not results.poll(0.2) and used <= limit and held < GIBIBYTES << 30:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(child.pid)
                used, held = sum(process.cpu_times()[:2]), process.memory_info().rss
        try:
            status, said = results.recv() if results.poll() else (-1, "")
        except EOFError:  # it died
            status, said = 1, ""
        child.kill()
        child.join()
        return status, said, used


def chosen(args: argparse.Namespace) -> list[Mutant]:
    modules = [module for module in TESTS if args.module in (None, module, Path(module).stem)]
    if not modules:
        raise SystemExit(f"--module {args.module} is none of {', '.join(sorted(TESTS))}")
    every = [mutant for module in modules for mutant in mutants(module) if not args.line or mutant.line in args.line]
    every.sort(key=lambda mutant: hashlib.sha256(f"{args.seed} {mutant.name}".encode()).digest())
    return sorted(every[: args.sample], key=lambda mutant: (mutant.module, mutant.index))


def known_survivors() -> set[str]:
    """Names of the places that MUTATION.md gives a reason for."""
    text = (ROOT / "tests" / "MUTATION.md").read_text(encoding="utf-8")
    return set(re.findall(r"^- (`.+? -> .+?` in `.+`): .", text, re.MULTILINE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", help="one module, by its name or path; by default all, or those of the same name")
    parser.add_argument("--sample", type=int, default=1 << 30, help="so many changes, drawn at random; by default all")
    parser.add_argument("--seed", type=int, default=1, help="of the sample")
    parser.add_argument("--line", type=int, nargs="+", help="the changes of these lines only")
    parser.add_argument("--keep", action="store_true", help="print what pytest says")
    parser.add_argument(
        "--log", type=Path, help="append the results to this file, and do not repeat what it has caught"
    )
    args = parser.parse_args()
    known, bench, verdicts = known_survivors(), Bench(), Counter()
    lines = args.log.read_text(encoding="utf-8").splitlines() if args.log and args.log.exists() else []
    done = {name: by for name, by, _ in (line.split("\t") for line in lines) if by}
    progress = tqdm(chosen(args), unit="change")
    for mutant in progress:
        by = done.get(mutant.name)
        if not by:
            start, (by, said) = time.monotonic(), bench.attempt(mutant)
            if args.log:
                with args.log.open("a", encoding="utf-8") as file:
                    file.write(f"{mutant.name}\t{by}\t{time.monotonic() - start:.0f} s\n")
            if args.keep:
                progress.write(said)
        verdict = "caught" if by else "known" if mutant.name in known else "survived"
        verdicts[verdict] += 1
        progress.write(f"{verdict:<8}  {mutant.module}:{mutant.line}  {mutant.change}" + (f"  by {by}" if by else ""))
        progress.set_postfix(verdicts)
    caught, total = verdicts["caught"], verdicts.total()
    print(
        f"{caught} of {total} caught ({100 * caught / max(total, 1):.1f} %), {verdicts['known']} known survivors, "
        f"{verdicts['survived']} unknown"
    )
    sys.exit(verdicts["survived"] > 0)


if __name__ == "__main__":
    main()
