"""Resolves the flags of llm_infer.py: sets arguments that were not typed, and checks combinations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from utils.base import dist
from utils.cli.arguments import InferArguments
from utils.cli.parser import Parsed
from utils.cli.ranges import check_common_numbers, check_generation
from utils.cli.resolution import Resolution
from utils.cli.resolve_common import check_template_flags, resolve_datasets, resolve_model, resolve_quantization
from utils.cli.scores import check_scores


def resolve_infer(parsed: Parsed[InferArguments]) -> Resolution[InferArguments]:
    """Return the resolved command line of llm_infer.py. Problems are collected, not raised.

    With --ckpt_dir, `parsed` must already have the values from the record of the training run.
    """
    done = Resolution(args=replace(parsed.args), typed=parsed.typed, problems=parsed.problems)
    resolve_model(done)
    check_template_flags(done)
    check_common_numbers(done)
    if done.args.check_server is None:
        done.without_effect(('served_model',), 'it is for --check_server')
    else:
        _resolve_server_check(done)
    if done.args.reads_data:
        _resolve_answered(done)
        done.without_effect(('use_streamer',), 'rows are answered in batches; it is for --eval_human true')
        check_scores(done.args.score, done.problems)
    else:
        done.without_effect(('score',), 'no rows are answered')

    if done.args.merge_lora_and_save and done.args.quantization_bit:
        _merge_unquantised(done)
    resolve_quantization(done)
    check_generation(done)

    args = done.args
    problems = done.problems
    if dist.world_size() > 1 and (args.check_server is not None or not args.reads_data):
        problems.add(
            '--eval_human, --merge_lora_and_save, --gguf, --export_native and --check_server run in one process. Start '
            'the command with python, not torchrun.'
        )
    if args.show_dataset_sample == 0 or args.show_dataset_sample < -1:
        problems.add(f'--show_dataset_sample takes 1 or more, or -1 for all, got {args.show_dataset_sample}.')
    if args.infer_batch_size < 1:
        problems.add(f'--infer_batch_size takes 1 or more, got {args.infer_batch_size}.')

    if args.export_native and (args.ckpt_dir is not None or args.output_dir is None or args.quantization_bit):
        problems.add(
            '--export_native true needs --output_dir, and cannot be used with --ckpt_dir or --quantization_bit. Give '
            '--output_dir, and name the model with --model_type or --model_id_or_path. To export a checkpoint, use '
            '--merge_lora_and_save true instead.'
        )
    elif not args.export_native:
        done.without_effect(('output_dir',), 'it is for --export_native true')

    _resolve_gguf(done)
    if args.merge_lora_and_save:
        if args.ckpt_dir is None:
            problems.add(
                '--merge_lora_and_save true: without a checkpoint there is nothing to merge. Name the checkpoint with '
                '--ckpt_dir.'
            )
        elif args.sft_type == 'full':
            problems.add(
                '--merge_lora_and_save true: this checkpoint was trained with --sft_type full and has no adapter. '
                'Remove --merge_lora_and_save: the checkpoint needs no merging.'
            )
    return done


def _resolve_server_check(done: Resolution[InferArguments]) -> None:
    """Check the address of the server, and switch sampling off, because only greedy answers can be compared."""
    args = done.args
    address = str(args.check_server)
    try:
        parts = urlsplit(address)
        is_address = parts.scheme in ('http', 'https') and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port or an IPv6 address that is none
        parts, is_address = urlsplit(''), False
    if parts.username is not None or parts.query or parts.fragment:
        done.problems.add(
            '--check_server takes an address without user, password, ? and #. Give the key of the server in the '
            'environment variable OPENAI_API_KEY.'
        )
    elif not is_address:
        done.problems.add(
            f"--check_server takes the address of a server, got '{address}'. Write e.g. http://localhost:8000/v1."
        )
    if not args.reads_data:
        done.problems.add(
            '--check_server needs rows to answer, and this command answers no rows. Remove --eval_human, '
            '--merge_lora_and_save, --gguf and --export_native.'
        )

    why = 'greedy answers are compared'
    done.without_effect(('score', 'save_generation_config'), '--check_server only compares')
    if args.do_sample:
        done.without_effect(('do_sample',), f'--check_server: {why}')
        done.decide('do_sample', False, why)


def _resolve_gguf(done: Resolution[InferArguments]) -> None:
    """Check --gguf, and warn about flags that have an effect only with it."""
    args = done.args
    if args.gguf is None:
        done.without_effect(('gguf_type', 'llama_cpp'), 'it is for --gguf')
        return

    given = f'--gguf {args.gguf}'
    if Path(args.gguf).suffix != '.gguf':
        done.problems.add(f'{given}: the name of the file must end in .gguf. Use --gguf {args.gguf}.gguf.')
    if args.ckpt_dir is None:
        done.problems.add(
            f'{given}: without a checkpoint there is nothing to write. Name the checkpoint with --ckpt_dir.'
        )
    elif args.sft_type != 'full' and not args.merge_lora_and_save:
        done.problems.add(
            f'{given}: a GGUF file holds a merged model, and this checkpoint holds an adapter. Add '
            '--merge_lora_and_save true to merge the adapter into its base.'
        )


def _resolve_answered(done: Resolution[InferArguments]) -> None:
    """Decide which rows are answered: the typed --val_dataset, else the typed --dataset, else the rows of the run."""
    args = done.args
    if 'val_dataset' in done.typed:
        done.without_effect(('dataset', 'dataset_test_ratio'), '--val_dataset names the rows to answer')
    elif 'dataset' in done.typed:
        args.val_dataset = None
    elif args.val_dataset:
        done.without_effect(('dataset_test_ratio',), 'the rows of the --val_dataset of the run are answered')

    sources = resolve_datasets(done)
    if args.answers_whole_dataset(done.typed):
        for source in sources:
            if source.share is not None:
                done.problems.add(
                    f"--dataset '{source.name}': a share (the number after %) can be used only in training. Write "
                    f'{source.name} to answer all rows, or {source.name}#100 to answer 100 rows.'
                )
    if 'show_dataset_sample' in done.typed:
        return
    if 'val_dataset' in done.typed:
        done.decide('show_dataset_sample', -1, '--val_dataset is typed: all rows taken from it are answered')
    elif args.answers_whole_dataset(done.typed):
        done.decide('show_dataset_sample', -1, '--dataset is typed: all rows taken from it are answered')


def _merge_unquantised(done: Resolution[InferArguments]) -> None:
    """Set quantization_bit to 0, because a merge needs unquantised weights.

    If --quantization_bit was typed, add a problem instead.
    """
    bits = done.args.quantization_bit
    if 'quantization_bit' in done.typed:
        done.problems.add(
            f'--merge_lora_and_save true: rounding to {bits} bits would lose the adapter. Remove --quantization_bit to '
            'merge into the unquantised base.'
        )
        return
    done.decide(
        'quantization_bit', 0, f'merging needs unquantised weights: rounding to {bits} bits would lose the adapter'
    )
