"""Resolves the typed flags into the arguments of a program: sets each argument that is None, and checks combinations.

The reason for each automatic value is recorded. The functions read no file, use no network and import no heavy
library. So a wrong command line fails within a second, and all its mistakes are reported together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from utils.base import dist
from utils.base.errors import ConfigError, did_you_mean
from utils.base.names import LAST
from utils.cli.arguments import GENERATION, HUB_FLAGS, CommonArguments, InferArguments, SftArguments
from utils.cli.parallel import resolve_scale
from utils.cli.parser import Parsed
from utils.cli.ranges import check_common_numbers, check_generation, check_sft_numbers, has_betas, has_epsilon
from utils.cli.resolution import Resolution, run_name
from utils.cli.schedule import ENDS_AT_A_RATIO, STABLE_DECAY, not_a_multiple
from utils.cli.scores import check_scores
from utils.cli.trackers import resolve_trackers
from utils.data.sources import Source, of_flag, parse_source, val_set_names
from utils.formats.reading import read_columns
from utils.loading.info import ModelInfo
from utils.loading.layers import ALL_LINEAR, bad_pattern
from utils.loading.template_settings import parse_settings
from utils.model import get_model_info, infer_model_type
from utils.preprocess import AUTO, TEMPLATE_MAPPING

DEFAULT_MODEL_TYPE = 'qwen-7b-chat'

_BNB_4BIT = ('bnb_4bit_comp_dtype', 'bnb_4bit_quant_type', 'bnb_4bit_use_double_quant')
# Shares typed as 0.333333 need not sum to exactly 1.
_SHARES_TOLERANCE = Fraction(1, 10**6)
# The optimizers for which --full_weights bf16 has a version with stochastic rounding.
_ADAMW = ('adamw_torch', 'adamw_torch_fused')
# A number in bf16 has 8 bits. If a sum has 64 equal summands, only 2 bits of the next summand are added.
_MAX_SUMMANDS = 64
_LORA_ONLY = (
    'lora_target_modules',
    'lora_rank',
    'lora_alpha',
    'lora_dropout_p',
    'use_dora',
    'use_rslora',
    'lora_modules_to_save',
    'tuner_backend',
)


def resolve_sft(parsed: Parsed[SftArguments]) -> Resolution[SftArguments]:
    """Return the resolved command line of a training run. Problems are collected, not raised."""
    done = Resolution(args=replace(parsed.args), typed=parsed.typed, problems=parsed.problems)
    _resolve_verification(done)
    _resolve_model(done)
    _check_chat_template(done)
    check_common_numbers(done)
    check_sft_numbers(done)
    sources = _resolve_datasets(done)
    _resolve_validation(done)
    _resolve_mixture(done, sources)
    _resolve_streaming(done)
    _resolve_clean_copy(done)
    _resolve_quantization(done)
    resolve_scale(done)
    _resolve_tuning(done)
    _resolve_full_weights(done)
    _resolve_schedule(done)
    _resolve_intervals(done)
    resolve_trackers(done)
    _check_layout(done)
    _resolve_hub(done)

    if done.args.predict_with_generate:
        check_generation(done)
        check_scores(done.args.score, done.problems, sets=val_set_names(done.args.val_dataset or ()))
    else:
        done.without_effect((*GENERATION, 'score'), 'evaluation is by loss (no --predict_with_generate true)')
    return done


def _resolve_verification(done: Resolution[SftArguments]) -> None:
    """With --verify true, switch off features that do not change the numbers of a run, for example the report."""
    args = done.args
    if not args.verify:
        return
    if args.from_run is None:
        done.problems.add('--verify true: no run is named. Add --from_run output/<model>/vN-<time>.')
    switched_off = {
        'preflight': False,
        'push_to_hub': False,
        'report_to': ['none'],
        'show_samples': 0,
        'report_samples': 0,
        'compare_rows': 0,
    }
    for name, value in switched_off.items():
        if getattr(args, name) != value:
            done.decide(name, value, '--verify true only compares numbers')


def resolve_infer(parsed: Parsed[InferArguments]) -> Resolution[InferArguments]:
    """Return the resolved command line of llm_infer.py. Problems are collected, not raised.

    With --ckpt_dir, `parsed` must already have the values from the record of the training run.
    """
    done = Resolution(args=replace(parsed.args), typed=parsed.typed, problems=parsed.problems)
    _resolve_model(done)
    _check_chat_template(done)
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
    _resolve_quantization(done)
    check_generation(done)

    args = done.args
    problems = done.problems
    if dist.world_size() > 1 and (args.check_server is not None or not args.reads_data):
        problems.add(
            '--eval_human, --merge_lora_and_save, --export_native and --check_server run in one process. Start '
            'the command with python, not torchrun.'
        )
    if args.show_dataset_sample == 0 or args.show_dataset_sample < -1:
        problems.add(f'--show_dataset_sample takes 1 or more, or -1 for all, got {args.show_dataset_sample}.')
    if args.infer_batch_size < 1:
        problems.add(f'--infer_batch_size takes 1 or more, got {args.infer_batch_size}.')

    if args.export_native and (args.ckpt_dir is not None or args.output_dir is None or args.quantization_bit):
        problems.add(
            '--export_native true needs --output_dir and an untuned model without --quantization_bit. Name the model '
            'with --model_type or --model_id_or_path. For a checkpoint use --merge_lora_and_save true.'
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
    """Check the address of the server, and choose greedy answers, because only these can be compared."""
    args = done.args
    address = str(args.check_server)
    try:
        parts = urlsplit(address)
        is_address = parts.scheme in ('http', 'https') and bool(parts.hostname) and (parts.port or 1) > 0
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
            '--check_server compares answers to rows, and this command answers none. Remove --eval_human, '
            '--merge_lora_and_save and --export_native.'
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
            f'{given}: this checkpoint holds an adapter, and the file holds a merged model. Add --merge_lora_and_save '
            'true.'
        )


def _resolve_answered(done: Resolution[InferArguments]) -> None:
    """Decide whose rows are answered: those of the typed --val_dataset or --dataset, else those of the training run."""
    args = done.args
    if 'val_dataset' in done.typed:
        done.without_effect(('dataset', 'dataset_test_ratio'), '--val_dataset names the rows to answer')
    elif 'dataset' in done.typed:
        args.val_dataset = None
    elif args.val_dataset:
        done.without_effect(('dataset_test_ratio',), 'the rows of the --val_dataset of the run are answered')

    sources = _resolve_datasets(done)
    if args.answers_whole_dataset(done.typed):
        for source in sources:
            if source.share is not None:
                done.problems.add(
                    f"--dataset '{source.name}': a share (%) is for training, and here all rows are answered. Write "
                    f'{source.name}, or {source.name}#100 for 100 rows.'
                )
    if 'show_dataset_sample' in done.typed:
        return
    if 'val_dataset' in done.typed:
        done.decide('show_dataset_sample', -1, '--val_dataset is typed: all its rows are answered')
    elif args.answers_whole_dataset(done.typed):
        done.decide('show_dataset_sample', -1, '--dataset is typed: all its rows are answered')


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
        'quantization_bit', 0, f'rounding to {bits} bits would lose the adapter: it is merged into the unquantised base'
    )


def _resolve_model(done: Resolution[Any]) -> None:
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
    """Return whether --template_type is registered. Adds a problem if it is not."""
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
    if template is not None and not template.has_system:
        done.without_effect(('system',), f"template '{args.template_type}' has no place for a system text")
    if args.template_type == AUTO and 'system' not in done.typed:
        done.decisions.append("system = the template's own default because template auto passes only a typed --system")


def _check_chat_template(done: Resolution[Any]) -> None:
    """Add the problems of --chat_template and --template_settings that can be found without reading a file."""
    args = done.args
    name = args.template_type
    is_fixed = TEMPLATE_MAPPING.get(name) is not None
    if is_fixed and args.chat_template is not None:
        done.problems.add(
            f"--chat_template {args.chat_template}: template '{name}' does not use it. Leave --template_type out, or "
            'use --template_type auto.'
        )
    if args.template_settings is None:
        return

    if is_fixed:
        done.problems.add(
            f"--template_settings: template '{name}' is fixed text without variables. Leave --template_settings out, "
            'or use --template_type auto.'
        )
    try:
        parse_settings(args.template_settings)
    except ConfigError as error:
        for problem in error.problems:
            done.problems.add(problem)


def _resolve_datasets(done: Resolution[Any]) -> list[Source]:
    """Return the sources of --dataset. Adds the problems of the words of --dataset and --val_dataset."""
    words, val_words = done.args.words_read()
    sources = _parse_sources(done, 'dataset', words)
    val_sources = _parse_sources(done, 'val_dataset', val_words)
    for source in val_sources:
        if source.share is not None:
            done.problems.add(
                f"--val_dataset '{source.name}': a share (%) is for training rows. Write {source.name}, or "
                f'{source.name}#100 for 100 rows.'
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
            done.problems.add(f"--{flag}: '{source.name}' is named twice, its rows would be used twice. Name it once.")
        seen.add(key)
        sources.append(source)
    return sources


def _resolve_validation(done: Resolution[SftArguments]) -> None:
    if not done.args.val_dataset:
        return
    done.decisions.append(
        f'validation rows = all rows of --val_dataset {",".join(done.args.val_dataset)} because it is typed: no row of '
        '--dataset is held out'
    )
    done.without_effect(('dataset_test_ratio', 'stream_val_rows'), '--val_dataset names the validation rows')


def _resolve_mixture(done: Resolution[SftArguments], sources: Sequence[Source]) -> None:
    """Check the shares of --dataset (name%0.3), and let them decide the number of training rows."""
    shares = [source.share for source in sources if source.share is not None]
    others = ', '.join(source.name for source in sources if source.share is None)
    if not shares:
        return

    args = done.args
    total = sum(shares, Fraction(0))
    if args.streaming and others:
        done.problems.add(
            f'--dataset {others}: without a share (%), the number of its rows decides the mixture, and --streaming '
            'true does not know this number. Give every data set a share, e.g. name%0.3, or remove --streaming.'
        )
    elif others and total >= 1:
        done.problems.add(
            f'--dataset: the shares after % sum to {float(total):.7g}, and nothing is left for {others}, which has no '
            'share. Lower the shares, or give every data set a share so that they sum to 1.'
        )
    elif not others and abs(total - 1) > _SHARES_TOLERANCE:
        done.problems.add(
            f'--dataset: the shares after % sum to {float(total):.7g}, and they must sum to 1 if every data set has '
            'a share. Change the shares, or remove the share of one data set: then all its rows are used.'
        )

    if not args.streaming and 'train_dataset_sample' not in done.typed:
        done.decide('train_dataset_sample', -1, 'the shares (%) of --dataset decide the number of training rows')


def _resolve_streaming(done: Resolution[SftArguments]) -> None:
    args = done.args
    problems = done.problems
    if not args.streaming:
        if not args.val_dataset:
            done.without_effect(('stream_val_rows',), 'it is for --streaming true')
        return

    if args.max_steps < 1:
        problems.add(
            '--streaming true needs --max_steps, because a stream has no known length. Add e.g. --max_steps 1000.'
        )
    if args.test_oom_error:
        problems.add(
            '--test_oom_error true sorts all rows, and --streaming true never holds all rows. Remove --test_oom_error '
            'or --streaming.'
        )
    if args.packing:
        problems.add(
            '--packing true chooses from all rows, and --streaming true never holds all rows. Remove --packing or '
            '--streaming.'
        )
    for word in args.dataset:
        if '#' in word:  # a word of --val_dataset may have one: validation sets are read whole
            problems.add(
                f"--dataset '{word}': # draws from all rows, and --streaming true never holds all rows. Remove "
                '# and the number after it, or remove --streaming.'
            )

    unused = ['train_dataset_sample', 'dataset_test_ratio', 'dataloader_num_workers', 'group_by_length']
    reason = 'with --streaming true the training process reads all rows, and the first rows are held out'
    if args.val_dataset:
        unused.remove('dataset_test_ratio')
        reason = 'with --streaming true the training process reads all rows'
    done.without_effect(tuple(unused), reason)
    done.decide('dataloader_num_workers', 0, 'a stream is read by the training process')


def _resolve_clean_copy(done: Resolution[SftArguments]) -> None:
    """Check --write_clean, and let it copy all rows if --train_dataset_sample is not typed."""
    args = done.args
    problems = done.problems
    if args.write_clean is None:
        return

    given = f'--write_clean {args.write_clean}'
    if not args.check_dataset:
        problems.add(f'{given}: the data check writes the copy. Add --check_dataset true.')
    if not args.write_clean.lower().endswith(('.jsonl', '.jsonl.gz')):
        problems.add(f'{given}: the copy holds JSON lines. Give a name that ends in .jsonl or .jsonl.gz.')
    if dist.world_size() > 1:
        problems.add(f'{given}: one process writes the copy. Start the command with python, not torchrun.')
    if 'train_dataset_sample' not in done.typed:
        done.decide('train_dataset_sample', -1, '--write_clean copies all rows')


def _resolve_quantization(done: Resolution[Any]) -> None:
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
    """Return a message for each flag that cannot be used with weights that are stored quantised.

    The list is empty if the weights are not stored quantised. Each message names a remedy.
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


def _resolve_tuning(done: Resolution[SftArguments]) -> None:
    args = done.args
    if args.learning_rate is None:
        value = 1e-4 if args.sft_type == 'lora' else 2e-5
        done.decide('learning_rate', value, f'sft_type is {args.sft_type}')

    if args.sft_type == 'full':
        done.without_effect(_LORA_ONLY, 'it is for --sft_type lora')
    elif args.lora_target_modules is not None:
        for problem in filter(None, map(bad_pattern, args.lora_target_modules)):
            done.problems.add(problem)
    elif done.info is not None and args.model_type is not None:
        done.decide('lora_target_modules', list(done.info.lora_target_modules), 'the model entry names them')
    elif done.info is not None:
        done.decide('lora_target_modules', [ALL_LINEAR], 'the model has no registry entry')

    if args.use_dora and args.sft_type == 'lora' and args.quantization_bit == 8:
        # PEFT 0.21 moves the weight that it reads, and bitsandbytes then loses its scales. See
        # https://github.com/huggingface/peft, utils/integrations.py, dequantize_module_weight.
        done.problems.add(
            '--use_dora true cannot read the weights of --quantization_bit 8. Use --quantization_bit 4, or remove '
            '--use_dora.'
        )

    _resolve_drift(done)
    _resolve_compare_rows(done)
    if args.only_save_model is None:
        resumable = args.sft_type == 'lora' and args.deepspeed_config_path is None
        reason = f'sft_type is {args.sft_type}' + (' with DeepSpeed' if args.deepspeed_config_path else '')
        done.decide('only_save_model', not resumable, reason)
    if args.only_save_model and args.resume_from_checkpoint == LAST:
        done.warnings.append(
            '--resume_from_checkpoint last: with --only_save_model true no checkpoint of this run can be resumed, so a '
            'restarted command trains from the beginning. Add --only_save_model false.'
        )


def _resolve_drift(done: Resolution[SftArguments]) -> None:
    """Decide --drift, which measures the difference between the model and the same model without its adapter.

    Each process measures it separately, so each process must hold all weights.
    """
    args = done.args
    reason = None
    if args.sft_type == 'full':
        reason = '--sft_type full has no adapter that could be switched off to compare with the base'
    elif args.fsdp or args.deepspeed_config_path is not None:
        reason = 'no process holds all weights with --fsdp or --deepspeed_config_path'

    if args.drift is None:
        done.decide('drift', reason is None, reason or 'sft_type is lora')
    elif args.drift and reason is not None:
        done.problems.add(f'--drift true: {reason}. Remove --drift.')


def _resolve_compare_rows(done: Resolution[SftArguments]) -> None:
    args = done.args
    reason = None
    if args.predict_with_generate:
        reason = 'evaluation is by generated answers, and the loss of rows is not computed'
    elif args.fsdp or args.deepspeed_config_path is not None:
        reason = 'no process holds all weights with --fsdp or --deepspeed_config_path'
    if reason is None:
        return
    done.without_effect(('compare_rows',), reason)
    done.decide('compare_rows', 0, reason)


def _resolve_full_weights(done: Resolution[SftArguments]) -> None:
    args = done.args
    if args.full_weights == 'fp32' or args.sft_type == 'lora':
        if args.full_weights == 'bf16':
            done.problems.add(
                '--full_weights bf16 needs --sft_type full, got lora: adapters are always trained in fp32. Use '
                '--sft_type full, or remove --full_weights.'
            )
        elif args.sft_type == 'lora':
            done.without_effect(('full_weights',), 'it is for --sft_type full')
        return

    if args.deepspeed_config_path is not None or args.fsdp:
        sharded = '--fsdp true' if args.fsdp else '--deepspeed_config_path'
        done.problems.add(
            f'--full_weights bf16 and {sharded}: stochastic rounding needs whole weights, and {sharded} shards them. '
            f'Remove --full_weights or {sharded}.'
        )
    if args.optim not in _ADAMW:
        done.problems.add(
            f'--optim {args.optim} rounds bf16 weights to the nearest number, which loses small updates. Use --optim '
            'adamw_torch with --full_weights bf16, or remove --full_weights.'
        )
    if args.dtype in ('fp16', 'fp32') and 'dtype' in done.typed:
        done.problems.add(
            f'--full_weights bf16 computes in bf16, and --dtype is {args.dtype}. Use --dtype bf16, or remove '
            '--full_weights.'
        )
    elif args.dtype != 'bf16':
        done.decide('dtype', 'bf16', '--full_weights bf16 computes in bf16')
    if args.gradient_accumulation_steps > _MAX_SUMMANDS:
        done.warnings.append(
            f'--gradient_accumulation_steps {args.gradient_accumulation_steps}: with --full_weights bf16 the gradients '
            f'of a step are added in bf16, and more than {_MAX_SUMMANDS} summands lose precision. Use a larger '
            '--batch_size with fewer steps.'
        )


def _resolve_schedule(done: Resolution[SftArguments]) -> None:
    """Check the flags of the learning-rate schedule and of the optimizer against each other."""
    args = done.args
    problems = done.problems
    kind = args.lr_scheduler_type
    if {'warmup_steps', 'warmup_ratio'} <= done.typed:
        problems.add(
            f'--warmup_steps {args.warmup_steps} and --warmup_ratio {args.warmup_ratio} both give the length of the '
            'warm-up. Remove --warmup_steps or --warmup_ratio.'
        )
    if args.min_lr_ratio is not None and kind not in ENDS_AT_A_RATIO:
        problems.add(
            f'--min_lr_ratio {args.min_lr_ratio}: --lr_scheduler_type {kind} does not end at a share of '
            f'--learning_rate. Remove --min_lr_ratio, or use one of {", ".join(ENDS_AT_A_RATIO)}.'
        )
    if 'decay_ratio' in done.typed and kind != STABLE_DECAY:
        problems.add(
            f'--decay_ratio {args.decay_ratio} is for --lr_scheduler_type {STABLE_DECAY}, got {kind}. Remove '
            f'--decay_ratio, or add --lr_scheduler_type {STABLE_DECAY}.'
        )
    if kind == 'constant':
        done.without_effect(
            ('warmup_ratio', 'warmup_steps'), '--lr_scheduler_type constant has no warm-up; constant_with_warmup has'
        )

    if not has_betas(args.optim):
        done.without_effect(('adam_beta1', 'adam_beta2'), f'--optim {args.optim} does not use it')
    if not has_epsilon(args.optim):
        done.without_effect(('adam_epsilon',), f'--optim {args.optim} does not use it')


def _resolve_intervals(done: Resolution[SftArguments]) -> None:
    """Set the intervals of checkpoints and the batch size of evaluations, if they were not typed."""
    args = done.args
    are_counts = args.eval_steps >= 1 and args.save_steps is not None and args.save_steps >= 1
    if args.save_steps is None:
        done.decide('save_steps', args.eval_steps, 'it follows --eval_steps')
    elif are_counts and args.save_steps % args.eval_steps and (args.dataset_test_ratio > 0 or args.val_dataset):
        done.warnings.append(not_a_multiple(args.save_steps, args.eval_steps))

    if args.eval_batch_size is None and args.predict_with_generate:
        done.decide('eval_batch_size', 1, 'evaluation generates answers')
    elif args.eval_batch_size is None:
        done.decide('eval_batch_size', args.batch_size, 'it follows --batch_size')

    if args.max_steps > 0:
        done.without_effect(('num_train_epochs',), f'--max_steps {args.max_steps} overrides it')
    if 'ddp_backend' in done.typed and dist.world_size() == 1:
        done.without_effect(('ddp_backend',), 'there is one process; start several with torchrun')


def _check_layout(done: Resolution[SftArguments]) -> None:
    args = done.args
    if args.packing and args.padding_free is False:
        done.problems.add(
            '--packing true concatenates rows, and --padding_free false pads them. Remove --packing or --padding_free.'
        )
    if args.packing and args.max_length == -1:
        done.problems.add(
            '--packing true fills rows up to --max_length, and -1 is no limit. Give a length, e.g. --max_length 2048.'
        )
    if args.test_oom_error:
        done.without_effect(('group_by_length',), '--test_oom_error true sorts all rows by length')


def _resolve_hub(done: Resolution[SftArguments]) -> None:
    args = done.args
    if not args.push_to_hub:
        done.without_effect(HUB_FLAGS, 'nothing is pushed without --push_to_hub true')
        return
    if args.hub_model_id is None:
        done.decide('hub_model_id', f'{run_name(args)}-{args.sft_type}', 'it is <model_type>-<sft_type>')
    elif args.hub_model_id.count('/') > 1 or not all(args.hub_model_id.split('/')):
        done.problems.add(f"--hub_model_id takes repo or user/repo, got '{args.hub_model_id}'.")
