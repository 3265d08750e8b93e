"""Trains the tiny model's tokenizer: Qwen's recipe, on a few pages of text.

Qwen2 splits text with a regular expression and then merges bytes inside each piece
(byte-level BPE). The same steps with a small vocabulary keep the embedding table small.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from common.tiny_qwen.corpus import Entry
from common.tiny_qwen.phrasings import (
    CLOSERS,
    FOLLOW_UPS_TRAINED,
    OPENERS,
    SHORT_SYSTEM_PROMPTS,
    SYSTEM_PROMPT,
    TRAINED,
)

VOCAB_SIZE = 3584  # with the special tokens; a multiple of 128, as hardware prefers
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# Contractions, words, single digits, punctuation, line ends, blanks: Qwen2's pieces.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ChatML, as Qwen's, but without a default system message: a demo that sends none
# should see exactly the tokens of what it sent.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tokenizer_text(glossary: dict[str, Entry]) -> list[str]:
    """The text whose frequent byte pairs become tokens.

    Templates enter with empty slots, so that no merge joins a wording with a term: a
    term should become the same tokens in an unseen question as in a trained one.
    """
    blank = {"term": "", "phrase": "", "zh": "\n"}
    texts = [template.format(**blank) for lang in TRAINED for template in TRAINED[lang]]
    texts += [text for group in FOLLOW_UPS_TRAINED.values() for text in group]
    texts += [text for group in (OPENERS, CLOSERS) for lang in group for text in group[lang]]
    texts += [*SHORT_SYSTEM_PROMPTS, "system\n", "user\n", "assistant\n"]
    texts += [SYSTEM_PROMPT] * 3  # three times: its words should be whole tokens
    for entry in glossary.values():
        names = [entry.term, " " + entry.term, " " + entry.phrase, entry.zh]
        texts += names * 2 + [entry.en_def, entry.zh_def]
    return texts


def train_tokenizer(glossary: dict[str, Entry]) -> Tokenizer:
    """Byte-level BPE with Qwen2's normalizer and pieces; special tokens get the last ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any byte can be written
        min_frequency=2,
        max_token_length=12,  # bytes; keeps Chinese tokens to four characters
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_text(glossary), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the settings that make AutoTokenizer a Qwen2 tokenizer."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
