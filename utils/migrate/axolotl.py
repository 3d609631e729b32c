"""Translates a recipe of axolotl."""

from __future__ import annotations

import re
from typing import Any

from utils.migrate.llama_factory import val_size
from utils.migrate.rows import Rows, hub_word, is_file
from utils.migrate.swift import lora_pattern
from utils.migrate.trainer_keys import (
    DIVIDED,
    FASTER,
    GROUPED,
    LOADING,
    LOGGING,
    NOT_BUILT,
    NOT_REPLIES,
    OUTPUT,
    TOKEN,
    deepspeed,
    fsdp,
    new_tokens,
    optimizer,
    precision,
    resume,
    torch_dtype,
    use_share,
)
from utils.migrate.translation import (
    Rule,
    Translation,
    apply_defaults,
    apply_rules,
    is_empty,
    is_off,
    is_on,
    other,
    refused,
    same,
    silent,
    to_list,
    to_number,
    unused,
)

# What axolotl does if the recipe does not say it, where this differs from the defaults here.
_DEFAULTS = {
    'loss_scope': 'all_rounds', 'max_length': 512, 'gradient_accumulation_steps': 1, 'weight_decay': 0,
    'warmup_ratio': 0.03, 'save_total_limit': 4, 'train_dataset_sample': -1, 'overlong': 'drop',
}  # fmt: skip
_HARMLESS_PLUGINS = ('cut_cross_entropy', 'liger', 'kernels', 'swanlab')
_OVERLONG = {'drop': 'drop', 'raise': 'refuse'}
_TRACKERS = {
    'wandb_project': 'wandb', 'use_tensorboard': 'tensorboard', 'use_mlflow': 'mlflow', 'use_swanlab': 'swanlab',
    'mlflow_tracking_uri': 'mlflow', 'mlflow_experiment_name': 'mlflow', 'use_comet': 'comet', 'use_wandb': 'wandb',
    'trackio_project_name': 'trackio', 'use_trackio': 'trackio',
}  # fmt: skip
_RLHF = refused(f'preference training and reinforcement learning: {NOT_REPLIES}. Use axolotl for it.')
_REWARD = refused(f'a reward or class instead of text: {NOT_REPLIES}. Use axolotl for it.')
_CONFIG = 'the configuration of the model is not changed here. Write it into its config.json.'
_OTHER_TRAINING = refused(f'it {NOT_REPLIES}. Use axolotl for it.')


def _adapter(t: Translation, key: str, value: Any) -> None:
    if str(value) not in ('lora', 'qlora'):
        t.refuse(key, f"'{value}' is not supported. Use lora or qlora, or remove the key to train all weights.")
        return
    t.use(key, 'sft_type', 'lora')
    if is_on(t.get('load_in_4bit')) or str(value) == 'qlora':
        t.use('load_in_4bit', 'quantization_bit', 4)
    elif is_on(t.get('load_in_8bit')):
        t.use('load_in_8bit', 'quantization_bit', 8)


def _targets(t: Translation, key: str, value: Any) -> None:
    if isinstance(value, str) and re.search(r'[\\(\[*|^$]', value):
        lora_pattern(t, key, value)
        return
    every = ['ALL'] if is_on(t.get('lora_target_linear')) else []
    t.use(key, 'lora_target_modules', every + to_list(value))


def _linear(t: Translation, key: str, value: Any) -> None:
    if is_empty(t.get('lora_target_modules')) and is_on(value):
        t.use(key, 'lora_target_modules', 'ALL')


def _experts(t: Translation, key: str, value: Any) -> None:
    t.use(key, 'lora_target_modules', [*t.flags.get('lora_target_modules', []), *to_list(value)])


def _scheduler(t: Translation, key: str, value: Any) -> None:
    known = {'one_cycle': 'cosine', 'rex': 'cosine'}
    if str(value) in known:
        t.use(key, 'lr_scheduler_type', known[str(value)], why=f"'{value}' is not supported")
    else:
        t.use(key, 'lr_scheduler_type', value)


def _template(t: Translation, key: str, value: Any) -> None:
    if str(value) == 'jinja':
        return
    if str(value) == 'tokenizer_default':
        t.note('used', key, 'template auto uses the chat template of the tokenizer')
        return
    t.note(
        'different',
        key,
        f"the chat template of the model's own tokenizer is used, and not the text that axolotl keeps as '{value}'; "
        '--chat_template FILE takes another one',
    )


def _jinja(t: Translation, key: str, value: Any) -> None:
    if '{' in str(value):
        t.refuse(key, 'the template is written into the recipe. Save it as a file, and give it to --chat_template.')
    else:
        t.use(key, 'chat_template', value)


def _template_settings(t: Translation, key: str, value: Any) -> None:
    if isinstance(value, dict):
        pairs = [f'{name}={str(item).lower() if isinstance(item, bool) else item}' for name, item in value.items()]
        t.use(key, 'template_settings', pairs)
    else:
        t.refuse(key, 'it is not an object of variables. Write --template_settings NAME=VALUE.')


def _plugins(t: Translation, key: str, value: Any) -> None:
    for plugin in to_list(value):
        if any(name in str(plugin) for name in _HARMLESS_PLUGINS):
            t.note('without effect', key, f'{plugin}: llm_sft.py uses its fast path wherever it is exact')
        else:
            t.refuse(key, f"'{plugin}' changes the training and is not supported. Remove it from the recipe.")


def _total_batch(t: Translation, key: str, value: Any) -> None:
    total = to_number(value)
    each = to_number(t.get('micro_batch_size')) or 1
    if total and is_empty(t.get('gradient_accumulation_steps')):
        t.use(key, 'gradient_accumulation_steps', max(1, int(total // each)))
    else:
        t.note('without effect', key, 'gradient_accumulation_steps decides')


def _tracker(t: Translation, key: str, value: Any) -> None:
    if is_off(value):
        t.note('without effect', key, 'it is off')
    else:
        t.use(key, 'report_to', [*t.flags.get('report_to', []), _TRACKERS[key]])


def _hub(t: Translation, key: str, value: Any) -> None:
    t.use(key, 'push_to_hub', True)
    t.use(key, 'hub_model_id', value)


def _bf16(t: Translation, key: str, value: Any) -> None:
    precision(t, key, value)
    if str(value) == 'full' and is_empty(t.get('adapter')):
        t.use(key, 'full_weights', 'bf16', why='updates are rounded stochastically')


def _full(t: Translation, key: str, value: Any) -> None:
    """Refuse load_in_4bit or load_in_8bit in a recipe without the key `adapter`.

    With `adapter`, nothing is done here, because the rule of `adapter` reads these two keys.
    """
    if is_empty(t.get('adapter')) and is_on(value):
        t.refuse(key, 'quantised weights cannot be trained. Add adapter: qlora, or remove the key.')


def _special_tokens(t: Translation, key: str, value: Any) -> None:
    names = set(value) if isinstance(value, dict) else set()
    if names <= {'pad_token', 'unk_token', 'bos_token'}:
        t.note('without effect', key, 'padding is masked, and the other tokens are those of the tokenizer')
    else:
        t.note('different', key, 'the special tokens are those of the tokenizer; change them in its own files')


def _divided(t: Translation, key: str, value: Any) -> None:
    if (to_number(value) or 1) <= 1:
        t.note('without effect', key, 'it divides nothing')
    else:
        DIVIDED(t, key, value)


RULES: dict[str, Rule] = {
    'base_model': same('model_id_or_path'),
    'revision_of_model': same('model_revision'),
    'adapter': _adapter,
    'load_in_4bit': _full,
    'load_in_8bit': _full,
    'gptq': unused('stored quantised weights are found from the files of the model'),
    'lora_model_dir': same('adapter'),
    'lora_r': same('lora_rank'),
    'lora_alpha': same('lora_alpha'),
    'lora_dropout': same('lora_dropout_p'),
    'lora_target_modules': _targets,
    'lora_target_linear': _linear,
    'lora_target_parameters': _experts,
    'lora_modules_to_save': lambda t, key, value: t.use(key, 'lora_modules_to_save', to_list(value)),
    'peft_use_dora': same('use_dora'),
    'peft_use_rslora': same('use_rslora'),
    'peft_init_lora_weights': other(f'another start of the adapter {NOT_BUILT}'),
    'peft_layers_to_transform': refused('an adapter on some layers only: use --lora_target_modules. Remove the key.'),
    'loraplus_lr_ratio': other(f'a second learning rate (LoRA+) {NOT_BUILT}'),
    'unfrozen_parameters': refused('training only some weights is not supported. Remove the key, or use an adapter.'),
    'bnb_config_kwargs': other('left out: --bnb_4bit_quant_type and others name these settings'),
    'sequence_len': same('max_length'),
    'excess_length_strategy': lambda t, key, value: t.use(
        key,
        'overlong',
        _OVERLONG.get(str(value), 'cut'),
        why='' if str(value) in _OVERLONG else 'the beginning of a longer row is cut; axolotl cuts its end',
    ),
    'sample_packing': same('packing'),
    'eval_sample_packing': unused('validation rows are evaluated one by one or concatenated, with the same loss'),
    'micro_batch_size': same('batch_size'),
    'eval_batch_size': same('eval_batch_size'),
    'gradient_accumulation_steps': same('gradient_accumulation_steps'),
    'batch_size': _total_batch,
    'num_epochs': same('num_train_epochs'),
    'max_steps': same('max_steps'),
    'optimizer': optimizer,
    'optim_args': other('left out: optimizers have their usual settings, and --adam_beta1 and others of its flags'),
    'lr_scheduler': _scheduler,
    'lr_scheduler_kwargs': other('left out: schedules have their usual settings here'),
    'learning_rate': same('learning_rate'),
    'cosine_min_lr_ratio': same('min_lr_ratio'),
    'cosine_constant_lr_ratio': other('left out: the rate of a cosine falls until the last step'),
    'weight_decay': same('weight_decay'),
    'max_grad_norm': same('max_grad_norm'),
    'adam_beta1': same('adam_beta1'),
    'adam_beta2': same('adam_beta2'),
    'adam_epsilon': same('adam_epsilon'),
    'warmup_ratio': same('warmup_ratio'),
    'warmup_steps': same('warmup_steps'),
    'neftune_noise_alpha': other(f'NEFTune {NOT_BUILT}'),
    'seed': same('seed'),
    'output_dir': OUTPUT,
    'logging_steps': same('logging_steps'),
    'save_total_limit': same('save_total_limit', 'the best checkpoint is always among those that are kept'),
    'save_only_model': same('only_save_model'),
    'gradient_checkpointing': lambda t, key, value: t.use(key, 'gradient_checkpointing', is_on(value)),
    'bf16': _bf16,
    'fp16': precision,
    'bfloat16': precision,
    'float16': precision,
    'torch_dtype': torch_dtype,
    'deepspeed': deepspeed,
    'fsdp': fsdp,
    'fsdp_config': fsdp,
    'fsdp_version': silent,
    'datasets': silent,
    'test_datasets': silent,
    'pretraining_dataset': silent,
    'val_set_size': silent,
    'dataset_prepared_path': LOADING,
    'shuffle_merged_datasets': LOADING,
    'chat_template': _template,
    'chat_template_jinja': _jinja,
    'chat_template_kwargs': _template_settings,
    'default_system_message': same('system'),
    'special_tokens': _special_tokens,
    'eot_tokens': unused('the end of a reply is found from the chat template'),
    'tokens': new_tokens,
    'added_tokens_overrides': new_tokens,
    'train_on_inputs': other('left out: tokens of a prompt never carry loss here'),
    'group_by_length': GROUPED,
    'streaming': same('streaming'),
    'eval_steps': silent,
    'eval_strategy': silent,
    'evaluation_strategy': silent,
    'evals_per_epoch': silent,
    'save_steps': silent,
    'save_strategy': silent,
    'saves_per_epoch': silent,
    'early_stopping_patience': same('early_stop'),
    'resume_from_checkpoint': resume,
    'auto_resume_from_checkpoints': other('the command starts a new run; checkpoints of axolotl are not resumed'),
    'hub_model_id': _hub,
    'hf_use_auth_token': TOKEN,
    'trust_remote_code': unused('code of a checkpoint is never run here; the model uses a class of this project'),
    'plugins': _plugins,
    'pad_to_sequence_len': FASTER,
    'remove_unused_columns': LOADING,
    'skip_prepare_dataset': LOADING,
    'strict': unused('a command line is always checked as a whole'),
    'loss_watchdog_threshold': unused('a run ends at NaN, and a spike of the loss is marked'),
    'loss_watchdog_patience': unused('a run ends at NaN, and a spike of the loss is marked'),
    'rl': _RLHF,
    'trl': _RLHF,
    'rl_beta': _RLHF,
    'orpo_alpha': _RLHF,
    'reward_model': _REWARD,
    'process_reward_model': _REWARD,
    'num_labels': _REWARD,
    'diffusion': _OTHER_TRAINING,
    'ebft': _OTHER_TRAINING,
    'qat': refused('training with rounded weights is not supported. Remove the key.'),
    'fp8': other('left out: the data type is that of --dtype'),
    'relora': refused('restarts of the adapter are not supported. Remove the key.'),
    'lisa_n_layers': other(f'LISA {NOT_BUILT}'),
    'llmcompressor': refused('sparse weights are not supported. Remove the key.'),
    'use_eaft': other('left out: the loss is the cross-entropy of the trained tokens'),
    'context_parallel_size': _divided,
    'sequence_parallel_degree': _divided,
    'tensor_parallel_size': _divided,
    'expert_parallel_size': _divided,
    'dp_shard_size': unused('--fsdp shards over all processes'),
    'dp_replicate_size': unused('--fsdp shards over all processes'),
    'model_config': refused(_CONFIG),
    'overrides_of_model_config': refused(_CONFIG),
    'rope_scaling': refused('the positions of the model are not changed here. Write them into its config.json.'),
    'reinit_weights': refused('the weights of the model are always read here. Remove the key.'),
    'tokenizer_config': refused('a tokenizer of another model is not used here. Save it into the folder of the model.'),
    'tokenizer_use_mistral_common': other('the tokenizer and chat template of transformers are used'),
    'freeze_mm_modules': same('freeze_vision'),
    'dataset_exact_deduplication': other('left out: --check_dataset true names rows that occur twice'),
    'curriculum_sampling': other('rows are shuffled by --seed in each epoch'),
    'min_sample_len': other('left out: short rows are trained too'),
    'lr_quadratic_warmup': other('left out: the rate rises in a straight line'),
    'use_ray': refused('runs are started with python or torchrun here, not by ray. Remove the key.'),
    'is_mistral_derived_model': silent,
    'is_llama_derived_model': silent,
    'is_falcon_derived_model': silent,
    'debug': LOGGING,
    'ddp': unused('several processes are joined whenever torchrun starts them'),
    'device_map': unused('without torchrun, a model that is larger than a GPU is divided by layers'),
    **dict.fromkeys(_TRACKERS, _tracker),
}

FAMILIES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            'flash_', 'attn_', 'sdp_', 'xformers', 'eager_', 'flex_', 's2_', 'liger_', 'lora_mlp', 'lora_qkv',
            'lora_o_', 'lora_fan', 'cut_cross', 'unsloth_', 'torch_compile', 'tf32', 'gradient_checkpointing_',
            'activation_', 'use_kernels', 'use_scattermoe', 'use_sonicmoe', 'experts_impl', 'tiled_mlp', 'fused_',
            'low_cpu', 'chunked_cross', 'quantize_moe', 'ddp_', 'dataloader_', 'gpu_memory', 'gc_steps',
            'pad_to_multiple', 'bf16_full', 'gemma4_', 'llama4_', 'max_packed', 'sample_packing_', 'multipack_',
            'pretrain_multipack', 'streaming_', 'save_first', 'include_tok', 'use_dsv', 'dsv', 'use_glm',
            'resize_token', 'accelerator_',
        ),
        FASTER,
    ),
    **dict.fromkeys(
        ('wandb_', 'mlflow_', 'swanlab_', 'comet_', 'use_otel', 'otel_', 'profiler_', 'trackio_'),
        unused('a tracker reads its own environment variables'),
    ),
    **dict.fromkeys(
        ('model_type', 'tokenizer_type', 'processor_type', 'tokenizer_use_f', 'tokenizer_legacy', 'is_', 'base_model_'),
        unused('the class of a model and of its tokenizer is found from their files'),
    ),
    **dict.fromkeys(('dataset_', 'save_safe', 'gptq_', 'preprocess', 'model_quantization', 'experimental_'), LOADING),
    'eval_': unused('the evaluation has its own settings here'),
    'do_causal': unused('the evaluation has its own settings here'),
    'expert_parallel': unused('experts are not divided over devices'),
    'relora_': unused('restarts of the adapter are not supported'),
    'jagged_': refused('restarts of the schedule are not supported. Remove the key.'),
    'lisa_': unused('LISA is not supported'),
    'eaft_': unused('the loss is the cross-entropy of the trained tokens'),
    'ray_': unused('runs are started with python or torchrun'),
    'kto_': _RLHF,
    'dpo_': _RLHF,
    'vllm': unused('it is for serving'),
    'hub_': unused('what is pushed, and when, is said by --push_hub_strategy'),
}  # fmt: skip


def translate(t: Translation) -> None:
    """Translate a recipe of axolotl: set the flags of `t`, and add its notes and problems."""
    apply_rules(t, RULES, FAMILIES)
    t.use('(hub)', 'hub', 'huggingface', kind='default')
    if is_empty(t.get('adapter')):
        t.use('(adapter)', 'sft_type', 'full', kind='default')
    elif not t.flags.get('lora_target_modules') and not t.problems.found:
        why = 'the layers that the model entry names, or all linear layers; axolotl takes the choice of PEFT'
        t.note('different', '(lora_target_modules)', why)

    rows = Rows()
    for entry in _entries(t, 'datasets') + _entries(t, 'pretraining_dataset'):
        rows.train += _entry_words(t, rows, 'datasets', entry)
    for entry in _entries(t, 'test_datasets'):
        rows.val += _entry_words(t, rows, 'test_datasets', entry)
    rows.finish(t, 'datasets')
    val_size(t, 'val_set_size')
    _steps(t, evaluates='val_dataset' in t.flags or t.flags.get('dataset_test_ratio', ['0']) != ['0'])

    defaults: dict[str, Any] = dict(_DEFAULTS)
    if 'warmup_steps' in t.flags or is_on(t.get('warmup_steps')):
        del defaults['warmup_ratio']
    apply_defaults(t, defaults)


def _steps(t: Translation, *, evaluates: bool) -> None:
    """Set --eval_steps and --save_steps.

    A recipe gives numbers of steps (eval_steps, save_steps) or numbers per epoch (evals_per_epoch, saves_per_epoch).
    Without such a number, both flags are set to one epoch. `evaluates` says whether the command has validation rows.
    Without them, --eval_steps is not set. If a strategy is `no`, its flag is not set, and a note is added. Numbers per
    epoch need the number of steps of an epoch, so with max_steps a note is added instead.
    """
    epochs = to_number(t.get('num_epochs')) or 1
    for what, often, flag in (('eval', 'evals_per_epoch', 'eval_steps'), ('save', 'saves_per_epoch', 'save_steps')):
        if what == 'eval' and not evaluates:
            if is_on(t.get(often)) or is_on(t.get(flag)):
                t.note('without effect', often if t.get(often) else flag, 'there are no validation rows')
            continue
        strategy = str(t.get(f'{what}_strategy', '')).lower()
        if is_off(strategy):
            t.note('different', f'{what}_strategy', 'checkpoints are always written, and validation rows evaluated')
        elif is_on(t.get(often)):
            use_share(t, often, flag, (to_number(t.get(often)) or 1) * epochs)
        elif is_on(t.get(flag)):
            t.use(flag, flag, t.get(flag))
        else:
            use_share(t, f'({what}_strategy)', flag, epochs, kind='default')


def _entries(t: Translation, key: str) -> list[dict[str, Any]]:
    """Return the data sets in the value of a key as a list of dictionaries."""
    value = t.get(key)
    entries = []
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, str):
            entries.append({'path': entry, 'type': 'completion'})
        elif isinstance(entry, dict) and entry.get('path'):
            entries.append({'type': 'completion', **entry} if key == 'pretraining_dataset' else entry)
        elif not is_empty(entry):
            t.refuse(key, 'an item has no path. Name its file, or its id on the hub.')
    return entries


def _entry_words(t: Translation, rows: Rows, key: str, entry: dict[str, Any]) -> list[str]:
    """Return the values of --dataset for one data set. Adds the names of its columns to `rows`."""
    path = str(entry['path'])
    named = f'{key} {path}'
    _shape(t, rows, named, entry)
    for name in ('shards', 'preprocess_shards'):
        if is_on(entry.get(name)):
            t.refuse(f'{named} {name}', 'a part of a file is not read. Use # and a number of rows instead.')

    files = to_list(entry.get('data_files'))
    revision = str(entry.get('revision') or '')
    if path in ('json', 'csv', 'parquet', 'text') and files:
        return [str(file) for file in files]
    if is_file(path):
        return [path]
    if '://' in path:
        t.refuse(named, 'rows are not read from this address. Download the files, and give their paths.')
        return [path]
    if files:
        return [hub_word('hf:', path, str(file), revision=revision) for file in files]
    return [
        hub_word('hf:', path, str(entry.get('name') or ''), split, revision=revision)
        for split in _splits(t, named, str(entry.get('split') or 'train'))
    ]


def _splits(t: Translation, named: str, split: str) -> list[str]:
    """Return the names of the splits in a text such as `train[:20%]+test`: train and test.

    A slice in brackets is removed, with a note. `named` names the data set in this note.
    """
    if '[' in split:
        t.note('different', named, f'all rows of the split are used instead of {split}; name#1000 draws 1000 rows')
    return [re.sub(r'\[.*\]', '', part) for part in split.split('+')]


def _shape(t: Translation, rows: Rows, named: str, entry: dict[str, Any]) -> None:
    """Add the names of a data set's columns to `rows`, according to the key `type`. An unknown type is a problem.

    `named` names the data set in notes and problems.
    """
    kind = entry.get('type')
    if isinstance(kind, dict):
        names = {kind.get(f'field_{part}', part): part for part in ('instruction', 'input', 'output', 'system')}
        rows.rename(t, named, {str(name): part for name, part in names.items() if f'field_{part}' in kind})
        t.note('different', named, 'the chat template of the model is used instead of the text of format')
        return

    base = str(kind).partition('.')[0].partition(':')[0]
    if base in ('chat_template', 'sharegpt') and not str(kind).endswith('.argilla'):
        _messages(t, rows, named, entry)
    elif base == 'alpaca':
        why = "the chat template of the model is used; axolotl puts the text 'Below is an instruction' around a row"
        t.note('different', named, why)
    elif base in ('completion', 'pretrain'):
        rows.text(t, named, str(entry.get('field') or entry.get('text_column') or 'text'))
    else:
        t.refuse(
            f'{named} type',
            f"'{kind}' is not known here. Save the rows with messages, or with instruction and output, and give the "
            'type chat_template or alpaca.',
        )


def _messages(t: Translation, rows: Rows, named: str, entry: dict[str, Any]) -> None:
    """Add the column that holds the messages to `rows`. Adds a problem to `t` if a setting is not supported."""
    mapped = entry.get('message_property_mappings') or {}
    role = str(mapped.get('role') or entry.get('message_field_role') or 'role')
    content = str(mapped.get('content') or entry.get('message_field_content') or 'content')
    older = str(entry.get('type')).startswith('sharegpt')
    column = str(entry.get('field_messages') or ('conversations' if older else 'messages'))
    rows.chat(t, named, column, role, content)
    trained = set(map(str, to_list(entry.get('roles_to_train'))))
    if trained and trained.isdisjoint({'assistant', 'gpt', 'model'}):
        t.refuse(f'{named} roles_to_train', 'only replies of the assistant carry loss here. Remove the key.')
