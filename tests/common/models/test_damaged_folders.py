"""A checkpoint is written by others: whatever is in the folder, loading it gives the right model or says why not.

Each case is a tiny checkpoint with one damage (damages.py). It must end, within seconds and a bounded amount of memory,
in logits equal to those of transformers, wherever that loads the folder too, or in one line.
"""

import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.models.weights import load_model
from common.parallel_state import TPGroup
from tests.common.models.damage import edit, save_base
from tests.common.models.damages import DAMAGES
from tests.common.models.dense import logits_of

MOST_MEMORY = 256 << 20
CASES = [(base, name) for base, damages in DAMAGES.items() for name in damages]
PROMPT = [5, 60, 0, 33, 8, 8, 21]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {name: save_base(name, tmp_path_factory.mktemp(name)) for name in DAMAGES}


@pytest.fixture
def damaged(bases, tmp_path):
    """damaged(base, name) -> a copy of that base with that damage, with something outside that it may not reach."""

    def make(base, name):
        shutil.copy(bases[base] / "model.safetensors", tmp_path / "outside.safetensors")
        folder = Path(shutil.copytree(bases[base], tmp_path / "model"))
        DAMAGES[base][name](folder)
        return folder

    return make


@contextmanager
def bounded_memory():
    """More address space than this is refused by the system: an allocation that must not be becomes an error."""
    try:
        import resource  # noqa: PLC0415, not on Windows

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def of_transformers(folder, ids):
    """Its logits, or None for a folder that it does not load."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0]
    except Exception:  # it may raise anything
        return None


def load(folder):
    """(model, None), or (None, the error)."""
    with bounded_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return load_model(folder, TPGroup())[0], None
        except Exception as error:
            return None, error


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("base", "name"), CASES)
def test_a_damaged_folder_gives_the_right_model_or_one_line(damaged, base, name):
    folder = damaged(base, name)
    model, error = load(folder)
    if error is not None:
        assert type(error) in (ValueError, FileNotFoundError), repr(error)
        text = str(error)
        assert text.isprintable(), text  # a line break is not
        assert str(folder) in text, text
        assert len(text) < 2000, text
        return
    ids = PROMPT[: model.config.max_position_embeddings]
    mine, theirs = logits_of(model, ids), of_transformers(folder, ids)
    assert mine.isfinite().all()
    assert all(0 <= token < model.config.vocab_size for token in model.config.eos_token_ids)
    if theirs is not None:
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", DAMAGES)
def test_undamaged_they_are_right(bases, base):
    """That the test above compares with something."""
    model, _ = load_model(bases[base], TPGroup())
    torch.testing.assert_close(logits_of(model, PROMPT), of_transformers(bases[base], PROMPT), rtol=1e-4, atol=1e-4)


def test_there_are_many_of_them():
    assert len(CASES) >= 1000


@pytest.mark.parametrize("model_type", ["qwen2", "custom"])
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "CustomForCausalLM"])
def test_python_in_the_folder_never_runs(bases, tmp_path, model_type, architecture):
    folder = Path(shutil.copytree(bases["qwen2"], tmp_path / "model"))
    (folder / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    auto_map = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    edit("config.json", model_type=model_type, architectures=[architecture], auto_map=auto_map)(folder)
    model, error = load(folder)
    assert (model is None) == ((model_type, architecture) != ("qwen2", "Qwen2ForCausalLM"))
    assert error is None or str(error).startswith(f"{folder / 'config.json'}: ")
    assert not (tmp_path / "ran").exists()
