"""How each family sees: what an image is among its token ids, and which tensors it takes for the image's file."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError, error_text
from utils.base.logger import logger
from utils.formats.images import bad_image, image_size, open_upright, read_images

if TYPE_CHECKING:
    import torch


class Images(ABC):
    """The images of one model. Templates print `mark` for an image; its one `slot` is repeated for each feature."""

    mark: str
    slot: int

    @abstractmethod
    def count(self, path: str) -> int:
        """Return how many slots an image takes; reads the file's header alone. Raises BadImage."""

    @abstractmethod
    def pixels(self, paths: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return what the model takes for these images, decoded now, in this order; raises BadImage."""

    def per_token(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what the model takes beside ids (B, T) that hold images."""
        return {}

    def inputs(self, input_ids: torch.Tensor, paths: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the model's inputs beside ids (B, T) with these images, row by row; none without images."""
        return {**self.pixels(paths), **self.per_token(input_ids)} if paths else {}

    def example(self, tokenizer: Any, text: list[int]) -> dict[str, torch.Tensor]:
        """Return a model's inputs for a picture, a gradient, with ids of text after it: to compare two models by."""
        import torch
        from PIL import Image

        start, _, end = tokenizer(self.mark, add_special_tokens=False)['input_ids']
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / 'gradient.png')
            Image.linear_gradient('L').save(path)
            ids = torch.tensor([[start, *[self.slot] * self.count(path), end, *text]])
            return {'input_ids': ids, **self.inputs(ids, [path])}

    def save(self, folder: Path) -> None:
        """Write what a saved model needs to see again, beside its weights and config.json."""
        return

    def _check_slot(self, tokenizer: Any, token: str) -> None:
        if (found := tokenizer.convert_tokens_to_ids(token)) != self.slot:
            raise ConfigError(
                f"the tokenizer's {token} is id {found}, the model's is {self.slot}: they are not of one model. "
                'Get both from the same place.'
            )


class QwenVLImages(Images):
    """Qwen-VL of 2023: every image is a square of one size with the same number of features."""

    mark = '<img><imgpad></img>'

    def __init__(self, model: Any, tokenizer: Any, model_dir: Path, max_pixels: int | None) -> None:
        visual = model.config.visual
        self.slot = visual['image_start_id'] + 2
        self._features, self._side = visual['n_queries'], visual['image_size']
        self._check_slot(tokenizer, '<imgpad>')
        if max_pixels is not None:
            logger.warning(f'--max_pixels has no effect: every image becomes {self._side} x {self._side}')

    def count(self, path: str) -> int:
        image_size(path)  # a file that is gone or no image is found before training
        return int(self._features)

    def pixels(self, paths: Sequence[str]) -> dict[str, torch.Tensor]:
        return {'pixel_values': read_images(paths, self._side)}


class ProcessorImages(Images):
    """Models whose image processor comes with transformers: images keep their shape, larger ones take more slots."""

    mark = '<|vision_start|><|image_pad|><|vision_end|>'

    def __init__(self, model: Any, tokenizer: Any, model_dir: Path, max_pixels: int | None) -> None:
        from transformers import AutoImageProcessor

        self.slot = model.config.image_token_id
        self._check_slot(tokenizer, '<|image_pad|>')
        try:
            # The other backend resizes otherwise: one model would see two pictures.
            self._processor = AutoImageProcessor.from_pretrained(model_dir, backend='pil', trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f'the image processor in {model_dir} cannot be opened: {error_text(error)}') from error
        if max_pixels is not None:
            size = self._processor.size
            if max_pixels < size['shortest_edge']:
                raise ConfigError(f'--max_pixels takes {size["shortest_edge"]} or more here, got {max_pixels}.')
            size['longest_edge'] = max_pixels

    def count(self, path: str) -> int:
        width, height = image_size(path)
        try:
            patches = self._processor.get_number_of_image_patches(height, width)
        except ValueError as error:  # too narrow
            raise bad_image(path, 'is too narrow', f': {error}.') from error
        return int(patches // self._processor.merge_size**2)

    def pixels(self, paths: Sequence[str]) -> dict[str, torch.Tensor]:
        return dict(self._processor(images=[open_upright(path) for path in paths], return_tensors='pt'))

    def per_token(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {'mm_token_type_ids': (input_ids == self.slot).long()}

    def save(self, folder: Path) -> None:
        self._processor.save_pretrained(folder)


# config.json's model_type of the opened model -> what reads its images.
READERS: dict[str, Callable[[Any, Any, Path, int | None], Images]] = {
    'assay_qwen_vl': QwenVLImages,
    'qwen2_5_vl': ProcessorImages,
    'qwen3_vl': ProcessorImages,
}


def open_images(model: Any, tokenizer: Any, model_dir: Path, *, max_pixels: int | None) -> Images | None:
    """Return how this model sees, None for one that does not; raises ConfigError where its files do not tell."""
    reader = READERS.get(model.config.model_type)
    if reader is not None:
        return reader(model, tokenizer, model_dir, max_pixels)
    if max_pixels is not None:
        logger.warning('--max_pixels has no effect: the model sees no images')
    return None
