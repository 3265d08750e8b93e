"""What a reader runs must run on Windows and macOS too: the sources are searched for what only some systems have.

Not for what is tested elsewhere by running it, and not in `tests/`, which may send signals (under a skipif).
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("common", "ch06_tp_vllm", "ch07_sglang_radix", "figures", "notebooks")
SOURCES = sorted([*(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")), *ROOT.glob("*.py")])

POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_OF = {
    "os": {
        "fork", "forkpty", "geteuid", "getgid", "getloadavg", "getpgid", "getuid", "kill", "killpg", "mkfifo", "nice",
        "sched_getaffinity", "sched_setaffinity", "setpgid", "setsid", "statvfs", "sysconf", "uname", "wait", "waitpid",
    },
    "signal": {
        "SIGALRM", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGSTOP", "SIGUSR1", "SIGUSR2", "alarm", "pause",
        "pthread_kill", "setitimer", "sigwait",
    },
    "time": {"clock_gettime", "tzset"},
    "socket": {"AF_UNIX"},
    "asyncio": {"add_signal_handler"},
}  # fmt: skip
POSIX_PATH = re.compile(r"^/(proc|sys|tmp|dev|etc|usr|var|home|root)(/|$)")
TEXT_FILES = {"open": 1, "read_text": 0, "write_text": 1}  # and where a positional encoding would be, or the mode


def complaints(source: str) -> list[str]:
    """["line: what is not portable"] of a module's source."""
    tree = ast.parse(source)
    guarded = _guarded(tree)
    found = []
    for node in ast.walk(tree):
        for words in _judge(node):
            if node.lineno not in guarded:
                found.append(f"{node.lineno}: {words}")
    return found


def _judge(node: ast.AST):
    if isinstance(node, ast.Import):
        yield from (f"import {a.name}" for a in node.names if a.name.split(".")[0] in POSIX_MODULES)
    elif isinstance(node, ast.ImportFrom):
        names = {alias.name for alias in node.names}
        if node.module in POSIX_MODULES:
            yield f"from {node.module} import"
        yield from (f"{node.module}.{name}" for name in sorted(names & POSIX_OF.get(node.module, set())))
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.attr in POSIX_OF.get(node.value.id, ()):
            yield f"{node.value.id}.{node.attr}"
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        if POSIX_PATH.match(node.value):
            yield f"the path {node.value!r}"
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        if any(isinstance(side, ast.Constant) and side.value == "/" for side in (node.left, node.right)):
            yield "a path joined with '/'"
    elif isinstance(node, ast.Call):
        yield from _judge_call(node)


def _judge_call(node: ast.Call):
    function = node.func
    name = getattr(function, "attr", getattr(function, "id", ""))
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if name == "CDLL" and node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value is None:
        yield "ctypes.CDLL(None)"
    if name in ("get_context", "set_start_method") and any(getattr(arg, "value", "") == "fork" for arg in node.args):
        yield "multiprocessing by fork"
    if name in ("run", "Popen", "check_output", "call") and getattr(keywords.get("shell"), "value", False):
        yield "a shell's command line"
    if name in TEXT_FILES and _is_of_a_file(function) and "encoding" not in keywords:
        if name == "open":
            at = TEXT_FILES[name] if isinstance(function, ast.Name) else 0
            mode = keywords.get("mode", node.args[at] if len(node.args) > at else None)
            if "b" in str(getattr(mode, "value", "")):
                return
        elif len(node.args) > TEXT_FILES[name]:
            return
        yield f"{name} without an encoding"


def _is_of_a_file(function: ast.expr) -> bool:
    """open(...) or something.open(...), but not os.open, zipfile.open and the like."""
    if isinstance(function, ast.Name):
        return True
    return getattr(function.value, "id", "") not in ("os", "tarfile", "zipfile", "gzip", "Image", "webbrowser")


def _guarded(tree: ast.AST) -> set[int]:
    """Lines that run on one kind of system only, and say so: below `if sys.platform ...` or `if os.name ...`, or behind
    such an `if` that returns; and texts that nobody runs."""
    lines = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.If) and _asks_for_the_system(node.test):
            for part in (*node.body, *node.orelse):
                lines |= set(range(part.lineno, part.end_lineno + 1))
        if isinstance(body, list):
            for statement in body:
                leaves = isinstance(statement, ast.If) and isinstance(statement.body[-1], ast.Return | ast.Raise)
                if leaves and _asks_for_the_system(statement.test):
                    lines |= set(range(statement.end_lineno + 1, body[-1].end_lineno + 1))
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    lines |= set(range(statement.lineno, statement.end_lineno + 1))  # a docstring
    return lines


def _asks_for_the_system(test: ast.expr) -> bool:
    said = ast.unparse(test)
    return "sys.platform" in said or "os.name" in said or "platform.system()" in said


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_for_some_systems_only(path):
    assert complaints(path.read_text(encoding="utf-8")) == []


def test_every_make_target_is_in_the_readme_as_plain_commands():
    """Whoever has no make finds, in the table of "Without make", the very commands of the Makefile."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("### Without make")[2].partition("\n## ")[0]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = {cells[0]: cells[1] for cells in re.findall(r"^\| `([\w-]+)` \| (.+) \|$", readme, re.MULTILINE)}
    rules = re.findall(r"^([\w-]+):[^=\n]*\n((?:(?:\t|ifeq|else|endif).*\n)*)", makefile, re.MULTILINE)
    commands = {target: re.findall(r"\$\(BIN\)/(.+)$", recipe, re.MULTILINE) for target, recipe in rules}
    assert set(shown) == set(commands) - {"setup"}
    assert sum(len(lines) for lines in commands.values()) >= 12
    for target, lines in commands.items():
        for line in lines:
            plain = re.sub(r"\$\$\w+.*", "", line).strip()  # `$$source; done` of a loop
            assert f"`{plain}" in shown[target], f"make {target} runs {plain!r}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os\nos.kill(pid, 0)", "2: os.kill"),
        ("from os import fork", "1: os.fork"),
        ("os.sysconf('SC_PHYS_PAGES')", "1: os.sysconf"),
        ("import resource", "1: import resource"),
        ("def f():\n    import fcntl", "2: import fcntl"),
        ("from termios import tcgetattr", "1: from termios import"),
        ("signal.signal(signal.SIGALRM, f)", "1: signal.SIGALRM"),
        ("process.send_signal(signal.SIGKILL)", "1: signal.SIGKILL"),
        ("Path('/proc/self/status')", "1: the path '/proc/self/status'"),
        ("open('/tmp/x', 'wb')", "1: the path '/tmp/x'"),
        ("open(f'/proc/{pid}/stat', encoding='ascii')", "1: the path '/proc/'"),
        ("libc = ctypes.CDLL(None)", "1: ctypes.CDLL(None)"),
        ("get_context('fork')", "1: multiprocessing by fork"),
        ("subprocess.run('ls | wc', shell=True)", "1: a shell's command line"),
        ("folder + '/' + name", "1: a path joined with '/'"),
        ("open(path)", "1: open without an encoding"),
        ("open(path, 'w')", "1: open without an encoding"),
        ("path.open('w', newline='')", "1: open without an encoding"),
        ("path.read_text()", "1: read_text without an encoding"),
        ("path.write_text(text)", "1: write_text without an encoding"),
        ("if sys.platform == 'linux':\n    pass\nos.fork()", "3: os.fork"),
        ("if fast:\n    os.fork()", "2: os.fork"),
    ],
)
def test_the_search_finds(source, said):
    assert complaints(source)[:1] == [said]


@pytest.mark.parametrize(
    "source",
    [
        "open(path, 'rb')", "open(path, mode='wb')", "open(path, encoding='utf-8')", "path.open('rb')",
        "path.read_text('utf-8')", "path.write_text(text, 'utf-8')", "os.open(path, os.O_RDONLY)",
        "if sys.platform == 'linux':\n    ctypes.CDLL(None)",
        "def f():\n    if sys.platform != 'linux':\n        return\n    ctypes.CDLL(None)",
        '"""Reads /proc on Linux."""\nsignal.signal(signal.SIGTERM, f)', "os.path.join(a, b)", "ratio = a / b",
        "'and/or' + more", "os.getpid()", "text = 'see /proc'",
    ],
)  # fmt: skip
def test_the_search_lets_pass(source):
    assert complaints(source) == []
