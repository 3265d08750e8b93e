"""Tokenizers of the kinds that checkpoints come with, made here in a second, and texts cut into their tokens anyhow."""

import json
from functools import cache
from pathlib import Path

import tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from common.text.tokenizer import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOOL_MARKS = ["<tool_call>", "→tool"]  # added, and yet text
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRAINING_TEXT = [
    "the pages of the cache hold the keys and the values",
    "The capital of France is Paris and Rome is not",
    "显存按页分配，页表记录每一页的位置",
    "分布式推理 😀😀",
] * 3
TEXTS = {
    "english": "the pages, the keys; don't  split   spaces\n\nand lines",
    "chinese": "张量并行把每一层的权重切到多张卡上，再用一次 all-reduce 求和。长城",
    "rare characters": "𠀀𪚥 ḱ é e\u0301 \u200d ﷽ <0xE9>",
    "emoji": "ok 😀🎉 👨‍👩‍👧‍👦 🇨🇳 👍🏽!",
    "mixed": "KV cache 用 pages 管理：每页 16 个 token 😀。",
    "tools": "<tool_call>{}→tool ",
}


def save(tokenizer: tokenizers.Tokenizer, folder: Path, **config) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return folder


def byte_level(folder: Path, **config) -> Path:
    """A BPE like Qwen's, with few merges: most Chinese characters are two or three tokens."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=350, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    bpe.train_from_iterator(TRAINING_TEXT, trainer)
    bpe.add_tokens(TOOL_MARKS)
    return save(bpe, folder, **config)


def misaligned(folder: Path, **config) -> Path:
    """A byte-level vocabulary whose pieces of three bytes begin in the middle of a character: of 长城 the first and
    the last byte stay over."""
    pieces = {"长城长城"[i:j].encode()[k : k + 3] for i, j, k in [(0, 2, 1), (0, 2, 2), (1, 3, 1), (1, 3, 2)]}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    shown = [_shown(piece) for piece in sorted(pieces)]
    merges = [pair for piece in shown for pair in ((piece[0], piece[1]), (piece[:2], piece[2]))]
    vocab = dict.fromkeys([*SPECIAL, *alphabet, *[piece[:2] for piece in shown], *shown])
    bpe = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, list(dict.fromkeys(merges))))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(SPECIAL)
    return save(bpe, folder, **config)


def llama(folder: Path, **config) -> Path:
    """As Llama 2's tokenizer.json: words carry their space in front (the first one too), characters outside the
    vocabulary become bytes, the decoder drops the space at the beginning."""
    bpe = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special + [f"<0x{i:02X}>" for i in range(256)], show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz,.;!▁"), limit_alphabet=70,
    )  # fmt: skip
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # so that it learns words, not phrases
    bpe.train_from_iterator(TRAINING_TEXT, trainer)
    made = json.loads(bpe.to_str()) | {"pre_tokenizer": None}
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] in special]
    bpe = tokenizers.Tokenizer.from_str(json.dumps(made))
    bpe.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    bpe.add_tokens([AddedToken(mark, normalized=False) for mark in TOOL_MARKS])
    return save(bpe, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **config)


def metaspace(folder: Path, **config) -> Path:
    """A Unigram vocabulary, as T5's: words carry their space in front, and the decoder drops the first one."""
    words = ["<unk>", "▁the", "▁pages", "▁hold", "▁keys", "s", "▁", ",", ".", "a", "b"]
    unigram = tokenizers.Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], 0, False))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return save(unigram, folder, **config)


def word_pieces(folder: Path, **config) -> Path:
    """A BERT-like vocabulary, whose spaces in front of commas are taken out after decoding."""
    words = ["[UNK]", "the", "page", "##s", ",", ".", "don", "'", "t"]
    made = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    return save(made, folder, unk_token="[UNK]", clean_up_tokenization_spaces=True, **config)


KINDS = {"byte level": byte_level, "misaligned": misaligned, "llama": llama}


@cache
def byte_names() -> list[str]:
    """Byte -> the character a byte-level vocabulary writes it as (GPT-2 `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names, extra = {byte: chr(byte) for byte in printable}, iter(range(256, 512))
    return [names.get(byte) or chr(next(extra)) for byte in range(256)]


def _shown(piece: bytes) -> str:
    return "".join(byte_names()[byte] for byte in piece)


@st.composite
def cuts(draw, tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
    """The text in tokens as no encoder would cut it: [(token id, bytes of the text so far)]."""
    vocab = tokenizer.hf.get_vocab()
    has_bytes = "<0x00>" in vocab
    data, at, out = text.encode(), 0, []
    while at < len(data):
        size = draw(st.integers(1, 8))
        token = None
        while token is None:
            piece = data[at : at + size]
            if not has_bytes:
                token = vocab.get(_shown(piece))
            elif size > 1 or draw(st.booleans()):
                try:
                    token = vocab.get(piece.decode().replace(" ", "▁"))
                except UnicodeDecodeError:
                    token = None
            if token is None and size == 1 and has_bytes:
                token = vocab[f"<0x{piece[0]:02X}>"]
            if token is None:
                size -= 1
        at += len(piece)
        out.append((token, at))
    return out
