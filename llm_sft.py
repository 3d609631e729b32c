#!/usr/bin/env python
"""Fine-tunes a model: parses the command line, resolves the arguments, trains. Each step is one call into utils/.

Modules are imported in the function that needs them, so that --help and a wrong command are answered at once.
"""

from __future__ import annotations

if __name__ == '__main__':
    from utils.base.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base import dist
from utils.cli.arguments import SftArguments
from utils.cli.parser import Parsed, parse
from utils.run.program import run_program

if TYPE_CHECKING:
    import torch

    from utils.cli.resolution import Ready, Resolution
    from utils.data.encode_plan import PreparedData
    from utils.data.plan import Plan
    from utils.data.stream_parts import Streams
    from utils.encode.encoder import Encoder
    from utils.infer.before_after import BeforeAfter
    from utils.infer.scores import Scores
    from utils.run.folder import Run
    from utils.train.row_losses import RowLosses
    from utils.train.trainer import SftTrainer


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says (train, or only run checks), and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    parsed = parse(SftArguments, words, program='llm_sft.py', about='Fine-tune a large language model.')
    if parsed.args.doctor:
        from utils.checks.machine import check_machine

        return run_program(lambda: check_machine(parsed))
    return run_program(lambda: train(resolve(parsed, words), parsed))


def resolve(now: Parsed[SftArguments], words: Sequence[str]) -> Resolution[SftArguments]:
    """Return the resolved command line. Flags that are typed now replace the flags of the run in --from_run.

    With --adapter, flags such as --lora_rank are taken from the files of the adapter, unless they are typed. Problems
    are collected, not raised. `words` are the words of the command line.
    """
    from utils.cli.resolve import resolve_sft
    from utils.run.lineage import fill_from_adapter
    from utils.run.lock import repeat
    from utils.run.new_tokens import check_new_tokens

    parsed = repeat(now, words)
    decisions: list[str] = []
    warnings: list[str] = []
    filled = fill_from_adapter(parsed, decisions, warnings)
    check_new_tokens(filled)
    resolved = resolve_sft(filled)
    resolved.decisions[:0] = decisions
    resolved.warnings[:0] = warnings
    return resolved


def train(resolved: Resolution[SftArguments], now: Parsed[SftArguments]) -> int:
    """Train with the resolved arguments, and return the exit code.

    With --check_dataset or --dry_run, nothing is trained. If --resume_from_checkpoint last finds a complete run,
    nothing is trained either. `now` is the command line that was typed now, without the flags of the run in --from_run.
    Arguments, files and data are checked before torch is imported, so that a wrong command fails quickly.
    """
    from utils.cli.machine import settle_sft
    from utils.run.folder import in_progress, log_decisions, open_run, removed_at_end
    from utils.run.last import resume_last
    from utils.run.open_model import find_weights
    from utils.run.processes import leave_out_unused, start_processes
    from utils.run.rows import keep_held_out, lock_of, rows_of

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
    leave_out_unused(args, done.info, weights.path)
    data = lock_of(rows, args)
    if resume_last(done, weights, data):
        return 0

    run = open_run(done, weights, data, now.typed)
    with removed_at_end(run.folder, removes=args.verify), in_progress(run.folder):
        keep_held_out(rows, run.folder)
        return carry_out(done, run, rows, now, started=started)


def carry_out(
    done: Ready[SftArguments], run: Run, rows: Plan | Streams, now: Parsed[SftArguments], *, started: float
) -> int:
    """Load the model, encode the rows, train, and write the results of checks and the report to the run folder.

    Returns the exit code. Raises Stopped if a signal ended the training. With --verify true, steps of the run in
    --from_run are repeated and compared, and there is no report. `started` is the time when the program started, as
    time.time returns it. --max_minutes counts from this time.
    """
    from transformers import set_seed

    from utils.data.parts import TRAIN
    from utils.data.stream_parts import some_rows
    from utils.infer.before_after import BeforeAfter
    from utils.proofs.repetition import verify
    from utils.proofs.template import ROWS, prove_template
    from utils.proofs.time_trial import keep_to_time
    from utils.report.finish import finish_run, stopped
    from utils.run.lock import steps_to_verify

    args = done.args
    set_seed(args.seed)
    opened = open_for_training(done, run)
    check_template(done, run, opened.encoder, now)
    prove_template(opened.encoder, some_rows(rows, TRAIN, ROWS), run.folder)
    data = encode(done, run, rows, opened.encoder)

    asked = BeforeAfter(args, opened.encoder, rows, opened.model.generation_config)
    asked.ask_before(opened.model, args)
    trainer = prepare_training(done, run, opened, rows, data, asked)
    row_losses = add_checks(trainer, args, run, opened.encoder, data)
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


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A loaded base model, its encoder (it turns rows into token ids), the dtype of the computation, and the scores.

    `token_ids` are the ids of the tokens that the run adds to the tokenizer (--new_tokens). `scores` are the functions
    of --score, or None without --predict_with_generate.
    """

    model: Any
    encoder: Encoder
    token_ids: list[int]
    dtype: torch.dtype
    scores: Scores | None


def open_for_training(done: Ready[SftArguments], run: Run) -> Opened:
    """Open the base model and make its encoder.

    With --predict_with_generate, files of --score are executed first, so that their errors show early. With LoRA, logs
    a warning if the base model never learnt the token that ends a turn and the run does not train it either.
    """
    from utils.infer.scores import Scores
    from utils.loading.image_processors import open_images
    from utils.loading.new_tokens import add_tokens, check_rows
    from utils.run.open_model import open_encoder, open_model
    from utils.train.end_token import warn_of_untrained_ends

    args = done.args
    scores = Scores(args.score) if args.predict_with_generate else None
    model, tokenizer, dtype = open_model(args, done.info, run.weights, trains=True, decide=run.decide)
    token_ids = add_tokens(model, tokenizer, run.record.added_tokens)
    if earlier := args.resume_from_checkpoint or args.adapter:
        check_rows(Path(earlier), token_ids)
    images = open_images(model, tokenizer, run.weights.path, max_pixels=args.max_pixels)
    system_typed = 'system' in done.typed
    encoder = open_encoder(args, tokenizer, system_typed=system_typed, model=model, images=images, new_ids=token_ids)
    if args.sft_type == 'lora' and not args.lora_modules_to_save:
        warn_of_untrained_ends(model, tokenizer, encoder.stop_ids, trained=token_ids)
    return Opened(model=model, encoder=encoder, token_ids=token_ids, dtype=dtype, scores=scores)


def check_template(done: Ready[SftArguments], run: Run, encoder: Encoder, now: Parsed[SftArguments]) -> None:
    """Record the template of the run, and compare it with the template of earlier runs.

    Raises ConfigError if the template has changed since the run that --from_run, --resume_from_checkpoint or --adapter
    names. It is no error if --template_type differs from that run. With --from_run and --adapter, it is also no error
    if the user typed --chat_template or --template_settings; with --adapter, a warning is logged.
    """
    from utils.base.names import TEMPLATE_FLAGS
    from utils.proofs.template import check_trained_template, note_template
    from utils.run.record import Trained, check_resumed_template, find_record

    args = done.args
    note_template(run, encoder, None if set(TEMPLATE_FLAGS) & now.typed else args.from_run)
    if args.resume_from_checkpoint is not None:
        check_resumed_template(Path(args.resume_from_checkpoint), run.record)
    if args.adapter is not None and (record := find_record(Path(args.adapter))):
        started_from = Trained(checkpoint=Path(args.adapter), record=record)
        check_trained_template(encoder, started_from, typed=done.typed)


def encode(done: Ready[SftArguments], run: Run, rows: Plan | Streams, encoder: Encoder) -> PreparedData:
    """Return the encoded rows of the run. With `Streams`, the training rows are encoded later, during training."""
    from utils.data.encode_plan import prepare_data
    from utils.data.plan import Plan
    from utils.data.stream import prepare_stream
    from utils.proofs.template import note_thinking

    args = done.args
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
    return data


def prepare_training(
    done: Ready[SftArguments], run: Run, opened: Opened, rows: Plan | Streams, data: PreparedData, asked: BeforeAfter
) -> SftTrainer:
    """Give the model its adapter or make its weights trainable, and return the trainer of the run.

    With --adapter, the model answers the rows of the report before training. `asked` keeps these answers.
    """
    from utils.export.push_queue import push_while_training
    from utils.run.rows import held_out_rows
    from utils.train.prepare import prepare_model, say_what_all_adds
    from utils.train.trainer import build_trainer

    args = done.args
    chosen_by_model = args.adapter is None and 'lora_target_modules' not in done.typed
    if chosen_by_model and (line := say_what_all_adds(opened.model, args)):
        run.say(line)
    model = prepare_model(
        opened.model,
        args,
        run.decide,
        base=run.weights.path,
        family=done.info.family,
        token_ids=opened.token_ids,
    )
    if args.adapter is not None:
        asked.ask_now(model)

    scores = opened.scores
    held_out = held_out_rows(rows, args.stream_val_rows) if scores is not None and scores.functions else None
    trainer = build_trainer(
        args, run, model, opened.encoder, data, dtype=opened.dtype, scores=scores, held_out=held_out
    )
    if args.push_to_hub:
        trainer.add_callback(push_while_training(args, run.folder, data.summary))
    return trainer


def add_checks(trainer: SftTrainer, args: SftArguments, run: Run, encoder: Encoder, data: PreparedData) -> RowLosses:
    """Check the loss mask now, and give the trainer the checks that run when training begins.

    Returns the RowLosses callback.
    """
    from utils.proofs.first_step import FirstStepGate
    from utils.proofs.loss_mask import MASK_ROWS, prove_mask
    from utils.proofs.loss_value import LossProof
    from utils.train.row_losses import RowLosses

    checked = data.spread(MASK_ROWS)
    prove_mask(checked, data.summary, trainer.data_collator, encoder, run.folder)
    row_losses = RowLosses(
        trainer, args.compare_rows, args.resume_from_checkpoint, from_adapter=run.record.lineage is not None
    )
    trainer.add_callback(row_losses)
    trainer.add_callback(LossProof(trainer, checked))
    if args.preflight:
        trainer.add_callback(FirstStepGate(trainer, resumed_from=args.resume_from_checkpoint))
    return row_losses


if __name__ == '__main__':
    sys.exit(main())
