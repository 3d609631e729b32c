"""Generates answers to a few rows before and after training, for the report."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from utils.base import dist
from utils.base.files import write_json
from utils.base.logger import logger
from utils.cli.arguments import SftArguments
from utils.cli.deepspeed import shards_weights
from utils.data.parts import TRAIN, VAL
from utils.data.plan import Plan
from utils.data.stream_parts import Streams, some_rows
from utils.encode.encoded import RowRefused
from utils.encode.encoder import Encoder
from utils.formats.conversation import Row
from utils.infer.generation import generate_batch, generation_config, wanted_texts
from utils.run.record import ANSWERS_JSON

# The largest number of tokens in an answer. It is enough to show a change, and costs little time.
_NEW_TOKENS = 64


class BeforeAfter:
    """Chooses a few rows, and generates answers to these rows with the untrained model and with the trained model.

    The rows are validation rows. If there are none, they are training rows. Rows with images are left out. If the
    weights are sharded over the processes, no rows are chosen.

    The main process generates all answers in one batch, without sampling. Plain text has no question, so the model
    continues the beginning of the text.

    The trained model answers after training. The flags decide when the untrained model answers:
    - With --sft_type full, it answers before training.
    - With --adapter, it answers before training. The untrained model is then the base model with the loaded adapter.
    - With a new LoRA adapter, it answers after training, with the adapter switched off.
    """

    def __init__(self, args: SftArguments, encoder: Encoder, rows: Plan | Streams, base: Any = None) -> None:
        self.encoder = encoder
        self.split = 'validation'
        self.before: list[str] = []
        settings = dataclasses.replace(args, max_new_tokens=_NEW_TOKENS, do_sample=False, repetition_penalty=1.0)
        self.config = generation_config(settings, encoder.tokenizer, encoder.stop_ids, base)
        self.rows: list[Row] = []
        self.prompts: list[list[int]] = []

        if args.report_samples and shards_weights(args):
            logger.info('the report will have no answers, because the weights are sharded over the processes')
        elif dist.is_main():
            chosen = some_rows(rows, VAL, args.report_samples)
            if not chosen:
                self.split = 'training'
                chosen = some_rows(rows, TRAIN, args.report_samples)
            for row in chosen:
                if row.images:
                    continue
                with contextlib.suppress(RowRefused):  # a refused row is reported when all rows are encoded
                    self.prompts += encoder.encode_prompts([row])
                    self.rows.append(row)

    def ask(self, model: Any) -> list[str]:
        """Return the model's answer to each chosen row. In all processes except the main process, the list is empty.

        The list is also empty if no row was chosen. The mode of the model (training or evaluation) is restored
        afterwards.
        """
        if not self.rows:
            return []
        was_training = model.training
        model.eval()
        answers = generate_batch(model, self.prompts, self.config)
        model.train(was_training)
        return [self.encoder.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]

    def ask_before(self, model: Any, args: SftArguments) -> None:
        """Generate the answers of the untrained model if --sft_type is full. Does nothing if --sft_type is lora.

        With LoRA, either the caller calls `ask_now` later, or `write` generates these answers.
        """
        if args.sft_type == 'full':
            self.ask_now(model)

    def ask_now(self, model: Any) -> None:
        """Generate answers with `model`, and keep them as the answers of the untrained model."""
        self.before = self.ask(model)

    def write(self, model: Any, run_dir: Path) -> None:
        """Generate the answers of the trained model, and write all answers to answers.json in the run folder.

        If no row was chosen, nothing is written. The answers of the untrained model are generated too, if they do not
        exist yet.
        """
        if not self.rows:
            return
        if not self.before:
            with model.disable_adapter():
                self.before = self.ask(model)
        after = self.ask(model)

        texts = wanted_texts(self.encoder, self.rows, self.config)
        decode = self.encoder.tokenizer.decode
        content = [
            {
                'split': self.split,
                **_asked(row, decode(ids, skip_special_tokens=True), wanted),
                'tools': row.tools,
                'wanted': wanted,
                'before': before,
                'after': now,
            }
            for row, ids, wanted, before, now in zip(self.rows, self.prompts, texts, self.before, after, strict=True)
        ]
        write_json(run_dir / ANSWERS_JSON, content)


def _asked(row: Row, prompt: str, wanted: str) -> dict[str, Any]:
    """Return a dict with the messages of a row, for answers.json.

    For plain text, the only message is the whole text: `prompt` followed by `wanted`. The dict then also has `prompt`,
    under the key 'beginning'.
    """
    if not row.is_text:
        return {'messages': row.messages}
    return {'messages': [{'role': 'assistant', 'content': prompt + wanted}], 'beginning': prompt}
