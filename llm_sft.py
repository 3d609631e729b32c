#!/usr/bin/env python
"""Fine-tune a model: parse, resolve, act. Every step below is one call into utils/."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from utils import dist, hub
from utils.argument import SftArguments, parse
from utils.dataset import get_dataset
from utils.errors import ConfigError
from utils.logger import logger
from utils.machine_check import check_machine_sft
from utils.model import locate
from utils.resolution import Resolution, run_name
from utils.resolve import SFT_ARGS, resolve_sft
from utils.run_dir import check_resumed, make_run_dir, run_record, write_json
from utils.start import open_model, run_program, start_processes


def main(argv: Sequence[str] | None = None) -> int:
    """Run a fine-tuning from its command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    parsed = parse(SftArguments, words, program='llm_sft.py', about='Fine-tune a large language model.')
    return run_program(lambda: train(resolve_sft(parsed)))


def train(done: Resolution[SftArguments]) -> None:
    """Train as resolved. Everything the user can get wrong is found before anything heavy is imported."""
    started = time.time()
    check_machine_sft(done)
    done.problems.raise_if_any()
    args, info = done.args, done.info
    assert info is not None, 'resolved without problems'
    rows = get_dataset(
        args.dataset,
        seed=args.dataset_seed,
        test_ratio=args.dataset_test_ratio,
        train_sample=args.train_dataset_sample,
    )

    start_processes(args.ddp_backend)
    weights = locate(info, revision=args.model_revision)
    record = run_record(args, system_typed='system' in done.typed, base_model=weights.record(info))
    if args.resume_from_checkpoint:
        done.warnings += check_resumed(Path(args.resume_from_checkpoint), record)
    run_dir = Path(
        dist.broadcast_text(str(make_run_dir(Path(args.output_dir), run_name(args))) if dist.is_main() else '')
    )
    if dist.is_main():
        write_json(run_dir / SFT_ARGS, record)
    logger.info(f'run folder: {run_dir}')
    for line in [*done.decisions, f'base weights = {weights.path} because {weights.reason}']:
        logger.info(line)
    for line in done.warnings:
        logger.warning(line)

    from transformers import set_seed

    from utils.auto_encoder import make_encoder
    from utils.collator import Collator
    from utils.encoding import encode_split, length_statistics, log_report, show_sample
    from utils.generation import generation_config
    from utils.push import PushCallback
    from utils.report import finish_run, interrupted
    from utils.trainer import SftTrainer, compute_loss_metrics, generation_metrics, training_arguments
    from utils.tuner import prepare_model

    set_seed(args.seed)
    model, tokenizer, dtype = open_model(args, info, weights, trains=True)
    encoder = make_encoder(
        tokenizer,
        template_type=str(args.template_type),
        system=args.system,
        system_typed='system' in done.typed,
        max_length=args.max_length,
    )
    train_rows, val_rows, _, report = encode_split(encoder, rows.train, rows.val, rows.left_out)
    statistics = {'train': length_statistics(train_rows), 'validation': length_statistics(val_rows)}
    log_report(report, statistics)
    sample = show_sample(tokenizer, train_rows[0])
    logger.info(f'one row, the trained part between ⟦ and ⟧:\n{sample}')
    if dist.is_main():
        (run_dir / 'sample.txt').write_text(sample + '\n', encoding='utf-8')
    model = prepare_model(model, args)

    trainer = SftTrainer(
        run_record=record,
        generation=generation_config(args, tokenizer, encoder.stop_ids),
        model=model,
        args=training_arguments(args, run_dir, dtype=dtype, evaluates=len(val_rows) > 0),
        train_dataset=train_rows.longest_first() if args.test_oom_error else train_rows,
        eval_dataset=val_rows.longest_first() if len(val_rows) else None,
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        compute_metrics=generation_metrics(tokenizer) if args.predict_with_generate else compute_loss_metrics,
    )
    trainer.log_to(run_dir)
    if args.push_to_hub:
        token = hub.find_token(args.hub_token)
        assert token is not None, 'checked before'
        trainer.add_callback(PushCallback(args, token))
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except KeyboardInterrupt:
        raise ConfigError(interrupted(trainer, run_dir)) from None
    if dist.is_main():
        finish_run(trainer, run_dir, started=started, data={**statistics, **report.counts()})


if __name__ == '__main__':
    sys.exit(main())
