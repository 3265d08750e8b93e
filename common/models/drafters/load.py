"""Which drafter an algorithm's name means. A drafter's module is imported when it is asked for."""

from importlib import import_module

from common.models.drafters.contract import Drafter, DraftOptions, Target

DRAFTERS = {
    "STANDALONE": "common.models.drafters.standalone:StandaloneDrafter",
    "MEDUSA": "common.models.drafters.medusa:MedusaDrafter",
    "EAGLE": "common.models.drafters.eagle:EagleDrafter",
    "EAGLE3": "common.models.drafters.eagle:EagleDrafter",
}


def load_drafter(options: DraftOptions, target: Target) -> Drafter | None:
    """None where the guesses are rank 0's own (NGRAM). Raises ValueError or FileNotFoundError on every rank alike."""
    if options.algorithm not in DRAFTERS:
        return None
    module, name = DRAFTERS[options.algorithm].split(":")
    return getattr(import_module(module), name)(options, target)
