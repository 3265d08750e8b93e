"""Rules about the repository that a reader relies on."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path for folder in ("common", "ch06_tp_vllm", "ch07_sglang_radix") for path in (ROOT / folder).rglob("*.py")
)
COLLECTIVES = {
    "all_reduce", "start_all_reduce", "all_reduce_together", "all_reduce_add_norm", "reduce_scatter", "all_gather",
    "all_gather_rows", "all_gather_merge", "gather", "broadcast", "all_to_all",
    "send_to", "receive_from", "start_receive", "start_exchange",
}  # fmt: skip
# the places that may call torch.distributed; the last speaks with a trainer, who is in no group of ours
SPEAKERS = ("collectives.py", "parallel_state.py", "update_group.py")
ENTRANCES = ("launch_server.py", "chat.py")  # into the wing `serving`
LEAVES = (
    "benchmarks",
    "exercises",
    "projects",
    "serving",
    "experts",
    "speculative",
    "quantization",
    "adapters",
    "images",
)  # folders that stand on a core
LEAF = re.compile(r"(demo|bench)_")  # demos and benchmarks may import anything, nobody imports them
# leaves, too, but for demos and benchmarks
COMMANDS = {
    ROOT / "common" / name
    for name in (
        "distributed/plan.py",
        "distributed/measure_links.py",
        "distributed/check_plan.py",
        "quantization/make.py",
    )
}


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
        leaf = path in COMMANDS or LEAF.match(path.name)
        assert leaf or ROOT.joinpath(*name.split(".")).with_suffix(".py") not in COMMANDS, name


def test_modules_have_no_import_cycle():
    graph = {}
    for path in MODULES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        # what runs at import: the module's top level, not `if TYPE_CHECKING` and not functions
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}

    seen = set()  # and no cycle through it

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in seen:
            for other in graph.get(name, ()):
                visit(other, [*path, name])
            seen.add(name)

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
    """Everything goes through common/distributed/collectives.py, or the ledger would miss it; the front door makes the groups."""
    for path in MODULES:
        fast = re.search(r"common\.distributed\.(symmetric|shared)_memory", path.read_text(encoding="utf-8"))
        assert path.name in (*SPEAKERS, "fast_all_reduce.py", "bench_all_reduce.py") or not fast, path
        if path.name in ("goodbyes.py", "rendezvous.py"):  # they meet, and speak through no group
            assert all(one.endswith("Store") for one in re.findall(r"\bdist\.(\w+)", path.read_text(encoding="utf-8")))
        elif path.name not in (
            *SPEAKERS,
            "symmetric_memory.py",
            "shared_memory.py",
            "update_group.py",  # no world's
            "bench_all_reduce.py",  # times the ways themselves
        ):
            text = path.read_text(encoding="utf-8").replace(
                '"torch.distributed.run"', ""
            )  # torchrun's name as a module
            assert "torch.distributed" not in text, path


def test_nothing_is_unpickled():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"import pickle|torch\.load\(|broadcast_object_list|all_gather_object", text), path


@pytest.mark.parametrize(
    "path", [path for path in MODULES if LEAF.match(path.name) or path in COMMANDS], ids=lambda path: path.name
)
def test_a_demo_ends_in_one_line_whatever_happens(path):
    """Ctrl-C and bad input are one line and exit code 1, not a traceback: common/distributed/launch.py."""
    last = path.read_text(encoding="utf-8").splitlines()[-1]
    assert last.strip() == "run_main(main)"


# what a room of common/ may stand on; kernels are Triton forms of what attention, layers and sampling define, which pick them
ROOMS = {
    "values": set(),
    "start_times": set(),
    "arguments": {"values"},
    "bounded": set(),
    "parallel_state": {"distributed"},
    "distributed": {"parallel_state", "kernels", "values"},
    "kernels": {"attention", "distributed", "layers", "quantization", "sampling"},
    "quantization": {"kernels", "models", "tiny_qwen", "values"},
    "layers": {"distributed", "parallel_state", "kernels", "quantization"},
    "draft_tree": set(),
    "attention": {"distributed", "draft_tree", "kernels"},
    "sampling": {"bounded", "distributed", "draft_tree", "kernels", "layers", "values"},
    "text": {"bounded", "values"},
    "vision": {"attention", "distributed", "layers", "parallel_state", "values"},
    "models": {
        "attention", "distributed", "draft_tree", "kernels", "layers", "parallel_state", "quantization", "values", "vision",
    },
    "pool_size": {"parallel_state"},
    "verify_step": {"attention", "distributed", "draft_tree", "models"},
    "executor": {
        "attention", "distributed", "draft_tree", "kernels", "layers", "models", "parallel_state", "pool_size", "quantization",
        "sampling", "start_times", "text", "tiny_qwen", "verify_step", "vision",
    },
    "memory_occupation": {"attention", "distributed", "executor", "layers", "models"},
    "request": {"sampling", "text", "values"},
    "planner": {"attention", "distributed", "layers", "models", "quantization"},
    "teaching": {"distributed", "text", "values"},
    "tiny_qwen": {"distributed", "teaching"},
}  # fmt: skip


def room(parts) -> str:
    return parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", [p for p in MODULES if p.is_relative_to(ROOT / "common")], ids=lambda p: p.name)
def test_rooms_of_common_stand_on_what_is_below_them(path):
    here = room(path.relative_to(ROOT).parts)
    if (
        path in COMMANDS
        or here in ("__init__", "check_environment")
        or path.name.startswith("bench_")
        or path.parent.name == "tiny_qwen"
    ):
        return  # leaves
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "common" and len(parts) > 1 and parts[1] != here:
            assert parts[1] in ROOMS[here], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_of_a_chapter_does_not_import_its_leaves(path):
    """Benchmarks, exercises and projects stand on the core, and so do the wings, which are entered by runnable files."""
    parts = path.relative_to(ROOT).parts
    if not parts[0].startswith("ch0") or len(parts) > 2 or LEAF.match(parts[-1]) or parts[-1] in ENTRANCES:
        return
    for name in imported(path):
        assert name.split(".")[:2] not in [[parts[0], one] for one in LEAVES], name


def test_no_circle_is_hidden_behind_type_checking():
    """An import for types alone that would run in a circle means that a contract has no place of its own."""
    for path in MODULES:
        if path.name != "__init__.py":  # a package may name what it loads on demand
            assert "TYPE_CHECKING" not in path.read_text(encoding="utf-8"), path


def test_a_long_file_says_why():
    for path in MODULES:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 350 or "one file" in " ".join(lines[:20]), f"{path}: {len(lines)} lines, and no reason"


def test_the_readme_names_every_room():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- rooms -->(.*?)<!-- /rooms -->", readme, re.DOTALL).group(1)
    named = set(re.findall(r"\]\(common/(\w+)/\)", table))
    assert named == {path.name for path in (ROOT / "common").iterdir() if (path / "__init__.py").is_file()}


def test_where_things_go_names_what_is_there():
    """The names in the table's last column stand in the file that its row links last."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.search(r"### Where things go\n(.*?)\n## ", readme, re.DOTALL).group(1)
    found = 0
    for row in rows.splitlines():
        files = re.findall(r"\]\(([\w/]+\.py)\)", row)
        for name in re.findall(r"`([A-Z]\w+)(?:\.\w+)?`", row):
            folders = [ROOT / "common", ROOT / "ch07_sglang_radix"]
            texts = [(ROOT / f).read_text(encoding="utf-8") for f in files] or [
                p.read_text(encoding="utf-8") for folder in folders for p in folder.rglob("*.py")
            ]
            everywhere = [p.read_text(encoding="utf-8") for folder in folders for p in folder.rglob("*.py")]
            assert any(name in text for text in texts) or any(f"class {name}" in text for text in everywhere), (
                row,
                name,
            )
            found += 1
    assert found >= 8
