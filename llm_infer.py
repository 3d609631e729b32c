#!/usr/bin/env python
"""Use a model: answer the validation rows, chat, or merge an adapter. Every step is one call into utils/."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.base import dist
from utils.base.errors import ConfigError, Problems
from utils.base.logger import logger
from utils.cli.arguments import InferArguments
from utils.cli.machine import settle_infer
from utils.cli.parser import Parsed, parse
from utils.cli.resolution import Ready
from utils.cli.resolve import resolve_infer
from utils.loading.folder import is_adapter
from utils.loading.image_processors import open_images
from utils.loading.weights import Weights
from utils.run.folder import log_decisions, result_path
from utils.run.open_model import find_weights, open_encoder, open_model
from utils.run.processes import start_processes
from utils.run.program import run_program
from utils.run.record import check_base, fill_from_run, open_checkpoint
from utils.run.rows import rows_to_answer


def main(argv: Sequence[str] | None = None) -> int:
    """Run inference from its command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    parsed = parse(InferArguments, words, program='llm_infer.py', about='Answer rows, chat, or merge an adapter.')
    return run_program(lambda: infer(parsed))


def infer(parsed: Parsed[InferArguments]) -> None:
    """Do what the arguments ask; the trained run supplies those that were not typed."""
    checkpoint = Path(parsed.args.ckpt_dir) if parsed.args.ckpt_dir else None
    record: dict[str, Any] | None = None
    warnings: list[str] = []
    if checkpoint is not None:
        record = open_checkpoint(checkpoint, parsed.problems)
        parsed = fill_from_run(parsed, record, warnings)
    elif not parsed.typed & {'model_type', 'model_id_or_path'}:
        parsed.problems.add('give --ckpt_dir, or name an untuned model with --model_type or --model_id_or_path.')
    resolved = resolve_infer(parsed)
    resolved.warnings += warnings
    done = settle_infer(resolved)
    if record is not None and 'dtype' not in done.typed and 'dtype' in record.get('asked', {}):
        done.decide('dtype', done.args.dtype, 'the run was trained in it')
    log_decisions(done)
    logged = len(done.warnings)
    rows = None
    if done.args.reads_data:
        rows = rows_to_answer(done, record, checkpoint)
        if not rows:
            raise ConfigError(
                'no validation row to answer: the run held none out. Use --eval_human true, or other data.'
            )

    start_processes('gloo')
    weights = find_weights(done)
    if checkpoint is not None and record is not None and is_adapter(checkpoint):
        problems = Problems()
        check_base(record, weights.record(done.info), problems)
        problems.raise_if_any()
    for line in done.warnings[logged:]:
        logger.warning(line)
    _act(done, weights, checkpoint, record, rows)


def _act(
    done: Ready[InferArguments],
    weights: Weights,
    checkpoint: Path | None,
    record: dict[str, Any] | None,
    rows: Any,
) -> None:
    from transformers import set_seed

    from utils.export.merge import merge_checkpoint
    from utils.infer.answers import answer_rows
    from utils.infer.chat import chat
    from utils.infer.generation import generation_config, served_config
    from utils.loading.adapter import load_adapter
    from utils.loading.save import export_native
    from utils.proofs.template import ask_as_trained, check_trained_template

    args, info = done.args, done.info
    set_seed(args.seed + dist.rank())
    model, tokenizer, _ = open_model(args, info, weights, trains=False)
    images = open_images(model, tokenizer, weights.path, max_pixels=args.max_pixels)
    if checkpoint is not None and is_adapter(checkpoint):
        model = load_adapter(model, checkpoint, weights.path, info.family)
    model.eval()
    if args.export_native:
        export_native(model, tokenizer, Path(str(args.output_dir)), images)
        logger.info(f'written: {args.output_dir}, for AutoModelForCausalLM or --model_id_or_path')
        return
    system_typed = 'system' in done.typed or bool(record and record['system_typed'])
    encoder = open_encoder(args, tokenizer, system_typed=system_typed, model=model, images=images)
    if checkpoint is not None and record is not None:
        check_trained_template(encoder, record, checkpoint, typed='template_type' in done.typed)
        ask_as_trained(encoder, record)
    config = generation_config(args, tokenizer, encoder.stop_ids, model.generation_config)
    if args.merge_lora_and_save:
        assert checkpoint is not None and record is not None, 'checked'
        served = served_config(model.generation_config, config, args, done.typed)
        target, proven = merge_checkpoint(model, encoder, served, checkpoint, record=record, images=images)
        logger.info(f'merged: {target}: {proven}\nnext: python llm_infer.py --ckpt_dir {target}')
        return
    model.generation_config = config
    if args.save_generation_config and checkpoint is not None and dist.is_main():
        config.save_pretrained(checkpoint)
    if args.eval_human:
        chat(model, tokenizer, encoder, config, streams=args.use_streamer)
    else:
        answer_rows(model, tokenizer, encoder, config, rows, args=args, target=result_path(args))


if __name__ == '__main__':
    sys.exit(main())
