"""Translates a recipe of LLaMA-Factory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.base.errors import ConfigError, did_you_mean
from utils.base.files import read_json
from utils.migrate.rows import Rows, hub_word, limit_rows
from utils.migrate.trainer_keys import (
    DIVIDED,
    FASTER,
    LOADING,
    LOGGING,
    NOT_BUILT,
    NOT_REPLIES,
    TRAINER_FAMILIES,
    TRAINER_RULES,
    generation_off,
    new_tokens,
    set_steps,
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
    unused,
)

# What LLaMA-Factory does if the recipe does not say it, where this differs from the defaults here.
_DEFAULTS = {
    'loss_scope': 'all_rounds', 'max_length': 2048, 'num_train_epochs': 3, 'batch_size': 8,
    'gradient_accumulation_steps': 1, 'learning_rate': 5e-5, 'lr_scheduler_type': 'linear', 'warmup_ratio': 0,
    'weight_decay': 0, 'save_total_limit': -1, 'logging_steps': 500, 'gradient_checkpointing': True,
    'train_dataset_sample': -1,
}  # fmt: skip
# The data sets that LLaMA-Factory names and that lie on Hugging Face: its name, and the id (and split).
_ON_HUGGING_FACE: dict[str, str] = {
    'alpaca_en': 'llamafactory/alpaca_en', 'alpaca_zh': 'llamafactory/alpaca_zh',
    'alpaca_gpt4_en': 'llamafactory/alpaca_gpt4_en', 'alpaca_gpt4_zh': 'llamafactory/alpaca_gpt4_zh',
    'glaive_toolcall_en': 'llamafactory/glaive_toolcall_en', 'glaive_toolcall_zh': 'llamafactory/glaive_toolcall_zh',
    'lima': 'llamafactory/lima', 'belle_1m': 'BelleGroup/train_1M_CN', 'belle_2m': 'BelleGroup/train_2M_CN',
    'open_platypus': 'garage-bAInd/Open-Platypus', 'codealpaca': 'sahil2801/CodeAlpaca-20k',
    'slimorca': 'Open-Orca/SlimOrca', 'mathinstruct': 'TIGER-Lab/MathInstruct',
    'ultrachat_200k': 'HuggingFaceH4/ultrachat_200k:train_sft', 'infinity_instruct': 'BAAI/Infinity-Instruct',
    'glaive_toolcall_100k': 'hiyouga/glaive-function-calling-v2-sharegpt',
    'open_thoughts': 'llamafactory/OpenThoughts-114k', 'open_r1_math': 'llamafactory/OpenR1-Math-94k',
    'pokemon_cap': 'llamafactory/pokemon-gpt4o-captions', 'stem_zh': 'hfl/stem_zh_instruction',
    'neo_sft': 'm-a-p/neo_sft_phase2', 'chinese_r1_distill': 'Congliu/Chinese-DeepSeek-R1-Distill-data-110k-SFT',
}  # fmt: skip
# The data sets of its own data folder: the name and the file.
_DEMO_FILES = {
    name: f'{name}.json'
    for name in (
        'identity', 'alpaca_en_demo', 'alpaca_zh_demo', 'glaive_toolcall_en_demo', 'glaive_toolcall_zh_demo',
        'mllm_demo',
    )
} | {'c4_demo': 'c4_demo.jsonl', 'wiki_demo': 'wiki_demo.txt'}  # fmt: skip
# The columns of an entry of dataset_info.json, and the names that are read here.
_ALPACA = {'prompt': 'instruction', 'query': 'input', 'response': 'output', 'history': 'history', 'system': 'system'}


def _stage(t: Translation, key: str, value: Any) -> None:
    if str(value) == 'sft':
        t.note('used', key, 'supervised fine-tuning')
    elif str(value) == 'pt':
        t.note('different', key, 'rows with a column text are trained on every token; rows of a chat on the replies')
    else:
        t.refuse(key, f"'{value}' {NOT_REPLIES}. Train this stage with LLaMA-Factory.")


def _finetuning_type(t: Translation, key: str, value: Any) -> None:
    if str(value) in ('lora', 'full'):
        t.use(key, 'sft_type', value)
    else:
        t.refuse(key, f"'{value}' is not supported. Use lora or full.")


def _lora_target(t: Translation, key: str, value: Any) -> None:
    names = to_list(value)
    t.use(key, 'lora_target_modules', ['ALL'] if names == ['all'] else names)


def _quantization(t: Translation, key: str, value: Any) -> None:
    method = str(t.get('quantization_method', 'bnb'))
    if method not in ('bnb', 'bitsandbytes'):
        t.refuse('quantization_method', f"'{method}' is not supported. Use bnb with 4 or 8 bits.")
    t.use(key, 'quantization_bit', value)


def _template(t: Translation, key: str, value: Any) -> None:
    t.note(
        'different',
        key,
        f"the chat template of the model's own tokenizer is used, and not the text that LLaMA-Factory keeps as "
        f"'{value}'; --chat_template FILE takes another one",
    )


def _packing(t: Translation, key: str, value: Any) -> None:
    t.use(key, 'packing', value, why='packed rows never attend to each other' if key == 'packing' else '')


def _flash_attn(t: Translation, key: str, value: Any) -> None:
    t.note('without effect', key, 'flash-attn is used if it is installed; the results are the same')


def _thinking(t: Translation, key: str, value: Any) -> None:
    if is_off(value):
        t.use(key, 'template_settings', 'enable_thinking=false', why='the template must have this variable')
    else:
        t.note('used', key, 'the template writes the reasoning of a row, which is its own default')


def _pure_bf16(t: Translation, key: str, value: Any) -> None:
    if is_off(value):
        t.note('without effect', key, 'it is off')
        return
    t.use(key, 'dtype', 'bf16')
    if str(t.get('finetuning_type', 'lora')) == 'full':
        t.use(key, 'full_weights', 'bf16', why='updates are rounded stochastically')


RULES: dict[str, Rule] = TRAINER_RULES | {
    'model_name_or_path': same('model_id_or_path'),
    'model_revision': same('model_revision'),
    'adapter_name_or_path': same('adapter'),
    'create_new_adapter': refused('a second adapter on a trained one is not supported. Merge the first one.'),
    'stage': _stage,
    'finetuning_type': _finetuning_type,
    'lora_rank': same('lora_rank'),
    'lora_alpha': same('lora_alpha'),
    'lora_dropout': same('lora_dropout_p'),
    'lora_target': _lora_target,
    'additional_target': lambda t, key, value: t.use(key, 'lora_modules_to_save', to_list(value)),
    'use_rslora': same('use_rslora'),
    'use_dora': same('use_dora'),
    'quantization_bit': _quantization,
    'quantization_method': silent,
    'quantization_type': same('bnb_4bit_quant_type'),
    'double_quantization': same('bnb_4bit_use_double_quant'),
    'quantization_device_map': LOADING,
    'freeze_vision_tower': same('freeze_vision'),
    'freeze_multi_modal_projector': other('the projector belongs to the vision tower: --freeze_vision decides'),
    'freeze_language_model': refused('the language model is always trained here. Remove the key.'),
    'dataset': silent,
    'eval_dataset': silent,
    'dataset_dir': silent,
    'media_dir': other('paths of images are relative to their data file'),
    'template': _template,
    'tool_format': unused('tools are written by the chat template of the tokenizer'),
    'default_system': same('system'),
    'enable_thinking': _thinking,
    'cutoff_len': same(
        'max_length', 'a longer row loses its beginning; the toolkit cuts the ends of a long prompt and of a long reply'
    ),
    'max_samples': silent,
    'val_size': silent,
    'train_on_prompt': other('left out: tokens of a prompt never carry loss here'),
    'mask_history': lambda t, key, value: t.use(key, 'loss_scope', 'all_rounds' if is_off(value) else 'last_round'),
    'packing': _packing,
    'neat_packing': lambda t, key, value: t.use(key, 'packing', value),
    'streaming': same('streaming'),
    'mix_strategy': silent,
    'interleave_probs': silent,
    'tokenized_path': other('rows are encoded here from their text, and kept in the cache'),
    'preprocessing_num_workers': LOADING,
    'preprocessing_batch_size': LOADING,
    'overwrite_cache': LOADING,
    'buffer_size': LOADING,
    'cache_dir': LOADING,
    'data_shared_file_system': LOADING,
    'ignore_pad_token_for_loss': unused('padding never carries loss'),
    'disable_shuffling': other('rows are shuffled by --seed in each epoch'),
    'flash_attn': _flash_attn,
    'shift_attn': other('left out: every token attends to all earlier ones, as the model was trained'),
    'rope_scaling': refused('the positions of the model are not changed here. Write them into its config.json.'),
    'image_max_pixels': same('max_pixels'),
    'image_min_pixels': unused('images are never scaled up'),
    'pure_bf16': _pure_bf16,
    'disable_gradient_checkpointing': lambda t, key, value: t.use(key, 'gradient_checkpointing', is_off(value)),
    'early_stopping_steps': same('early_stop'),
    'use_swanlab': lambda t, key, value: t.use(key, 'report_to', ['swanlab']) if is_on(value) else None,
    'enable_liger_kernel': FASTER,
    'use_unsloth': FASTER,
    'use_unsloth_gc': FASTER,
    'use_reentrant_gc': FASTER,
    'low_cpu_mem_usage': FASTER,
    'upcast_layernorm': other('left out: norms compute in fp32 and keep the data type of the weights'),
    'plot_loss': LOGGING,
    'compute_accuracy': unused('accuracy of the trained tokens is always computed'),
    'use_fast_tokenizer': LOADING,
    'split_special_tokens': refused('special tokens are never split here. Remove the key.'),
    'use_cache': FASTER,
    'print_param_status': LOGGING,
    'resize_vocab': new_tokens,
    'add_tokens': new_tokens,
    'add_special_tokens': new_tokens,
    'infer_backend': generation_off,
    'export_dir': refused('the recipe merges a model. Use python llm_infer.py --merge_lora_and_save true.'),
    'mixture_of_depths': refused('it changes the layers of the model. Remove the key.'),
    'use_llama_pro': refused('it adds layers to the model. Remove the key.'),
    'use_badam': other(f'BAdam {NOT_BUILT}; --optim updates all weights'),
    'use_apollo': other(f'APOLLO {NOT_BUILT}; --optim updates all weights'),
    'use_adam_mini': other(f'Adam-mini {NOT_BUILT}; --optim updates all weights'),
    'use_muon': other(f'Muon {NOT_BUILT}; --optim updates all weights'),
    'loraplus_lr_ratio': other(f'a second learning rate (LoRA+) {NOT_BUILT}'),
    'use_dft_loss': other('left out: the loss is the cross-entropy of the trained tokens'),
    'use_eaft_loss': other('left out: the loss is the cross-entropy of the trained tokens'),
    'train_from_scratch': refused('the weights of the model are always read here. Remove the key.'),
    'moe_aux_loss_coef': other('left out: no loss of the router is added'),
    'sequence_parallel_size': DIVIDED,
}

FAMILIES: dict[str, Rule] = {
    'pissa_': other(f'PiSSA {NOT_BUILT}'),
    'loraplus_': other(f'a second learning rate (LoRA+) {NOT_BUILT}'),
    'badam_': unused('BAdam is not supported'),
    'apollo_': unused('APOLLO is not supported'),
    'eaft_': unused('the loss is the cross-entropy of the trained tokens'),
    'pref_': refused(f'preference training {NOT_REPLIES}. Use LLaMA-Factory for it.'),
    'ppo_': refused(f'reinforcement learning {NOT_REPLIES}. Use LLaMA-Factory for it.'),
    'freeze_trainable': refused('training only some layers is not supported. Use lora or full.'),
    'video_': unused('rows with videos are not read here'),
    'audio_': unused('rows with sound are not read here'),
    'vllm_': unused('it is for serving'),
    'sglang_': unused('it is for serving'),
    'export_': unused('it is for merging'),
    **TRAINER_FAMILIES,
}


def translate(t: Translation, folder: Path, dataset_info: Path | None) -> None:
    """Translate a LLaMA-Factory recipe in `folder`. `dataset_info` is the path in --dataset_info, or None."""
    apply_rules(t, RULES, FAMILIES)
    modelscope = str(t.environment.get('USE_MODELSCOPE_HUB', '0')).lower() in ('1', 'true')
    t.use('(hub)', 'hub', 'modelscope' if modelscope else 'huggingface', kind='default')
    if not any(is_on(t.get(key)) for key in ('do_train', 'do_predict', 'export_dir', 'infer_backend')):
        t.note('different', 'do_train', 'the recipe does not say do_train: true; the command trains')

    _rows(t, folder, dataset_info)
    evaluates = 'val_dataset' in t.flags or t.flags.get('dataset_test_ratio', ['0']) != ['0']
    # The defaults of transformers' TrainingArguments: a recipe without eval_strategy does not evaluate.
    set_steps(t, evaluates=evaluates, eval_strategy='no', eval_steps='logging_steps')

    defaults: dict[str, Any] = dict(_DEFAULTS)
    if str(t.get('finetuning_type', 'lora')) == 'lora':
        rank = to_number(t.get('lora_rank')) or 8
        defaults |= {'lora_target_modules': 'ALL', 'lora_alpha': 2 * rank}
    if str(t.get('stage', 'sft')) == 'pt':
        defaults['packing'] = True
    if 'warmup_steps' in t.flags:
        del defaults['warmup_ratio']
    apply_defaults(t, defaults)


def _rows(t: Translation, folder: Path, dataset_info: Path | None) -> None:
    rows = Rows()
    info = _read_info(t, folder, dataset_info)
    for name in to_list(t.get('dataset')):
        rows.train += _words(t, rows, 'dataset', name, info)
    for name in to_list(t.get('eval_dataset')):
        rows.val += _words(t, rows, 'eval_dataset', name, info)

    count = to_number(t.get('max_samples'))
    if count:
        rows.train = limit_rows(t, 'max_samples', rows.train, int(count))
        rows.val = limit_rows(t, 'max_samples', rows.val, int(count))
    _mix(t, rows)
    rows.finish(t, 'dataset')
    val_size(t, 'val_size')


def _mix(t: Translation, rows: Rows) -> None:
    """Append the shares in `interleave_probs` to the values of --dataset (name%share), unless mix_strategy is concat.

    A share replaces a number of rows (#). A wrong number of shares is a problem.
    """
    strategy = str(t.get('mix_strategy', 'concat'))
    shares = to_list(t.get('interleave_probs'))
    if strategy == 'concat':
        if shares:
            t.note('without effect', 'interleave_probs', 'mix_strategy is concat')
        return
    if len(shares) != len(rows.train):
        t.refuse('interleave_probs', f'it has {len(shares)} shares for {len(rows.train)} data sets. Give one for each.')
        return
    rows.train = [f'{word.partition("#")[0]}%{share}' for word, share in zip(rows.train, shares, strict=True)]
    t.note('different', 'mix_strategy', 'the shares hold exactly; the size is that of all rows together')


def val_size(t: Translation, key: str) -> None:
    """Translate the size of the validation set to --dataset_test_ratio, which is a share of all rows.

    If the recipe names validation rows, the flag is not set. If the recipe gives a share, it is used. If the recipe
    gives a number of rows, the share is unknown, because the number of all rows is unknown. Then the flag is set to
    0.01, and a note asks the user to correct it.
    """
    size = to_number(t.get(key, 0))
    if size is None or size < 0:
        t.refuse(key, f"'{t.get(key)}' is not a share. Give a share below 1, e.g. 0.1.")
    elif 'val_dataset' in t.flags:
        if size:
            t.note('without effect', key, 'the validation set is named')
    elif 0 < size < 1:
        t.use(key, 'dataset_test_ratio', size, why='the rows that are held out are chosen by another random generator')
    elif size:
        t.use(key, 'dataset_test_ratio', 0.01, why=f'the recipe asks for {int(size)} rows; change this share')
    else:
        t.use(key if t.get(key) is not None else '(--dataset_test_ratio)', 'dataset_test_ratio', 0, kind='default')


def _read_info(t: Translation, folder: Path, dataset_info: Path | None) -> Mapping[str, Any]:
    """Return the entries of dataset_info.json. Each entry also gets the key `in`, the folder of the file.

    If `dataset_info` is None, the file is looked for in the data folder that the recipe names. If it is not there,
    returns an empty dictionary. Raises ConfigError if the file `dataset_info` does not exist.
    """
    named = str(t.get('dataset_dir', 'data'))
    places = [dataset_info] if dataset_info else [Path(base, named, 'dataset_info.json') for base in (folder, Path())]
    for file in places:
        if file is not None and file.is_file():
            entries = read_json(file).items()
            return {name: {'in': str(file.parent), **entry} for name, entry in entries if isinstance(entry, dict)}
    if dataset_info is not None:
        raise ConfigError(f'--dataset_info {dataset_info}: the file is not there. Correct the path.')
    return {}


def _words(t: Translation, rows: Rows, key: str, name: str, info: Mapping[str, Any]) -> list[str]:
    """Return the values of --dataset for a data set that LLaMA-Factory knows by this name.

    An unknown name is a problem. It is returned unchanged.
    """
    if name in info:
        return _entry_words(t, rows, f'{key} {name}', info[name])
    if name in _ON_HUGGING_FACE:
        repo_id, _, split = _ON_HUGGING_FACE[name].partition(':')
        return [hub_word('hf:', repo_id, split or 'train')]
    if name in _DEMO_FILES:
        folder = str(t.get('dataset_dir', 'data'))
        t.note('different', f'{key} {name}', 'a file of the LLaMA-Factory repository: start in it, or give its path')
        return [f'{folder}/{_DEMO_FILES[name]}']
    known = (*info, *_ON_HUGGING_FACE, *_DEMO_FILES)
    t.refuse(
        f'{key} {name}',
        f'its entry of dataset_info.json is not found{did_you_mean(name, known)} Name its file: --dataset_info FILE.',
    )
    return [name]


def _entry_words(t: Translation, rows: Rows, key: str, entry: Mapping[str, Any]) -> list[str]:
    """Return the values of --dataset for an entry of dataset_info.json. Adds the names of its columns to `rows`."""
    if entry.get('ranking') or 'kto_tag' in entry.get('columns', {}):
        t.refuse(key, 'rows with a chosen and a rejected reply are for preference training. Name rows with replies.')
    if entry.get('script_url'):
        t.refuse(key, 'a script makes these rows, and no script of a data set is run. Save the rows as .jsonl.')
    _entry_columns(t, rows, key, entry)

    modelscope = t.flags.get('hub') == ['modelscope'] and entry.get('ms_hub_url')
    if modelscope or entry.get('hf_hub_url') or entry.get('ms_hub_url'):
        prefix = 'ms:' if modelscope or not entry.get('hf_hub_url') else 'hf:'
        repo_id = entry['ms_hub_url'] if prefix == 'ms:' else entry['hf_hub_url']
        subset = str(entry.get('subset') or entry.get('folder') or '')
        word = hub_word(prefix, repo_id, subset, str(entry.get('split') or 'train'))
    else:
        word = f'{entry["in"]}/{entry.get("file_name", "")}'
    return [f'{word}#{entry["num_samples"]}' if entry.get('num_samples') else word]


def _entry_columns(t: Translation, rows: Rows, key: str, entry: Mapping[str, Any]) -> None:
    columns = dict(entry.get('columns') or {})
    if not {'videos', 'audios'}.isdisjoint(columns):
        t.refuse(key, 'rows with videos or sound are not read here. Name rows with text or images.')
    if entry.get('formatting', 'alpaca') == 'alpaca':
        if set(columns) == {'prompt'}:
            rows.text(t, key, str(columns['prompt']))
        else:
            rows.rename(t, key, {name: _ALPACA[part] for part, name in columns.items() if part in _ALPACA})
        return

    tags = entry.get('tags') or {}
    column = str(columns.get('messages', 'conversations'))
    rows.chat(t, key, column, str(tags.get('role_tag', 'from')), str(tags.get('content_tag', 'value')))
