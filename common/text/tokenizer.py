"""Text <-> token ids, the chat template, and text that grows token by token."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

REPLACEMENT = "�"  # what a decoder shows for bytes that are not yet a character


class Tokenizer:
    """The checkpoint's own tokenizer (Hugging Face), always from a local folder."""

    def __init__(self, folder: str | Path):
        if not self.lies_in(folder):
            raise ValueError(f"{folder}: no usable tokenizer, neither tokenizer.json nor tokenizer_config.json")
        try:
            self.hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # a damaged file can make the library raise anything
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ValueError(
                f"{folder}: no usable tokenizer (tokenizer.json, tokenizer_config.json): {reason}"
            ) from None

    @staticmethod
    def lies_in(folder: str | Path) -> bool:
        """Whether the folder has a tokenizer at all; weights alone can still be run on token ids."""
        return any(
            (Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
        )

    def encode(self, text: str) -> list[int]:
        """The text as it stands: no template, no special token added that the tokenizer does not add itself."""
        return self.hf.encode(text)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.hf.chat_template)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """[{"role": "system" | "user" | "assistant", "content": ...}] -> prompt ids, up to the assistant's turn.

        Raises ValueError if the checkpoint has no chat template (a base model), and for what is no message.
        """
        for message in messages:
            texts = isinstance(message, dict) and [message.get(key) for key in ("role", "content")]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError(f'a message is {{"role": text, "content": text}}, not {message!r:.80}')
        if not self.has_chat_template:
            raise ValueError("this checkpoint has no chat template; send plain text instead of messages")
        text = self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return self.hf.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, without special tokens."""
        return self.hf.decode(list(ids), skip_special_tokens=True)


class IncrementalDetokenizer:
    """Turns a growing list of tokens into growing text, never showing half a character.

    A token of a byte-level vocabulary can end inside a UTF-8 character. Decoding token by token would give
    replacement marks; decoding everything each time costs O(n^2). So: decode a short window twice, with and
    without the new tokens, and hand out the difference once it ends in a whole character (the scheme of vLLM
    and SGLang).
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._window = 0  # where the window starts: enough context for spaces to come out right
        self._shown = 0  # tokens whose text is out

    def add(self, *ids: int) -> str:
        """Take new tokens, return the text that became certain; "" while a character is incomplete."""
        self._ids.extend(ids)
        before = self._tokenizer.decode(self._ids[self._window : self._shown])
        after = self._tokenizer.decode(self._ids[self._window :])
        if len(after) <= len(before) or after.endswith(REPLACEMENT):
            return ""
        self._window, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def finish(self) -> str:
        """What is left at the end, replacement marks and all."""
        before = self._tokenizer.decode(self._ids[self._window : self._shown])
        after = self._tokenizer.decode(self._ids[self._window :])
        self._window = self._shown = len(self._ids)
        return after[len(before) :]
