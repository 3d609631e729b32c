"""Translates the flags of a `swift sft` command line."""

from __future__ import annotations

import math
import re
from typing import Any

from utils.migrate.llama_factory import val_size
from utils.migrate.rows import Rows, hub_word, is_file
from utils.migrate.trainer_keys import (
    DIVIDED,
    FASTER,
    LOADING,
    LOGGING,
    NOT_BUILT,
    NOT_REPLIES,
    TOKEN,
    TRAINER_FAMILIES,
    TRAINER_RULES,
    new_tokens,
    set_steps,
    torch_dtype,
)
from utils.migrate.translation import (
    Rule,
    Translation,
    apply_defaults,
    apply_rules,
    is_off,
    is_on,
    other,
    refused,
    same,
    silent,
    to_list,
    to_number,
    to_word,
    unused,
)

# What ms-swift does if the command does not say it, where this differs from the defaults here.
_DEFAULTS = {
    'loss_scope': 'all_rounds', 'overlong': 'drop', 'num_train_epochs': 3, 'weight_decay': 0.1, 'adam_beta2': 0.95,
    'warmup_ratio': 0, 'save_total_limit': -1, 'gradient_checkpointing': True, 'train_dataset_sample': -1,
}  # fmt: skip
_PREFIXES = {'hf': 'hf:', 'ms': 'ms:'}
_SELF_COGNITION = 'swift/self-cognition'
_OVERLONG = {'delete': 'drop', 'left': 'cut', 'split': 'split'}


def _tuner(t: Translation, key: str, value: Any) -> None:
    if str(value) in ('lora', 'full'):
        t.use(key, 'sft_type', value)
    else:
        t.refuse(key, f"'{value}' is not supported. Use lora or full.")


def _targets(t: Translation, key: str, value: Any) -> None:
    names = [name for part in to_list(value) for name in str(part).split()]
    t.use(key, 'lora_target_modules', ['ALL' if name == 'all-linear' else name for name in names])


def lora_pattern(t: Translation, key: str, value: Any) -> None:
    """Translate a regular expression for the paths of layers. It becomes --lora_target_modules re:EXPRESSION."""
    t.use(key, 'lora_target_modules', f're:{value}')


def _truncation(t: Translation, key: str, value: Any) -> None:
    if str(value) == 'right':
        t.use(key, 'overlong', 'cut', why='the beginning of a longer row is cut, so that its last reply stays')
    else:
        t.use(key, 'overlong', _OVERLONG.get(str(value), value))


def _loss_scale(t: Translation, key: str, value: Any) -> None:
    if str(value) == 'last_round':
        t.use(key, 'loss_scope', 'last_round')
    elif str(value) == 'default':
        t.use(key, 'loss_scope', 'all_rounds')
    else:
        why = f"'{value}' of ms-swift weights tokens; here every token of a reply has weight 1"
        t.use(key, 'loss_scope', 'all_rounds', why=why)


def _template(t: Translation, key: str, value: Any) -> None:
    t.note(
        'different',
        key,
        f"the chat template of the model's own tokenizer is used, and not the text that ms-swift keeps as '{value}'; "
        '--chat_template FILE takes another one',
    )


def _thinking(t: Translation, key: str, value: Any) -> None:
    setting = f'enable_thinking={to_word(not is_off(value))}'
    t.use(key, 'template_settings', setting, why='the template must have this variable')


def _columns(t: Translation, key: str, value: Any) -> None:
    pairs = re.findall(r'"([^"]+)"\s*:\s*"([^"]+)"', str(value))
    if pairs:
        t.use(key, 'columns', [f'{name}={meaning}' for name, meaning in pairs])
    else:
        t.refuse(key, 'it is not an object of names. Write --columns NAME=COLUMN.')


def _quant_method(t: Translation, key: str, value: Any) -> None:
    if str(value) == 'bnb':
        t.note('used', key, 'bitsandbytes, which is the method here')
    else:
        t.refuse(key, f"'{value}' is not supported. Use bnb with 4 or 8 bits.")


def _compute_dtype(t: Translation, key: str, value: Any) -> None:
    short = {'bfloat16': 'bf16', 'float16': 'fp16', 'float32': 'fp32'}
    t.use(key, 'bnb_4bit_comp_dtype', short.get(str(value), value))


def _task(t: Translation, key: str, value: Any) -> None:
    if str(value) == 'causal_lm':
        t.note('used', key, 'the model writes text')
    else:
        t.refuse(key, f"'{value}' {NOT_REPLIES}. Train this task with ms-swift.")


RULES: dict[str, Rule] = TRAINER_RULES | {
    'swift pt': other('rows with a column text are trained on every token; rows of a chat on the replies only'),
    'model': same('model_id_or_path'),
    'model_type': unused('the class of a model is found from its files'),
    'model_revision': same('model_revision'),
    'task_type': _task,
    'train_type': _tuner,
    'tuner_type': _tuner,
    'tuner_backend': unused('the layers of the adapter are those of PEFT'),
    'adapters': same('adapter'),
    'dataset': silent,
    'val_dataset': silent,
    'split_dataset_ratio': silent,
    'columns': _columns,
    'torch_dtype': torch_dtype,
    'lora_rank': same('lora_rank'),
    'lora_alpha': same('lora_alpha'),
    'lora_dropout': same('lora_dropout_p'),
    'target_modules': _targets,
    'target_regex': lora_pattern,
    'modules_to_save': lambda t, key, value: t.use(key, 'lora_modules_to_save', to_list(value)),
    'use_rslora': same('use_rslora'),
    'use_dora': same('use_dora'),
    'init_weights': other(f'another start of the adapter {NOT_BUILT}'),
    'lorap_lr_ratio': other(f'a second learning rate (LoRA+) {NOT_BUILT}'),
    'lora_bias': other('left out: biases are not trained'),
    'freeze_llm': refused('the language model is always trained here. Remove the flag.'),
    'freeze_vit': same('freeze_vision'),
    'freeze_aligner': other('the projector belongs to the vision tower: --freeze_vision decides'),
    'vit_lr': other('left out: one learning rate for all layers'),
    'aligner_lr': other('left out: one learning rate for all layers'),
    'max_length': same('max_length'),
    'truncation_strategy': _truncation,
    'max_pixels': same('max_pixels'),
    'loss_scale': _loss_scale,
    'template': _template,
    'system': same('system'),
    'enable_thinking': _thinking,
    'agent_template': unused('tools are written by the chat template of the tokenizer'),
    'template_backend': unused('the chat template of the tokenizer is used'),
    'use_chat_template': other('the chat template is used for rows of a chat, and no template for rows with text'),
    'packing': same('packing'),
    'packing_length': same('max_length'),
    'padding_free': same('padding_free'),
    'streaming': same('streaming'),
    'interleave_prob': silent,
    'stopping_strategy': unused('a data set that ends starts its next pass'),
    'shuffle_buffer_size': LOADING,
    'dataset_num_proc': LOADING,
    'load_from_cache_file': LOADING,
    'dataset_shuffle': LOADING,
    'train_dataloader_shuffle': LOADING,
    'lazy_tokenize': LOADING,
    'strict': unused('rows that cannot be trained are skipped, counted and named'),
    'download_mode': LOADING,
    'use_hf': silent,
    'attn_impl': unused('flash-attn is used if it is installed; the results are the same'),
    'quant_method': _quant_method,
    'quant_bits': same('quantization_bit'),
    'bnb_4bit_compute_dtype': _compute_dtype,
    'bnb_4bit_quant_type': same('bnb_4bit_quant_type'),
    'bnb_4bit_use_double_quant': same('bnb_4bit_use_double_quant'),
    'bnb_4bit_quant_storage': FASTER,
    'early_stop_interval': same('early_stop', 'evaluations are counted, and not checkpoints'),
    'use_cce': FASTER,
    'use_logits_to_keep': FASTER,
    'experts_impl': FASTER,
    'vit_gradient_checkpointing': FASTER,
    'acc_strategy': unused('accuracy is that of tokens'),
    'model_author': silent,
    'model_name': silent,
    'external_plugins': refused('it runs code of its own. Remove the flag.'),
    'custom_register_path': refused('it runs code of its own. Name the rows with --dataset.'),
    'custom_dataset_info': refused('it gives names to data sets. Name their ids or files with --dataset.'),
    'cached_dataset': refused('rows that are encoded already are not read. Name the rows with --dataset.'),
    'loss_type': refused('the loss is the cross-entropy of the trained tokens. Remove the flag.'),
    'sequence_parallel_size': DIVIDED,
    'check_model': LOADING,
    'device_map': unused('without torchrun, a model that is larger than a GPU is divided by layers'),
    'add_version': unused('each run gets a new folder vN-<time>'),
    'create_checkpoint_symlink': LOGGING,
    'enable_dft_loss': other('left out: the loss is the cross-entropy of the trained tokens'),
    'enable_channel_loss': LOGGING,
    'router_aux_loss_coef': other('left out: no loss of the router is added'),
    'use_galore': other(f'GaLore {NOT_BUILT}; --optim updates all weights'),
    'optimizer': other('left out: --optim names the optimizer'),
    'lisa_activated_layers': other(f'LISA {NOT_BUILT}'),
    'new_special_tokens': new_tokens,
    'ignore_args_error': same('ignore_args_error'),
    'rlhf_type': refused(f'preference training and reinforcement learning: {NOT_REPLIES}. Use ms-swift for it.'),
    'gradient_checkpointing_kwargs': FASTER,
    'hub_token': TOKEN,
    'norm_bbox': unused('boxes in a text are read as text'),
    'response_prefix': other('left out: the chat template writes the beginning of a reply'),
}
FAMILIES: dict[str, Rule] = {
    'freeze_parameters': refused('training only some weights is not supported. Use lora or full.'),
    'trainable_parameters': refused('training only some weights is not supported. Use lora or full.'),
    'vllm_': unused('it is for serving'),
    'target_parameters': refused('name stacked experts with --lora_target_modules. Remove the flag.'),
    **TRAINER_FAMILIES,
}


def translate(t: Translation) -> None:
    """Translate the flags of `swift sft` or `swift pt`: set the flags of `t`, and add its notes and problems."""
    apply_rules(t, RULES, FAMILIES)
    hugging_face = is_on(t.get('use_hf')) or str(t.environment.get('USE_HF', '0')).lower() in ('1', 'true')
    hub = 'huggingface' if hugging_face else 'modelscope'
    t.use('use_hf' if t.get('use_hf') is not None else '(hub)', 'hub', hub, kind='default')
    if 'MAX_PIXELS' in t.environment and 'max_pixels' not in t.flags:
        t.use('MAX_PIXELS', 'max_pixels', t.environment['MAX_PIXELS'])
    if 'NPROC_PER_NODE' in t.environment:
        count = to_number(t.environment['NPROC_PER_NODE'])
        t.processes = int(count) if count else None

    rows = Rows()
    rows.train = _words(t, 'dataset')
    rows.val = _words(t, 'val_dataset')
    rows.finish(t, 'dataset')
    val_size(t, 'split_dataset_ratio')
    evaluates = 'val_dataset' in t.flags or t.flags.get('dataset_test_ratio', ['0']) != ['0']
    # Without eval_strategy and eval_steps, ms-swift evaluates whenever it saves.
    set_steps(t, evaluates=evaluates, eval_strategy=str(t.get('save_strategy', 'steps')), eval_steps='save_steps')
    apply_defaults(t, _defaults(t))


def _defaults(t: Translation) -> dict[str, Any]:
    defaults: dict[str, Any] = dict(_DEFAULTS)
    full = t.flags.get('sft_type') == ['full']
    size = to_number(t.get('per_device_train_batch_size')) or 1
    defaults['gradient_accumulation_steps'] = max(1, math.ceil(16 / size / (t.processes or 1)))
    defaults['learning_rate'] = 1e-5 if full else 1e-4
    if not full:
        defaults |= {'lora_target_modules': 'ALL', 'lora_dropout_p': 0.05}
    if 'max_length' not in t.flags:
        t.use('(--max_length)', 'max_length', -1, why='no limit here; ms-swift takes the limit of the model')
    if 'warmup_steps' in t.flags:
        del defaults['warmup_ratio']
    return defaults


def _words(t: Translation, key: str) -> list[str]:
    value = t.get(key)
    words = []
    for word in value if isinstance(value, list) else to_list(value):
        prefix, mark, rest = str(word).partition('::')
        hub = _PREFIXES.get(prefix.lower(), '') if mark else ''
        name, _, count = (rest if mark else str(word)).partition('#')
        if name.partition(':')[0] == _SELF_COGNITION:
            t.refuse(
                f'{key} {name}',
                'its rows hold {{NAME}} and {{AUTHOR}}, which only ms-swift fills in. Save the rows with the names '
                'filled in, and give that file.',
            )
        if not is_file(name) and not hub and '/' not in name.partition(':')[0]:
            # The first data sets of Hugging Face have no owner.
            hub = 'hf:'
        words += _subsets(name, hub, count)
    if key == 'dataset' and (shares := to_list(t.get('interleave_prob'))) and len(shares) == len(words):
        t.note('used', 'interleave_prob', 'the share after % of each data set')
        return [f'{word.partition("#")[0]}%{share}' for word, share in zip(words, shares, strict=True)]
    return words


def _subsets(name: str, hub: str, count: str) -> list[str]:
    """Return a value of --dataset for each subset of the data set `name`, or one value if it is a file.

    In ms-swift, / separates the names of subsets. `hub` is the prefix of the hub, for example hf:. `count` is the
    number of rows to draw from each subset, or '' for all rows.
    """
    sample = f'#{count}' if count else ''
    if is_file(name):
        return [name + sample]
    repo_id, _, subsets = name.partition(':')
    return [hub_word(hub, repo_id, subset) + sample for subset in (subsets.split('/') if subsets else [''])]
