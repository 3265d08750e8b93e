"""From the glossary to training conversations.

The glossary (`glossary.jsonl`) is the model's whole knowledge. This module loads it,
draws random conversations of one to three turns about it, and renders it as Markdown:

    python -m common.tiny_qwen.corpus        # rewrites GLOSSARY.md
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from common.tiny_qwen import TINY_QWEN_PATH
from common.tiny_qwen.phrasings import (
    CLOSERS,
    FOLLOW_UPS_TRAINED,
    KEYWORDS,
    OPENERS,
    SHORT_SYSTEM_PROMPTS,
    SYSTEM_PROMPT,
    TRAINED,
)

GLOSSARY_PATH = TINY_QWEN_PATH / "glossary.jsonl"
LANGUAGES = ("en", "zh")

# A raw prompt ("What is a radix cache?") is continued by this and then the answer.
BARE_SEPARATOR = "\n"

# Where a Chinese character touches a Latin letter or a digit, a space is customary.
_SCRIPT_BORDER = re.compile(r"(?<=[\u4e00-\u9fff])(?=[A-Za-z0-9])|(?<=[A-Za-z0-9])(?=[\u4e00-\u9fff])")

# The units of a wording: a slot, a keyword, an English word, or one other character.
_WORDS = re.compile(rf"{{\w+}}|{'|'.join(KEYWORDS)}|[A-Za-z]+|\s+|.")


@dataclass(frozen=True)
class Entry:
    """One glossary entry; `see` names two other entries by their English term."""

    term: str  # radix cache
    phrase: str  # a radix cache
    zh: str  # 基数缓存
    en_def: str
    zh_def: str
    see: tuple[str, str]


@dataclass(frozen=True)
class Conversation:
    """Question-answer turns, with or without a system message.

    A `bare` conversation is one question and its answer without the chat template:
    what a completion endpoint sees when a reader sends it a plain prompt.
    """

    turns: tuple[tuple[str, str], ...]
    system: str | None = None
    bare: bool = False


def load_glossary(path: Path = GLOSSARY_PATH) -> dict[str, Entry]:
    """Read the glossary as {term: Entry}, in file order."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return {row["term"]: Entry(**{**row, "see": tuple(row["see"])}) for row in rows}


def ask(template: str, entry: Entry, english_name: bool = False) -> str:
    """Fill a question template with an entry's names, spaced as is customary.

    With `english_name` a Chinese question names the term in English, as engineers do.
    """
    zh = entry.term if english_name else entry.zh
    return _SCRIPT_BORDER.sub(" ", template.format(term=entry.term, phrase=entry.phrase, zh=zh))


def definition(entry: Entry, language: str) -> str:
    """The answer to any question about an entry, in one language."""
    return entry.en_def if language == "en" else entry.zh_def


def follow_up_answer(kind: str, language: str, entry: Entry, glossary: dict[str, Entry]) -> str:
    """The answer to a follow-up of a kind, asked in a language, after a turn about entry."""
    if kind == "to_en":
        return entry.en_def
    if kind == "to_zh":
        return entry.zh_def
    if language == "en":
        return f"See also: {', '.join(entry.see)}."
    return f"另见：{'、'.join(glossary[term].zh for term in entry.see)}。"


class Blur:
    """Replaces words of a wording by random ones, but for its slots and its keywords.

    A model that saw only a few dozen wordings would know these by heart and stumble over
    any other. Among random words, the term itself is the only thing it can rely on.
    """

    def __init__(self, glossary: dict[str, Entry], rng: random.Random):
        self.rng = rng
        names = {word for e in glossary.values() for word in [*e.term.lower().split(), *e.zh]}
        english = {word for e in glossary.values() for word in re.findall("[a-z]+", e.en_def)}
        chinese = {char for e in glossary.values() for char in e.zh_def if char.isalpha()}
        self.words = {  # none of them part of a term's name; sorted, since sets have no fixed order
            "en": sorted(english - names),
            "zh": sorted(char for char in chinese - names if not char.isascii()),
        }

    def __call__(self, wording: str, language: str) -> str:
        """Replace each word (in Chinese: each character) with a chance drawn for the wording."""
        chance = self.rng.random()
        return "".join(
            self._random_words(language)
            if piece.isalpha() and piece not in KEYWORDS and self.rng.random() < chance
            else piece
            for piece in _WORDS.findall(wording)
        )

    def _random_words(self, language: str) -> str:
        """None to three random words; some of letters or characters the glossary never uses."""
        words = self.rng.choices(self.words[language], k=self.rng.choice([0, 1, 1, 2, 3]))
        if words and self.rng.random() < 0.3:
            letters = range(97, 123) if language == "en" else range(0x4E00, 0x9000)
            words[0] = "".join(map(chr, self.rng.choices(letters, k=3 if language == "en" else 1)))
        return (" " if language == "en" else "").join(words)


class ConversationSampler:
    """Draws endless random training conversations, each term equally often."""

    def __init__(self, glossary: dict[str, Entry], rng: random.Random):
        self.glossary = glossary
        self.rng = rng
        self.blur = Blur(load_glossary(), rng)  # a style of answering changes no question
        self._deck: list[tuple[Entry, str]] = []

    def draw(self, long_prompt: bool) -> Conversation:
        """Draw with the long system prompt, or else one of the other kinds of start."""
        if long_prompt:
            return Conversation(self._turns(), system=SYSTEM_PROMPT)
        kind = self.rng.random()
        if kind < 0.25:
            return Conversation((self._question(*self._next_entry()),), bare=True)
        if kind < 0.5:
            return Conversation(self._turns(), system=self.rng.choice(SHORT_SYSTEM_PROMPTS))
        return Conversation(self._turns())

    def _next_entry(self) -> tuple[Entry, str]:
        """Deal (entry, language) pairs from a shuffled deck: even coverage, random order."""
        if not self._deck:
            self._deck = [(e, lang) for e in self.glossary.values() for lang in LANGUAGES]
            self.rng.shuffle(self._deck)
        return self._deck.pop()

    def _turns(self) -> tuple[tuple[str, str], ...]:
        """One to three turns; a later turn follows up on the last term or asks a new one."""
        entry, language = self._next_entry()
        turns = [self._question(entry, language)]
        for _ in range(self.rng.choices([0, 1, 2], weights=[0.4, 0.35, 0.25])[0]):
            if self.rng.random() < 0.85:
                turns.append(self._follow_up(entry))
            else:
                entry, language = self._next_entry()
                turns.append(self._question(entry, language))
        return tuple(turns)

    def _question(self, entry: Entry, language: str) -> tuple[str, str]:
        """A question in a random trained wording, often blurred or with small talk around it."""
        wording = self.rng.choice(TRAINED[language])
        if self.rng.random() < 0.4:
            wording = self.blur(wording, language)
        if self.rng.random() < 0.2:
            wording = self.rng.choice(OPENERS[language]) + wording
        if self.rng.random() < 0.2:
            wording = wording + self.rng.choice(CLOSERS[language])
        question = ask(wording, entry, english_name=self.rng.random() < 0.2)
        if language == "zh" and self.rng.random() < 0.1:
            question = question.replace(" ", "")  # readers often leave the spaces out
        return question, definition(entry, language)

    def _follow_up(self, entry: Entry) -> tuple[str, str]:
        """A request that makes sense only after a turn about `entry`."""
        kind = self.rng.choices(["to_en", "to_zh", "related"], weights=[1, 1, 2])[0]  # in order of difficulty
        language = self.rng.choice(LANGUAGES)
        wording = self.rng.choice(FOLLOW_UPS_TRAINED[kind, language])
        if self.rng.random() < 0.4:
            wording = self.blur(wording, language)
        return wording, follow_up_answer(kind, language, entry, self.glossary)


def glossary_markdown(glossary: dict[str, Entry]) -> str:
    """Render the glossary as a two-language Markdown page."""
    lines = [
        "# Glossary",
        "",
        f"{len(glossary)} terms of distributed LLM inference. "
        "This page is rendered from `glossary.jsonl` by `python -m common.tiny_qwen.corpus`.",
        "",
    ]
    for entry in glossary.values():
        see = ", ".join(f"{term} ({glossary[term].zh})" for term in entry.see)
        lines += [f"## {entry.term} · {entry.zh}", "", entry.en_def, "", entry.zh_def, "", f"See also: {see}.", ""]
    return "\n".join(lines)


def main() -> None:
    page = TINY_QWEN_PATH / "GLOSSARY.md"
    page.write_text(glossary_markdown(load_glossary()), encoding="utf-8")
    print(f"wrote {page.name}")


if __name__ == "__main__":
    main()
