"""What an engine is told about speculative decoding, under SGLang's names, and what goes with what.

    speculative_algorithm            who guesses: NGRAM, STANDALONE, EAGLE, EAGLE3, and MEDUSA, which SGLang has not
    speculative_draft_model_path     its checkpoint; None with the bundled model: what is bundled with that
    speculative_num_steps            levels of guesses below the last token
    speculative_eagle_topk           children of a node; 1 is a chain
    speculative_num_draft_tokens     nodes of a tree that are verified, the last token included
    speculative_stand_down           plain steps while these bring more tokens a second (speculative/stand_down.py; not SGLang's)
    speculative_accept_threshold_*, speculative_use_rejection_sampling, speculative_typical_acceptance (not SGLang's)
                                     other rules for what is kept (common/sampling/acceptance.py); thresholds below 1 and
                                     typical acceptance are lossy: answers are no longer distributed as the model says.
                                     Rejection sampling is exact, and has a draft's chains drawn from its own distribution
    speculative_ngram_*              the trie of NGRAM

Like server_args.py it imports nothing that brings torch. What the algorithms do: speculative/ and common/models/drafters/.
"""

from dataclasses import dataclass
from typing import Any

from common.values import choice, flag, path, real, shown, whole

# levels below the root, children of a node, nodes with the root; by default
DEFAULTS = {
    "NGRAM": (None, None, 8), "STANDALONE": (4, 1, 5), "MEDUSA": (3, 2, 8),
    "EAGLE": (4, 1, 5), "EAGLE3": (4, 1, 5),
}  # fmt: skip
# how NGRAM guesses: a tree of what all requests said last, or most often, behind such words; or a chain of what this one said
MATCH_TYPES = ("BFS", "PROB", "LOOKUP")
MOST_NODES = 1024
THRESHOLDS = ("speculative_accept_threshold_single", "speculative_accept_threshold_acc")
# what SGLang has beside them: the way out
ELSEWHERE = {
    "speculative_draft_model_revision": "give the Hub id alone, or a local folder",
    "speculative_draft_load_format": "safetensors files are read; leave it out",
    "speculative_draft_model_quantization": "a draft is read in the model's dtype; leave it out",
    "speculative_token_map": "a draft's own reduced vocabulary (EAGLE3's d2t) is read; leave it out",
    "speculative_attention_mode": "a tree is verified as decode steps are; leave it out",
    "speculative_draft_attention_backend": "a draft attends by attention_backend=; leave it out",
    "speculative_adaptive": "the number of guesses stays; speculative_stand_down says when they are left out",
    "speculative_ngram_external_corpus_path": "the trie knows what this engine has seen; send the text as a prompt",
}
IDLE = dict.fromkeys(ELSEWHERE) | {"speculative_attention_mode": "prefill", "speculative_adaptive": False}


@dataclass(frozen=True)
class Speculative:
    """What is asked for, complete. steps and topk are 0 where rank 0 guesses from what was said."""

    algorithm: str
    path: str | None
    steps: int
    topk: int
    nodes: int


def check_speculative(args: Any) -> dict[str, Any]:
    """args: a ServerArgs -> its values as they are to be kept, by name. ValueError, in one line, for what cannot be."""
    kept = {
        "speculative_draft_model_path": path("speculative_draft_model_path", args.speculative_draft_model_path),
        "speculative_ngram_match_type": choice("speculative_ngram_match_type", args.speculative_ngram_match_type, MATCH_TYPES),
    }  # fmt: skip
    for name in ("speculative_use_rejection_sampling", "speculative_typical_acceptance", "speculative_stand_down"):
        kept[name] = flag(name, getattr(args, name))
    for name in THRESHOLDS:
        kept[name] = real(name, getattr(args, name), 0, 1)
    for name, least, most in (
        ("min_bfs_breadth", 1, MOST_NODES), ("max_bfs_breadth", 1, MOST_NODES), ("max_trie_depth", 2, 1024),
        ("capacity", 1, 1 << 40),
    ):  # fmt: skip
        kept[f"speculative_ngram_{name}"] = whole(
            f"speculative_ngram_{name}", getattr(args, f"speculative_ngram_{name}"), least, most
        )
    if kept["speculative_ngram_min_bfs_breadth"] > kept["speculative_ngram_max_bfs_breadth"]:
        raise ValueError(
            f"speculative_ngram_min_bfs_breadth={kept['speculative_ngram_min_bfs_breadth']} is more than "
            f"speculative_ngram_max_bfs_breadth={kept['speculative_ngram_max_bfs_breadth']}"
        )
    rules = [name for name in ("speculative_use_rejection_sampling", "speculative_typical_acceptance") if kept[name]]
    rules += [f"{name}={kept[name]}" for name in THRESHOLDS if kept[name] < 1][:1]
    if len(rules) > 1:
        raise ValueError(f"{rules[0]} with {rules[1]}: each is a rule for what is kept; use one of the two")
    if args.speculative_algorithm is None:
        given = ("draft_model_path", "num_steps", "eagle_topk", "num_draft_tokens")
        for name in (f"speculative_{one}" for one in given):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"{name}={shown(getattr(args, name))} without speculative_algorithm: nothing is guessed; give one"
                )
        return kept
    options = speculative_options(args)
    for name in ("pp_size", "attn_dp_size", "cp_size"):
        if getattr(args, name) > 1:
            raise ValueError(
                f"{name}={getattr(args, name)} with speculative_algorithm={options.algorithm}: a tree is verified by ranks that "
                "all have all rows; use tp_size, ep_size or dp_size"
            )
    for name in ("enable_layernorm_sp", "enable_two_batch_overlap"):
        if getattr(args, name):
            raise ValueError(
                f"{name} with speculative_algorithm={options.algorithm}: it cuts the rows of a step; use one of the two"
            )
    if args.disaggregation_mode != "null":
        raise ValueError(
            f"disaggregation_mode={args.disaggregation_mode} with speculative_algorithm={options.algorithm}: what a draft "
            "remembers of a prompt does not travel; use one of the two"
        )
    if args.enable_mixed_chunk and options.steps:
        raise ValueError(
            f"enable_mixed_chunk with speculative_algorithm={options.algorithm}: a draft is told of prompts, or of running "
            "requests, in one step; leave one of the two out"
        )
    return kept


def speculative_options(args: Any) -> Speculative | None:
    """args: a ServerArgs; None if it asks for nothing of the kind."""
    if args.speculative_algorithm is None:
        return None
    algorithm = choice("speculative_algorithm", args.speculative_algorithm, tuple(DEFAULTS))
    steps, topk, nodes = DEFAULTS[algorithm]
    asked = {
        "speculative_num_steps": args.speculative_num_steps, "speculative_eagle_topk": args.speculative_eagle_topk,
    }  # fmt: skip
    most = args.speculative_num_draft_tokens
    if steps is None:
        for name, value in (asked | {"speculative_draft_model_path": args.speculative_draft_model_path}).items():
            if value is not None:
                raise ValueError(
                    f"{name}={shown(value)} with speculative_algorithm={algorithm}, which has no draft; leave it out"
                )
        nodes = nodes if most is None else whole("speculative_num_draft_tokens", most, 2, MOST_NODES)
        return Speculative(algorithm, None, 0, 0, nodes)
    if steps_given := asked["speculative_num_steps"] is not None:
        steps = whole("speculative_num_steps", asked["speculative_num_steps"], 1, MOST_NODES - 1)
    if asked["speculative_eagle_topk"] is not None:
        topk = whole("speculative_eagle_topk", asked["speculative_eagle_topk"], 1, MOST_NODES)
    if most is not None:
        nodes = whole("speculative_num_draft_tokens", most, 2, MOST_NODES)
    if topk == 1:  # a chain has as many nodes as it has
        if most is not None and not steps_given:
            steps = nodes - 1
        if most is not None and nodes != steps + 1:
            raise ValueError(
                f"speculative_num_draft_tokens={nodes} with speculative_eagle_topk=1 and speculative_num_steps={steps}: a chain of "
                f"{steps} guesses has {steps + 1} nodes, the last token included"
            )
        nodes = steps + 1
    elif most is None:
        nodes = min(1 + topk * steps, MOST_NODES)
    return Speculative(algorithm, args.speculative_draft_model_path, steps, topk, nodes)
