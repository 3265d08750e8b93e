"""A scripted checkpoint says its script: transformers, the engine, one rank and two."""

import pytest

from ch07_sglang_radix import Engine
from common.teaching.scripted_checkpoint import scripted_checkpoint
from common.text.tokenizer import Tokenizer
from common.tiny_qwen import TINY_QWEN_PATH
from tests.common.text import kinds
from tests.oracle import greedy

SCRIPTS = {
    "words": "The radix tree holds prefixes.",
    "a call": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "unit": "C"}}\n</tool_call>',
    "thought and answer": "<think>\nRain? Rain. Rain!\n</think>\n\nIt rains, it rains, it rains.",
    "characters in several tokens": "长城长城 😀😀 é",
    "one token over and over": "aaaaaaaaaaaa",
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_transformers_recites_it(tmp_path, script):
    ids = scripted_checkpoint(tmp_path, script, TINY_QWEN_PATH)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode(ids) == script
    for prompt in ("anything", "user\nWhat is a radix cache?\nassistant\n"):
        assert greedy(tmp_path, tokenizer.encode(prompt), len(ids)) == ids


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_the_engine_recites_it_and_stops(tmp_path, script):
    ids = scripted_checkpoint(tmp_path, script, TINY_QWEN_PATH)
    with Engine(str(tmp_path), device="cpu") as engine:
        for temperature in (0, 1):
            answer = engine.generate("What is\n", {"max_new_tokens": 100, "temperature": temperature})
            assert (answer["text"], answer["output_ids"]) == (script, ids)
            assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": ids[-1]}


def test_two_ranks_recite_it(tmp_path):
    script = SCRIPTS["a call"]
    scripted_checkpoint(tmp_path, script, TINY_QWEN_PATH)
    with Engine(str(tmp_path), device="cpu", tp_size=2) as engine:
        assert engine.generate("What is", {"max_new_tokens": 100})["text"] == script


def test_token_ids_are_recited_as_they_are_cut(tmp_path_factory):
    """Three tokens of the first character's bytes: what a detokenizer has to hold back."""
    tokenizer = Tokenizer(kinds.byte_level(tmp_path_factory.mktemp("tokenizer"), eos_token="<|im_end|>"))
    ids = [tokenizer.hf.convert_tokens_to_ids(letter) for letter in "éķ¿"]  # 长 is E9 95 BF
    assert tokenizer.decode(ids) == "长"
    folder = tmp_path_factory.mktemp("checkpoint")
    scripted_checkpoint(folder, ids, tokenizer.hf.name_or_path)
    with Engine(str(folder), device="cpu") as engine:
        texts = [chunk["text"] for chunk in engine.generate("What is", {"max_new_tokens": 10}, stream=True)]
    assert set(texts) == {"", "长"}


def test_what_cannot_be_recited_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"token 7 .* comes twice"):
        scripted_checkpoint(tmp_path, [7, 8, 7], TINY_QWEN_PATH)
    with pytest.raises(ValueError, match="script is empty"):
        scripted_checkpoint(tmp_path, "", TINY_QWEN_PATH)
    with pytest.raises(ValueError, match="names no token that ends an answer"):
        scripted_checkpoint(tmp_path, "words", kinds.byte_level(tmp_path))
