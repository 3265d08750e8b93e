"""What a start imports: seconds of it are saved where a module comes when it is needed, and lost again by one careless line."""

import subprocess
import sys

# transformers and the Hub's client: 2 s of CPU; Dynamo, inductor and sympy: 2.6 s; the rest belongs to servers, tests and figures
NOT_FOR_AN_ANSWER = (
    "transformers", "huggingface_hub", "torch._dynamo", "torch._inductor", "sympy", "matplotlib", "fastapi", "uvicorn", "grpc",
    "jinja2", "pytest",
)  # fmt: skip
START = """
import sys
import ch07_sglang_radix
print([name for name in ("torch", "numpy") if name in sys.modules])
engine = ch07_sglang_radix.Engine(device="cpu")
print(engine.generate("What is a page?", {"max_new_tokens": 1})["meta_info"]["completion_tokens"])
print([name for name in %r if name in sys.modules])
"""


def test_an_engine_answers_without_what_it_does_not_need():
    """The package alone imports not even torch."""
    run = subprocess.run(
        [sys.executable, "-c", START % (NOT_FOR_AN_ANSWER,)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    assert run.stdout.splitlines() == ["[]", "1", "[]"]
