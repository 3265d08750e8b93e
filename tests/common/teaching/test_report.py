"""A file that a user names and that cannot be written is named in the error, whichever write of it fails."""

import ast
import csv
import errno
import json
import re
from pathlib import Path

import pytest

from common.teaching.report import output_file, write_csv, write_json
from tests import warm

ROOT = Path(__file__).parents[3]
FULL = Path("/dev/full")
DISK_IS_FULL = pytest.mark.skipif(not FULL.exists(), reason="has no file that is always full")


@DISK_IS_FULL
@pytest.mark.parametrize("length", [1, 1_000_000])  # found when the file is closed, and while it is written
def test_a_full_disk_is_named(length):
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'$") as error, output_file(FULL) as file:
        file.write("x" * length)
    assert error.value.errno == errno.ENOSPC


@DISK_IS_FULL
@pytest.mark.parametrize("write", [lambda: write_csv([{"a": 1}], FULL), lambda: write_json({"a": 1}, FULL)])
def test_rows_and_values_too(write):
    with pytest.raises(OSError, match=r"'/dev/full'$"):
        write()


@pytest.mark.parametrize("name", ["no/such/folder", "."])
def test_a_file_that_cannot_be_made_is_named(tmp_path, name):
    with pytest.raises(OSError, match=re.escape(f"'{tmp_path / name}'")), output_file(tmp_path / name):
        pytest.fail("it was opened")


def test_what_is_written_is_read_back(tmp_path):
    write_csv([{"say": "长城", "n": 1}, {"say": 'a,"b"', "n": 2}], tmp_path / "new" / "rows.csv", measured=False)
    with (tmp_path / "new" / "rows.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{"say": "长城", "n": "1"}, {"say": 'a,"b"', "n": "2"}]
    write_json({"say": "长城"}, tmp_path / "value.json")
    assert json.loads((tmp_path / "value.json").read_text(encoding="utf-8")) == {"say": "长城"}


@DISK_IS_FULL
@pytest.mark.parametrize("script", ["demo_1_toy_split.py", "demo_3_heads.py"])
def test_a_demo_that_cannot_write_its_csv_says_so_in_one_line(script):
    done = warm.run([f"ch06_tp_vllm/{script}", "--csv", str(FULL)], ROOT)
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device: '/dev/full'\n")


def test_every_program_writes_its_files_here():
    """A `write_text` elsewhere would not name the file. The exceptions write no file that a user has named."""
    allowed = {
        "common/teaching/report.py", "common/teaching/trace.py",  # a trace that cannot go on must not end the engine
        "common/distributed/rank_main.py", "common/distributed/spawn.py",
        "common/tiny_qwen/corpus.py", "common/tiny_qwen/tokenizer.py",
        "common/tiny_qwen/train.py", "common/teaching/apart.py", "ch07_sglang_radix/projects/swap.py",
        "ch07_sglang_radix/benchmarks/bench_cpu_real.py",  # the table in the README
        "ch07_sglang_radix/benchmarks/disaggregation_report.py",  # likewise
        "ch07_sglang_radix/serving/child.py", "ch07_sglang_radix/serving/demo_5_tool_call.py",
        "common/teaching/scripted_checkpoint.py", "common/tiny_qwen/upcycle.py", "common/tiny_qwen/train_medusa.py",
        "common/tiny_qwen/train_eagle.py", "common/tiny_qwen/train_adapters.py", "common/tiny_qwen/train_vision.py",
        "common/tiny_qwen/tiny_vision.py", "ch07_sglang_radix/benchmarks/bench_speculation.py",
            "ch07_sglang_radix/quantization/demo_2_zero_points.py",  # checkpoints
            "common/storage/page_store.py", "ch07_sglang_radix/quantization/demo_6_comes_back.py",  # pages, whole or not at all
    }  # fmt: skip
    writers = set()
    for folder in ("common", "ch06_tp_vllm", "ch07_sglang_radix", "figures"):
        for path in (ROOT / folder).rglob("*.py"):
            if _writes(ast.parse(path.read_text(encoding="utf-8"))):
                writers.add(path.relative_to(ROOT).as_posix())
    assert "common/teaching/report.py" in writers
    assert writers <= allowed


def _writes(tree: ast.AST) -> bool:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        modes = [arg.value for arg in [*node.args, *(k.value for k in node.keywords)] if isinstance(arg, ast.Constant)]
        if name in ("write_text", "write_bytes") or (name == "open" and any(m in ("w", "a", "x", "wb") for m in modes)):
            return True
    return False
