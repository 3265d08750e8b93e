"""The bundled model as a mixture: equal experts change no token, cut experts lose no column, the trained one has learned."""

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from common.tiny_qwen import TINY_QWEN_PATH
from common.tiny_qwen.corpus import LANGUAGES, ask, load_glossary
from common.tiny_qwen.phrasings import SYSTEM_PROMPT, UNSEEN
from common.tiny_qwen.upcycle import EXPERTS, MIXTURE_PATH, PARTS, balance_loss, save_upcycled, tiny_mixture, upcycle
from tests.oracle import greedy

LAYERS = 4


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN_PATH)
    entries = list(load_glossary().values())
    questions = [ask(UNSEEN[lang][i], entries[20 * i + 3]) for i in range(3) for lang in LANGUAGES]
    said = [[{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": q}] for q in questions]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in said]
    return tokenizer([*texts, "RoPE", "a b c"])["input_ids"]


def rewritten(source, folder, tensors=None, **config):
    """A copy of a checkpoint with another config, and perhaps other weights."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    raw = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | config))
    if tensors:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_equal_experts_with_normalised_weights_answer_as_the_dense_model(prompts):
    for prompt in prompts:
        assert greedy(tiny_mixture(), prompt, 30) == greedy(TINY_QWEN_PATH, prompt, 30)


def test_then_no_router_can_change_a_token(prompts, tmp_path):
    tensors = load_file(tiny_mixture() / "model.safetensors")
    torch.manual_seed(1)
    for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
        tensors[name] = torch.randn_like(tensors[name])
    other = rewritten(tiny_mixture(), tmp_path / "other_router", tensors)
    for prompt in prompts[:4]:
        assert greedy(other, prompt, 30) == greedy(TINY_QWEN_PATH, prompt, 30)


def test_without_normalised_weights_it_answers_otherwise(prompts, tmp_path):
    raw = rewritten(tiny_mixture(), tmp_path / "raw", norm_topk_prob=False)
    assert any(greedy(raw, prompt, 30) != greedy(TINY_QWEN_PATH, prompt, 30) for prompt in prompts)


def test_the_trained_experts_are_no_longer_equal(prompts, tmp_path):
    tensors = load_file(MIXTURE_PATH / "model.safetensors")
    for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
        tensors[name] = tensors[name].roll(1, 0)  # each expert gets the tokens of its neighbour
    rolled = rewritten(MIXTURE_PATH, tmp_path / "rolled", tensors)
    for prompt in prompts[:3]:
        assert greedy(rolled, prompt, 30) != greedy(MIXTURE_PATH, prompt, 30)


def test_every_column_is_in_the_shared_expert_or_in_a_part():
    dense = load_file(TINY_QWEN_PATH / "model.safetensors")
    tensors = upcycle(dense, LAYERS, PARTS)
    for layer in range(LAYERS):
        mlp = f"model.layers.{layer}.mlp"
        for name, axis, scales in (("gate_proj", 0, (1, 1)), ("up_proj", 0, (1, 1)), ("down_proj", 1, (2, PARTS))):
            shared = tensors[f"{mlp}.shared_expert.{name}.weight"] / scales[0]
            parts = [tensors[f"{mlp}.experts.{e}.{name}.weight"] / scales[1] for e in range(EXPERTS)]
            for first, second in zip(parts[:PARTS], parts[PARTS:], strict=True):
                assert torch.equal(first, second)
            columns = [tuple(c.flatten().tolist()) for part in [shared, *parts[:PARTS]] for c in part.split(1, axis)]
            whole = [tuple(c.flatten().tolist()) for c in dense[f"{mlp}.{name}.weight"].split(1, axis)]
            assert sorted(columns) == sorted(whole)


def test_it_is_made_once_however_many_ask_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: tiny_mixture(), range(4)))
    (folder,) = folders
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny_mixture() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert list(tmp_path.iterdir()) == [folder], "what the slower ones wrote is gone"


def test_experts_that_do_not_divide_the_columns_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="544 columns"):
        save_upcycled(tmp_path / "odd", parts=3)


def test_balance_loss_is_1_for_all_alike_and_e_over_k_for_two_that_get_everything():
    even = torch.arange(16).reshape(8, 2) % 8  # each of 8 experts twice
    assert balance_loss(torch.zeros(8, 8), even).item() == pytest.approx(1)
    sure = torch.tensor([[50.0, 50.0, *[0.0] * 6]] * 5)
    assert balance_loss(sure, torch.tensor([[0, 1]] * 5)).item() == pytest.approx(8 / 2)
