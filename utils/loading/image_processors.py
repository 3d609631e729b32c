"""Converts images to model inputs: the tokens that represent an image in the text, and the tensors of its pixels."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError, error_text
from utils.base.logger import logger
from utils.formats.images import bad_image, image_size, open_upright, read_images
from utils.loading.legacy.registry import find_family

if TYPE_CHECKING:
    import torch


class Images(ABC):
    """Converts images to the inputs of one model.

    `mark` is the text that templates write for an image. It contains the image token, whose id is `slot`. In input_ids,
    the image token is repeated, once for each feature of the image.
    """

    mark: str
    slot: int

    @abstractmethod
    def count(self, path: str) -> int:
        """Return how often the image token is repeated for an image. Only the header of the file is read.

        Raises BadImage if the file is missing or damaged, or if the image cannot be used.
        """

    @abstractmethod
    def pixels(self, paths: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the pixel inputs of the model for these images, in the order of `paths`.

        Raises BadImage if a file cannot be decoded.
        """

    def per_token(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return additional inputs with one value per token. `input_ids` and each additional input are (B, T).

        The base class returns an empty dict, because most models need no additional inputs.
        """
        return {}

    def inputs(self, input_ids: torch.Tensor, paths: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return all model inputs for these images except `input_ids`, which are (B, T).

        `paths` has the images of all rows, in the order of the rows. If there are no images, the dict is empty.
        """
        if not paths:
            return {}

        return {**self.pixels(paths), **self.per_token(input_ids)}

    def example(self, tokenizer: Any, text: list[int]) -> dict[str, torch.Tensor]:
        """Return all inputs of the model for one test row: an image that is a ramp from black to white, then `text`.

        `text` is a list of token ids. Two models are compared on this row.
        """
        import torch
        from PIL import Image

        start, _, end = tokenizer(self.mark, add_special_tokens=False)['input_ids']

        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / 'gradient.png')
            Image.linear_gradient('L').save(path)

            ids = torch.tensor([[start, *[self.slot] * self.count(path), end, *text]])
            return {'input_ids': ids, **self.inputs(ids, [path])}

    def save(self, folder: Path) -> None:
        """Write the files of the image processor into the folder of a saved model.

        The base class writes nothing, because not every model has an image processor.
        """
        return

    def _check_image_token(self, tokenizer: Any, token: str) -> None:
        """Raise ConfigError if the id of the image token `token` is different in the tokenizer and in the model."""
        found = tokenizer.convert_tokens_to_ids(token)
        if found != self.slot:
            raise ConfigError(
                f"the tokenizer's {token} is id {found}, the model's is {self.slot}: they do not belong together. "
                'Use the model and the tokenizer of one repository or folder.'
            )


class QwenVLImages(Images):
    """Images for Qwen-VL of 2023. Every image is resized to the same square and has the same number of features."""

    mark = '<img><imgpad></img>'

    def __init__(self, model: Any, tokenizer: Any, model_dir: Path, max_pixels: int | None) -> None:
        visual = model.config.visual
        self.slot = visual['image_start_id'] + 2
        self._features = visual['n_queries']
        self._side = visual['image_size']

        self._check_image_token(tokenizer, '<imgpad>')
        if max_pixels is not None:
            logger.warning(f'--max_pixels has no effect: every image becomes {self._side} x {self._side}')

    def count(self, path: str) -> int:
        image_size(path)  # This raises BadImage for a missing or damaged file before training starts.
        return int(self._features)

    def pixels(self, paths: Sequence[str]) -> dict[str, torch.Tensor]:
        return {'pixel_values': read_images(paths, self._side)}


class ProcessorImages(Images):
    """Images for models with an image processor in transformers.

    An image keeps its aspect ratio. A larger image has more features.
    """

    mark = '<|vision_start|><|image_pad|><|vision_end|>'

    def __init__(self, model: Any, tokenizer: Any, model_dir: Path, max_pixels: int | None) -> None:
        from transformers import AutoImageProcessor

        self.slot = model.config.image_token_id
        self._check_image_token(tokenizer, '<|image_pad|>')

        try:
            # The backend is fixed. The backends resize differently, so training and inference could get different
            # pixels.
            self._processor = AutoImageProcessor.from_pretrained(model_dir, backend='pil', trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f'the image processor in {model_dir} cannot be opened: {error_text(error)}') from error

        if max_pixels is not None:
            size = self._processor.size
            if max_pixels < size['shortest_edge']:
                raise ConfigError(
                    f'--max_pixels takes {size["shortest_edge"]} or more for this model, got {max_pixels}.'
                )
            size['longest_edge'] = max_pixels

    def count(self, path: str) -> int:
        width, height = image_size(path)

        try:
            patches = self._processor.get_number_of_image_patches(height, width)
        except ValueError as error:  # The image is too narrow.
            raise bad_image(path, 'is too narrow', f': {error}.') from error

        return int(patches // self._processor.merge_size**2)

    def pixels(self, paths: Sequence[str]) -> dict[str, torch.Tensor]:
        return dict(self._processor(images=[open_upright(path) for path in paths], return_tensors='pt'))

    def per_token(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {'mm_token_type_ids': (input_ids == self.slot).long()}

    def save(self, folder: Path) -> None:
        self._processor.save_pretrained(folder)


# model_type in the config of the opened model -> the class that converts its images.
READERS: dict[str, Callable[[Any, Any, Path, int | None], Images]] = {
    'assay_qwen_vl': QwenVLImages,
    'qwen2_5_vl': ProcessorImages,
    'qwen3_vl': ProcessorImages,
}


def open_images(model: Any, tokenizer: Any, model_dir: Path, *, max_pixels: int | None) -> Images | None:
    """Return the object that converts images for a model. Returns None if no images are supported for the model.

    Raises ConfigError if the image processor of the folder cannot be opened, if `max_pixels` is too small for it, or if
    the image token has different ids in the tokenizer and in the model.
    """
    reader = READERS.get(model.config.model_type)

    if reader is not None:
        return reader(model, tokenizer, model_dir, max_pixels)

    if max_pixels is not None:
        logger.warning('--max_pixels has no effect: images are not supported for this model')

    return None


def open_images_of_folder(
    config: Mapping[str, Any], tokenizer: Any, model_dir: Path, *, max_pixels: int | None
) -> Images | None:
    """Return the object that converts images for the model in a folder. The model is not opened.

    `config` is the content of config.json in the folder. Returns None if no images are supported for the model. Raises
    ConfigError for the reasons of `open_images`, or if config.json has a value that is not supported.
    """
    family = find_family(config) if 'visual' in config else None
    settings = {**config, **family.config(config), 'model_type': family.saved_model_type} if family else dict(config)
    if settings.get('model_type') not in READERS:
        return None

    unopened = SimpleNamespace(config=SimpleNamespace(**settings))
    return open_images(unopened, tokenizer, model_dir, max_pixels=max_pixels)
