import pytest
import torch
from transformers.vision_utils import get_vision_window_index

from common.models.config import ModelConfig
from common.models.weights import load_model
from common.parallel_state import TPGroup
from common.vision.tower import in_windows
from tests.common.vision.checkpoints import PROCESSOR, SEEING, patches_of, picture, reference, save_seeing


@pytest.fixture(scope="module", params=SEEING)
def folder(request, tmp_path_factory):
    return save_seeing(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("size", [(84, 84), (56, 140), (224, 196), (28, 28 * 9)])
@torch.inference_mode()
def test_rows_of_a_picture_are_those_of_transformers(folder, size):
    model, _ = load_model(folder, TPGroup())
    pixels = PROCESSOR.pixels(picture(*size, seed=1))
    values, grids = patches_of([pixels])
    theirs = torch.cat(reference(folder).get_image_features(values, grids).pooler_output)
    mine = model.visual(values, pixels.grid)
    assert mine.shape == theirs.shape == (pixels.key.rows, 112)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("h", "w", "side"), [(1, 1, 3), (3, 3, 3), (4, 4, 4), (5, 7, 3), (2, 9, 4), (10, 6, 2)])
def test_windows_are_those_of_transformers(h, w, side):
    order, sizes = in_windows(h, w, side)
    index, ends = get_vision_window_index(torch.tensor([[1, 2 * h, 2 * w]]), 2, side * 28, 14)
    assert order.tolist() == index.tolist()
    assert torch.tensor([0, *sizes]).cumsum(0).mul(4).tolist() == ends.tolist()


def test_every_tensor_of_the_tower_is_used(folder):
    _, report = load_model(folder, TPGroup())
    assert len(report.tensors) == len(set(report.tensors))
    assert sum(name.startswith("visual.") for name in report.tensors) == len(
        list(reference(folder).model.visual.state_dict())
    )
    assert ModelConfig.from_folder(folder).vision.image_token_id == 1003
