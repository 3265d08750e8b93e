"""Rules about the repository that a reader relies on."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path for folder in ("common", "ch06_tp_vllm", "ch07_sglang_radix") for path in (ROOT / folder).rglob("*.py")
)
COLLECTIVES = {"all_reduce", "all_gather", "gather", "broadcast"}
LEAF = re.compile(r"(demo|bench)_")  # demos and benchmarks may import anything, nobody imports them


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    """common <- ch06, common <- ch07; the chapters never import each other; demos and benchmarks are leaves."""
    here = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        top = name.split(".")[0]
        if here == "common":
            assert not top.startswith("ch0"), name
        if here.startswith("ch0"):
            assert not top.startswith("ch0") or top == here, name
        assert top != "tests", name
        assert not LEAF.match(name.split(".")[-1]), name


def test_modules_have_no_import_cycle():
    graph = {}
    for path in MODULES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        # what runs at import: the module's top level, not `if TYPE_CHECKING` and not functions
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        for other in graph.get(name, ()):
            visit(other, [*path, name])

    for name in graph:
        visit(name, [])


def test_every_collective_call_carries_its_marker():
    """`grep -rn "# COMM"` is the complete map of the communication."""
    unmarked, marked = [], 0
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            if isinstance(function, ast.Name) and function.id in COLLECTIVES:
                called = True
            else:  # dist.all_reduce(...) outside the one place that wraps it
                called = (
                    isinstance(function, ast.Attribute)
                    and function.attr in COLLECTIVES
                    and getattr(function.value, "id", "") == "dist"
                )
            if not called or "_communicate(" in lines[node.lineno - 1]:
                continue
            marked += 1
            if "# COMM " not in lines[node.lineno - 1]:
                unmarked.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not unmarked
    assert marked >= 9


def test_collectives_are_called_in_one_place():
    """Everything goes through common/parallel_state.py, or the ledger would miss it; it alone calls the fast one."""
    for path in MODULES:
        assert path.name == "parallel_state.py" or "common.distributed.symmetric_memory" not in path.read_text(
            encoding="utf-8"
        )
        if path.name not in ("parallel_state.py", "symmetric_memory.py"):
            assert "torch.distributed" not in path.read_text(encoding="utf-8"), path


def test_nothing_is_unpickled():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"import pickle|torch\.load\(|broadcast_object_list|all_gather_object", text), path
