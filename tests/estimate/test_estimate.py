"""The memory estimate: its table against the real classes, its arithmetic, and what autograd really saves."""

from __future__ import annotations

import json
import weakref
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.support.runs import ROOT
from utils.cli.arguments import SftArguments
from utils.cli.parser import parse
from utils.cli.ranges import OPTIMIZERS
from utils.cli.resolve import resolve_sft
from utils.estimate.gpus import Machine, flops, gpus_that_fit, mode_of, optimizer_bytes
from utils.estimate.memory import Batch, Mode, footprint, lora_parameters
from utils.estimate.model_shape import TABLE, Shape, known_shape, measure, shape_of
from utils.model import MODEL_MAPPING, get_model_info

TABLE_CONTENT = json.loads(TABLE.read_text(encoding='utf-8'))
# One of every class in the table that is small enough to be made in about a second.
REBUILT = (
    'smollm2-135m', 'qwen-7b', 'chatglm2-6b', 'baichuan2-13b', 'mistral-nemo-12b', 'seqgpt-560m', 'polylm-13b',
    'qwen3-0.6b', 'qwen3.5-4b', 'gemma3-1b', 'gpt-oss-20b', 'phi4-mini', 'qwen2.5-vl-7b', 'qwen3-30b-a3b', 'qwen-vl',
)  # fmt: skip
# Parameter counts that the makers of these models published.
PUBLISHED = {
    'smollm2-135m-instruct': 134_515_008, 'qwen-7b-chat': 7_721_324_544, 'qwen-14b': 14_167_290_880,
    'llama2-7b': 6_738_415_616, 'llama2-13b-chat': 13_015_864_320, 'llama2-70b-chat': 68_976_648_192,
    'baichuan2-7b': 7_505_973_248, 'baichuan2-13b-chat': 13_896_668_160, 'chatglm2-6b': 6_243_584_000,
    'mistral-7b': 7_241_732_096, 'mistral-nemo-12b-instruct': 12_247_782_400, 'seqgpt-560m': 559_214_592,
    'llama3.1-8b-instruct': 8_030_261_248, 'llama3.2-1b-instruct': 1_235_814_400, 'qwen3-8b': 8_190_735_360,
    'qwen2.5-7b-instruct': 7_615_616_512, 'qwen2.5-vl-7b-instruct': 8_292_166_656, 'gemma3-1b-it': 999_885_952,
    'gpt-oss-20b': 20_914_757_184, 'phi4-mini-instruct': 3_836_021_760, 'qwen3-30b-a3b': 30_532_122_624,
}  # fmt: skip
UNKNOWN = {'openbuddy-llama2-13b-chat', 'openbuddy-llama2-70b-chat', 'openbuddy-mistral-7b-chat', 'ziya2-13b-chat'}
TINY = Shape(
    model_class='Tiny', parameters=1000, embedding=100, head=100, experts=0, tower=0, active=900, hidden=10, layers=2,
    vocabulary=10, heads=2, kv_heads=1, head_dim=5, normed=50, inner=60, gated=True, attention='rows',
    modules={
        'layers.#.q_proj': [('0-1', 10, 10)], 'layers.#.k_proj': [('0-1', 10, 5)], 'layers.#.v_proj': [('0-1', 10, 5)],
        'layers.#.mlp.down_proj': [('0-1', 30, 10)],
    },
    stacked={},
)  # fmt: skip
BATCH = Batch(tokens=8, longest=8, trained=4)


@pytest.mark.parametrize('name', REBUILT)
def test_the_table_holds_what_the_real_class_counts(name: str, tmp_path: Path) -> None:
    entry = TABLE_CONTENT['shapes'][name]
    (tmp_path / 'config.json').write_text(json.dumps(entry['config']))
    key = next(key for key, shape in TABLE_CONTENT['models'].items() if shape == name)
    assert json.loads(json.dumps(asdict(shape_of(tmp_path, MODEL_MAPPING[key])))) == entry['shape']


def test_counts_are_those_that_were_published() -> None:
    for key, parameters in PUBLISHED.items():
        shape = known_shape(key)
        assert shape is not None and shape.parameters == parameters, key


def test_every_entry_is_of_a_model_and_the_unknown_are_known() -> None:
    models, shapes = TABLE_CONTENT['models'], TABLE_CONTENT['shapes']
    assert set(models) <= set(MODEL_MAPPING) and set(models.values()) == set(shapes) and len(models) >= 90
    folders = {path.name for path in (ROOT / 'scripts').iterdir() if path.is_dir()}
    of_scripts = {key for key in MODEL_MAPPING if key.replace('-', '_').replace('.', '_') in folders}
    assert of_scripts - set(models) == UNKNOWN and len(of_scripts) == len(folders)
    for key, name in models.items():
        named = MODEL_MAPPING[key].lora_target_modules
        assert set(named) <= set(Shape(**shapes[name]['shape']).linear), f'{key}: LoRA on layers it has'


def test_what_is_held_by_hand() -> None:
    lora = Mode(full=False, compute=2, targets=('q_proj', 'down_proj'), rank=4)
    adapter = 2 * 4 * (10 + 10) + 2 * 4 * (30 + 10)
    assert lora_parameters(TINY, lora.targets, 4) == adapter == 480
    found = footprint(TINY, lora, BATCH)
    assert (found.weights, found.adapter, found.gradients, found.optimizer) == (2000, 1920, 1920, 3840)
    four = footprint(TINY, replace(lora, packed='nf4x2', fused=False), BATCH)
    assert four.weights == int(2 * (1000 - 1000) + 1000 * (0.5 + 1 / 64 + 4 / 64 / 256))
    full = Mode(full=True, compute=2)
    held = {
        'alone': (full, 4000, 4000, 8000),
        'ddp': (replace(full, processes=2), 4000, 4000, 8000),
        'zero2': (replace(full, processes=2, sharding='zero2'), 2000, 1000, 6000),
        'zero3': (replace(full, processes=2, sharding='zero3'), 1000, 1000, 6000),
        'fsdp': (replace(full, processes=2, sharding='fsdp'), 2000, 2000, 4000),
        'offload': (replace(full, processes=2, sharding='zero2', offloads_optimizer=True), 2000, 0, 0),
        'mp': (replace(full, devices=2), 2000, 2000, 4000),
        'bf16': (replace(full, trained=2, optimizer_bytes=6), 2000, 2000, 6000),
        'bf16, ddp': (replace(full, trained=2, optimizer_bytes=6, processes=2), 2000, 2000, 6000),
    }
    for name, (mode, *expected) in held.items():
        found = footprint(TINY, mode, BATCH)
        assert [found.weights, found.gradients, found.optimizer] == expected and found.adapter == 0, name


def test_checkpointing_keeps_one_layer_and_the_inputs_of_all() -> None:
    lora = Mode(full=False, compute=2, targets=('q_proj',), rank=4, checkpointing=True)
    assert footprint(TINY, lora, BATCH).activations == 8 * 3 * 10 * 2
    assert footprint(TINY, replace(lora, full=True), BATCH).activations == 8 * 3 * 10 * 4


def test_gradients_of_earlier_batches_are_there_only_where_they_accumulate() -> None:
    mode = Mode(full=True, compute=4, gpu=False)
    batch = Batch(tokens=4000, longest=4000, trained=1)
    kept, fresh = (footprint(TINY, replace(mode, accumulates=value), batch).peak for value in (True, False))
    assert kept - fresh == 4000


def test_gpus_that_fit_have_room_for_libraries_and_gaps() -> None:
    shape = known_shape('llama2-70b-chat')
    assert shape is not None
    mode = Mode(full=False, compute=2, packed='nf4x2', targets=('q_proj', 'v_proj'), fused=False, checkpointing=True)
    batch = Batch(tokens=2048, longest=2048, trained=2048)
    assert gpus_that_fit(shape, mode, batch)[0] == 'L40S'
    assert gpus_that_fit(shape, replace(mode, devices=2), batch)[0] == 'RTX 3090'
    assert flops(shape, mode, 10) == 6 * shape.active * 10


def test_states_of_optimizers() -> None:
    names = ('adamw_torch', 'adamw_8bit', 'paged_adamw_32bit', 'paged_lion_8bit', 'sgd', 'adafactor')
    assert [optimizer_bytes(name) for name in names] == [8, 2, 8, 1, 0, 0]
    assert {type(optimizer_bytes(name)) for name in OPTIMIZERS} == {int}
    mode, batch = Mode(full=True, compute=2), Batch(tokens=8, longest=8, trained=8)
    small, usual = (footprint(TINY, replace(mode, optimizer_bytes=n), batch) for n in (2, 8))
    assert usual.optimizer == 4 * small.optimizer == 8 * TINY.parameters


def test_modes_come_from_flags() -> None:
    def mode(*words: str, machine: Machine | None = None) -> Mode:
        done = resolve_sft(parse(SftArguments, words, program='x', about='x'))
        shape = known_shape(done.args.model_type)
        assert not done.problems.found and done.info is not None and shape is not None
        return mode_of(done.args, done.info, shape, machine or Machine())

    assert mode() == Mode(full=False, compute=2, targets=('q_proj', 'k_proj', 'v_proj'))
    assert mode('--optim', 'adamw_8bit').optimizer_bytes == 2
    assert (mode().trained, mode('--sft_type', 'full').trained) == (4, 4)
    rounded = mode('--sft_type', 'full', '--full_weights', 'bf16')
    assert (rounded.trained, rounded.optimizer_bytes, rounded.autocasts) == (2, 6, False)
    qlora = mode('--quantization_bit', '4', '--lora_target_modules', 'ALL')
    assert (qlora.packed, qlora.fused, len(qlora.targets)) == ('nf4x2', True, 7)
    gptq = mode('--model_type', 'qwen-7b-chat-int8')
    assert (gptq.packed, gptq.fused, gptq.saves_weights) == ('gptq8', True, False)
    assert mode('--model_type', 'qwen-7b-chat-int8', '--tuner_backend', 'peft').saves_weights
    assert not mode('--quantization_bit', '8').fused
    assert mode('--model_type', 'baichuan2-7b-chat-int4').packed == 'nf4'
    assert mode('--lora_target_modules', 'c_attn', 'mlp.c_proj').targets == ('q_proj', 'k_proj', 'v_proj', 'down_proj')
    assert not mode('--model_type', 'qwen-vl').padding_free and not mode('--padding_free', 'false').padding_free
    sharded = mode('--deepspeed_config_path', str(ROOT / 'ds_config' / 'zero3_offload.json'))
    assert (sharded.sharding, sharded.offloads_optimizer, sharded.offloads_weights) == ('zero3', True, True)
    assert not sharded.padding_free and not sharded.chunked and not sharded.fused
    spread = mode(machine=Machine(processes=2, devices=3))
    assert (spread.processes, spread.devices) == (2, 3)


def saved_bytes(model: Any, prepared: Any, *, padding_free: bool, autocasts: bool) -> int:
    """Return the bytes that autograd holds after a forward pass through the code that training uses."""
    import torch

    from utils.data.collator import Collator
    from utils.fast.chunked_loss import find_head
    from utils.fast.scoring import Scorer

    rows = [{'input_ids': list(range(1, 41)), 'trained': (10, 40), 'prompt_length': 10}] * 2
    held: list[weakref.ref[Any]] = []  # autograd frees tensors of a graph that does not lead to the loss

    def save(tensor: Any) -> Any:
        held.append(weakref.ref(tensor))
        return tensor

    autocast = torch.autocast('cpu', dtype=torch.bfloat16) if autocasts else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), autocast:
        loss = Scorer(model, find_head(model)).loss(prepared, Collator(0, pads=not padding_free)(rows), 1.0)
    copies = [c.low for m in prepared.modules() if 'low_copies' in vars(m) for c in m.low_copies._copies.values()]
    own = {tensor.untyped_storage().data_ptr() for tensor in (*prepared.parameters(), *copies)}
    storages = [tensor.untyped_storage() for ref in held if (tensor := ref()) is not None]
    assert loss.requires_grad
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}.values())


@pytest.mark.parametrize('padding_free', [True, False])
@pytest.mark.parametrize('method', ['q_proj,k_proj,v_proj', 'ALL', 'full', 'full in bf16', 'dora', 'dora ALL'])
@pytest.mark.parametrize('kind', ['Llama', 'Qwen3'])
def test_activations_are_what_autograd_saves(kind: str, method: str, padding_free: bool) -> None:
    """Counts them with hooks on a forward pass of the real class."""
    import torch
    import transformers

    from utils.fast.attention import attend_by_rows
    from utils.train.prepare import prepare_model

    config = getattr(transformers, f'{kind}Config')(
        vocab_size=50, hidden_size=96, intermediate_size=256, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    full = method.startswith('full')
    autocasts = method == 'full'
    model = getattr(transformers, f'{kind}ForCausalLM')(config).to(torch.float32 if autocasts else torch.bfloat16)
    shape = measure(model)
    if padding_free:
        attend_by_rows(model)
    targets = {'dora': ['q_proj', 'down_proj'], 'dora ALL': ['ALL']}.get(method, method.split(','))
    args = SftArguments(
        sft_type='full' if full else 'lora',
        dtype='bf16',
        lora_target_modules=targets,
        use_dora='dora' in method,
        full_weights='bf16' if method == 'full in bf16' else 'fp32',
    )
    prepared = prepare_model(model, args).train()
    mode = mode_of(args, get_model_info(None, 'any'), shape, Machine(gpu=False))
    mode = replace(mode, padding_free=padding_free)
    predicted = footprint(shape, mode, Batch(tokens=80, longest=40, trained=60)).activations
    found = saved_bytes(model, prepared, padding_free=padding_free, autocasts=autocasts)
    assert predicted == pytest.approx(found, rel=0.04)


@pytest.mark.slow
@pytest.mark.optional
@pytest.mark.parametrize('targets', [['q_proj', 'k_proj', 'v_proj'], ['ALL']])
@pytest.mark.parametrize('backend', ['swift', 'peft'])
def test_activations_on_packed_weights_are_what_autograd_saves(
    backend: Literal['swift', 'peft'], targets: list[str], tmp_path: Path
) -> None:
    pytest.importorskip('gptqmodel')
    import transformers

    from tests.support.old_models import original_folder
    from utils.fast.attention import attend_by_rows
    from utils.loading.weights import locate
    from utils.run.open_model import open_model
    from utils.train.prepare import prepare_model

    folder = original_folder('qwen-7b-chat-int4', tmp_path)
    info = get_model_info('qwen-7b-chat-int4', str(folder))
    args = SftArguments(dtype='bf16', lora_target_modules=targets, tuner_backend=backend)
    model, _, _ = open_model(args, info, locate(info, revision='master'), trains=True)
    attend_by_rows(model)
    prepared = prepare_model(model, args).train()

    settings = {name: value for name, value in model.config.to_dict().items() if name != 'quantization_config'}
    shape = measure(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings)))
    mode = replace(mode_of(args, info, shape, Machine(gpu=False)), padding_free=True)
    predicted = footprint(shape, mode, Batch(tokens=80, longest=40, trained=60)).activations
    found = saved_bytes(model, prepared, padding_free=True, autocasts=False)
    # In a model of 2 layers, it shows that the first inputs need no gradient, so that their layers save no weight.
    assert predicted == pytest.approx(found, rel=0.02 if backend == 'swift' else 0.06)


def test_the_shape_of_a_directory_needs_no_weights(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / 'config.json').write_bytes((model_dir / 'config.json').read_bytes())
    found = shape_of(tmp_path, get_model_info(None, str(tmp_path)))
    assert (found.parameters, found.embedding, found.head, found.attention) == (44_192, 12_800, 12_800, 'rows')


def test_the_measured_peaks_are_met() -> None:
    """Compares the measurements of benchmarks/estimate.py with the current arithmetic, if the table has the model."""
    content = json.loads((ROOT / 'benchmarks' / 'results' / 'estimate.json').read_text())
    assert len({json.dumps(row['case']) for row in content['rows']}) == 18 and content['allowed'] == 0.15
    again = 0
    for row in content['rows']:
        assert row['estimated'] == pytest.approx(row['measured'], rel=0.15), row
        if row['case']['model'] == 'smollm2':
            shape = known_shape('smollm2-135m-instruct')
            assert shape is not None
            bf16 = row['case']['setting'] == 'full bf16'
            mode = Mode(
                full=row['case']['setting'] != 'lora', compute=2, targets=('q_proj', 'k_proj', 'v_proj'), gpu=False,
                checkpointing=row['case']['checkpointing'], trained=2 if bf16 else 4, optimizer_bytes=6 if bf16 else 8,
            )  # fmt: skip
            found = footprint(shape, mode, Batch(tokens=4 * 96, longest=96, trained=4 * 72))
            assert found.peak / 2**20 == pytest.approx(row['measured'], rel=0.15), row
            again += 1
    assert again == 6
