"""How much one request may ask for. Each number is more than any honest client sends, and less than what hurts the others."""

from typing import Any

from ch07_sglang_radix.generate_request import images_of_each
from ch07_sglang_radix.serving.io_struct import GenerateRequest

MAX_BATCH = 1024  # prompts of one request
MAX_ANSWERS = 1024  # prompts times n
MAX_STOPS = 32  # SGLang's
MAX_STOP_CHARACTERS = 1024
MAX_TOP_LOGPROBS = 128
MAX_TOKEN_IDS_LOGPROB = 1024
MAX_RID_CHARACTERS = 256
MAX_PICTURES = 64  # of a request times n: each answer's own message brings their pixels


def check_limits(request: GenerateRequest) -> None:
    """Raises ValueError that names the limit. Kinds and ranges of values are the intake's to look at."""
    batch = request.text if isinstance(request.text, list) else [0]
    if request.input_ids and isinstance(request.input_ids[0], list):
        batch = request.input_ids
    if not batch:
        raise ValueError("text=[] is a batch of no prompt; give one at least")
    _at_most("prompts in a request", len(batch), MAX_BATCH)
    given = request.sampling_params or {}
    several = given if isinstance(given, list) else [given] * len(batch)
    _at_most("answers of a request", sum(_whole(one.get("n")) for one in several), MAX_ANSWERS)
    for one in several:
        for name in ("stop", "stop_regex", "stop_token_ids"):
            stops = one.get(name)
            stops = [stops] if isinstance(stops, str) else stops if isinstance(stops, list) else []
            _at_most(name, len(stops), MAX_STOPS)
            _at_most(
                f"characters of a {name}",
                max((len(s) for s in stops if isinstance(s, str)), default=0),
                MAX_STOP_CHARACTERS,
            )
    shown = images_of_each(request.image_data, len(batch), single=batch == [0])
    pictures = sum(len(images) * _whole(one.get("n")) for images, one in zip(shown, several, strict=False))
    _at_most("pictures of a request, times n", pictures, MAX_PICTURES)
    _at_most("top_logprobs_num", request.top_logprobs_num or 0, MAX_TOP_LOGPROBS)
    _at_most("token_ids_logprob", len(request.token_ids_logprob or ()), MAX_TOKEN_IDS_LOGPROB)
    rids = [request.rid] if isinstance(request.rid, str) else request.rid or []
    _at_most("characters of an rid", max(map(len, rids), default=0), MAX_RID_CHARACTERS)


def _whole(n: Any) -> int:
    return n if isinstance(n, int) and n > 0 else 1


def _at_most(what: str, number: int, most: int) -> None:
    if number > most:
        raise ValueError(f"{number} {what}; this server takes {most} at most")
