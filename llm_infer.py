#!/usr/bin/env python
"""Uses a model: answers rows, checks a server, chats, merges or exports. Each step is one call into utils/.

Modules are imported in the function that needs them, so that --help and a wrong command are answered at once.
"""

from __future__ import annotations

if __name__ == '__main__':
    from utils.base.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base import dist
from utils.base.errors import ConfigError, Problems
from utils.base.logger import logger
from utils.cli.arguments import InferArguments
from utils.cli.parser import Parsed, parse
from utils.run.program import run_program

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from utils.cli.resolution import Ready
    from utils.encode.encoder import Encoder
    from utils.formats.conversation import Row
    from utils.infer.scores import Scores
    from utils.loading.image_processors import Images
    from utils.loading.weights import Weights
    from utils.run.record import Trained
    from utils.serve.client import Server


def main(argv: Sequence[str] | None = None) -> int:
    """Run inference as the command line says, and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    parsed = parse(InferArguments, words, program='llm_infer.py', about='Answer rows, chat, or merge an adapter.')
    return run_program(lambda: infer(parsed))


def infer(parsed: Parsed[InferArguments]) -> int:
    """Answer rows, check a server, chat, merge or export, as the arguments say. Returns the exit code.

    Arguments and data are checked before torch is imported, so that a wrong command fails quickly.
    """
    from utils.run.folder import log_decisions
    from utils.run.open_model import find_weights
    from utils.run.processes import leave_out_unused, start_processes

    done, trained = resolve(parsed)
    args = done.args
    log_decisions(done)
    logged = len(done.warnings)
    rows = find_rows(done, trained) if args.reads_data else []
    scores = load_scores(args) if args.reads_data and args.check_server is None else None
    server = reach_server(args) if args.check_server is not None else None

    start_processes('gloo')
    weights = find_weights(done)
    leave_out_unused(args, done.info, weights.path)
    check_weights(done, trained, weights)
    for line in done.warnings[logged:]:
        logger.warning(line)

    if args.export_native:
        export(done, weights)
        return 0
    served = open_served(done, trained, weights)
    if args.merge_lora_and_save or args.gguf is not None:
        assert trained is not None, 'checked'
        device = served.model.device  # merging frees the model
        folder = merge(done, trained, served, weights) if args.merge_lora_and_save else trained.checkpoint
        if args.gguf is not None:
            write_file(done, trained, served, folder, device)
        return 0
    if server is not None:
        return check(done, trained, served, rows, server)
    apply_settings(done, trained, served)
    if args.eval_human:
        chat(done, served)
    else:
        assert scores is not None, 'rows are answered'
        answer(done, served, rows, scores)
    return 0


def resolve(parsed: Parsed[InferArguments]) -> tuple[Ready[InferArguments], Trained | None]:
    """Return the resolved arguments, and the checkpoint of --ckpt_dir (None without --ckpt_dir).

    Flags of training that were not typed are taken from the record of the run that wrote the checkpoint. Raises
    ConfigError if there are problems.
    """
    from utils.cli.machine import settle_infer
    from utils.cli.resolve_infer import resolve_infer
    from utils.run.record import fill_from_run, open_checkpoint

    trained: Trained | None = None
    warnings: list[str] = []
    if parsed.args.ckpt_dir:
        trained = open_checkpoint(Path(parsed.args.ckpt_dir), parsed.problems)
        parsed = fill_from_run(parsed, trained, warnings)
    elif not parsed.typed & {'model_type', 'model_id_or_path'}:
        parsed.problems.add('give --ckpt_dir, or name an untuned model with --model_type or --model_id_or_path.')

    resolved = resolve_infer(parsed)
    resolved.warnings += warnings
    done = settle_infer(resolved)
    if trained is not None and 'dtype' not in done.typed and 'dtype' in trained.record.asked:
        done.decide('dtype', done.args.dtype, 'the run was trained in it')
    if trained is not None and done.args.chat_template == str(trained.checkpoint):
        done.decide('chat_template', done.args.chat_template, 'the checkpoint holds the one of its run')
    return done, trained


def find_rows(done: Ready[InferArguments], trained: Trained | None) -> list[Row]:
    """Return the rows to answer. Raises ConfigError if there are no rows."""
    from utils.run.rows import rows_to_answer

    rows = rows_to_answer(done, trained)
    if not rows:
        raise ConfigError(
            'there are no validation rows to answer. Use --eval_human true to chat, or name rows with --val_dataset.'
        )
    return rows


def load_scores(args: InferArguments) -> Scores:
    """Return the scores that --score names. A Python file in --score is executed now, so that its errors show early."""
    from utils.infer.scores import Scores

    return Scores(args.score)


def reach_server(args: InferArguments) -> Server:
    """Return the client of the server of --check_server.

    Raises ConfigError if the server does not answer, or if it lists several models and --served_model is not typed.
    """
    from utils.serve.client import reach

    return reach(str(args.check_server), args.served_model)


def check_weights(done: Ready[InferArguments], trained: Trained | None, weights: Weights) -> None:
    """Raise ConfigError if the checkpoint is an adapter that was trained on different base weights."""
    from utils.loading.folder import is_adapter
    from utils.run.record import check_base

    if trained is None or not is_adapter(trained.checkpoint):
        return
    problems = Problems()
    check_base(trained.record, weights.record(done.info), problems)
    problems.raise_if_any()


def export(done: Ready[InferArguments], weights: Weights) -> None:
    """Write the untuned model to --output_dir, as a model folder of its native transformers class."""
    from utils.loading.image_processors import open_images
    from utils.loading.save import export_native
    from utils.run.open_model import open_model, set_template

    args = done.args
    model, tokenizer, _ = open_model(args, done.info, weights, trains=False)
    set_template(args, tokenizer)
    images = open_images(model, tokenizer, weights.path, max_pixels=args.max_pixels)
    export_native(model.eval(), tokenizer, Path(str(args.output_dir)), images)
    logger.info(f'written: {args.output_dir}, as {type(model).__name__}. Open it with --model_id_or_path.')


@dataclass(frozen=True, kw_only=True)
class Served:
    """A loaded model (with its adapter, if any), its tokenizer, its encoder and its generation settings."""

    model: Any
    tokenizer: Any
    encoder: Encoder
    config: GenerationConfig


def open_served(done: Ready[InferArguments], trained: Trained | None, weights: Weights) -> Served:
    """Open and return the model (with the adapter of the checkpoint), tokenizer, encoder and generation settings.

    Raises ConfigError if the template has changed since training. If the user typed a flag that chooses or changes the
    template, a warning is logged instead.
    """
    from transformers import set_seed

    from utils.infer.generation import generation_config
    from utils.loading.adapter import load_adapter
    from utils.loading.folder import is_adapter
    from utils.loading.image_processors import open_images
    from utils.loading.new_tokens import add_tokens, check_rows
    from utils.proofs.template import ask_as_trained, check_trained_template
    from utils.run.open_model import open_encoder, open_model

    args = done.args
    set_seed(args.seed + dist.rank())
    model, tokenizer, _ = open_model(args, done.info, weights, trains=False)
    adapted = trained if trained is not None and is_adapter(trained.checkpoint) else None
    new_ids = add_tokens(model, tokenizer, adapted.record.added_tokens if adapted is not None else ())
    images: Images | None = open_images(model, tokenizer, weights.path, max_pixels=args.max_pixels)
    if adapted is not None:
        check_rows(adapted.checkpoint, new_ids)
        model = load_adapter(model, adapted.checkpoint, weights.path, done.info.family)
    model.eval()

    system_typed = 'system' in done.typed or (trained is not None and trained.record.system_typed)
    encoder = open_encoder(args, tokenizer, system_typed=system_typed, model=model, images=images, new_ids=new_ids)
    if trained is not None:
        check_trained_template(encoder, trained, typed=done.typed)
        ask_as_trained(encoder, trained.record)
    config = generation_config(args, tokenizer, encoder.stop_ids, model.generation_config)
    return Served(model=model, tokenizer=tokenizer, encoder=encoder, config=config)


def merge(done: Ready[InferArguments], trained: Trained, served: Served, weights: Weights) -> Path:
    """Merge the adapter into its base model. Return the new model folder <checkpoint>-merged.

    Raises ConfigError if the merged model differs too much from the model with the adapter.
    """
    from utils.export.merge import merge_checkpoint
    from utils.export.write import find_base
    from utils.infer.generation import served_config
    from utils.run.outcome import read_outcome, use_commands

    model = served.model
    config = served_config(model.generation_config, served.config, done.args, done.typed)
    target, result = merge_checkpoint(
        model,
        served.encoder,
        config,
        trained.checkpoint,
        record=trained.record,
        images=served.encoder.images,
        base=find_base(done, trained, weights),
    )
    logger.info(f'the merged model is in {target}. Result of its check: {result}')
    for name, command in use_commands(target, read_outcome(trained.checkpoint.absolute().parent)).items():
        logger.info(f'{name}: {command}')
    return target


def write_file(done: Ready[InferArguments], trained: Trained, served: Served, folder: Path, device: Any) -> None:
    """Write a Modelfile (for Ollama) for the GGUF file that --gguf names.

    With --llama_cpp, the model folder `folder` is also converted to this GGUF file. The model in the GGUF file is then
    opened on `device`, and compared with the model in `folder`. Raises ConfigError if they differ.
    """
    from utils.export.gguf import GgufTarget, write_gguf
    from utils.infer.generation import served_config

    args = done.args
    says = write_gguf(
        folder,
        served.encoder,
        served_config(served.model.generation_config, served.config, args, done.typed),
        GgufTarget(
            file=Path(str(args.gguf)),
            type=args.gguf_type,
            llama_cpp=None if args.llama_cpp is None else Path(args.llama_cpp),
        ),
        run_dir=trained.checkpoint.absolute().parent,
        device=device,
    )
    logger.info(f'gguf: {says}')


def check(
    done: Ready[InferArguments], trained: Trained | None, served: Served, rows: Sequence[Row], server: Server
) -> int:
    """Compare the answers of a server with the answers of this program.

    Returns 1 if they differ or if the server refused a row, else 0.
    """
    import copy

    from utils.cli.resolution import log_decision
    from utils.infer.generation import served_config
    from utils.loading.folder import is_adapter
    from utils.run.folder import result_path
    from utils.serve.check import ServerCheck

    # A server takes the penalty from generation_config.json of the model folder.
    config = copy.deepcopy(served.config)
    of_folder = served_config(served.model.generation_config, config, done.args, done.typed)
    config.repetition_penalty = of_folder.repetition_penalty or 1.0
    if config.repetition_penalty != done.args.repetition_penalty:
        log_decision('repetition_penalty', config.repetition_penalty, 'the generation settings of the model say so')
    has_adapter = trained is not None and is_adapter(trained.checkpoint)
    server_check = ServerCheck(server, served.model, served.encoder, config, args=done.args, has_adapter=has_adapter)
    return server_check.run(rows, result_path(done.args))


def apply_settings(done: Ready[InferArguments], trained: Trained | None, served: Served) -> None:
    """Set the model's generation settings to `served.config`.

    With --save_generation_config and a checkpoint, these settings are also written to the checkpoint.
    """
    served.model.generation_config = served.config
    if done.args.save_generation_config and trained is not None and dist.is_main():
        served.config.save_pretrained(trained.checkpoint)


def chat(done: Ready[InferArguments], served: Served) -> None:
    """Chat in the terminal until the user leaves."""
    from utils.infer.chat import chat as chat_until_left

    chat_until_left(served.model, served.tokenizer, served.encoder, served.config, streams=done.args.use_streamer)


def answer(done: Ready[InferArguments], served: Served, rows: Sequence[Row], scores: Scores) -> None:
    """Answer the rows, print the answers, and write the answers and the scores to a file.

    If --show_dataset_sample is less than the number of rows, that many rows are drawn and answered. Raises ConfigError
    if every drawn row is skipped.
    """
    from utils.infer.answers import answer_rows
    from utils.run.folder import result_path

    answer_rows(
        served.model,
        served.tokenizer,
        served.encoder,
        served.config,
        rows,
        args=done.args,
        scores=scores,
        target=result_path(done.args),
    )


if __name__ == '__main__':
    sys.exit(main())
