"""Make an engine see: what Engine calls, on every rank, if its model has a vision tower."""

from dataclasses import replace

from ch07_sglang_radix.images.intake import PictureIntake
from ch07_sglang_radix.images.sender import PictureSender
from ch07_sglang_radix.images.sources import Sources
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.server_args import ServerArgs


def attach(scheduler: TPScheduler, args: ServerArgs) -> PictureSender:
    """Pictures come in (whoever calls Engine owns the disk, so paths are read) and reach the ranks."""
    see = PictureIntake.of(scheduler.wrapper.folder, Sources(files=True, urls=args.allow_image_urls))
    scheduler.intake = replace(scheduler.intake, see=see)
    return PictureSender(scheduler)
