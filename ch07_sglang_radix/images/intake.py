"""What a user shows beside a prompt -> tokens with room for it, or one ValueError before anything is queued.

<|vision_start|><|image_pad|><|vision_end|>What is it?      one placeholder a picture, as chat templates write it
<|vision_start|><|image_pad|> x rows<|vision_end|>What ...  and as many as the picture has rows
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ch07_sglang_radix.images.sources import Sources
from ch07_sglang_radix.server_args import ServerArgs
from common.models.config import ModelConfig
from common.models.hub import resolve_model
from common.models.vision import Vision, image_processor
from common.vision.pictures import Pictures
from common.vision.pixels import ImageProcessor, Pixels


@dataclass(frozen=True)
class PictureIntake:
    """`see` of an Intake (common/request/intake.py)."""

    vision: Vision
    processor: ImageProcessor
    sources: Sources

    @classmethod
    def of(cls, folder: str | Path, sources: Sources) -> "PictureIntake | None":
        """None for a model that reads text only."""
        vision = ModelConfig.from_folder(folder).vision
        return vision and cls(vision, image_processor(folder, vision.tower), sources)

    def from_now(self) -> "PictureIntake":
        return replace(self, sources=self.sources.from_now())

    def opened(self, image: Any) -> Pixels:
        """As it travels. Raises ValueError for what is no picture, or none that may be read."""
        return image if isinstance(image, Pixels) else self.processor.pixels(self.sources.picture(image))

    def __call__(self, ids: list[int], opened: Sequence[Pixels]) -> tuple[list[int], Pictures | None]:
        """(ids with a placeholder for each row of each picture, the pictures). Raises ValueError if they are not one each."""
        mark = self.vision.image_token_id
        if self.vision.video_token_id in ids:
            raise ValueError(
                "the prompt has a place for a video, and pictures alone are shown here; send its frames one by one"
            )
        places = [i for i, token in enumerate(ids) if token == mark]
        if len(places) != len(opened):
            raise ValueError(
                f"the prompt has {len(places)} place(s) for pictures (token {mark}) and image_data has {len(opened)}; "
                f"give one picture for each place"
            )
        if not opened:
            return ids, None
        at, out, done = [], [], 0
        for place, one in zip(places, opened, strict=True):
            out += ids[done:place]
            at.append(len(out))
            out += [mark] * one.key.rows
            done = place + 1
        return out + ids[done:], Pictures(tuple(opened), tuple(at))


def of_a_server(args: ServerArgs) -> PictureIntake:
    """Of the process that speaks HTTP: whoever asks owns none of this machine's files."""
    return PictureIntake.of(resolve_model(args.model_path), Sources(urls=args.allow_image_urls))
