"""A checkpoint that recites a given text: what a test needs of a model that calls tools, thinks, or halves a character.

    ids = scripted_checkpoint(folder, '<think>Rain?</think>It rains.', TINY_QWEN_PATH)
    Engine(folder).generate("anything", {"max_new_tokens": 50})["text"]   # '<think>Rain?</think>It rains.'

It is a real Llama folder, and the whole engine runs. Its one layer adds nothing (its weights are zero), so the last hidden
state is the normalised embedding of the last token, and the LM head, which is not tied, is a table of who comes next:
`lm_head[b] += 8 * embed[a]` for each token a of the text and the one behind it, b. No token can stand in the text twice,
as nothing but the last token is known. Every token that is not in the text leads to its first, so a prompt starts it; one
that ends in a token of the text goes on from there.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from common.text.detokenizer import REPLACEMENT
from common.text.tokenizer import Tokenizer
from common.values import shown

WIDTH = 128  # D: a few hundred random directions in it are nearly at right angles
PULL = 8.0  # logit of the next token: 8 * sqrt(D) = 90, so that it wins at any temperature

# Qwen's way to show tools, calls and results. enable_thinking: true opens a thought, false closes it, undefined does neither
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}Tools, one a line, in <tools></tools>:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
A call is {"name": ..., "arguments": ...} in <tool_call></tool_call>.<|im_end|>
{% endif %}
{%- for message in (messages[1:] if tools and messages[0].role == 'system' else messages) -%}
<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}
{% if message.role == 'tool' %}<tool_response>
{{ message.content }}
</tool_response>{% else %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}{{ '\\n' if message.content or not loop.first }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined %}<think>
{% if not enable_thinking %}

</think>

{% endif %}{% endif %}{% endif %}"""


def scripted_checkpoint(
    folder: Path, script: str | Sequence[int], tokenizer_folder: str | Path, *, chat_template: str = CHAT_TEMPLATE,
    prompt_end: str = "\n", max_position_embeddings: int = 2048,
) -> list[int]:  # fmt: skip
    """Write the folder; returns the token ids of the answer: the script's and the one that ends it.

    A text may repeat itself: what would be a token for the second time becomes, with what stands before it, a new token
    of the folder's tokenizer. So does prompt_end, a token with which prompts end: after it the script begins.
    Token ids are taken as they are, where the cut matters (half a character).

    Raises ValueError for an empty script, a token that comes twice, and a tokenizer that names no end token or cannot
    write the text.
    """
    hf = Tokenizer(tokenizer_folder).hf
    if hf.eos_token_id is None:
        raise ValueError(f"{tokenizer_folder}: its tokenizer names no token that ends an answer (eos_token)")
    ids = _tokens(hf, script, prompt_end) if isinstance(script, str) else list(script)
    if not ids:
        raise ValueError("the script is empty: there is nothing to recite")
    ids.append(hf.eos_token_id)
    twice = next((token for at, token in enumerate(ids) if token in ids[:at]), None)
    if twice is not None:
        raise ValueError(f"token {twice} ({shown(hf.decode([twice]))}) comes twice: what follows it would not be known")
    hf.chat_template = chat_template
    hf.save_pretrained(folder)
    size = max(hf.get_vocab().values()) + 1
    config = _config(size, ids[-1], max_position_embeddings)
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(_weights(ids, size, config), Path(folder) / "model.safetensors", metadata={"format": "pt"})
    return ids


def _config(vocab_size: int, eos: int, positions: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "vocab_size": vocab_size,
        "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": positions, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": eos,
    }  # fmt: skip


def _weights(ids: list[int], vocab_size: int, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """ids: the script's. Raises ValueError if it is so long that two of its directions are nearly one."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    kv_width = WIDTH // heads * kv_heads
    directions = torch.randn(len(ids), WIDTH, generator=torch.Generator().manual_seed(0))
    directions /= directions.norm(dim=1, keepdim=True)
    start, script = directions[0], directions[1:]  # `start`: of every token that is not in the script, of its end too

    embed = start.repeat(vocab_size, 1)  # [V, D]
    embed[ids[:-1]] = script
    lm_head = torch.zeros(vocab_size, WIDTH)
    for last, following in zip([start, *script], ids, strict=True):
        lm_head[following] += PULL * last
    best = (torch.stack([start, *script]) @ lm_head.T).argmax(dim=1)
    if best.tolist() != ids:
        raise ValueError(f"{len(ids)} tokens are too many for {WIDTH} dimensions; shorten the script")

    layer = "model.layers.0."
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (kv_width, WIDTH), "self_attn.v_proj": (kv_width, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (WIDTH, WIDTH), "mlp.up_proj": (WIDTH, WIDTH),
        "mlp.down_proj": (WIDTH, WIDTH),
    }  # fmt: skip
    nothing = {f"{layer}{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    norms = ("model.norm", f"{layer}input_layernorm", f"{layer}post_attention_layernorm")
    return {
        "model.embed_tokens.weight": embed, "lm_head.weight": lm_head, **nothing,
        **{f"{name}.weight": torch.ones(WIDTH) for name in norms},
    }  # fmt: skip


# --- a text in tokens of which none comes twice


def _tokens(hf: PreTrainedTokenizerFast, script: str, prompt_end: str) -> list[int]:
    """The script's ids; adds tokens to the tokenizer."""
    pieces: list[tuple[str, list[int]]] = [(prompt_end, hf.encode(prompt_end, add_special_tokens=False))]
    for piece, ids in _whole_characters(hf, script):
        text = piece
        used = {token for _, tokens in pieces for token in tokens}
        while len(pieces) > 1 and text in {before for before, _ in pieces}:
            text = pieces.pop()[0] + text
        pieces.append((text, ids if text == piece and used.isdisjoint(ids) else []))
    pieces = pieces[1:]
    hf.add_tokens([AddedToken(text, normalized=False) for text, ids in pieces if not ids])
    found = [token for text, ids in pieces for token in ids or [hf.convert_tokens_to_ids(text)]]
    if hf.decode(found) != script:
        raise ValueError(f"this tokenizer cannot write {shown(script)} in tokens that come once; give token ids")
    return found


def _whole_characters(hf: PreTrainedTokenizerFast, script: str) -> Iterator[tuple[str, list[int]]]:
    """The text token by token, but tokens that share a character together."""
    run: list[int] = []
    for token in hf.encode(script, add_special_tokens=False):
        run.append(token)
        text = hf.decode(run)
        if REPLACEMENT not in text:
            yield text, run
            run = []
