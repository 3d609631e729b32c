"""Resolves the flags that both programs have: model, template, data sets and quantisation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError, did_you_mean
from utils.cli.arguments import CommonArguments, InferArguments, SftArguments
from utils.cli.resolution import Resolution, run_name
from utils.cli.template_entry import entry_problems
from utils.data.sources import Source, of_flag, parse_source
from utils.formats.reading import read_columns
from utils.loading.info import ModelInfo
from utils.loading.template_settings import parse_settings
from utils.model import get_model_info, infer_model_type
from utils.preprocess import AUTO, TEMPLATE_MAPPING

DEFAULT_MODEL_TYPE = 'qwen-7b-chat'

_BNB_4BIT = ('bnb_4bit_comp_dtype', 'bnb_4bit_quant_type', 'bnb_4bit_use_double_quant')


def resolve_model(done: Resolution[Any]) -> None:
    args = done.args
    problems = done.problems
    both_given = args.model_type is not None and args.model_id_or_path is not None
    if both_given and {'model_type', 'model_id_or_path'} <= done.typed:
        problems.add(
            f"--model_type '{args.model_type}' and --model_id_or_path '{args.model_id_or_path}' both name a model. "
            'Remove --model_type or --model_id_or_path.'
        )
        return

    if args.model_type is None and args.model_id_or_path is None:
        done.decide('model_type', DEFAULT_MODEL_TYPE, 'no model was named')
    elif args.model_type is None and (found := infer_model_type(args.model_id_or_path)):
        done.decide('model_type', found, f"'{args.model_id_or_path}' is the model of this registry entry")

    if 'model_type' in done.typed or Path(str(args.model_id_or_path)).is_absolute():
        done.without_effect(('model_revision',), 'it is for a hub id in --model_id_or_path')

    try:
        done.info = get_model_info(args.model_type, args.model_id_or_path)
    except ConfigError as error:
        problems.add(error.problems[0])
        _check_template_name(done)
        return

    if 'model_revision' not in done.typed and args.model_revision != done.info.revision:
        done.decide('model_revision', done.info.revision, 'the model entry names it')
    if args.dtype is None and done.info.torch_dtype is not None:
        done.decide('dtype', done.info.torch_dtype, 'the model entry names it')
    _resolve_template(done, done.info)


def _check_template_name(done: Resolution[Any]) -> bool:
    """Return whether --template_type is registered or not given. Otherwise, adds a problem."""
    name = done.args.template_type
    if name is None or name in TEMPLATE_MAPPING:
        return True
    done.problems.add(
        f"--template_type '{name}' is not registered{did_you_mean(name, TEMPLATE_MAPPING)} "
        'To add one, edit TEMPLATE_MAPPING in utils/preprocess.py.'
    )
    return False


def _resolve_template(done: Resolution[Any], info: ModelInfo) -> None:
    if not _check_template_name(done):
        return

    args = done.args
    names_file = args.chat_template is not None and 'template_type' not in done.typed
    if names_file and args.template_type != AUTO:
        done.decide('template_type', AUTO, '--chat_template names the chat template')
    elif args.template_type is None:
        reason = 'the model entry names it' if args.model_type else 'the model has no registry entry'
        done.decide('template_type', info.template, reason)

    template = TEMPLATE_MAPPING[args.template_type]
    faults = [] if template is None else entry_problems(args.template_type, template)
    for fault in faults:
        done.problems.add(fault)
    if template is not None and not faults and not template.has_system:
        done.without_effect(('system',), f"template '{args.template_type}' has no place for a system text")
    if args.template_type == AUTO and 'system' not in done.typed:
        done.decisions.append("system = the template's own default because template auto passes only a typed --system")


def check_template_flags(done: Resolution[Any]) -> None:
    """Add the problems of --chat_template and --template_settings that can be found without reading a file."""
    args = done.args
    name = args.template_type
    is_fixed = TEMPLATE_MAPPING.get(name) is not None
    if is_fixed and args.chat_template is not None:
        done.problems.add(
            f'--chat_template {args.chat_template} has no effect with --template_type {name}, which has its own '
            'format. Leave --template_type out to apply --chat_template.'
        )
    if args.template_settings is None:
        return

    if is_fixed:
        done.problems.add(
            f'--template_settings: --template_type {name} is fixed text without variables. Leave --template_settings '
            "out, or use --template_type auto to apply them to the model's own template."
        )
    try:
        parse_settings(args.template_settings)
    except ConfigError as error:
        for problem in error.problems:
            done.problems.add(problem)


def resolve_datasets(done: Resolution[Any]) -> list[Source]:
    """Return the sources of --dataset, in the typed order. Words that are not understood are left out.

    Adds a problem for each invalid or repeated word of --dataset and --val_dataset, and for each invalid item of
    --columns.
    """
    words, val_words = done.args.datasets_read()
    sources = _parse_sources(done, 'dataset', words)
    val_sources = _parse_sources(done, 'val_dataset', val_words)
    for source in val_sources:
        if source.share is not None:
            done.problems.add(
                f"--val_dataset '{source.name}': a share (the number after %) is possible only in --dataset. Write "
                f'{source.name} for all rows, or {source.name}#100 for 100 rows.'
            )

    for problem in read_columns(done.args.columns or ())[1]:
        done.problems.add(problem)
    if done.args.max_length == -1:
        done.without_effect(('overlong',), '--max_length -1 is no limit')
    if all(source.path is None and source.hub is None for source in (*sources, *val_sources)):
        done.without_effect(('columns',), 'the columns of a registered data set are those of its entry')
    return sources


def _parse_sources(done: Resolution[Any], flag: str, words: Sequence[str]) -> list[Source]:
    sources: list[Source] = []
    seen: set[Any] = set()
    for word in words:
        try:
            source = parse_source(word)
        except ConfigError as error:
            done.problems.add(of_flag(error.problems[0], flag))
            continue
        # The same data set of a hub can be written in two ways.
        key = source.name if source.hub is None else source.hub.key(done.args.hub)
        if key in seen:
            done.problems.add(
                f"--{flag}: '{source.name}' is named twice, so its rows would be used twice. Name it once."
            )
        seen.add(key)
        sources.append(source)
    return sources


def resolve_quantization(done: Resolution[Any]) -> None:
    args = done.args
    if args.quantization_bit != 4:
        done.without_effect(_BNB_4BIT, 'it is for --quantization_bit 4')
    elif args.bnb_4bit_comp_dtype is None and args.dtype is not None:
        done.decide('bnb_4bit_comp_dtype', args.dtype, 'it follows --dtype')

    for problem in quantized_problems(args, done.info):
        done.problems.add(problem)
    if args.quantization_bit and args.sft_type == 'full':
        done.problems.add(
            f'--quantization_bit {args.quantization_bit} needs --sft_type lora, got full: '
            f'{args.quantization_bit}-bit weights cannot be trained. Remove --quantization_bit, or use --sft_type lora.'
        )


def quantized_problems(args: CommonArguments, info: ModelInfo | None) -> list[str]:
    """Return a message for each flag that cannot be used with weights that are quantised already.

    The list is empty for all other weights. Each message names a remedy.
    """
    if info is None or info.quantization is None:
        return []

    stored = f"the weights of '{run_name(args)}' are stored quantised ({info.quantization})"
    problems: list[str] = []
    serves_checkpoint = isinstance(args, InferArguments) and bool(args.ckpt_dir)
    if args.sft_type == 'full' and not serves_checkpoint:
        problems.append(
            f'--sft_type full: {stored} and cannot be trained. Use --sft_type lora, or the same model without int4 or '
            'int8.'
        )

    if isinstance(args, SftArguments) and args.fsdp:
        problems.append(
            f'--fsdp true: {stored} and cannot be sharded. Use --deepspeed_config_path ds_config/zero2.json, or start '
            'without --fsdp.'
        )

    if isinstance(args, SftArguments) and args.use_dora and info.quantization in ('gptq', 'awq'):
        problems.append(
            f'--use_dora true: {stored}, and PEFT has no DoRA for such weights. Remove --use_dora, or use the same '
            'model without int4 or int8, with --quantization_bit 4.'
        )

    # Weights in nf4 (Baichuan2) are first converted to full precision, so that bitsandbytes can quantise them again.
    if args.quantization_bit and info.quantization != 'nf4':
        problems.append(
            f'--quantization_bit {args.quantization_bit}: {stored} and cannot be quantised again. Remove '
            '--quantization_bit: the weights stay quantised.'
        )

    if isinstance(args, InferArguments) and args.merge_lora_and_save:
        problems.append(
            f'--merge_lora_and_save true: {stored}, and rounding would lose the adapter. Remove --merge_lora_and_save '
            'to serve base and adapter, or train on the same model without int4 or int8 and merge that.'
        )
    return problems
