"""From what was typed to what is used: fills every None, checks every rule across flags, says why.

Pure: no file, no network, no heavy import, so that a mistake is answered at once, all mistakes together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from utils import dist
from utils.argument import CommonArguments, InferArguments, Parsed, SftArguments
from utils.dataset import parse_source
from utils.errors import ConfigError, Problems, did_you_mean
from utils.model import ModelInfo, get_model_info, infer_model_type
from utils.preprocess import AUTO, TEMPLATE_MAPPING

DEFAULT_MODEL_TYPE = 'qwen-7b-chat'
SFT_ARGS = 'sft_args.json'

# The names that transformers takes; a test holds both lists against its enums.
OPTIMIZERS = (
    'adamw_torch', 'adamw_torch_fused', 'adafactor', 'sgd', 'adagrad', 'rmsprop', 'adamw_bnb_8bit', 'adamw_8bit',
    'lion_8bit', 'lion_32bit', 'ademamix', 'ademamix_8bit', 'paged_adamw_32bit', 'paged_adamw_8bit',
    'paged_lion_32bit', 'paged_lion_8bit', 'paged_ademamix_32bit', 'paged_ademamix_8bit', 'rmsprop_bnb',
    'rmsprop_bnb_8bit', 'rmsprop_bnb_32bit',
)  # fmt: skip
SCHEDULERS = (
    'linear', 'cosine', 'cosine_with_restarts', 'polynomial', 'constant', 'constant_with_warmup', 'inverse_sqrt',
)  # fmt: skip

ArgumentsT = TypeVar('ArgumentsT', bound=CommonArguments)

_SAMPLING = ('temperature', 'top_k', 'top_p')
# Settings of generation, not of training: a run that evaluates by loss never used them.
GENERATION = ('max_new_tokens', 'do_sample', *_SAMPLING, 'repetition_penalty')
_BNB_4BIT = ('bnb_4bit_comp_dtype', 'bnb_4bit_quant_type', 'bnb_4bit_use_double_quant')
_LORA_ONLY = ('lora_target_modules', 'lora_rank', 'lora_alpha', 'lora_dropout_p', 'tuner_backend')
HUB_FLAGS = ('hub_model_id', 'hub_private_repo', 'push_hub_strategy', 'hub_token')


@dataclass(kw_only=True)
class Resolution(Generic[ArgumentsT]):
    """Arguments ready for use, the model's entry, and each automatic decision with its reason."""

    args: ArgumentsT
    typed: frozenset[str]
    info: ModelInfo | None = None
    decisions: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)

    def decide(self, name: str, value: Any, reason: str) -> None:
        """Set an argument and record why it has this value."""
        setattr(self.args, name, value)
        self.decisions.append(f'{name} = {_shown(value)} because {reason}')

    def without_effect(self, names: tuple[str, ...], reason: str) -> None:
        """Warn about each of these flags that was typed."""
        self.warnings += [f'--{name} has no effect: {reason}.' for name in names if name in self.typed]


def _shown(value: Any) -> str:
    return ','.join(value) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else str(value)


def run_name(args: CommonArguments) -> str:
    """Return the name a run's folder is filed under: the model type, or the last part of the path or id."""
    return args.model_type or Path(str(args.model_id_or_path)).resolve().name.lower()


def resolve_sft(parsed: Parsed[SftArguments]) -> Resolution[SftArguments]:
    """Return the arguments of a training run with nothing left open; problems are collected, not raised."""
    done = Resolution(args=replace(parsed.args), typed=parsed.typed, problems=parsed.problems)
    _resolve_model(done)
    _check_common_numbers(done)
    _check_sft_numbers(done)
    _resolve_datasets(done)
    _resolve_quantization(done)
    _resolve_tuning(done)
    _resolve_schedule(done)
    _resolve_hub(done)
    args = done.args
    if args.predict_with_generate:
        _check_generation(done)
    else:
        done.without_effect(GENERATION, 'evaluation is by loss (no --predict_with_generate true)')
    return done


def resolve_infer(parsed: Parsed[InferArguments]) -> Resolution[InferArguments]:
    """Return the arguments of llm_infer.py, its checkpoint's values already filled in by the caller."""
    done = Resolution(args=replace(parsed.args), typed=parsed.typed, problems=parsed.problems)
    _resolve_model(done)
    _check_common_numbers(done)
    if not done.args.eval_human:
        _resolve_datasets(done)
        done.without_effect(('use_streamer',), 'rows are answered in batches; it is for --eval_human true')
    _resolve_quantization(done)
    _check_generation(done)
    args, problems = done.args, done.problems
    if args.show_dataset_sample == 0 or args.show_dataset_sample < -1:
        problems.add(f'--show_dataset_sample takes 1 or more, or -1 for all, got {args.show_dataset_sample}.')
    if args.infer_batch_size < 1:
        problems.add(f'--infer_batch_size takes 1 or more, got {args.infer_batch_size}.')
    if args.merge_lora_and_save:
        if args.ckpt_dir is None:
            problems.add('--merge_lora_and_save true needs --ckpt_dir: without a checkpoint there is nothing to merge.')
        elif args.sft_type == 'full':
            problems.add('--merge_lora_and_save true: this checkpoint is of --sft_type full, its weights are whole.')
        elif args.quantization_bit:
            problems.add(
                f'--merge_lora_and_save true cannot merge into {args.quantization_bit}-bit weights: rounding would '
                'swallow the adapter. Add --quantization_bit 0, which merges into the unquantised base.'
            )
    return done


def _resolve_model(done: Resolution[Any]) -> None:
    args, problems = done.args, done.problems
    if (
        args.model_type is not None
        and args.model_id_or_path is not None
        and ({'model_type', 'model_id_or_path'} <= done.typed)
    ):
        problems.add(
            f"both --model_type '{args.model_type}' and --model_id_or_path '{args.model_id_or_path}' are given: "
            'each names the model by itself. Drop one of them.'
        )
        return
    if args.model_type is None and args.model_id_or_path is None:
        done.decide('model_type', DEFAULT_MODEL_TYPE, 'no model was named')
    elif args.model_type is None and (found := infer_model_type(args.model_id_or_path)):
        done.decide('model_type', found, f"'{args.model_id_or_path}' is the model of that entry")
    if 'model_revision' in done.typed and (
        'model_type' in done.typed or Path(str(args.model_id_or_path)).is_absolute()
    ):
        done.without_effect(('model_revision',), 'it counts only for a hub id in --model_id_or_path')
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
    name = done.args.template_type
    if name is None or name in TEMPLATE_MAPPING:
        return True
    done.problems.add(
        f"template_type '{name}' is not registered{did_you_mean(name, TEMPLATE_MAPPING)} "
        'To add one, edit TEMPLATE_MAPPING in utils/preprocess.py.'
    )
    return False


def _resolve_template(done: Resolution[Any], info: ModelInfo) -> None:
    if not _check_template_name(done):
        return
    args = done.args
    if args.template_type is None:
        done.decide(
            'template_type', info.template, 'the model entry names it' if args.model_type else 'no entry names one'
        )
    template = TEMPLATE_MAPPING[args.template_type]
    if template is not None and not template.has_system:
        done.without_effect(('system',), f"template '{args.template_type}' has no place for a system text")
    if args.template_type == AUTO and 'system' not in done.typed:
        done.decisions.append("system = the template's own default because template auto passes only a typed --system")


def _resolve_datasets(done: Resolution[Any]) -> None:
    seen: set[str] = set()
    for word in done.args.dataset:
        try:
            source = parse_source(word)
        except ConfigError as error:
            done.problems.add(error.problems[0])
            continue
        if source.name in seen:
            done.problems.add(f"--dataset names '{source.name}' twice: its rows would count double. Name it once.")
        seen.add(source.name)


def _check_number(done: Resolution[Any], name: str, ok: bool, wanted: str) -> None:
    value = getattr(done.args, name)
    if not ok or (isinstance(value, float) and not math.isfinite(value)):
        done.problems.add(f'--{name} takes {wanted}, got {value}.')


def _check_common_numbers(done: Resolution[Any]) -> None:
    args = done.args
    _check_number(done, 'dataset_test_ratio', 0 <= args.dataset_test_ratio < 1, 'a share from 0 to below 1')
    if args.max_length != -1 and args.max_length < 2:
        done.problems.add(
            f'--max_length {args.max_length} leaves no room for one token of prompt and one of reply. '
            'Give 2 or more, or -1 for no limit.'
        )


def _check_sft_numbers(done: Resolution[SftArguments]) -> None:
    args = done.args
    at_least_one = (
        'lora_rank', 'lora_alpha', 'batch_size', 'gradient_accumulation_steps', 'eval_steps', 'logging_steps',
    )  # fmt: skip
    for name in at_least_one:
        _check_number(done, name, getattr(args, name) >= 1, '1 or more')
    for name in ('eval_batch_size', 'save_steps'):
        _check_number(done, name, getattr(args, name) is None or getattr(args, name) >= 1, '1 or more')
    for name in ('weight_decay', 'max_grad_norm', 'dataloader_num_workers'):
        _check_number(done, name, getattr(args, name) >= 0, '0 or more')
    for name in ('lora_dropout_p', 'warmup_ratio'):
        _check_number(done, name, 0 <= getattr(args, name) < 1, 'a share from 0 to below 1')
    _check_number(done, 'learning_rate', args.learning_rate is None or args.learning_rate > 0, 'a number above 0')
    _check_number(done, 'train_dataset_sample', args.train_dataset_sample == -1 or args.train_dataset_sample >= 1,
                  '1 or more, or -1 for all')  # fmt: skip
    _check_number(done, 'save_total_limit', args.save_total_limit == -1 or args.save_total_limit >= 1,
                  '1 or more, or -1 for all')  # fmt: skip
    if args.max_steps < 0:
        _check_number(done, 'num_train_epochs', args.num_train_epochs >= 1, '1 or more')
    elif args.max_steps == 0:
        done.problems.add('--max_steps 0 trains nothing. Give 1 or more, or leave it out for whole epochs.')
    for name, known in (('optim', OPTIMIZERS), ('lr_scheduler_type', SCHEDULERS)):
        if getattr(args, name) not in known:
            done.problems.add(
                f"--{name} '{getattr(args, name)}' is not known{did_you_mean(getattr(args, name), known)}"
            )


def _resolve_quantization(done: Resolution[Any]) -> None:
    args = done.args
    if args.quantization_bit != 4:
        done.without_effect(_BNB_4BIT, 'it is for --quantization_bit 4')
    elif args.bnb_4bit_comp_dtype is None and args.dtype is not None:
        done.decide('bnb_4bit_comp_dtype', args.dtype, 'it follows --dtype')
    if args.quantization_bit and args.sft_type == 'full':
        done.problems.add(
            f'--quantization_bit {args.quantization_bit} needs --sft_type lora, got full: '
            f'{args.quantization_bit}-bit weights cannot be trained. Drop one of them.'
        )


def _resolve_tuning(done: Resolution[SftArguments]) -> None:
    args = done.args
    if args.learning_rate is None:
        value = 1e-4 if args.sft_type == 'lora' else 2e-5
        done.decide('learning_rate', value, f'sft_type is {args.sft_type}')
    if args.sft_type == 'full':
        done.without_effect(_LORA_ONLY, 'it is for --sft_type lora')
    else:
        if args.tuner_backend == 'swift':
            done.decisions.append(
                'tuner_backend = swift, which is PEFT for now: the adapter files are the same either way'
            )
        if args.lora_target_modules is None and done.info is not None and args.model_type is not None:
            done.decide('lora_target_modules', list(done.info.lora_target_modules), 'the model entry names them')
    if args.only_save_model is None:
        resumable = args.sft_type == 'lora' and args.deepspeed_config_path is None
        how = f'sft_type is {args.sft_type}' + (' with DeepSpeed' if args.deepspeed_config_path else '')
        done.decide('only_save_model', not resumable, how)


def _resolve_schedule(done: Resolution[SftArguments]) -> None:
    args = done.args
    if args.save_steps is None:
        done.decide('save_steps', args.eval_steps, 'it follows --eval_steps')
    elif args.save_steps % args.eval_steps and args.dataset_test_ratio > 0:
        done.warnings.append(
            f'--save_steps {args.save_steps} is no multiple of --eval_steps {args.eval_steps}: '
            'only a checkpoint of a step that was evaluated can become the best.'
        )
    if args.eval_batch_size is None:
        value, reason = (
            (1, 'evaluation generates') if args.predict_with_generate else (args.batch_size, 'it follows --batch_size')
        )
        done.decide('eval_batch_size', value, reason)
    if args.max_steps > 0:
        done.without_effect(('num_train_epochs',), f'--max_steps {args.max_steps} wins')
    if 'ddp_backend' in done.typed and dist.world_size() == 1:
        done.without_effect(('ddp_backend',), 'there is one process; start several with torchrun')


def _resolve_hub(done: Resolution[SftArguments]) -> None:
    args = done.args
    if not args.push_to_hub:
        done.without_effect(HUB_FLAGS, 'nothing is pushed without --push_to_hub true')
        return
    if args.hub_model_id is None:
        done.decide('hub_model_id', f'{run_name(args)}-{args.sft_type}', 'it is <model_type>-<sft_type>')
    elif args.hub_model_id.count('/') > 1 or not all(args.hub_model_id.split('/')):
        done.problems.add(f"--hub_model_id takes repo or user/repo, got '{args.hub_model_id}'.")


def _check_generation(done: Resolution[Any]) -> None:
    args = done.args
    _check_number(done, 'max_new_tokens', args.max_new_tokens >= 1, '1 or more')
    _check_number(done, 'repetition_penalty', args.repetition_penalty > 0, 'a number above 0')
    if not args.do_sample:
        done.without_effect(_SAMPLING, 'decoding is greedy (--do_sample false)')
        return
    _check_number(done, 'temperature', args.temperature > 0, 'a number above 0; for greedy decoding --do_sample false')
    _check_number(done, 'top_k', args.top_k >= 0, '0 or more')
    _check_number(done, 'top_p', 0 < args.top_p <= 1, 'a share above 0 up to 1')
