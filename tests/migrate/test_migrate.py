"""Recipes of other toolkits, translated into a command as a user would: `python -m utils.migrate RECIPE`."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.runs import ROOT
from utils.migrate import axolotl, llama_factory, swift
from utils.migrate.__main__ import main
from utils.migrate.rows import Rows
from utils.migrate.translation import Rule, Translation


@dataclass(kw_only=True)
class Shown:
    """What the program printed: the command, the sections by title, the whole text and the exit code."""

    code: int
    command: str
    sections: dict[str, list[str]]
    text: str

    def flags(self) -> dict[str, list[str]]:
        """Return the flags of the printed command with their words."""
        found: dict[str, list[str]] = {}
        words = shlex.split(self.command.replace('\\\n', ' '))
        for word in words[words.index('llm_sft.py') + 1 :]:
            if word.startswith('--'):
                found[word[2:]] = []
            else:
                found[list(found)[-1]].append(word)
        return found

    def section(self, title: str) -> dict[str, str]:
        """Return the notes of the section whose title starts with `title`, by key."""
        lines = next((lines for name, lines in self.sections.items() if name.startswith(title)), [])
        return {key.strip(): text for key, _, text in (line.partition(': ') for line in lines)}


@pytest.fixture
def migrate(capsys: pytest.CaptureFixture[str]):
    def run(*words: str) -> Shown:
        code = main(words)
        out = capsys.readouterr()
        blocks = out.out.strip().split('\n\n')
        named = [block.split('\n') for block in blocks[1:]]
        sections = {lines[0]: lines[1:] for lines in named}
        return Shown(code=code, command=blocks[0], sections=sections, text=out.out + out.err)

    return run


@pytest.fixture
def write(tmp_path: Path):
    def file(text: str, name: str = 'recipe.yaml') -> str:
        path = tmp_path / name
        path.write_text(text, encoding='utf-8')
        return str(path)

    return file


LLAMA_FACTORY = """\
model_name_or_path: owner/Model-1B
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: all
dataset: ours,alpaca_en
template: llama3
cutoff_len: 1024
max_samples: 500
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 1.0e-4
num_train_epochs: 2.0
warmup_ratio: 0.1
lr_scheduler_type: cosine
bf16: true
val_size: 0.1
eval_strategy: steps
eval_steps: 25
save_steps: 50
hf_hub_token: hf_secretsecretsecret
overwrite_cache: true
gradient_acumulation: 3
resume_from_checkpoint: null
report_to: none
"""


def test_llama_factory_recipe_becomes_a_command_that_resolves(migrate, write, tmp_path: Path) -> None:
    info = {'ours': {'file_name': 'ours.jsonl', 'columns': {'prompt': 'question', 'response': 'answer'}}}
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'dataset_info.json').write_text(json.dumps(info))
    shown = migrate(write(LLAMA_FACTORY))

    assert shown.code == 0, shown.text
    assert shown.flags() == {
        'model_id_or_path': ['owner/Model-1B'],
        'sft_type': ['lora'],
        'lora_rank': ['16'],
        'lora_target_modules': ['ALL'],
        'max_length': ['1024'],
        'batch_size': ['2'],
        'gradient_accumulation_steps': ['4'],
        'learning_rate': ['0.0001'],
        'num_train_epochs': ['2'],
        'warmup_ratio': ['0.1'],
        'lr_scheduler_type': ['cosine'],
        'dtype': ['bf16'],
        'hub': ['huggingface'],
        'dataset': [f'{tmp_path}/data/ours.jsonl#500', 'hf:llamafactory/alpaca_en:train#500'],
        'columns': ['question=instruction', 'answer=output'],
        'dataset_test_ratio': ['0.1'],
        'eval_steps': ['25'],
        'save_steps': ['50'],
        'loss_scope': ['all_rounds'],
        'weight_decay': ['0'],
        'save_total_limit': ['-1'],
        'logging_steps': ['500'],
        'gradient_checkpointing': ['true'],
        'train_dataset_sample': ['-1'],
        'lora_alpha': ['32'],
        'report_to': ['none'],
    }
    assert shown.section('Different')['cutoff_len'].startswith('--max_length 1024; a longer row loses its beginning')
    assert shown.section('Different')['template'].startswith("the chat template of the model's own tokenizer is used")
    assert 'gradient_acumulation' in shown.section('Not understood')
    assert "did you mean 'gradient_accumulation_steps'" in shown.section('Not understood')['gradient_acumulation']
    assert 'secret' not in shown.text, 'tokens are never shown'


@pytest.mark.parametrize(
    ('changed', 'problem'),
    [
        ('stage: dpo', "stage: 'dpo' trains something else than replies"),
        ('finetuning_type: freeze', "finetuning_type: 'freeze' is not supported."),
        ('dataset: elsewhere', 'dataset elsewhere: its entry of dataset_info.json is not found'),
        ('dataset: alpaca_em', "did you mean 'alpaca_en'"),
        ('quantization_bit: 3', "--quantization_bit takes 0, 4, 8, got '3'."),
        ('quantization_bit: 4\nquantization_method: hqq', "quantization_method: 'hqq' is not supported."),
        ('export_dir: out', 'export_dir: the recipe merges a model.'),
        ('do_train: false\ndo_predict: true', 'do_predict: the recipe answers rows and trains nothing.'),
        ('optim: adamw_torsch', "--optim 'adamw_torsch' is not known: did you mean 'adamw_torch'"),
        ('add_tokens: <a>,<b>', 'add_tokens: the recipe adds tokens'),
        ('rope_scaling: yarn', 'rope_scaling: the positions of the model are not changed here.'),
        ('resume_from_checkpoint: saves/checkpoint-5', 'a checkpoint of LLaMA-Factory cannot be resumed here'),
        ('mix_strategy: interleave_under\ninterleave_probs: 0.5', 'it has 1 shares for 2 data sets'),
        ('deepspeed: {zero_optimization: {stage: 2}}', 'deepspeed: the configuration is in the recipe.'),
        ('val_size: some', "val_size: 'some' is not a share."),
    ],
)  # fmt: skip
def test_what_llama_factory_means_and_nothing_here_does_is_a_problem(
    migrate, write, changed: str, problem: str
) -> None:
    text = LLAMA_FACTORY.replace('dataset: ours,alpaca_en', 'dataset: alpaca_zh,alpaca_en') + changed
    shown = migrate(write(text))
    assert shown.code == 1
    assert problem in shown.text
    assert 'Problems' in shown.text


def test_one_recipe_reports_all_its_problems(migrate, write) -> None:
    text = LLAMA_FACTORY.replace('dataset: ours,alpaca_en', 'dataset: nowhere')
    shown = migrate(write(text + 'stage: ppo\noptim: none_such\nlora_rank: many\n'))
    problems = [line.strip() for line in shown.sections['Problems:']]
    assert shown.code == 1
    starts = ('stage:', 'dataset nowhere:', '--lora_rank takes', "--optim 'none_such'", "--dataset 'nowhere'")
    assert sorted(problem.startswith(starts) for problem in problems) == [True] * 5
    assert {next(start for start in starts if problem.startswith(start)) for problem in problems} == set(starts)


def test_dataset_info_gives_every_kind_of_data_set(migrate, write, tmp_path: Path) -> None:
    info = {
        'chat': {
            'hf_hub_url': 'owner/chat',
            'formatting': 'sharegpt',
            'subset': 'en',
            'split': 'train_sft',
            'num_samples': 9,
            'columns': {'messages': 'turns'},
            'tags': {'role_tag': 'role', 'content_tag': 'content'},
        },
        'both': {'hf_hub_url': 'owner/hf', 'ms_hub_url': 'owner/ms'},
        'pairs': {'hf_hub_url': 'owner/pairs', 'ranking': True},
        'odd': {
            'hf_hub_url': 'owner/odd',
            'formatting': 'sharegpt',
            'tags': {'role_tag': 'who', 'content_tag': 'said'},
        },
        'script': {'script_url': 'make_rows'},
        'video': {'file_name': 'v.json', 'columns': {'videos': 'videos'}},
        'text': {'file_name': 'text.jsonl', 'columns': {'prompt': 'body'}},
        'clash': {'file_name': 'c.json', 'columns': {'prompt': 'turns', 'response': 'output'}},
    }
    file = tmp_path / 'names.json'
    file.write_text(json.dumps(info))

    def dataset(names: str) -> Shown:
        recipe = f'model_name_or_path: owner/Model\ndo_train: true\ndataset: {names}\n'
        return migrate(write(recipe), '--dataset_info', str(file))

    good = dataset('chat,both')
    assert good.code == 0, good.text
    assert good.flags()['dataset'] == ['hf:owner/chat:en:train_sft#9', 'hf:owner/hf:train']
    assert good.flags()['columns'] == ['turns=messages']
    assert dataset('text').flags()['columns'] == ['body=text']
    assert 'pairs: rows with a chosen and a rejected reply' in dataset('pairs').text
    assert 'odd: its messages have the keys who and said' in dataset('odd').text
    assert 'no script of a data set is run' in dataset('script').text
    assert 'rows with videos or sound are not read here' in dataset('video').text
    assert "the column 'turns' means messages in one data set and instruction in another" in dataset('chat,clash').text

    shared = 'USE_MODELSCOPE_HUB=1 llamafactory-cli train ' + write(
        'model_name_or_path: owner/Model\ndo_train: true\ndataset: both\n'
    )
    assert migrate(shared, '--dataset_info', str(file)).flags()['dataset'] == ['ms:owner/ms:train']


def test_shares_and_validation_sets_of_llama_factory(migrate, write) -> None:
    recipe = (
        'model_name_or_path: owner/Model\ndo_train: true\ndataset: alpaca_en,lima\nmix_strategy: interleave_over\n'
        'interleave_probs: 0.25,0.75\neval_dataset: alpaca_zh\nval_size: 0.2\nmask_history: true\nneat_packing: true\n'
        'enable_thinking: false\ndeepspeed: examples/deepspeed/ds_z3_offload_config.json\npure_bf16: true\n'
        'additional_target: embed_tokens\nwarmup_steps: 0.2\nuse_galore: true\n'
    )
    shown = migrate(write(recipe))
    flags = shown.flags()
    assert shown.code == 0, shown.text
    assert flags['dataset'] == ['hf:llamafactory/alpaca_en:train%0.25', 'hf:llamafactory/lima:train%0.75']
    assert flags['val_dataset'] == ['hf:llamafactory/alpaca_zh:train']
    assert 'dataset_test_ratio' not in flags
    assert flags['loss_scope'] == ['last_round']
    assert flags['packing'] == ['true']
    assert flags['template_settings'] == ['enable_thinking=false']
    assert flags['deepspeed_config_path'] == ['ds_config/zero3_offload.json']
    assert flags['warmup_ratio'] == ['0.2']
    assert shown.command.startswith('torchrun --nproc_per_node 2 llm_sft.py')
    assert 'write your number of GPUs for 2' in shown.text
    assert 'GaLore is not supported on purpose' in shown.section('Different')['use_galore']


AXOLOTL = """\
base_model: owner/Model-1B
model_type: AutoModelForCausalLM
adapter: qlora
load_in_4bit: true
lora_r: 32
lora_alpha: 16
lora_target_linear: true
chat_template: chatml
datasets:
  - path: owner/chats
    type: chat_template
    name: en
    split: train[:20%]
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
  - path: rows/mine.jsonl
    type: alpaca
val_set_size: 0.05
sequence_len: 4096
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 8
num_epochs: 2
optimizer: adamw_torch_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: true
eval_steps: 20
save_steps: 40
warmup_ratio: 0.1
plugins:
  - axolotl.integrations.liger.LigerPlugin
wandb_project:
special_tokens: {pad_token: <pad>}
"""


def test_axolotl_recipe_becomes_a_command_that_resolves(migrate, write) -> None:
    shown = migrate(write(AXOLOTL, 'a.yml'))
    assert shown.code == 0, shown.text
    flags = shown.flags()
    assert flags == {
        'model_id_or_path': ['owner/Model-1B'],
        'sft_type': ['lora'],
        'quantization_bit': ['4'],
        'lora_rank': ['32'],
        'lora_alpha': ['16'],
        'lora_target_modules': ['ALL'],
        'max_length': ['4096'],
        'packing': ['true'],
        'batch_size': ['2'],
        'gradient_accumulation_steps': ['8'],
        'num_train_epochs': ['2'],
        'optim': ['adamw_8bit'],
        'lr_scheduler_type': ['cosine'],
        'learning_rate': ['2e-4'],
        'warmup_ratio': ['0.1'],
        'hub': ['huggingface'],
        'dataset': ['hf:owner/chats:en:train', 'rows/mine.jsonl'],
        'dataset_test_ratio': ['0.05'],
        'eval_steps': ['20'],
        'save_steps': ['40'],
        'loss_scope': ['all_rounds'],
        'weight_decay': ['0'],
        'save_total_limit': ['4'],
        'train_dataset_sample': ['-1'],
        'overlong': ['drop'],
    }
    assert 'all rows of the split are used' in shown.section('Different')['datasets owner/chats']
    assert "'Below is an instruction' around a row" in shown.section('Different')['datasets rows/mine.jsonl']
    assert shown.section('Without effect')['tf32'].startswith('it changes only speed or memory')
    assert 'wandb_project' not in shown.text, 'a key that says nothing is not shown'


@pytest.mark.parametrize(
    ('added', 'problem'),
    [
        ('rl: dpo', 'rl: preference training and reinforcement learning'),
        ('reward_model: true', 'reward_model: a reward or class instead of text'),
        ('adapter: llama-adapter', "adapter: 'llama-adapter' is not supported."),
        ('context_parallel_size: 2', 'context_parallel_size: one model or row is divided over several devices'),
        ('plugins: [my.Plugin]', "plugins: 'my.Plugin' changes the training and is not supported."),
        ('unfrozen_parameters: [lm_head]', 'unfrozen_parameters: training only some weights is not supported.'),
        ('fsdp_version: 2\nfsdp_config: {reshard: true}', '--fsdp true cannot shard quantised weights.'),
        ('chat_template: jinja\nchat_template_jinja: "{{ messages }}"', 'the template is written into the recipe.'),
        ('chat_template_kwargs: thinking', 'it is not an object of variables.'),
        ('adapter:\nload_in_8bit: true', 'load_in_8bit: quantised weights cannot be trained.'),
        ('tokens: ["<a>"]', 'tokens: the recipe adds tokens to the vocabulary.'),
        ('datasets: [{path: a/b, type: input_output}]', "datasets a/b type: 'input_output' is not known here."),
        ('datasets: [{path: s3://x/y, type: alpaca}]', 'rows are not read from this address.'),
        ('datasets: [{path: a/b, type: alpaca, shards: 4}]', 'a part of a file is not read.'),
        ('datasets: [{path: a/b, type: chat_template, roles_to_train: [user]}]', 'only replies of the assistant'),
        ('datasets: [{type: alpaca}]', 'datasets: an item has no path.'),
        ('datasets:', 'datasets: the recipe names no data set.'),
    ],
)  # fmt: skip
def test_what_axolotl_means_and_nothing_here_does_is_a_problem(migrate, write, added: str, problem: str) -> None:
    shown = migrate(write(f'{AXOLOTL}\n{added}\n', 'a.yml'))
    assert shown.code == 1
    assert problem in shown.text


def test_data_sets_of_axolotl(migrate, write) -> None:
    recipe = """\
base_model: owner/Model
datasets:
  - {path: owner/a, type: alpaca, revision: v1, split: train+extra}
  - {path: json, type: chat_template, data_files: [x.jsonl, y.jsonl], field_messages: talk}
  - path: owner/b
    data_files: part.jsonl
    type: {field_instruction: ask, field_output: say, format: '[{instruction}]'}
  - {path: ./folder/plain.txt, type: completion}
test_datasets:
  - {path: owner/c, split: test, type: alpaca}
micro_batch_size: 2
batch_size: 8
fsdp_config: {reshard_after_forward: true}
wandb_project: mine
hub_model_id: me/out
bf16: true
lora_model_dir:
chat_template: tokenizer_default
excess_length_strategy: raise
num_epochs: 3
evals_per_epoch: 2
saves_per_epoch: 1
warmup_steps: 10
cosine_min_lr_ratio: 0.1
"""
    shown = migrate(write(recipe, 'a.yml'))
    flags = shown.flags()
    assert shown.code == 0, shown.text
    assert flags['dataset'] == [
        'hf:owner/a:train@v1', 'hf:owner/a:extra@v1', 'x.jsonl', 'y.jsonl', 'hf:owner/b:part.jsonl',
        './folder/plain.txt',
    ]  # fmt: skip
    assert flags['val_dataset'] == ['hf:owner/c:test']
    assert flags['columns'] == ['talk=messages', 'ask=instruction', 'say=output']
    assert flags['sft_type'] == ['full']
    assert flags['gradient_accumulation_steps'] == ['4']
    assert flags['max_length'] == ['512'], 'the default of axolotl'
    assert flags['fsdp'] == ['true']
    assert flags['push_to_hub'] == ['true']
    assert flags['overlong'] == ['refuse']
    assert flags['report_to'] == ['wandb']
    assert flags['eval_steps'] == ['0.166667']
    assert flags['save_steps'] == ['0.333333']
    assert flags['warmup_steps'] == ['10']
    assert 'warmup_ratio' not in flags
    assert flags['min_lr_ratio'] == ['0.1']


SWIFT = r"""
# 2 GPUs
nproc_per_node=2
CUDA_VISIBLE_DEVICES=0,1 \
NPROC_PER_NODE=$nproc_per_node \
swift sft \
    --model owner/Model-1B \
    --train_type lora \
    --dataset 'owner/chats#500' HF::other/rows:en/de#20 \
              mine.jsonl \
    --torch_dtype bfloat16 \
    --target_modules all-linear embed_tokens \
    --gradient_accumulation_steps $(expr 16 / $nproc_per_node) \
    --learning_rate 1e-4 --system 'You are kind.' \
    --max_length 2048 --split_dataset_ratio 0.01 --eval_steps 50 --save_steps 50 \
    --loss_scale last_round --deepspeed zero2
swift infer --adapters x
"""


def test_swift_command_line_becomes_a_command_that_resolves(migrate, write) -> None:
    shown = migrate(write(SWIFT, 'train.sh'))
    assert shown.code == 0, shown.text
    assert shown.command.startswith('torchrun --nproc_per_node 2 llm_sft.py')
    assert shown.flags() == {
        'model_id_or_path': ['owner/Model-1B'],
        'sft_type': ['lora'],
        'dtype': ['bf16'],
        'lora_target_modules': ['ALL', 'embed_tokens'],
        'gradient_accumulation_steps': ['8'],
        'learning_rate': ['1e-4'],
        'system': ['You are kind.'],
        'max_length': ['2048'],
        'loss_scope': ['last_round'],
        'deepspeed_config_path': ['ds_config/zero2.json'],
        'hub': ['modelscope'],
        'dataset': ['owner/chats#500', 'hf:other/rows:en#20', 'hf:other/rows:de#20', 'mine.jsonl'],
        'dataset_test_ratio': ['0.01'],
        'eval_steps': ['50'],
        'save_steps': ['50'],
        'overlong': ['drop'],
        'num_train_epochs': ['3'],
        'weight_decay': ['0.1'],
        'warmup_ratio': ['0'],
        'save_total_limit': ['-1'],
        'gradient_checkpointing': ['true'],
        'train_dataset_sample': ['-1'],
        'lora_dropout_p': ['0.05'],
        'adam_beta2': ['0.95'],
    }


@pytest.mark.parametrize(
    ('flags', 'problem'),
    [
        ('--dataset swift/self-cognition#500', 'its rows hold {{NAME}} and {{AUTHOR}}'),
        ('--dataset a/b --train_type adalora', "train_type: 'adalora' is not supported."),
        ('--dataset a/b --task_type embedding', "task_type: 'embedding' trains something else"),
        ('--dataset a/b --external_plugins x.py', 'external_plugins: it runs code of its own.'),
        ('--dataset a/b --quant_method hqq', "quant_method: 'hqq' is not supported."),
        ('--dataset a/b --columns nothing', 'columns: it is not an object of names.'),
        ('--dataset a/b --packing true', '--packing true fills rows up to --max_length'),
    ],
)  # fmt: skip
def test_what_swift_means_and_nothing_here_does_is_a_problem(migrate, flags: str, problem: str) -> None:
    shown = migrate(f'swift sft --model owner/Model {flags}')
    assert shown.code == 1
    assert problem in shown.text


def test_other_flags_of_swift(migrate) -> None:
    shown = migrate(
        'MAX_PIXELS=1000 USE_HF=1 swift sft --model owner/Model --dataset gsm8k --tuner_type=full '
        '--columns \'{"q": "query"}\' --truncation_strategy right --enable_thinking false --seed 7 --loss_scale hermes'
    )
    flags = shown.flags()
    assert shown.code == 0, shown.text
    assert flags['sft_type'] == ['full']
    assert flags['dataset'] == ['hf:gsm8k']
    assert flags['columns'] == ['q=query']
    assert flags['overlong'] == ['cut']
    assert flags['max_pixels'] == ['1000']
    assert flags['hub'] == ['huggingface']
    assert flags['learning_rate'] == ['1e-05']
    assert flags['template_settings'] == ['enable_thinking=false']
    assert "'hermes' of ms-swift weights tokens" in shown.section('Different')['loss_scale']


def test_one_time_per_run_is_a_share_below_1(migrate, write) -> None:
    """A share of 1 would be read as every step."""
    recipe = 'base_model: owner/Model\nnum_epochs: 1\nval_set_size: 0.1\ndatasets: [{path: owner/a, type: alpaca}]\n'
    flags = migrate(write(recipe)).flags()
    assert flags['eval_steps'] == flags['save_steps'] == ['0.99999']
    chat = 'model_name_or_path: owner/Model\ndo_train: true\ndataset: lima\nsave_strategy: epoch\n'
    assert migrate(write(chat)).flags()['save_steps'] == ['0.333333'], 'three epochs are the default there'


def test_full_fine_tuning_in_16_bits(migrate, write) -> None:
    recipe = 'base_model: owner/Model\nbf16: full\ndatasets: [{path: owner/a, type: alpaca}]\n'
    flags = migrate(write(recipe)).flags()
    assert (flags['dtype'], flags['full_weights'], flags['sft_type']) == (['bf16'], ['bf16'], ['full'])


def test_continued_pre_training_of_swift(migrate) -> None:
    shown = migrate('swift pt --model owner/Model --dataset a/b --deepspeed zero1')
    assert shown.code == 0, shown.text
    assert shown.section('Different')['swift pt'].startswith('rows with a column text are trained on every token')
    assert 'stage 2 replaces stage 1' in shown.section('Different')['deepspeed']
    assert shown.section('Not in the recipe')['(--save_steps)'] == '--save_steps 500'


def test_a_recipe_without_eval_keys_gets_the_defaults_of_its_toolkit(migrate, write) -> None:
    """LLaMA-Factory takes them from TrainingArguments of transformers; ms-swift evaluates whenever it saves."""
    start = 'model_name_or_path: owner/Model\ndo_train: true\ndataset: lima\nval_size: 0.1\n'
    shown = migrate(write(start))
    assert 'eval_steps' not in shown.flags()
    assert shown.section('Different')['(eval_strategy)'].startswith('validation rows are always evaluated here')

    shown = migrate(write(f'{start}eval_strategy: steps\nlogging_steps: 20\nsave_steps: 100\n'))
    assert (shown.flags()['eval_steps'], shown.flags()['save_steps']) == (['20'], ['100'])
    assert migrate(write(f'{start}eval_strategy: steps\n')).flags()['eval_steps'] == ['500']

    start = 'swift sft --model owner/Model --dataset a/b --split_dataset_ratio 0.1'
    assert migrate(f'{start} --save_steps 30 --logging_steps 5').flags()['eval_steps'] == ['30']
    shown = migrate(f'{start} --save_strategy epoch --num_train_epochs 2')
    assert shown.flags()['eval_steps'] == shown.flags()['save_steps'] == ['0.5']
    assert shown.section('Not in the recipe')['(eval_strategy)'] == '--eval_steps 0.5'


def test_an_epoch_is_no_share_of_a_run_with_max_steps(migrate, write) -> None:
    start = 'model_name_or_path: owner/Model\ndo_train: true\ndataset: lima\nval_size: 0.1\nmax_steps: 40\n'
    shown = migrate(write(f'{start}eval_strategy: epoch\nsave_strategy: epoch\n'))
    assert not {'eval_steps', 'save_steps'} & shown.flags().keys()
    different = shown.section('Different')
    assert different['eval_strategy'].endswith('give --eval_steps a number of steps')
    assert different['save_strategy'].endswith('give --save_steps a number of steps')

    start = (
        'base_model: owner/Model\ndatasets:\n  - path: a.jsonl\n    type: alpaca\nval_set_size: 0.1\nmax_steps: 40\n'
    )
    shown = migrate(write(f'{start}evals_per_epoch: 4\nsave_steps: 10\n', 'a.yml'))
    assert 'eval_steps' not in shown.flags() and shown.flags()['save_steps'] == ['10']
    assert shown.section('Different')['evals_per_epoch'].endswith('give --eval_steps a number of steps')


def test_switched_off_keys_have_no_other_meaning(migrate, write) -> None:
    """YAML reads an unquoted `no` as false."""
    start = 'model_name_or_path: owner/Model\ndo_train: true\ndataset: lima\nval_size: 0.1\nresize_vocab: false\n'
    shown = migrate(write(f'{start}eval_strategy: no\nsave_strategy: no\neval_steps: 10\n'))
    assert shown.code == 0, shown.text
    different = shown.section('Different')
    assert different['eval_strategy'] == 'validation rows are always evaluated here; --eval_steps says how often'
    assert different['save_strategy'] == 'checkpoints are always written here'
    assert shown.section('Without effect')['resize_vocab'] == 'it is off'

    start = 'base_model: owner/Model\ndatasets:\n  - path: a.jsonl\n    type: alpaca\nval_set_size: 0.1\n'
    shown = migrate(write(f'{start}eval_strategy: no\nsave_strategy: no\n', 'a.yml'))
    assert {'eval_strategy', 'save_strategy'} <= shown.section('Different').keys(), shown.text
    assert not {'eval_steps', 'save_steps'} & shown.flags().keys()


def test_one_column_with_two_meanings_is_a_problem() -> None:
    t = Translation(toolkit='axolotl', values={})
    rows = Rows(train=['a.jsonl', 'b.jsonl'])
    rows.rename(t, 'datasets a', {'input': 'input'})
    rows.rename(t, 'datasets b', {'input': 'instruction'})
    assert t.problems.found[0].startswith("datasets b: the column 'input' means input in one data set and instruction")


def test_command_that_names_a_file_is_read_with_its_changes(migrate, write) -> None:
    file = write(AXOLOTL, 'a.yml')
    assert migrate(f'axolotl train {file} --learning-rate 3e-4').flags()['learning_rate'] == ['3e-4']
    assert migrate(f'accelerate launch -m axolotl.cli.train {file}').code == 0
    shown = migrate(f'FORCE_TORCHRUN=1 llamafactory-cli train {write(LLAMA_FACTORY)} dataset=lima lora_rank=4')
    assert shown.code == 0, shown.text
    assert shown.flags()['lora_rank'] == ['4']


@pytest.mark.parametrize(
    ('text', 'name', 'problem'),
    [
        (None, 'absent.yaml', 'the file is not there'),
        ('token: hf_secret\na: [', 'a.yaml', 'this is not YAML (line 2'),
        ('a: \x01', 'a.yaml', 'this YAML cannot be read.'),
        ('a: !!python/object/apply:os.system ["true"]', 'a.yaml', 'this is not YAML'),
        ('- a\n- b', 'a.yaml', 'this YAML has no keys'),
        ('a: 1', 'a.yaml', 'this recipe is not of a known toolkit'),
        ('python train.py', 'a.sh', 'there is no command that trains'),
        ("swift sft --model 'a", 'a.sh', 'a line of the command cannot be read (No closing quotation)'),
        ('swift rlhf --rlhf_type grpo', 'a.sh', 'swift rlhf: only supervised fine-tuning'),
        ('axolotl train gone.yml', 'a.sh', 'the recipe file that the command names is not there'),
        ('a: 2024-13-45', 'a.yaml', 'this YAML has a value that is not a possible number or date'),
        ('llamafactory-cli train --stage sft', 'a.sh', 'the command: this recipe is not of a known toolkit'),
        ('x' * (2**20 + 1), 'a.yaml', 'this file is too large to be a recipe'),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_refused(
    migrate, write, tmp_path: Path, text: str | None, name: str, problem: str
) -> None:
    shown = migrate(str(tmp_path / name) if text is None else write(text, name))
    assert shown.code == 2
    assert problem in shown.text
    assert 'secret' not in shown.text, 'the text of a recipe is not quoted'


def test_file_that_is_not_utf8_is_refused(migrate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / 'a.yaml'
    path.write_bytes(b'\xff\xfe\x00')
    for given in (str(path), f'llamafactory-cli train {path}'):
        assert main([given]) == 2
        assert 'is not UTF-8' in capsys.readouterr().err


def test_dataset_info_that_cannot_be_used_is_refused(write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write('model_name_or_path: owner/Model\ndo_train: true\ndataset: ours\n')
    assert main([recipe, '--dataset_info', str(tmp_path / 'gone.json')]) == 2
    assert 'gone.json: the file is not there. Correct the path.' in capsys.readouterr().err


def test_program_loads_nothing_heavy(write) -> None:
    code = (
        'import sys; from utils.migrate.__main__ import main; code = main(sys.argv[1:]); '
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, '-c', code, write(AXOLOTL, 'a.yml')], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('python llm_sft.py \\\n    --model_id_or_path owner/Model-1B')


TOOLKITS = {'axolotl': axolotl, 'LLaMA-Factory': llama_factory, 'ms-swift': swift}


@pytest.mark.parametrize('toolkit', TOOLKITS)
def test_every_rule_takes_every_kind_of_value_and_names_flags_that_exist(toolkit: str) -> None:
    """`use` fails for a name that is no flag. A rule says what happened with its key, or leaves it to the rows."""
    module = TOOLKITS[toolkit]
    tried = 0
    rules: dict[str, Rule] = {**module.RULES, **module.FAMILIES}
    for key, rule in rules.items():
        for value in (True, False, 1, 0.5, 'text', '0.5', ['a', 'b'], {'a': 1}):
            rule(Translation(toolkit=toolkit, values={key: value}), key, value)
            tried += 1
    assert tried > 8 * 100
