"""Rules for the keys that LLaMA-Factory and ms-swift share with the arguments of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.migrate.translation import (
    Kind,
    Rule,
    Translation,
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

FASTER = unused('it changes only speed or memory; llm_sft.py uses its fast path wherever it is exact')
NOT_BUILT = 'is not supported on purpose; the run trains without it'
LOGGING = unused('logs and progress bars are those of llm_sft.py')
LOADING = unused('files are read, encoded and cached as described in docs/data.md')
TOKEN = unused('the token of a recipe is not used. Set the environment variable HF_TOKEN or MODELSCOPE_API_TOKEN')
DIVIDED = refused(
    'one model or row is divided over several devices, which is not supported. Remove the key, and use '
    '--deepspeed_config_path ds_config/zero3.json for a model that is larger than a GPU.'
)
OUTPUT = same('output_dir', 'each run gets a new folder in it: <output_dir>/<model>/vN-<time>')
GROUPED = same('group_by_length', 'rows are rearranged within an optimizer step, so that no step gets other rows')
# Each of these trains something else than one model on replies.
NOT_REPLIES = 'trains something else than replies to prompts, and only supervised fine-tuning is supported'
# One evaluation or checkpoint at the end. A share of 1 would be read as one step.
_WHOLE_RUN = 0.99999


def _max_steps(t: Translation, key: str, value: Any) -> None:
    number = to_number(value)
    if number is not None and number < 1:
        t.note('without effect', key, 'whole epochs are trained')
    else:
        t.use(key, 'max_steps', value)


def resume(t: Translation, key: str, value: Any) -> None:
    """Refuse resume_from_checkpoint, because a checkpoint of a different toolkit cannot be resumed.

    If the key is off, adds only a note.
    """
    if is_off(value):
        t.note('without effect', key, 'a new run is started')
        return
    t.refuse(
        key,
        f'a checkpoint of {t.toolkit} cannot be resumed here. Remove the key; to train its adapter further, use '
        '--adapter DIR.',
    )


def deepspeed(t: Translation, key: str, value: Any) -> None:
    """Translate the name or path of a DeepSpeed configuration to --deepspeed_config_path.

    If the name contains a ZeRO stage, such as zero3, z3 or stage3, the configuration of this project for the stage is
    used, e.g. ds_config/zero3.json. Stage 1 (zero1 or z1) becomes stage 2. If the key is off, or if the name is zero0
    or ds_z0_config.json, the flag is not set. Any other path is kept. A configuration as an object is a problem.
    """
    if isinstance(value, dict):
        t.refuse(key, 'the configuration is in the recipe. Save it as JSON, and give it to --deepspeed_config_path.')
        return

    name = Path(str(value)).name.lower()
    stage = 3 if 'zero3' in name or 'z3' in name or 'stage3' in name else 2
    offload = '_offload' if 'offload' in name or name.startswith('zero3_cpu') else ''
    if is_off(value) or name in ('zero0', 'ds_z0_config.json'):
        t.note('without effect', key, 'nothing is sharded by it')
        return
    if not any(mark in name for mark in ('z1', 'z2', 'z3', 'zero1', 'zero2', 'zero3', 'stage2', 'stage3')):
        t.use(key, 'deepspeed_config_path', str(value), why='the file must exist, and torchrun must start the command')
    else:
        chosen = f'ds_config/zero{stage}{offload}.json'
        why = 'the configuration of this ZeRO stage in ds_config/ replaces the file'
        if 'z1' in name or 'zero1' in name:
            why = 'stage 2 replaces stage 1: it also shards the gradients'
        t.use(key, 'deepspeed_config_path', chosen, why=why)
    t.sharded = True


def fsdp(t: Translation, key: str, value: Any) -> None:
    """Translate FSDP of version 1 or 2 to --fsdp, unless the key is off.

    This project always uses FSDP2 over all processes.
    """
    if is_off(value):
        t.note('without effect', key, 'it is off')
        return
    t.use(key, 'fsdp', True, why='FSDP2 shards over all processes, and its further settings have no effect')
    t.sharded = True


def precision(t: Translation, key: str, value: Any) -> None:
    """Translate the keys bf16, fp16, bfloat16 and float16 to --dtype.

    If the value is auto or off, the flag is not set.
    """
    if str(value).lower() == 'auto':
        t.note('used', key, 'bf16 if the device supports it, which is also the default here')
    elif is_off(value):
        t.note('without effect', key, 'it is off')
    else:
        t.use(key, 'dtype', 'bf16' if key.startswith('bf') else 'fp16')


def torch_dtype(t: Translation, key: str, value: Any) -> None:
    """Translate torch_dtype (bfloat16, float16 or float32) to --dtype. If the value is auto, the flag is not set."""
    short = {'bfloat16': 'bf16', 'float16': 'fp16', 'float32': 'fp32'}
    if str(value) == 'auto':
        t.note('used', key, 'chosen by the device here, bf16 if it is supported')
    else:
        t.use(key, 'dtype', short.get(str(value), value))


def scheduler(t: Translation, key: str, value: Any) -> None:
    """Translate the name of the learning-rate schedule.

    cosine_with_min_lr becomes cosine. The rule for lr_scheduler_kwargs sets its lowest rate.
    """
    if str(value) != 'cosine_with_min_lr':
        t.use(key, 'lr_scheduler_type', value)
        return
    t.use(key, 'lr_scheduler_type', 'cosine', why='the lowest rate is --min_lr_ratio')


def scheduler_settings(t: Translation, key: str, value: Any) -> None:
    """Translate lr_scheduler_kwargs. Only the lowest learning rate is used; other settings are left out."""
    settings = value if isinstance(value, dict) else {}
    rate = to_number(t.get('learning_rate'))
    ratio = to_number(settings.get('min_lr_rate'))
    lowest = to_number(settings.get('min_lr'))
    if ratio is None and lowest is not None and rate:
        ratio = lowest / rate
    if ratio is not None:
        t.use(key, 'min_lr_ratio', ratio)
    else:
        t.note('different', key, 'left out: schedules have their usual settings here')


def warmup_steps(t: Translation, key: str, value: Any) -> None:
    """Translate warmup_steps to --warmup_steps. A number below 1 is a share of the run, and becomes --warmup_ratio."""
    number = to_number(value)
    if number is not None and 0 <= number < 1:
        t.use(key, 'warmup_ratio', value)
    else:
        t.use(key, 'warmup_steps', value)


def report_to(t: Translation, key: str, value: Any) -> None:
    """Translate report_to. With `all`, --report_to keeps its default, because `all` depends on installed packages."""
    names = to_list(' '.join(map(str, value)).replace(' ', ',') if isinstance(value, list) else value)
    if names == ['all']:
        t.note('different', key, 'only tensorboard, the default here, and not every tracker that is installed')
    else:
        t.use(key, 'report_to', names)


def optimizer(t: Translation, key: str, value: Any) -> None:
    """Translate the name of an optimizer. Optimizers of torchao become the 8-bit optimizers of bitsandbytes."""
    if str(value) in ('adamw_torch_8bit', 'adamw_torch_4bit'):
        t.use(key, 'optim', 'adamw_8bit', why=f"bitsandbytes keeps its states in 8 bits instead of '{value}'")
    elif str(value) == 'adamw_hf':
        t.use(key, 'optim', 'adamw_torch', why='the AdamW of torch, which computes the same')
    else:
        t.use(key, 'optim', value)


def new_tokens(t: Translation, key: str, value: Any) -> None:
    """Refuse a key that adds tokens to the vocabulary, because --new_tokens reads tokens from a file.

    If the key is off, adds only a note.
    """
    if is_off(value):
        t.note('without effect', key, 'it is off')
        return
    t.refuse(
        key,
        'the recipe adds tokens to the vocabulary. Write them to a text file, one per line, and add --new_tokens FILE.',
    )


def generation_off(t: Translation, key: str, value: Any) -> None:
    """Refuse a recipe that generates answers and does not train. If the key is off or do_train is on, adds a note."""
    if is_on(value) and not is_on(t.get('do_train')):
        t.refuse(key, 'the recipe answers rows and trains nothing. Use python llm_infer.py --ckpt_dir CHECKPOINT.')
    else:
        t.note('without effect', key, 'answers of a trained model are for llm_infer.py')


TRAINER_RULES: dict[str, Rule] = {
    'per_device_train_batch_size': same('batch_size'),
    'per_device_eval_batch_size': same('eval_batch_size'),
    'gradient_accumulation_steps': same('gradient_accumulation_steps'),
    'learning_rate': same('learning_rate'),
    'weight_decay': same('weight_decay'),
    'max_grad_norm': same('max_grad_norm'),
    'num_train_epochs': same('num_train_epochs'),
    'max_steps': _max_steps,
    'lr_scheduler_type': scheduler,
    'lr_scheduler_kwargs': scheduler_settings,
    'warmup_ratio': same('warmup_ratio'),
    'warmup_steps': warmup_steps,
    'optim': optimizer,
    'optim_args': other('left out: optimizers have their usual settings, and --adam_beta1 and others of its flags'),
    'adam_beta1': same('adam_beta1'),
    'adam_beta2': same('adam_beta2'),
    'adam_epsilon': same('adam_epsilon'),
    'logging_steps': same('logging_steps'),
    'save_total_limit': same('save_total_limit', 'the best checkpoint is always among those that are kept'),
    'save_only_model': same('only_save_model'),
    'seed': same('seed'),
    'data_seed': same('dataset_seed'),
    'dataloader_num_workers': same('dataloader_num_workers'),
    'gradient_checkpointing': same('gradient_checkpointing'),
    'report_to': report_to,
    'output_dir': OUTPUT,
    'group_by_length': GROUPED,
    'resume_from_checkpoint': resume,
    'deepspeed': deepspeed,
    'fsdp': fsdp,
    'fsdp_config': silent,
    'bf16': precision,
    'fp16': precision,
    'push_to_hub': same('push_to_hub'),
    'hub_model_id': same('hub_model_id'),
    'hub_private_repo': same('hub_private_repo'),
    'do_train': silent,
    'do_eval': unused('validation rows are evaluated whenever there are any'),
    'do_predict': generation_off,
    'eval_strategy': silent,
    'evaluation_strategy': silent,
    'eval_steps': silent,
    'save_strategy': silent,
    'save_steps': silent,
    'predict_with_generate': same('predict_with_generate'),
    'max_new_tokens': same('max_new_tokens'),
    'temperature': same('temperature'),
    'top_p': same('top_p'),
    'top_k': same('top_k'),
    'do_sample': same('do_sample'),
    'repetition_penalty': same('repetition_penalty'),
    'neftune_noise_alpha': other(f'NEFTune {NOT_BUILT}'),
    'label_smoothing_factor': other(f'label smoothing {NOT_BUILT}'),
    'use_galore': other(f'GaLore {NOT_BUILT}; --optim updates all weights'),
    'load_best_model_at_end': unused('the best checkpoint is kept and named, and the run ends with the last weights'),
    'metric_for_best_model': unused('the best checkpoint is that of the lowest loss, or of the first score'),
    'greater_is_better': unused('llm_sft.py knows for which scores a larger value is better'),
    'trust_remote_code': unused('code of a checkpoint is never run here; the model uses a class of this project'),
    'ddp_backend': same('ddp_backend'),
    'torch_compile': FASTER,
    'use_liger_kernel': FASTER,
    'tf32': FASTER,
    'gradient_checkpointing_kwargs': FASTER,
    'torch_empty_cache_steps': FASTER,
    'run_name': LOGGING,
    'overwrite_output_dir': unused('a run never overwrites another one'),
    'remove_unused_columns': LOADING,
    'pad_to_multiple_of': FASTER,
    'tokenizer_name': refused('a tokenizer of another model is not used here. Save it into the folder of the model.'),
    'eval_on_start': unused('the preflight tries an evaluation before the first step'),
}

TRAINER_FAMILIES: dict[str, Rule] = {
    'galore_': unused('GaLore is not supported'),
    'dataloader_': FASTER,
    'ddp_': unused('processes are joined and timed out as the run needs it'),
    'log': LOGGING,
    'include_': LOGGING,
    'disable_tqdm': LOGGING,
    'hub_token': TOKEN,
    'hf_hub_token': TOKEN,
    'ms_hub_token': TOKEN,
    'om_hub_token': TOKEN,
    'hub_': unused('what is pushed, and when, is said by --push_hub_strategy'),
    'swanlab_': unused('a tracker reads its own environment variables'),
    'ray_': refused('runs are started with python or torchrun here, not by ray. Remove the key.'),
    'eval_': unused('the evaluation has its own settings here'),
    'save_safetensors': unused('weights are always safetensors'),
}


def set_steps(t: Translation, *, evaluates: bool, eval_strategy: str, eval_steps: str, save_default: int = 500) -> None:
    """Set --eval_steps and --save_steps from eval_strategy, eval_steps, save_strategy and save_steps of the recipe.

    With the strategy `steps`, a flag is set to the value of eval_steps or save_steps. The default of save_steps is
    `save_default`. With the strategy `epoch`, a flag is set to the share of the run that one epoch takes. If the recipe
    sets max_steps, this share is not known, and a note says so.

    The toolkits differ in two defaults: `eval_strategy` is the strategy of a recipe without eval_strategy, and
    `eval_steps` is the key whose value a recipe without eval_steps uses. If the recipe lacks this key too, the value is
    `save_default`.

    llm_sft.py always evaluates validation rows and always writes checkpoints. So a strategy `no` has no equivalent, and
    a note says so. With eval_strategy `no`, --eval_steps is not set. With save_strategy `no`, --save_steps is set in
    the same way as for `steps`.

    If `evaluates` is False, the command has no validation rows. Then eval_strategy is ignored, and --eval_steps is not
    set.
    """
    epochs = to_number(t.get('num_train_epochs')) or 3
    key = 'eval_strategy' if t.get('eval_strategy') is not None else 'evaluation_strategy'
    is_given = t.get(key) is not None
    named = key if is_given else '(eval_strategy)'
    strategy = str(t.get(key, eval_strategy if evaluates else 'no')).lower()
    saved = str(t.get('save_strategy', 'steps')).lower()

    if evaluates and strategy == 'epoch':
        use_share(t, named, 'eval_steps', epochs, kind='used' if is_given else 'default')
    elif evaluates and strategy == 'steps':
        _use_steps(t, 'eval_steps', t.get(eval_steps, save_default))
    elif evaluates:
        t.note('different', named, 'validation rows are always evaluated here; --eval_steps says how often')
    elif is_on(t.get('eval_steps')):
        t.note('without effect', 'eval_steps', 'there are no validation rows')

    if saved == 'epoch':
        use_share(t, 'save_strategy', 'save_steps', epochs)
    else:
        _use_steps(t, 'save_steps', save_default)
    if is_off(saved):
        t.note('different', 'save_strategy', 'checkpoints are always written here')


def use_share(t: Translation, key: str, flag: str, times: float, *, kind: Kind = 'used') -> None:
    """Set --eval_steps or --save_steps for `times` evaluations or checkpoints in all epochs of the recipe.

    If the recipe sets max_steps, the number of steps of its epochs is not known. Then the flag is not set, and a note
    says so.
    """
    if (to_number(t.get('max_steps')) or 0) > 0:
        t.note('different', key, f'how many steps an epoch has is not known here; give --{flag} a number of steps')
    else:
        t.use(key, flag, run_share(times), kind=kind)


def _use_steps(t: Translation, flag: str, default: Any) -> None:
    """Set a flag to the value of the key with the same name. `default` is the value if the recipe lacks the key."""
    if t.get(flag) is None:
        t.use(f'(--{flag})', flag, default, kind='default')
    else:
        t.use(flag, flag, t.get(flag))


def run_share(times: float) -> float:
    """Return the value of --eval_steps or --save_steps for `times` evaluations or checkpoints in the whole run.

    For example, times=4 gives 0.25, a quarter of the run. times=1 gives a value slightly below 1, because the value 1
    would mean every step.
    """
    return _WHOLE_RUN if times <= 1 else round(1 / times, 6)
