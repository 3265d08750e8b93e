"""Text <-> token ids, and the chat template."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer


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
        self._special = {i: added.content for i, added in self.hf.added_tokens_decoder.items() if added.special}

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

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """The text of the ids. Only the tokenizers that are written in Python ever put spaces between special tokens."""
        return self.hf.decode(
            list(ids),
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )

    def special_text(self, token: int) -> str:
        """How a special token is written, "" for all others."""
        return self._special.get(token, "")

    def has_text(self, token: int, skip_special_tokens: bool = True) -> bool:
        """Not so for special tokens that are left out, and for ids that only pad the model's vocabulary."""
        if token in self._special:
            return not skip_special_tokens
        return self.hf.convert_ids_to_tokens(token) is not None
