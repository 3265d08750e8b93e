"""Text <-> token ids, and the chat template."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from common import values
from common.text.chat_template import TemplateRenderer
from common.text.tokenizer_file import TokenizerFile, read_plain

# transformers fills itself as names are asked for: of two threads that ask at once, one finds it half empty
ONE_IMPORTS = Lock()
OPEN_END = "\ue000the end\ue001"  # where the last message ends, if it is to go on; characters that no text has

# how byte-level vocabularies write bytes: most as the letter of that number, the others, unprintable there, from 256 on
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF_LETTER = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


class Tokenizer:
    """The checkpoint's own tokenizer (Hugging Face), always from a local folder, whose Python code is never run.

    inner: what turns text into ids and back, and knows the named tokens and the template: the file itself where it can be read
    without transformers (tokenizer_file.py), else transformers' tokenizer. hf: the latter in any case, loaded when it is asked for.
    """

    def __init__(self, folder: str | Path):
        if not self.lies_in(folder):
            raise ValueError(f"{folder}: no usable tokenizer, neither tokenizer.json nor tokenizer_config.json")
        self._folder = folder
        plain = read_plain(Path(folder))
        self.inner: TokenizerFile | Any = plain or self.hf
        self._special = {i: added.content for i, added in self.inner.added_tokens_decoder.items() if added.special}
        self.bytes_of, self.letter = self._byte_tokens()
        self._backend = plain.backend_tokenizer if plain else self._backend_of_hf()
        self._renderer = TemplateRenderer()

    @cached_property
    def hf(self) -> Any:
        """transformers' tokenizer of the folder. Raises ValueError, in one line, for one that it cannot read."""
        with ONE_IMPORTS:
            from transformers import AutoTokenizer  # noqa: PLC0415, two seconds that most checkpoints need not wait

        try:
            # said explicitly: left open, transformers asks on the terminal whether it may run the folder's code
            return AutoTokenizer.from_pretrained(str(self._folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a damaged file can make the library raise anything
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            if "trust_remote_code" in str(error):
                reason = "it is Python code (auto_map), never run here; use a folder without"
            raise ValueError(
                f"{self._folder}: no usable tokenizer (tokenizer.json, tokenizer_config.json): {reason}"
            ) from None

    def _backend_of_hf(self) -> Any:
        """What decodes in its place: hf.decode does no more, and takes three times as long to find out what ids it was given."""
        from transformers import PreTrainedTokenizerFast  # noqa: PLC0415, it is there already

        same = getattr(type(self.hf), "_decode", None) is PreTrainedTokenizerFast._decode
        return self.hf.backend_tokenizer if same and not self.hf.clean_up_tokenization_spaces else None

    @staticmethod
    def lies_in(folder: str | Path) -> bool:
        """Whether the folder has a tokenizer at all; weights alone can still be run on token ids."""
        return any(
            (Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
        )

    def encode(self, text: str) -> list[int]:
        """The text as it stands: no template, and what the tokenizer itself adds, such as a first token (BOS).

        A text that begins with the first token's text, as a rendered chat does, gets no second one. Raises ValueError
        for half a surrogate pair.
        """
        ids = self.inner.encode(values.text("the text", text))
        bos = self.inner.bos_token_id
        return ids[1:] if ids[:2] == [bos, bos] and text.startswith(self.inner.bos_token) else ids

    def encode_bare(self, text: str) -> list[int]:
        """The text alone, without what the tokenizer puts around a prompt."""
        return self.inner.encode(text, add_special_tokens=False)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.inner.chat_template)

    def render_chat(
        self, messages: Sequence[dict[str, str]], /, *, chat_template: str | None = None,
        tools: list[dict] | None = None, documents: list[dict] | None = None, add_generation_prompt: bool = True,
        continue_final_message: bool = False, **chat_template_kwargs: Any,
    ) -> str:  # fmt: skip
        """[{"role": "system" | "user" | "assistant", "content": ...}] -> the text that the checkpoint's template makes.

        By default up to the assistant's turn; with `continue_final_message` the last message is left open instead.
        `chat_template` replaces the checkpoint's own or names one of several; every further argument is a variable of
        the template, such as `enable_thinking`.

        Raises ValueError if the checkpoint has no chat template (a base model), for what is no message, and for a
        template that fails, refuses the messages or takes too long (chat_template.py).
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise ValueError(f"a conversation is one message or several, in a list, not {values.shown(messages)}")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not _is_content(message):
                raise ValueError(f'a message is {{"role": text, "content": text}}, not {values.shown(message)}')
        if "messages" in chat_template_kwargs:
            raise ValueError("chat_template_kwargs: the template's `messages` are the conversation itself")
        variables = {
            **self.inner.special_tokens_map,
            **chat_template_kwargs,
            "messages": [{key: value for key, value in message.items() if value is not None} for message in messages],
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._template(chat_template, tools)
        if not continue_final_message:
            return self._renderer.render(template, variables)
        if add_generation_prompt:
            raise ValueError("continue_final_message=True needs add_generation_prompt=False: no new turn begins")
        if not isinstance(variables["messages"][-1]["content"], str):
            raise ValueError("continue_final_message: the last message has pictures, and only a text can go on")
        variables["messages"][-1]["content"] += OPEN_END + " "
        text, found, behind = self._renderer.render(template, variables).rpartition(OPEN_END)
        if not found:
            raise ValueError("continue_final_message: the chat template leaves the last message out, or changes it")
        return text if behind.startswith(" ") else text.rstrip()  # a template that trims messages trims this one too

    def encode_chat(self, messages: Sequence[dict[str, str]], /, **chat_template_kwargs: Any) -> list[int]:
        """Prompt ids of a conversation; the arguments, and what is raised, are those of `render_chat`."""
        text = values.text("the chat", self.render_chat(messages, **chat_template_kwargs))
        return self.encode_bare(text)  # the template writes what the model wants to see

    def _template(self, chosen: str | None, tools: list[dict] | None) -> str:
        if chosen is None and not self.has_chat_template:
            raise ValueError("this checkpoint has no chat template; send plain text instead of messages")
        try:
            template = self.inner.get_chat_template(chosen, tools)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(" ".join(str(error).split())) from None
        return values.text("the chat template", template)

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """The text of the ids. Only the tokenizers that are written in Python ever put spaces between special tokens."""
        if self._backend:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return self.inner.decode(
            list(ids),
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )

    def token_text(self, token: int) -> str:
        """One token as it reads in the middle of a text: with its space, and special tokens as they are written."""
        return self.decode([token, token], False)[len(self.decode([token], False)) :]

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which may be half a character."""
        if token in self.bytes_of:
            return bytes([self.bytes_of[token]])
        text = self.token_text(token)
        raw = self.inner.convert_ids_to_tokens(token) if "\ufffd" in text else None
        letters = raw and [BYTE_OF_LETTER.get(letter) for letter in raw]
        return bytes(letters) if letters and None not in letters else text.encode()

    def _byte_tokens(self) -> tuple[dict[int, int], int]:
        """{token: its byte} of a tokenizer that writes rare characters in bytes, <0x00> to <0xFF>, and a letter of it."""
        ids = {i: byte for byte in range(256) if (i := self.inner.convert_tokens_to_ids(f"<0x{byte:02X}>")) is not None}
        letter = next((i for i, byte in ids.items() if byte == ord("A")), -1)
        return (ids, letter) if len(ids) == 256 and self.inner.decode([letter]) == "A" else ({}, -1)

    def special_text(self, token: int) -> str:
        """How a special token is written, "" for all others."""
        return self._special.get(token, "")

    def has_text(self, token: int, skip_special_tokens: bool = True) -> bool:
        """Not so for special tokens that are left out, and for ids that only pad the model's vocabulary."""
        if token in self._special:
            return not skip_special_tokens
        return self.inner.convert_ids_to_tokens(token) is not None


def _is_content(message: dict) -> bool:
    """A text, or the parts of what a model reads that sees: {"type": "text", "text": ...} and {"type": "image"}."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return isinstance(content, str) or (bool(parts) and all(isinstance(one, dict) and "type" in one for one in parts))
