"""The bundled model keeps what its card promises, asked through the project's own engine."""

import csv
import json
import random

import pytest

from ch07_sglang_radix import Engine
from common.models.config import ModelConfig
from common.tiny_qwen import TINY_QWEN_PATH
from common.tiny_qwen.corpus import LANGUAGES, ask, definition, glossary_markdown, load_glossary
from common.tiny_qwen.phrasings import (
    FOLLOW_UPS_TRAINED,
    FOLLOW_UPS_UNSEEN,
    SYSTEM_PROMPT,
    TRAINED,
    UNSEEN,
)

GLOSSARY = load_glossary()


def test_the_checkpoint_is_small_and_shaped_like_the_real_one():
    files = [path for path in TINY_QWEN_PATH.iterdir() if path.suffix in (".safetensors", ".json", ".jinja")]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    config = ModelConfig.from_folder(TINY_QWEN_PATH)
    assert (config.architecture, config.num_heads, config.num_kv_heads) == ("Qwen2ForCausalLM", 14, 2)
    assert config.tie_word_embeddings


def test_the_glossary_is_whole():
    assert len(GLOSSARY) >= 150
    for entry in GLOSSARY.values():
        assert entry.en_def.endswith(".")
        assert entry.zh_def.endswith("。")
        assert all(name in GLOSSARY and name != entry.term for name in entry.see), entry.term
    assert len({entry.zh for entry in GLOSSARY.values()}) == len(GLOSSARY)


def test_the_readable_glossary_is_the_current_one():
    assert (TINY_QWEN_PATH / "GLOSSARY.md").read_text(encoding="utf-8") == glossary_markdown(GLOSSARY)


def test_unseen_phrasings_are_unseen():
    for lang in LANGUAGES:
        assert not set(TRAINED[lang]) & set(UNSEEN[lang])
    for kind in FOLLOW_UPS_UNSEEN:
        assert not set(FOLLOW_UPS_TRAINED[kind]) & set(FOLLOW_UPS_UNSEEN[kind])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_exact(dtype):
    """A sample of 120 a split; `python -m common.tiny_qwen.evaluate` asks them all."""
    engine = Engine(device="cpu", dtype=dtype)
    rng = random.Random(0)
    for templates, least in ((TRAINED, 0.98), (UNSEEN, 0.80)):
        cases = []
        for entry in rng.sample(sorted(GLOSSARY.values(), key=lambda e: e.term), 60):
            cases += [(ask(rng.choice(templates[lang]), entry), definition(entry, lang)) for lang in LANGUAGES]
        messages = [[{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": q}] for q, _ in cases]
        ids = [engine.wrapper.tokenizer.encode_chat(m) for m in messages]
        results = engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 120})
        exact = [r["text"] == answer for r, (_, answer) in zip(results, cases, strict=True)]
        assert sum(exact) / len(exact) >= least


def test_the_card_s_table_is_the_evaluation():
    card = (TINY_QWEN_PATH / "README.md").read_text(encoding="utf-8")
    names = {"en": "English", "zh": "Chinese"}
    shares: dict[tuple[str, str], list[str]] = {}
    with (TINY_QWEN_PATH / "evaluation.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            shares.setdefault((row["split"], row["language"]), [row["asked"]]).append(f"{float(row['share']):.1%}")
    for (split, language), (asked, *exact) in shares.items():
        cells = " | ".join([split, names[language], asked, *exact])
        assert cells in card.replace(" %", "%"), cells


def test_config_reads_old_and_new():
    raw = json.loads((TINY_QWEN_PATH / "config.json").read_text())
    old = {k: v for k, v in raw.items() if k not in ("rope_parameters", "dtype")}
    new = {k: v for k, v in raw.items() if k not in ("rope_theta", "torch_dtype")}
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)
