#!/usr/bin/env python
"""Fine-tunes a model: parses the command line, resolves the arguments, trains. Each step is one call into utils/."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from utils.base import dist
from utils.base.names import TEMPLATE_FLAGS
from utils.cli.arguments import SftArguments
from utils.cli.machine import settle_sft
from utils.cli.parser import Parsed, parse
from utils.cli.resolution import Ready, Resolution
from utils.cli.resolve import resolve_sft
from utils.data.parts import TRAIN
from utils.data.plan import Plan
from utils.data.stream_parts import Streams, some_rows
from utils.run.folder import Run, log_decisions, open_run, removed_at_end
from utils.run.last import resume_last
from utils.run.lineage import fill_from_adapter
from utils.run.lock import repeat, steps_to_verify
from utils.run.open_model import find_weights, open_encoder, open_model
from utils.run.processes import start_processes
from utils.run.program import run_program
from utils.run.record import Trained, check_resumed_template, find_record
from utils.run.rows import held_out_rows, keep_held_out, lock_of, rows_of


def main(argv: Sequence[str] | None = None) -> int:
    """Fine-tune a model as the command line says, and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    parsed = parse(SftArguments, words, program='llm_sft.py', about='Fine-tune a large language model.')
    whole = repeat(parsed, words)
    if parsed.args.doctor:
        from utils.checks.machine import check_machine

        return run_program(lambda: check_machine(parsed))
    return run_program(lambda: train(resolve(whole), parsed))


def resolve(parsed: Parsed[SftArguments]) -> Resolution[SftArguments]:
    """Return the resolved command line. Flags that the adapter of --adapter decides are taken from it."""
    decisions: list[str] = []
    warnings: list[str] = []
    resolved = resolve_sft(fill_from_adapter(parsed, decisions, warnings))
    resolved.decisions[:0] = decisions
    resolved.warnings[:0] = warnings
    return resolved


def train(resolved: Resolution[SftArguments], now: Parsed[SftArguments]) -> int:
    """Train with the resolved arguments, and return the exit code. With --check_dataset or --dry_run, do not train.

    `now` is the command line that was typed now, without the flags of the run in --from_run. Arguments, files and data
    are checked before torch is imported, so that a wrong command fails quickly.
    """
    started = time.time()
    done = settle_sft(resolved)
    args = done.args

    if args.check_dataset:
        from utils.checks.dataset import check_dataset

        return check_dataset(done)
    if args.dry_run:
        from utils.estimate.dry_run import dry_run

        return dry_run(done)

    log_decisions(done)
    rows = rows_of(done)

    start_processes(
        args.ddp_backend, deepspeed=args.deepspeed_config_path is not None, deterministic=args.deterministic
    )
    weights = find_weights(done)
    data = lock_of(rows, args)
    if resume_last(done, weights, data):
        return 0

    run = open_run(done, weights, data, now.typed)
    with removed_at_end(run.folder, removes=args.verify):
        keep_held_out(rows, run.folder)
        return carry_out(done, run, rows, now, started=started)


def carry_out(
    done: Ready[SftArguments], run: Run, rows: Plan | Streams, now: Parsed[SftArguments], *, started: float
) -> int:
    """Load the model, encode the rows, train, and write the proofs and the report to the run folder.

    Returns the exit code. With --verify true, steps of a run are repeated and compared, and there is no report.
    """
    from transformers import set_seed

    from utils.data.encode_plan import prepare_data
    from utils.data.stream import prepare_stream
    from utils.export.push_queue import push_while_training
    from utils.infer.before_after import BeforeAfter
    from utils.infer.scores import Scores
    from utils.loading.image_processors import open_images
    from utils.proofs.first_step import FirstStepGate
    from utils.proofs.loss_mask import MASK_ROWS, prove_mask
    from utils.proofs.loss_value import LossProof
    from utils.proofs.repetition import verify
    from utils.proofs.template import ROWS, check_trained_template, note_template, note_thinking, prove_template
    from utils.proofs.time_trial import keep_to_time
    from utils.report.finish import finish_run, stopped
    from utils.train.end_token import warn_of_untrained_ends
    from utils.train.prepare import prepare_model, say_what_all_adds
    from utils.train.row_losses import RowLosses
    from utils.train.trainer import build_trainer

    args = done.args
    set_seed(args.seed)
    scores = Scores(args.score) if args.predict_with_generate else None
    model, tokenizer, dtype = open_model(args, done.info, run.weights, trains=True, decide=run.decide)
    images = open_images(model, tokenizer, run.weights.path, max_pixels=args.max_pixels)
    system_typed = 'system' in done.typed
    encoder = open_encoder(args, tokenizer, system_typed=system_typed, model=model, images=images)
    if args.sft_type == 'lora' and not args.lora_modules_to_save:
        warn_of_untrained_ends(model, tokenizer, encoder.stop_ids)

    note_template(run, encoder, None if set(TEMPLATE_FLAGS) & now.typed else args.from_run)
    if args.resume_from_checkpoint is not None:
        check_resumed_template(Path(args.resume_from_checkpoint), run.record)
    if args.adapter is not None and (record := find_record(Path(args.adapter))):
        started_from = Trained(checkpoint=Path(args.adapter), record=record)
        check_trained_template(encoder, started_from, typed=done.typed)
    prove_template(encoder, some_rows(rows, TRAIN, ROWS), run.folder)

    if isinstance(rows, Plan):
        data = prepare_data(encoder, rows, run.folder, samples=args.show_samples)
    else:
        data = prepare_stream(
            encoder,
            rows,
            run.folder,
            val_rows=args.stream_val_rows,
            seed=args.dataset_seed,
            samples=args.show_samples,
        )
    note_thinking(run, encoder, data.switched)

    asked = BeforeAfter(args, encoder, rows, model.generation_config)
    asked.ask_before(model, args)

    if args.adapter is None and 'lora_target_modules' not in done.typed and (line := say_what_all_adds(model, args)):
        run.say(line)
    model = prepare_model(model, args, run.decide, base=run.weights.path, family=done.info.family)
    if args.adapter is not None:
        asked.ask_now(model)
    own_scores = scores is not None and scores.functions
    held_out = held_out_rows(rows, args.stream_val_rows) if own_scores else None
    trainer = build_trainer(args, run, model, encoder, data, dtype=dtype, scores=scores, held_out=held_out)
    if args.push_to_hub:
        trainer.add_callback(push_while_training(args, run.folder, data.summary))

    checked = data.spread(MASK_ROWS)
    prove_mask(checked, data.summary, trainer.data_collator, encoder, run.folder)
    row_losses = RowLosses(trainer, args.compare_rows, args.resume_from_checkpoint)
    trainer.add_callback(row_losses)
    trainer.add_callback(LossProof(trainer, checked))
    if args.preflight:
        trainer.add_callback(FirstStepGate(trainer, resumed_from=args.resume_from_checkpoint))
    keep_to_time(trainer, args, now.typed, started=started)
    if args.verify:
        return verify(trainer, args, run, steps=steps_to_verify(now))

    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.stopped:
        raise stopped(trainer, run.folder, done)

    row_losses.finish()
    summary = data.final()
    if dist.is_main():
        finish_run(args, trainer, run, started=started, data=summary, asked=asked)
    return 0


if __name__ == '__main__':
    sys.exit(main())
