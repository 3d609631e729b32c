"""Measures how far training has moved the model on texts that it is not trained on (eval_drift_kl)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel

if TYPE_CHECKING:
    from utils.train.trainer import SftTrainer


def neutral_texts() -> list[str]:
    """Return the fixed texts, in English and Chinese. They come with this project and never contain user data."""
    texts: list[str] = json.loads(Path(__file__).with_name('neutral_texts.json').read_text(encoding='utf-8'))
    return texts


class Drift:
    """Compares the model with its base on the neutral texts. The base is the model with its adapter switched off."""

    def __init__(self, trainer: SftTrainer) -> None:
        self.trainer = trainer
        # The texts are not rendered by the chat template. A tokenizer may need one id for a short text, and then no
        # token is predicted from the text.
        encoded = [trainer.processing_class(text)['input_ids'] for text in neutral_texts()]
        self.rows = [
            {'input_ids': ids, 'trained': (0, len(ids)), 'prompt_length': 0, 'row': index}
            for index, ids in enumerate(encoded)
            if len(ids) > 1
        ]

    def measure(self) -> float:
        """Return KL(base || tuned) in nats: the mean over all predicted tokens of the neutral texts.

        The model must be in evaluation mode. Each process measures this value separately. No random numbers are used.
        """
        trainer = self.trainer
        model: Any = trainer.model
        assert isinstance(model, PeftModel), 'the flag is for lora'
        batch = trainer._prepare_inputs(trainer.data_collator(self.rows))
        with trainer.accelerator.autocast():
            return trainer.scorer.divergence(model, model.disable_adapter, batch)
