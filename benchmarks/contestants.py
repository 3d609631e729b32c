"""The trainers that benchmarks/train.py measures: same model, rows, batch and optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def _common(output: str, *, steps: int, batch: int, accumulation: int) -> dict[str, Any]:
    return {
        'output_dir': output, 'per_device_train_batch_size': batch, 'gradient_accumulation_steps': accumulation,
        'max_steps': steps, 'learning_rate': 1e-4, 'logging_steps': 1000, 'save_strategy': 'no', 'bf16': True,
        'use_cpu': not torch.cuda.is_available(), 'report_to': 'none', 'disable_tqdm': True,
        'gradient_checkpointing': False,
    }  # fmt: skip


def _lora(targets: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=32, lora_dropout=0.0, target_modules=targets, task_type='CAUSAL_LM')


def _label_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    from utils.encode.encoded import row_labels

    return [{'input_ids': row['input_ids'], 'labels': row_labels(row)} for row in rows]


def plain(model: Any, tokenizer: Any, rows: Any, output: str, *, targets: Any, steps: int, batch: int,
          accumulation: int, **_: Any) -> Any:  # fmt: skip
    """Return transformers' Trainer with PEFT and its padding collator."""
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return Trainer(
        model=model if targets is None else get_peft_model(model, _lora(targets)),
        args=TrainingArguments(**_common(output, steps=steps, batch=batch, accumulation=accumulation)),
        train_dataset=_label_rows(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )


def trl(model: Any, tokenizer: Any, rows: Any, output: str, *, targets: Any, variant: str, steps: int, batch: int,
        accumulation: int, max_length: int) -> Any:  # fmt: skip
    """Return TRL's SFTTrainer on tokenised rows; with packing, a step is all packs that the rows fill."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    masks = [[int(row['trained'][0] <= i < row['trained'][1]) for i in range(len(row['input_ids']))] for row in rows]
    packs = variant in ('trl_packing', 'trl_liger')
    data = Dataset.from_dict({'input_ids': [row['input_ids'] for row in rows], 'completion_mask': masks})
    common = _common(output, steps=steps, batch=1 if packs else batch, accumulation=accumulation)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **common,
            max_length=max_length,
            packing=packs,
            completion_only_loss=True,
            use_liger_kernel=variant == 'trl_liger',
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=None if targets is None else _lora(targets),
    )
    if packs:
        trainer.args.gradient_accumulation_steps = len(trainer.train_dataset)
    return trainer


def ours(model: Any, tokenizer: Any, rows: Any, output: str, *, targets: Any, variant: str, steps: int, batch: int,
         accumulation: int, max_length: int, checkpointing: bool = False,
         bf16_weights: bool = False) -> Any:  # fmt: skip
    """Return this project's trainer: on its fast path, or padded, with PEFT's layers and the class's own logits."""
    from utils.cli.arguments import SftArguments
    from utils.data.encode_plan import EncodedRows, PreparedData
    from utils.encode.encoded import Encoded
    from utils.infer.generation import generation_config
    from utils.loading.fingerprint import Fingerprint
    from utils.loading.weights import Weights
    from utils.run.folder import Run
    from utils.run.processes import start_processes
    from utils.run.record import RunRecord
    from utils.train.prepare import prepare_model
    from utils.train.trainer import TrainerSetup, make_trainer

    fast = variant == 'fast'
    if fast:
        start_processes('gloo')
    names = ['ALL'] if isinstance(targets, str) else targets
    args = SftArguments(
        sft_type='full' if targets is None else 'lora', lora_target_modules=names, batch_size=batch,
        gradient_accumulation_steps=accumulation, max_steps=steps, learning_rate=1e-4, dataloader_num_workers=0,
        tuner_backend='swift' if fast else 'peft', padding_free=None if fast else False, chunked_loss=fast,
        group_by_length=fast, fused_norms=fast, fused_mlp=fast, fused_rotary=fast, max_length=max_length,
        eval_batch_size=batch, save_steps=10_000, logging_steps=1000,
        warmup_ratio=0.0, only_save_model=True, gradient_checkpointing=checkpointing,
        full_weights='bf16' if bf16_weights else 'fp32',
    )  # fmt: skip
    train = EncodedRows()
    for row in rows:
        train.append(Encoded(**row))
    data = PreparedData(train=train, val=EncodedRows(), summary={})
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    Path(output).mkdir(parents=True, exist_ok=True)
    weights = Weights(path=Path(output), reason='', fingerprint=Fingerprint(sha256='', covers=''))
    run = Run(folder=Path(output), record=RunRecord(), weights=weights)
    setup = TrainerSetup(
        run=run,
        tokenizer=tokenizer,
        dtype=torch.bfloat16,
        generation=generation_config(args, tokenizer, []),
    )
    return make_trainer(args, prepare_model(model, args), data, setup)
