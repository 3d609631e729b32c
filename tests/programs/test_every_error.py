"""Bad inputs, one row each: how to make it, and a part of its message. No traceback, no half-written file.

A new message for users needs a row here or a test elsewhere; tests/repository/test_error_sites.py says which have none.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llm_infer
import llm_sft
from tests.support.runs import ROOT, small_flags
from tests.support.tiny_models import make_model, make_tokenizer
from utils.base.errors import ConfigError
from utils.cli.arguments import SftArguments
from utils.export import push
from utils.migrate.__main__ import main as migrate
from utils.report.__main__ import main as report

TOKENIZERS = ROOT / 'tests' / 'goldens' / 'tokenizers'
DEEP, DIGITS = '[' * 200_000, '1' * 5000
LATIN = b'\xff'


@dataclass(kw_only=True)
class World:
    """What a row may use and damage: copies of a model, of data and of a finished run; and the programs."""

    tmp: Path
    source: Path
    data: Path
    set: pytest.MonkeyPatch

    @property
    def out(self) -> Path:
        return self.tmp / 'out'

    def model(self, name: str = '', content: str | bytes | None = '') -> Path:
        """Return a copy of the model's directory with one file replaced, or removed (None)."""
        return write(copied(self.source / 'model', self.tmp / 'model'), name, content)

    def file(self, name: str, content: str | bytes) -> Path:
        return write(self.tmp, name, content) / name

    @property
    def first(self) -> Path:
        """Return the run that tests copy; it must not be changed."""
        return next(self.source.glob('out/*/*'))

    def run(self, name: str = '', content: str | bytes | None = '') -> Path:
        return write(copied(self.first, self.tmp / 'run'), name, content)

    def checkpoint(self, name: str = '', content: str | bytes | None = '') -> Path:
        run = self.run()
        if name == 'sft_args.json':
            write(run, name, content)
        return write(run / 'checkpoint-1', name, content)

    def whole(self) -> Path:
        """Return a checkpoint of --sft_type full."""
        record = json.loads((self.first / 'sft_args.json').read_text())
        return write(self.model(), 'sft_args.json', json.dumps({**record, 'sft_type': 'full'}))

    def torchrun(self, processes: int) -> None:
        world = {'RANK': 0, 'LOCAL_RANK': 0, 'WORLD_SIZE': processes, 'LOCAL_WORLD_SIZE': processes}
        for name, value in world.items():
            self.set.setenv(name, str(value))
        self.set.setattr('os._exit', lambda code: None)

    def sft(self, *words: str | Path, model: Path | None = None, data: Path | None = None) -> int:
        given = small_flags(model or self.source / 'model', data or self.data, self.out)
        return llm_sft.main([*given, '--max_steps', '1', *map(str, words)])

    def infer(self, *words: str | Path) -> int:
        return llm_infer.main(list(map(str, words)))

    def lacks(self, *packages: str) -> None:
        self.set.setattr('utils.cli.machine.has_package', lambda name: name not in packages)


def write(folder: Path, name: str, content: str | bytes | None) -> Path:
    if name and content is None:
        (folder / name).unlink()
    elif name:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content or b'')
    return folder


def copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


@pytest.fixture(scope='module')
def source(tmp_path_factory: pytest.TempPathFactory, data_file: Path) -> Path:
    """Return a folder with a model and a run of one step on it."""
    folder = tmp_path_factory.mktemp('source')
    make_model().save_pretrained(folder / 'model')
    make_tokenizer().save_pretrained(folder / 'model')
    flags = ('--max_steps', '1', '--preflight', 'false')
    assert llm_sft.main([*small_flags(folder / 'model', data_file, folder / 'out'), *flags]) == 0
    return folder


@pytest.fixture
def world(source: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp=tmp_path, source=source, data=data_file, set=monkeypatch)


Row = tuple[Callable[[World], Any], str]


def changed(world: World, name: str, **fields: Any) -> str:
    """Return the text of a JSON file of the run with some fields changed."""
    return json.dumps({**json.loads((world.first / name).read_text()), **fields})


def config(world: World, **fields: Any) -> Path:
    found = json.loads((world.source / 'model' / 'config.json').read_text())
    return world.model('config.json', json.dumps({**found, **fields}))


def settings(world: World, **fields: Any) -> Path:
    found = json.loads((world.source / 'model' / 'tokenizer_config.json').read_text())
    return world.model('tokenizer_config.json', json.dumps({**found, **fields}))


def rows(name: str, content: str | bytes) -> Callable[[World], int]:
    return lambda world: world.sft(data=world.file(name, content))


def deepspeed(content: str | bytes) -> Callable[[World], int]:
    return lambda world: world.sft('--deepspeed_config_path', world.file('ds.json', content))


def answers(name: str, content: str | bytes | None) -> Callable[[World], int]:
    return lambda world: world.infer('--ckpt_dir', world.checkpoint(name, content))


def opened(name: str, content: str | bytes | None) -> Callable[[World], int]:
    return lambda world: world.sft(model=world.model(name, content), data=world.data)


def legacy(content: str) -> Callable[[World], int]:
    def make(world: World) -> int:
        model = world.model('chat_template.json', content)
        (model / 'chat_template.jinja').unlink()
        return world.sft(model=model)

    return make


def repeated(content: str | bytes) -> Callable[[World], int]:
    return lambda world: llm_sft.main(['--from_run', str(world.run('lock.json', content))])


def cache_of_words(world: World) -> int:
    world.set.setenv('ASSAY_CACHE_GIB', 'plenty')
    return world.sft('--preflight', 'false')


def folder_named_as_a_file(world: World) -> int:
    (world.tmp / 'folder' / 'a.jsonl').mkdir(parents=True)
    return world.sft(data=world.tmp / 'folder')


def resumed_under_deepspeed(world: World) -> int:
    checkpoint = world.checkpoint()
    (checkpoint / 'global_step1').mkdir()
    return world.sft('--resume_from_checkpoint', checkpoint, '--max_steps', '2')


def not_installed(world: World) -> int:
    from importlib import metadata

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    world.set.setattr('importlib.metadata.version', version)
    return llm_sft.main(['--model_type', 'qwen3.5-4b'])


def not_writable(world: World) -> int:
    world.set.setattr('os.access', lambda *_: False)
    return world.sft()


def bare_tokenizer(world: World) -> int:
    model = world.model()
    make_tokenizer(chat_template=None).save_pretrained(model)
    (model / 'chat_template.jinja').unlink()
    return world.sft(model=model)


def without_bos(world: World) -> int:
    settings = json.loads((world.source / 'model' / 'tokenizer_config.json').read_text())
    settings.pop('bos_token')
    return world.sft('--template_type', 'ziya', model=world.model('tokenizer_config.json', json.dumps(settings)))


def no_place_for_validation(world: World) -> int:
    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError('Unable to allocate')

    world.set.setattr('utils.train.trainer.SftTrainer.prediction_step', fails)
    return world.sft()


def full_disk(*words: str) -> Callable[[World], int]:
    def make(world: World) -> int:
        def fails(*_: Any, **__: Any) -> None:
            raise OSError(28, 'No space left on device')

        world.set.setattr('utils.train.checkpoints.seal', fails)
        return world.sft(*words)

    return make


def failing(name: str) -> Callable[[World], int]:
    def make(world: World) -> int:
        def fails(*_: Any) -> None:
            raise PermissionError(13, 'Permission denied', 'a.json')

        world.set.setattr(name, fails)
        return push.main([str(world.tmp)])

    return make


def unreadable(world: World) -> int:
    def fails(*_: Any, **__: Any) -> str:
        raise PermissionError(13, 'Permission denied', 'a.yaml')

    file = write(world.tmp, 'a.yaml', 'a: 1') / 'a.yaml'
    world.set.setattr(Path, 'read_text', fails)
    return migrate([str(file)])


def away(world: World) -> int:
    world.set.setenv('HF_TOKEN', 'hf-token')
    world.set.setattr('utils.export.push._WAITS', (0,))
    return pushed('', '', **PUSHES, hub='huggingface')(world)


def without_adapter(world: World) -> int:
    return world.infer('--ckpt_dir', world.checkpoint('adapter_model.safetensors', None))


def of_two_processes(*words: str) -> Callable[[World], int]:
    def make(world: World) -> int:
        world.torchrun(2)
        return world.infer('--ckpt_dir', world.checkpoint(), *words)

    return make


def pushed(name: str, content: str | bytes | None, **fields: Any) -> Callable[[World], int]:
    def make(world: World) -> int:
        run = world.run('sft_args.json', changed(world, 'sft_args.json', **fields))
        if name == 'checkpoint-1':
            shutil.rmtree(run / name)
        else:
            write(run, name, content)
        return push.main([str(run)])

    return make


PUSHES: dict[str, Any] = {'hub_model_id': 'me/it', 'push_hub_strategy': 'push_best'}

# The two programs: each call ends with exit code 2 and a message with this part.
PROGRAMS: dict[str, Row] = {
    # flags
    'no checkpoint and no model': (lambda w: w.infer(), 'give --ckpt_dir, or name an untuned model'),
    'an unknown model': (lambda w: llm_sft.main(['--model_type', 'qwen-7b-caht']), "did you mean 'qwen-7b-chat'"),
    'an unknown template': (lambda w: w.sft('--template_type', 'chatlm'), "did you mean 'chatglm2' or 'chatml'?"),
    'a seed below 0': (lambda w: w.sft('--seed', '-1'), '--seed takes a whole number from 0 to 4294967295, got -1.'),
    'a seed too large': (lambda w: w.sft('--seed', str(2**40)), '--seed takes a whole number from 0 to'),
    'a count of odd digits': (lambda w: w.sft('--dataset', 'sql-demo#²'), "1 or more, got '²'"),
    'a count without end': (lambda w: w.sft('--dataset', f'sql-demo#{DIGITS}'), 'the number of rows after #'),
    'bytes in a flag': (lambda w: w.sft('--system', 'a\udcff'), '--system: the value is not UTF-8.'),
    'a list of nothing': (lambda w: w.sft('--dataset'), '--dataset needs at least one value.'),
    'neither true nor false': (lambda w: w.sft('--packing', 'maybe'), "--packing takes true or false, got 'maybe'."),
    'one file by two names': (
        lambda w: w.sft('--dataset', w.data, w.data.parent / '.' / '..' / w.data.parent.name / w.data.name),
        'so its rows would be used twice. Remove one of the two.',
    ),
    'a package that is not there': (not_installed, 'which is not installed. Run: pip install "transformers>=5.2.0"'),
    'a share below 0': (lambda w: w.sft('--dataset_test_ratio', '-0.1'), 'takes a share from 0 to below 1, got -0.1.'),
    'a share above 1': (lambda w: w.sft('--dataset_test_ratio', '1.5'), 'takes a share from 0 to below 1, got 1.5.'),
    'no rows to show': (lambda w: w.infer('--show_dataset_sample', '0'), '--show_dataset_sample takes 1 or more, or'),
    'batches of none': (lambda w: w.infer('--infer_batch_size', '0'), '--infer_batch_size takes 1 or more, got 0.'),
    'export of a checkpoint': (
        lambda w: w.infer('--ckpt_dir', w.checkpoint(), '--export_native', 'true'),
        'To export a checkpoint, use --merge_lora_and_save true instead',
    ),
    'merging nothing': (
        lambda w: w.infer('--model_id_or_path', w.source / 'model', '--merge_lora_and_save', 'true'),
        'without a checkpoint there is nothing to merge. Name the checkpoint with --ckpt_dir.',
    ),
    'merging whole weights': (
        lambda w: w.infer('--ckpt_dir', w.whole(), '--merge_lora_and_save', 'true'), 'the checkpoint needs no merging.',
    ),
    'merging into 4 bits': (
        lambda w: w.infer('--ckpt_dir', w.checkpoint(), '--merge_lora_and_save', 'true', '--quantization_bit', '4'),
        'rounding to 4 bits would lose the adapter. Remove --quantization_bit',
    ),
    'chatting in two processes': (of_two_processes('--eval_human', 'true'), 'Start the command with python, not'),
    'merging in two processes': (of_two_processes('--merge_lora_and_save', 'true'), 'run in one process'),
    'packing a stream': (
        lambda w: w.sft('--packing', 'true', '--streaming', 'true'),
        '--packing true chooses from all rows, but --streaming true never has all rows in memory. Remove --packing or',
    ),
    'a stream that is held out': (
        lambda w: w.sft('--streaming', 'true', '--stream_val_rows', '100'),
        'All rows read so far are skipped or held out for validation. Lower --stream_val_rows,',
    ),
    'bitsandbytes is not there': (
        lambda w: (w.lacks('bitsandbytes'), w.sft('--optim', 'adamw_8bit'))[1],
        '--optim adamw_8bit needs bitsandbytes: pip install bitsandbytes',
    ),
    'an untuned model without rows': (
        lambda w: w.infer('--model_id_or_path', w.source / 'model', '--dataset', w.data, '--dataset_test_ratio', '0'),
        'there are no validation rows to answer.',
    ),
    # output folders
    'a folder of someone else': (not_writable, 'you have no write permission for '),
    'a cache of words': (cache_of_words, "ASSAY_CACHE_GIB: this variable takes a number of GiB, got 'plenty'. Set"),
    'answers under a file': (
        lambda w: w.infer('--ckpt_dir', w.checkpoint(), '--result_path', w.data / 'a.jsonl'), 'qa.jsonl is a file.',
    ),
    'answers into a folder': (
        lambda w: w.infer('--ckpt_dir', w.checkpoint(), '--result_path', w.tmp), 'is a folder. Give a file in it',
    ),
    'export under a file': (
        lambda w: w.infer('--model_id_or_path', w.source / 'model', '--export_native', 'true', '--output_dir',
                          w.data / 'a'), 'qa.jsonl is a file. Give another path.',
    ),
    'export into what is there': (
        lambda w: w.infer('--model_id_or_path', w.source / 'model', '--export_native', 'true', '--output_dir', w.tmp),
        'exists already and is not replaced. Name a new folder.',
    ),
    # DeepSpeed's configuration
    'a list for DeepSpeed': (deepspeed('[]'), 'ds.json holds a list, but a dict is expected. Use --deepspeed'),
    'half a file for DeepSpeed': (deepspeed('{'), 'ds.json cannot be read as JSON: Expecting'),
    'no UTF-8 for DeepSpeed': (deepspeed(LATIN), 'ds.json cannot be read as JSON: '),
    'brackets for DeepSpeed': (deepspeed(DEEP), 'ds.json cannot be read as JSON: maximum recursion'),
    'a number for DeepSpeed': (
        deepspeed('{"zero_optimization": 3}'), 'zero_optimization must be an object, got 3. Write',
    ),
    'a word for the stage of DeepSpeed': (
        deepspeed('{"zero_optimization": {"stage": "two"}}'),
        "the stage of zero_optimization must be a number, got 'two'.",
    ),
    # rows
    'a number without end': (rows('a.jsonl', f'{{"query": "a", "response": {DIGITS}}}'), 'a.jsonl:1: this line is not'),
    'a number without end in an array': (
        rows('a.json', f'[{{"query": {DIGITS}}}]'), 'a.json:1: the JSON is broken in the row',
    ),
    'brackets without end': (
        rows('a.jsonl', '{"query": ' + DEEP), 'a.jsonl:1: this line is not JSON (maximum recursion',
    ),
    'brackets without end in an array': (rows('a.json', '[{"query": ' + DEEP), 'a.json:1: the JSON is broken'),
    'brackets in a column': (
        rows('a.jsonl', json.dumps({'query': 'a', 'response': 'b', 'history': DEEP})),
        'history is text that is not JSON',
    ),
    'half of a character': (
        rows('a.jsonl', '{"query": "a", "response": "\\ud83d"}'), 'half of a character (a lone surrogate)',
    ),
    'calls that are none': (
        rows('a.jsonl', json.dumps({'messages': [{'role': 'user', 'content': 'a'},
                                                 {'role': 'assistant', 'tool_calls': ['f']}]})),
        'tool_calls is not a list of objects',
    ),
    'a history that is a number': (
        rows('a.jsonl', '{"query": "a", "response": "b", "history": 3}'),
        'history is not a list of [query, response] pairs',
    ),
    'a picture of no name': (
        rows('a.jsonl', json.dumps({'query': '<img></img>', 'response': 'b', 'images': ['a\0b']})),
        '1 row skipped: the row has images, but images are not supported for this model (',
    ),
    'one column twice': (rows('a.csv', 'query,query,response\na,b,c\n'), "a.csv:1: the header names 'query' twice."),
    'a folder named as a file': (folder_named_as_a_file, 'a.jsonl: the data file cannot be read: Is a directory.'),
    # the model's directory
    'a file as a model': (lambda w: w.sft(model=w.data), 'qa.jsonl is a file.'),
    'config.json is a list': (opened('config.json', '[]'), 'config.json holds a list, but a dict is expected.'),
    'config.json in brackets': (opened('config.json', DEEP), 'config.json cannot be read as JSON: maximum recursion'),
    'config.json without a type': (opened('config.json', '{}'), 'config.json names no model_type'),
    'a width in words': (lambda w: w.sft(model=config(w, hidden_size='wide')), "'hidden_size' expected int, got str"),
    'quantised by a list': (
        lambda w: w.sft(model=config(w, quantization_config=[1])),
        'config.json: quantization_config is missing or has the wrong type. Download or copy the file again.',
    ),
    'a language model of no size': (
        lambda w: w.sft(
            model=config(w, model_type='gemma3', text_config={'hidden_size': 'x'}).rename(w.tmp / 'gemma-3-4b-it')
        ),
        'the language model in ',
    ),
    'packed experts packed again': (
        lambda w: w.sft('--quantization_bit', '4', '--template_type', 'default',
                        model=config(w, quantization_config={'quant_method': 'mxfp4'}).rename(w.tmp / 'gpt-oss-20b')),
        'cannot quantise gpt-oss: its experts are packed in 4 bits already. Remove --quantization_bit.',
    ),
    'weights without one layer': (
        lambda w: w.sft(model=config(w, num_hidden_layers=3)),
        'has 9 missing tensors: model.layers.2.input_layernorm.weight, ',
    ),
    'a padding token beyond the vocabulary': (
        lambda w: w.sft(model=config(w, pad_token_id=99_999)),
        'AssertionError: Padding_idx must be within num_embeddings',
    ),
    'a model of no layers': (
        lambda w: w.sft(model=config(w, num_hidden_layers=0)),
        '--sft_type lora: LlamaForCausalLM has no layer for LoRA. Use --sft_type full.',
    ),
    'no chat template': (
        bare_tokenizer,
        'has no chat template. Name a file with --chat_template, or choose a --template_type: ',
    ),
    'a chat template cut off': (opened('chat_template.jinja', '{% for'), 'fails on a one-turn chat'),
    'a chat template that fails': (
        opened('chat_template.jinja', '{{ 1 / 0 }}'),
        'the chat template fails: ZeroDivisionError: division by zero.',
    ),
    'a chat template without end': (
        opened('chat_template.jinja', '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}'),
        'the chat template fails: maximum recursion depth exceeded',
    ),
    'an old chat template cut off': (legacy('{'), 'chat_template.json cannot be read as JSON'),
    'an old chat template of none': (legacy('{}'), 'has no chat template. Name a file with --chat_template'),
    'no tokenizer': (opened('tokenizer.json', None), 'the tokenizer in '),
    'an empty tokenizer': (opened('tokenizer.json', '{}'), "cannot be opened: KeyError: 'added_tokens'"),
    'a tokenizer without a model': (opened('tokenizer.json', '{"added_tokens": []}'), 'the tokenizer in '),
    'a list of tokenizer settings': (opened('tokenizer_config.json', '[]'), 'cannot be opened: AttributeError'),
    'a length in words': (
        lambda w: w.sft(model=settings(w, model_max_length='long')),
        "cannot be opened: TypeError: '>' not supported between",
    ),
    'no token that the template says': (
        without_bos, "template 'ziya' needs bos_token_id, which the tokenizer does not have.",
    ),
    # a run and its checkpoints
    'arguments are a list': (answers('sft_args.json', '[]'), 'sft_args.json holds a list, but a dict is expected.'),
    'arguments are nothing': (answers('sft_args.json', '{}'), 'has an sft_args.json with content'),
    'arguments without weights': (
        answers('sft_args.json', '{"sft_type": "lora", "base_model": {}}'),
        'sft_args.json: base_model is missing or has',
    ),
    'arguments are no UTF-8': (answers('sft_args.json', LATIN), 'sft_args.json cannot be read as JSON: '),
    'an adapter cut off': (answers('adapter_model.safetensors', b'1234'), 'The adapter is damaged, or was trained'),
    'an adapter of nothing': (answers('adapter_config.json', '{}'), "KeyError: 'peft_type' The adapter is damaged"),
    'an adapter in brackets': (answers('adapter_config.json', DEEP), 'adapter_config.json cannot be read as JSON'),
    'an adapter without weights': (without_adapter, 'holds no adapter weights: neither adapter_model.safetensors nor'),
    'resuming from a run that is gone': (
        lambda w: w.sft('--resume_from_checkpoint', w.tmp / 'gone' / 'v0-1' / 'checkpoint-5'), 'is not a directory. ',
    ),
    'resuming from a folder': (lambda w: w.sft('--resume_from_checkpoint', w.tmp), 'it has no trainer_state.json.'),
    'resuming from a run folder': (
        lambda w: w.sft('--resume_from_checkpoint', w.run()), 'It is a run folder: give ',
    ),
    'resuming from a changed file': (
        lambda w: w.sft('--resume_from_checkpoint', w.checkpoint('adapter_config.json', '{}')),
        'adapter_config.json has 2 bytes, it was written with ',
    ),
    'resuming an adapter whole': (
        lambda w: w.sft('--resume_from_checkpoint', w.checkpoint(), '--sft_type', 'full'),
        'holds an adapter, and --sft_type is full. Use --sft_type lora',
    ),
    'resuming without DeepSpeed': (
        resumed_under_deepspeed,
        'was written with DeepSpeed. Add --deepspeed_config_path and the file of the original run.',
    ),
    'a lock that is a list': (repeated('[]'), 'lock.json holds a list, but a dict is expected. Give --from_run a run'),
    'a lock of nothing': (repeated('{}'), 'lock.json: command is missing or has the wrong type.'),
    'a lock of other data': (
        repeated('{"command": [], "processes": 1, "base_model": {}, "data": {"a": 1}, "versions": {}}'),
        'lock.json: data is missing or has the wrong type. Give --from_run a run folder',
    ),
    'a lock that is no UTF-8': (repeated(LATIN), 'lock.json cannot be read as JSON: '),
    'a full disk before the first step': (full_disk(), ': a checkpoint cannot be written: '),
    'a full disk later': (
        full_disk('--preflight', 'false'),
        'This run has no complete checkpoint yet.',
    ),
    'memory for no validation': (no_place_for_validation, 'Lower --eval_batch_size or --max_length.'),
    # commands on a run folder
    'pushing no run': (lambda w: push.main([str(w.tmp)]), 'is not a run folder, because it has no sft_args.json. '),
    'pushing what names no hub': (pushed('', ''), 'the run has no repository, because it was trained without '),
    'pushing nothing': (pushed('checkpoint-1', None, **PUSHES), 'has no checkpoint to push.'),
    'pushing without a token': (pushed('', '', **PUSHES), 'Set the environment variable MODELSCOPE_API_TOKEN.'),
    'pushing to a hub that is away': (away, 'To push it again, run python -m utils.export.push '),
    'pushing a broken outcome': (pushed('run.json', '{', **PUSHES), 'run.json cannot be read as JSON: Expecting'),
    'pushing without a hub': (
        pushed('', '', **{**PUSHES, 'hub': None}),
        'sft_args.json: hub is missing or has the wrong type. Restore the file',
    ),
    'pushing a list': (lambda w: push.main([str(w.run('sft_args.json', '[]'))]), 'sft_args.json holds a list'),
    'pushing without a place to stage': (
        failing('utils.export.push.push_again'), 'a.json: the push stopped: Permission denied. Correct the permissions',
    ),
    'reporting where nothing can be written': (
        lambda w: ((w.run('proofs.json', '{}') / 'report.html').unlink(missing_ok=True),
                   (w.tmp / 'run' / 'report.html').mkdir(), report([str(w.tmp / 'run')]))[-1],
        'report.html: the report cannot be written: Is a directory.',
    ),
    'comparing answers without scores': (
        lambda w: report([str(write(w.tmp, 'a.jsonl', '{"origin": "a", "answer": "b"}') / 'a.jsonl'), str(w.data)]),
        'a.jsonl:1: scores is missing or has the wrong type. Give a file that llm_infer.py wrote',
    ),
    'comparing answers with a folder': (
        lambda w: report([str(w.tmp), str(w.data)]), 'the answers in this file cannot be read (IsADirectoryError).',
    ),
    'migrating a folder': (lambda w: migrate([str(w.tmp)]), 'this is a folder. Give a YAML file of LLaMA-Factory or'),
    'migrating what cannot be read': (unreadable, 'a.yaml: the recipe cannot be read: Permission denied. Correct its'),
    'reporting on no run': (lambda w: report([str(w.tmp)]), 'Give a run folder, output/<model>/vN-<time>.'),
    'reporting on other arguments': (
        lambda w: report([str(w.run('sft_args.json', '{}'))]),
        'it does not say how a run was trained. Give a run',
    ),
    'reporting on a broken outcome': (
        lambda w: report([str(w.run('run.json', LATIN))]), 'run.json cannot be read',
    ),
    'reporting on other versions': (
        lambda w: report([str(w.run('run.json', '{"versions": []}'))]),
        'run.json: versions is missing or has the wrong type. Move or delete the file.',
    ),
    'reporting on other steps': (
        lambda w: report([str(w.run('history.json', '[{"loss": 1.0}]'))]),
        'history.json, entry 1: step is missing or has the wrong type.',
    ),
    'reporting on other proofs': (
        lambda w: report([str(w.run('proofs.json', '{"merge": true}'))]),
        'proofs.json: merge is missing or has the wrong type.',
    ),
    'reporting on other answers': (
        lambda w: report([str(w.run('answers.json', '["a"]'))]),
        'answers.json, entry 1: it is a str, but a dict is expected.',
    ),
    'reporting on other rows': (
        lambda w: report([str(w.run('rows.jsonl', '{"loss_before": 1}'))]),
        'rows.jsonl:1: origin is missing or has the wrong type. Move or delete it',
    ),
    'comparing with a list': (
        lambda w: report([str(w.run('history.json', '{}')), str(w.first)]),
        'history.json holds a dict, but a list',
    ),
    'comparing into a file': (
        lambda w: report([str(w.first), str(w.first), '--html', str(w.data / 'a.html')]),
        'a.html cannot be written: Not a directory. Name another file with --html.',
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', PROGRAMS)
def test_programs_answer_with_one_message(
    name: str, world: World, problems: Callable[[], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = PROGRAMS[name]
    assert make(world) == 2
    printed = capsys.readouterr()
    said = [*problems(), *printed.err.splitlines()]
    assert any(words in line for line in said), said
    assert 'Traceback' not in printed.out + printed.err
    left = [p for p in world.out.rglob('*') if p.name.startswith(('checkpoint-', '.'))]
    assert not left, 'no checkpoint, and nothing half'


def two_shards(tmp: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from utils.loading.weight_files import read_state

    for shard in ('a.safetensors', 'b.safetensors'):
        save_file({'x': torch.ones(2)}, tmp / shard)
    places = {'weight_map': {'x': 'a.safetensors', 'y': 'b.safetensors'}}
    write(tmp, 'model.safetensors.index.json', json.dumps(places))
    read_state(tmp)


def special_tokens(**settings: Any) -> Callable[[Path], Any]:
    def make(tmp: Path) -> Any:
        from utils.loading.legacy.tokenizers.sentencepiece import build_internlm_tokenizer

        shutil.copy(TOKENIZERS / 'internlm.model', tmp / 'tokenizer.model')
        return build_internlm_tokenizer(write(tmp, 'tokenizer_config.json', json.dumps(settings)))

    return make


def one_name_for_two(tmp: Path) -> Any:
    import torch

    from utils.loading.legacy.families.polylm import native_tensors

    return native_tensors({'wte.weight': torch.ones(1, 1), 'transformer.wte.weight': torch.ones(1, 1)}, {})


def image_token_of_another_model(tmp: Path) -> Any:
    from utils.loading.image_processors import ProcessorImages

    model: Any = SimpleNamespace(config=SimpleNamespace(image_token_id=7))
    return ProcessorImages(model, make_tokenizer(), tmp, None)


def more_processes_than_gpus(tmp: Path) -> Any:
    from utils.run.processes import _take_gpus

    os.environ['LOCAL_WORLD_SIZE'] = '4'
    return _take_gpus(2)


def sharded_in_half_precision(tmp: Path) -> Any:
    import torch

    from utils.run.open_model import _fully_sharded

    return _fully_sharded(SftArguments(fsdp=True), torch.float32, torch.float16)


def flash_attention_on_a_cpu(tmp: Path) -> Any:
    import torch

    from utils.cli.resolution import log_decision
    from utils.run.open_model import _uses_flash_attention

    return _uses_flash_attention(SftArguments(use_flash_attn=True), torch.float32, log_decision)


def directory_of_nothing(tmp: Path) -> Any:
    from utils.model import load_model

    return load_model(tmp)


def dropout_on_experts(tmp: Path) -> Any:
    from tests.support.modern_models import make_modern
    from utils.train.prepare import prepare_model

    targets = ['q_proj', 'experts.down_proj']
    return prepare_model(make_modern('qwen3-30b-a3b'), SftArguments(lora_target_modules=targets, lora_dropout_p=0.1))


def objects(content: bytes) -> Callable[[Path], Any]:
    def make(tmp: Path) -> Any:
        from utils.formats.data_file import read_objects

        return list(read_objects(write(tmp, 'a.json', content) / 'a.json'))

    return make


def archive(*, swells: bool) -> Callable[[Path], Any]:
    def make(tmp: Path) -> Any:
        from utils.formats.hub_dataset import _unpack_images

        packed = io.BytesIO()
        with zipfile.ZipFile(packed, 'w', zipfile.ZIP_DEFLATED) as opened_archive:
            opened_archive.writestr('a.png', bytes(60_000_000 if swells else 10))
        content = packed.getvalue()
        if not swells:  # the bit that means: a password is needed
            content = content.replace(b'PK\x03\x04\x14\0\0', b'PK\x03\x04\x14\0\1').replace(
                b'PK\x01\x02\x14\3\x14\0\0', b'PK\x01\x02\x14\3\x14\0\1'
            )
        return _unpack_images(write(tmp, 'a.zip', content) / 'a.zip')

    return make


# Messages that no command line reaches without GPU or network: call the function that the program would call.
FUNCTIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    'one tensor in two shards': (two_shards, "b.safetensors: tensor 'x' is in another shard too."),
    'one name for two tensors': (one_name_for_two, "two tensors for 'transformer.wte.weight', and one of them has"),
    'a special token that is a number': (special_tokens(bos_token=3), 'has the special token 3, which has no text.'),
    'a token to add that is null': (
        special_tokens(bos_token=None, add_bos_token=True),
        'bos_token is to be added to each text, but its value is null.',
    ),
    'an image token of another model': (image_token_of_another_model, "the model's is 7: they do not belong together."),
    'more processes than GPUs': (more_processes_than_gpus, '4 processes for 2 GPUs, and each process needs its own'),
    'sharding in fp16': (sharded_in_half_precision, 'this GPU has no bf16. Use --dtype fp32, or use '),
    'flash attention on a CPU': (flash_attention_on_a_cpu, 'needs a GPU (AMD, or NVIDIA of compute capability 8'),
    'a directory of nothing': (directory_of_nothing, 'has no config.json, so its architecture is unknown.'),
    'dropout on experts': (dropout_on_experts, '--lora_dropout_p 0.1 is not possible on expert parameters'),
    'an object cut off': (objects(b'{"a": 1}\n{"b": '), 'a.json:2: the JSON is broken in the row that'),
    'an object that is none': (
        objects(b'{"a": 1}, 3'), 'a.json: object 2: expected an object with named columns, got int.',
    ),
    'an object with a number without end': (objects(b'{"a": ' + b'1' * 5000 + b'}'), 'a.json:1: the JSON is broken'),
    'pictures that swell': (archive(swells=True), 'the archive expands to more than 50 times its size'),
    'pictures with a password': (archive(swells=False), 'a.zip: the zip file is damaged or encrypted: '),
}  # fmt: skip


@pytest.mark.parametrize('name', FUNCTIONS)
def test_functions_raise_one_message(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '1')
    make, words = FUNCTIONS[name]
    with pytest.raises(ConfigError) as caught:
        make(tmp_path)
    assert words in str(caught.value), caught.value


SFT_ON_TWO = ROOT / 'scripts' / 'qwen_7b_chat' / 'lora_ddp' / 'sft.sh'
# Message of a script -> the command, variables, and the shell line that replaces `python3`.
SCRIPTS: dict[str, tuple[str, dict[str, str], str]] = {
    'usage: infer.sh CHECKPOINT [FLAGS]': (f'bash {SFT_ON_TWO.with_name("infer.sh")}', {}, ''),
    'the number of this machine, 0 on the first': (f'bash {SFT_ON_TWO}', {'NNODES': '2'}, ''),
    'the address of machine 0': (f'bash {SFT_ON_TWO}', {'NNODES': '2', 'NODE_RANK': '0'}, ''),
    'Python 3.11 to 3.13 is needed, found: ': (
        f'source {ROOT}/scripts/venv.sh; make_venv a b', {}, 'echo Python 3.9.1; [[ $1 == --version ]]',
    ),
    'python3 cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv': (
        f'source {ROOT}/scripts/venv.sh; make_venv a b', {}, '[[ $1 == -c ]]',
    ),
}  # fmt: skip


def test_every_message_of_the_scripts_is_among_these() -> None:
    files = [*(ROOT / 'scripts').rglob('*.sh'), ROOT / '.ci' / 'run']
    text = '\n'.join(path.read_text(encoding='utf-8') for path in files)
    said = {*re.findall(r'\$\{\w+:\?([^}]+)\}', text), *(m[1] for m in re.findall(r'echo (["\'])(.+)\1 >&2', text))}
    assert {message.partition('$')[0] for message in said} == set(SCRIPTS) and len(files) > 150


@pytest.mark.slow
@pytest.mark.parametrize('words', SCRIPTS)
def test_scripts_answer_with_one_message(words: str, tmp_path: Path) -> None:
    command, variables, python = SCRIPTS[words]
    write(tmp_path, 'python3', f'#!/usr/bin/env bash\n{python}\n')
    (tmp_path / 'python3').chmod(0o755)
    path = f'{tmp_path}:{os.environ["PATH"]}' if python else os.environ['PATH']
    done = subprocess.run(
        ['bash', '-c', command], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, **variables, 'PATH': path},
    )  # fmt: skip
    assert done.returncode != 0 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['python3']
