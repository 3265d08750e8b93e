"""What a start imports: seconds of it are saved where a module comes when it is needed, and lost again by one careless line."""

import gc
import py_compile
import subprocess
import sys
import time
from contextlib import suppress

from ch07_sglang_radix import Engine
from common import start_times
from common.start_times import Laps, has_bytecode, imports_alone

# for the package alone, before anybody asks for an engine
NOT_FOR_A_NAME = ("torch", "numpy", "triton", "tokenizers", "safetensors", "PIL", "psutil", "regex", "llguidance")
# transformers and the Hub's client: 2 s of CPU; Dynamo, inductor and sympy: 2.6 s; the rest belongs to servers, tests and figures
NOT_FOR_AN_ANSWER = (
    "transformers", "huggingface_hub", "peft", "torch._dynamo", "torch._inductor", "torch.onnx", "sympy",
    "networkx", "scipy", "pandas", "numba", "numpy.testing", "matplotlib", "fastapi", "uvicorn", "grpc",
    "requests", "http.server", "sqlite3", "jinja2", "multiprocessing.pool", "concurrent.futures.process",
    "pytest",
)  # fmt: skip
START = """
import sys
import ch07_sglang_radix
print([name for name in %r if name in sys.modules])
engine = ch07_sglang_radix.Engine(device="cpu")
print(engine.generate("What is a page?", {"max_new_tokens": 1})["meta_info"]["completion_tokens"])
print([name for name in %r if name in sys.modules])
"""


def test_an_engine_answers_without_what_it_does_not_need():
    run = subprocess.run(
        [sys.executable, "-c", START % (NOT_FOR_A_NAME, NOT_FOR_AN_ANSWER)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    assert run.stdout.splitlines() == ["[]", "1", "[]"]


def test_imports_leave_the_collector_as_they_found_it():
    on = gc.isenabled()
    try:
        for state in (gc.enable, gc.disable):
            state()
            before = gc.isenabled()
            with suppress(ImportError), imports_alone():
                assert not gc.isenabled()
                raise ImportError
            assert gc.isenabled() == before
    finally:
        (gc.enable if on else gc.disable)()


def test_laps_are_what_has_passed_since_the_one_before(monkeypatch):
    clock = iter([10.0, 12.0, 13.0, 16.0])
    monkeypatch.setattr(start_times.time, "perf_counter", lambda: next(clock))
    laps = Laps()
    for what in ("weights", "pages", "weights"):
        laps.lap(what)
    assert laps == {"weights": 5.0, "pages": 1.0}


def test_an_engine_tells_where_its_start_went():
    began = time.perf_counter()
    with Engine(device="cpu") as engine:
        laps = engine.wrapper.start_seconds
        assert list(laps) == ["weights", "tokenizer", "forms", "pages"]
        assert 0 < sum(laps.values()) < time.perf_counter() - began


def test_bytecode_is_there_or_not(tmp_path):
    source = tmp_path / "module.py"
    source.write_text("x = 1")
    assert not has_bytecode(str(source))
    py_compile.compile(str(source))
    assert has_bytecode(str(source))
