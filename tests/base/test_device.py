"""Devices other than CUDA and CPU, faked by replacing torch's answers, and systems without the modules of POSIX.

Nothing here computes on such a device. The tests show what is decided when torch says that there is one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import ROOT, small_flags, write_jsonl
from utils.base import device, dist, system
from utils.checks import machine
from utils.cli.arguments import SftArguments
from utils.loading.devices import Spread, pick_dtype
from utils.loading.packed import trainable_backend
from utils.train.callbacks import Speedometer, peak_memory_gib, peak_reserved_gib
from utils.train.state import random_state, set_random_state
from utils.train.trainer_args import training_arguments

GIB = 2**30
Fake = Callable[..., types.SimpleNamespace]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Return a function that makes torch report two devices of a kind, and that returns torch's module of the kind."""

    def install(kind: str, *, bf16: bool = True) -> types.SimpleNamespace:
        def written(state: torch.Tensor, index: int = 0) -> None:
            module.states[index] = state

        module = types.SimpleNamespace(
            states=[torch.tensor([1]), torch.tensor([2])],
            used=[],
            resets=[],
            device_count=lambda: 1 if kind == 'mps' else 2,
            get_device_name=lambda index: f'{kind} model {index}',
            set_device=lambda index: module.used.append(index),
            mem_get_info=lambda index: (10 * GIB, 24 * GIB),
            max_memory_allocated=lambda index: (index + 1) * GIB,
            max_memory_reserved=lambda index: (index + 2) * GIB,
            synchronize=lambda: module.waits.append(1),
            waits=[],
            reset_peak_memory_stats=lambda index: module.resets.append(index),
            get_rng_state_all=lambda: list(module.states),
            get_rng_state=lambda: module.states[0],
            set_rng_state=written,
            recommended_max_memory=lambda: 20 * GIB,
            driver_allocated_memory=lambda: 4 * GIB,
            is_bf16_supported=lambda **emulated: bf16,
        )
        monkeypatch.setattr(
            torch.accelerator, 'current_accelerator', lambda check_available: types.SimpleNamespace(type=kind)
        )
        monkeypatch.setattr(torch, 'get_device_module', lambda name: {kind: module}[name])
        monkeypatch.setattr(torch.backends.mps, 'is_macos_or_newer', lambda major, minor: bf16)
        return module

    return install


@pytest.mark.parametrize('kind', ['xpu', 'npu', 'mps'])
def test_the_device_that_torch_reports_is_used(kind: str, fake: Fake) -> None:
    module = fake(kind)
    is_mac = kind == 'mps'
    assert (device.kind(), device.reason(), device.count()) == (kind, 'torch can use it', 1 if is_mac else 2)
    device.use(0)
    assert module.used == ([] if is_mac else [0])
    assert device.address(0) == device.torch_name(0) == ('mps' if is_mac else f'{kind}:0')
    assert device.memory(0) == ((16 * GIB, 20 * GIB) if is_mac else (10 * GIB, 24 * GIB))
    assert peak_memory_gib() == (4.0 if is_mac else 3.0)
    assert peak_reserved_gib() == (4.0 if is_mac else 5.0)
    Speedometer().on_train_begin()
    assert module.resets == ([] if is_mac else [0, 1])
    device.wait()
    assert module.waits == [1]
    assert device.pins_memory() is not is_mac and not device.has_flash_attention()
    assert trainable_backend() == 'gptq_torch'
    named = device.description(0)
    assert named.startswith('GPU of this Mac (') if is_mac else named == f'{kind} model 0'


def test_a_cpu_has_no_peak_of_an_allocator_and_nothing_to_wait_for() -> None:
    assert peak_reserved_gib() is None
    device.wait()


def test_values_are_copied_now_and_read_later(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([1.0, 2.0])
    read = device.read_later(values)
    values.zero_()
    assert read() == [1.0, 2.0]

    done: list[str] = []
    event = types.SimpleNamespace(record=lambda: done.append('record'), synchronize=lambda: done.append('wait'))
    fake('mps').Event = lambda: event
    monkeypatch.setattr(torch.Tensor, 'copy_', lambda self, other, non_blocking: done.append(f'copy {non_blocking}'))
    read = device.read_later(torch.zeros(2, device='meta'))
    assert done == ['copy True', 'record']
    read()
    assert done == ['copy True', 'record', 'wait']


def test_an_accelerator_of_another_kind_is_not_used_and_named(fake: Fake) -> None:
    fake('hpu')
    assert (device.kind(), device.count()) == ('cpu', 0)
    assert device.reason() == 'this toolkit does not support hpu'


@pytest.mark.parametrize('kind', ['xpu', 'npu', 'mps'])
def test_the_dtype_follows_the_device(kind: str, fake: Fake) -> None:
    fake(kind)
    assert pick_dtype(None) == (torch.bfloat16, 'the GPU supports it')
    fake(kind, bf16=False)
    without = torch.float32 if kind == 'mps' else torch.float16
    assert pick_dtype(None)[0] == without and 'no bf16' in pick_dtype(None)[1]


@pytest.mark.parametrize('kind', ['xpu', 'npu', 'mps'])
def test_random_states_of_the_device_are_kept(kind: str, fake: Fake) -> None:
    module = fake(kind)
    kept = random_state()
    assert kept['device'] == kind and len(kept[kind]) == (1 if kind == 'mps' else 2)
    wanted = [tensor.clone() for tensor in kept[kind]]
    module.states[:] = [torch.tensor([8]), torch.tensor([9])]
    set_random_state(kept)
    assert [int(state) for state in module.states[: len(wanted)]] == [int(state) for state in wanted]


def test_random_states_of_cuda_from_before_the_other_kinds_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {name: value for name, value in random_state().items() if name not in ('device', 'cpu')}
    stored: dict[int, Any] = {}
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'set_rng_state', lambda state, index: stored.update({index: int(state)}))
    set_random_state({**kept, 'cuda': [torch.tensor(5), torch.tensor(6)]})
    assert stored == {0: 5}


def test_sums_need_no_fp64_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss and the scores of rows are computed without any tensor in fp64, as MPS has none."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from utils.fast import chunked_loss, scoring
    from utils.fast.chunked_loss import Head, scored, summed_loss

    class RefuseFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            assert not (isinstance(out, torch.Tensor) and out.dtype == torch.float64), function
            return out

    assert device.sum_dtype(torch.device('cpu')) == torch.float64
    assert device.sum_dtype(torch.device('mps')) == torch.float32
    for module in (chunked_loss, scoring):
        monkeypatch.setattr(module, 'sum_dtype', lambda device: torch.float32)
    head = Head(torch.nn.Linear(8, 11, bias=False))
    hidden, targets = torch.randn(5, 8, requires_grad=True), torch.tensor([1, 2, 3, 4, 5])
    with RefuseFloat64():
        loss = summed_loss(hidden, targets, head, 2.0)
        loss.backward()
        scored(hidden, targets, head)
    wanted = torch.nn.functional.cross_entropy(head.linear(hidden), targets, reduction='sum') / 2
    torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize(
    ('kind', 'expected'), [('xpu', {'': 'xpu:0'}), ('npu', {'': 'npu:0'}), ('mps', {'': 'mps'}), ('cpu', None)]
)
def test_the_model_is_loaded_onto_the_device(
    kind: str, expected: Any, fake: Fake, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from utils.model import get_model_info
    from utils.run.open_model import _device_map

    info = get_model_info(None, str(model_dir))
    if kind != 'cpu':
        fake(kind)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '1' if kind in ('mps', 'cpu') else '2')
    assert _device_map(SftArguments(), info, torch.bfloat16, trains=True) == expected
    if kind in ('xpu', 'npu'):
        monkeypatch.setenv('LOCAL_WORLD_SIZE', '1')
        found = _device_map(SftArguments(), info, torch.bfloat16, trains=True)
        assert isinstance(found, Spread) and list(found.memory) == [f'{kind}:0', f'{kind}:1']


@pytest.mark.parametrize('kind', ['xpu', 'npu', 'mps'])
def test_a_process_takes_its_device(kind: str, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    from utils.run.processes import _take_gpus

    module = fake(kind)
    monkeypatch.setenv('LOCAL_RANK', '0')
    _take_gpus(device.count())
    assert module.used == ([] if kind == 'mps' else [0])


def test_the_trainer_is_told_to_use_the_device(fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr('utils.train.trainer_args.Seq2SeqTrainingArguments', lambda **given: seen.update(given))
    training_arguments(SftArguments(), tmp_path, dtype=torch.bfloat16, evaluates=False)
    assert seen['use_cpu'] and not seen['dataloader_pin_memory']
    for kind in ('xpu', 'npu', 'mps'):
        fake(kind)
        training_arguments(SftArguments(), tmp_path, dtype=torch.bfloat16, evaluates=False)
        assert not seen['use_cpu'] and seen['dataloader_pin_memory'] == (kind != 'mps')


# What a machine shows without torch: platform, processor, build of torch, packages, device files; and what follows.
MACHINES = [
    (('darwin', 'arm64', '2.13.0', ''), ('mps', 'gloo', 1)),
    (('darwin', 'x86_64', '2.13.0', ''), ('cpu', 'gloo', 0)),
    (('linux', 'x86_64', '2.13.0+xpu', 'dri/renderD*'), ('xpu', 'xccl', 2)),
    (('linux', 'x86_64', '2.13.0+cpu', 'dri/renderD*'), ('cpu', 'gloo', 0)),
    (('linux', 'x86_64', '2.13.0+xpu', ''), ('cpu', 'gloo', 0)),
    (('win32', 'AMD64', '2.13.0+xpu', ''), ('xpu', 'gloo', 1)),
    (('linux', 'aarch64', '2.13.0', 'davinci[0-9]*'), ('npu', 'hccl', 2)),
    (('win32', 'AMD64', '2.13.0+cu130', 'nvidia-smi'), ('cuda', 'gloo', 1)),
]


@pytest.mark.parametrize(('shown', 'expected'), MACHINES)
def test_the_device_is_recognised_without_torch(
    shown: tuple[str, str, str, str], expected: tuple[str, str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    system_name, processor, build, files = shown
    monkeypatch.setattr(dist, 'has_gpu_device', lambda: False)
    monkeypatch.setattr(sys, 'platform', system_name)
    monkeypatch.setattr('platform.machine', lambda: processor)
    monkeypatch.setattr('shutil.which', lambda name: name if name == files else None)
    monkeypatch.setattr(Path, 'glob', lambda self, pattern: iter(['0', '1'] if pattern == files else []))
    monkeypatch.setattr(dist, 'package_version', lambda name: build if name == 'torch' else '2.13.0')
    for variable in ('CUDA_VISIBLE_DEVICES', 'ZE_AFFINITY_MASK', 'ASCEND_RT_VISIBLE_DEVICES'):
        monkeypatch.delenv(variable, raising=False)
    assert (dist.visible_kind(), dist.default_backend(), dist.visible_gpus()) == expected


def test_visible_devices_of_other_kinds_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, variable in (('xpu', 'ZE_AFFINITY_MASK'), ('npu', 'ASCEND_RT_VISIBLE_DEVICES')):
        monkeypatch.setattr(dist, 'visible_kind', lambda kind=kind: kind)
        monkeypatch.setenv(variable, '0,2,3')
        assert dist.visible_gpus() == 3


def test_amd_gpus_are_counted_as_their_driver_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, 'visible_kind', lambda: 'cuda')
    monkeypatch.setattr(dist, '_AMD_NODES', tmp_path)
    monkeypatch.setitem(dist._VISIBLE, 'cuda', (dist._VISIBLE['cuda'][0], 'no-such-device*'))
    for variable in dist._VISIBLE['cuda'][0]:
        monkeypatch.delenv(variable, raising=False)
    for node, gpu_id in enumerate(('0', '21224', '4098')):
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / 'gpu_id').write_text(f'{gpu_id}\n', encoding='ascii')
    (tmp_path / '3' / 'gpu_id').mkdir(parents=True)  # cannot be read, as a GPU that is hidden from a container
    assert dist.visible_gpus() == 2

    monkeypatch.setenv('HIP_VISIBLE_DEVICES', '1')
    assert dist.visible_gpus() == 1


def test_where_the_number_of_gpus_is_unknown_the_processes_are_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, 'visible_kind', lambda: 'cuda')
    monkeypatch.setattr(dist, '_AMD_NODES', tmp_path)
    monkeypatch.setitem(dist._VISIBLE, 'cuda', (('NO_SUCH_VARIABLE',), 'no-such-device*'))
    assert dist.visible_gpus() == 1
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert dist.visible_gpus() == 4


REFUSED = [
    ('mps', ('--quantization_bit', '4'), '--quantization_bit 4: bitsandbytes does not run on the GPU of a Mac.'),
    ('npu', ('--quantization_bit', '8'), '--quantization_bit 8: bitsandbytes does not run on an Ascend NPU.'),
    ('mps', ('--optim', 'adamw_8bit'), '--optim adamw_8bit: bitsandbytes does not run on the GPU of a Mac.'),
    ('mps', ('--use_flash_attn', 'true'), '--use_flash_attn true: flash-attn does not run on the GPU of a Mac.'),
    ('xpu', ('--use_flash_attn', 'true'), '--use_flash_attn true: flash-attn does not run on an Intel GPU.'),
    ('mps', ('--deepspeed_config_path', 'ds_config/zero2.json'), '--deepspeed_config_path: DeepSpeed does not run on'),
    ('mps', ('--fsdp', 'true'), '--fsdp true: a Mac has one GPU, so nothing can be sharded. Remove --fsdp.'),
    ('mps', ('--dtype', 'fp16'), '--dtype fp16: training on the GPU of a Mac has no loss scaling, which fp16 needs.'),
    ('mps', ('--ddp_backend', 'nccl'), '--ddp_backend nccl needs a GPU of NVIDIA or AMD, and this machine has none.'),
    ('cpu', ('--ddp_backend', 'xccl'), '--ddp_backend xccl needs an Intel GPU, and this machine has none.'),
    ('cuda', ('--ddp_backend', 'hccl'), '--ddp_backend hccl needs an Ascend NPU, and this machine has none.'),
]


@pytest.mark.parametrize(('kind', 'flags', 'said'), REFUSED)
def test_what_the_device_cannot_do_is_refused_by_one_message(
    kind: str, flags: tuple[str, str], said: str, run_sft: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    problems: Callable[[], list[str]],
) -> None:  # fmt: skip
    monkeypatch.setattr(dist, 'visible_kind', lambda: kind)
    run_sft(*flags, expect=2)
    assert len([text for text in problems() if text.startswith(said)]) == 1


def test_weights_in_4_bits_are_refused_on_a_mac(
    monkeypatch: pytest.MonkeyPatch, problems: Callable[[], list[str]], data_file: Path, tmp_path: Path
) -> None:
    import llm_sft

    monkeypatch.setattr(dist, 'visible_kind', lambda: 'mps')
    flags = ['--model_type', 'baichuan2-7b-chat-int4', '--dataset', str(data_file), '--output_dir', str(tmp_path)]
    assert llm_sft.main(flags) == 2
    assert any(
        text.startswith("the weights of 'baichuan2-7b-chat-int4' are stored in 4 bits, and bitsandbytes, which reads ")
        for text in problems()
    )


@pytest.mark.parametrize(('kind', 'backend'), [('xpu', 'xccl'), ('npu', 'hccl'), ('mps', 'gloo'), ('cpu', 'gloo')])
def test_two_processes_use_the_backend_of_the_device(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    from utils.cli.devices import _settle_backend
    from utils.cli.resolution import Resolution

    monkeypatch.setattr(dist, 'visible_kind', lambda: kind)
    monkeypatch.setenv('WORLD_SIZE', '2')
    done = Resolution(args=SftArguments(), typed=frozenset())
    _settle_backend(done)
    shows = 'no GPU' if kind == 'cpu' else f'a device of kind {kind}'
    assert done.decisions == [f'ddp_backend = {backend} because this machine shows {shows}']
    assert done.args.ddp_backend == backend


@pytest.mark.parametrize(('kind', 'typed', 'workers'), [
    ('cuda', None, 1), ('xpu', None, 1), ('npu', None, 1), ('mps', None, 0), ('cpu', None, 0),
    ('cpu', 2, 2), ('cuda', 0, 0),
])  # fmt: skip
def test_workers_prepare_batches_only_beside_a_gpu(
    kind: str, typed: int | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from utils.cli.devices import _settle_workers
    from utils.cli.resolution import Resolution

    monkeypatch.setattr(dist, 'visible_kind', lambda: kind)
    done = Resolution(args=SftArguments(dataloader_num_workers=typed), typed=frozenset())
    _settle_workers(done)
    assert done.args.dataloader_num_workers == workers
    assert len(done.decisions) == (typed is None)


def test_the_cpu_never_computes_unsaid_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from utils.run.processes import _log_device

    monkeypatch.setattr(dist, 'visible_kind', lambda: 'mps')
    with caplog.at_level('INFO', logger='assay'):
        _log_device()
    found = f'torch {torch.__version__} finds no GPU'
    assert [record.getMessage() for record in caplog.records] == [
        f'device = cpu because {found}',
        f'this machine has a device of kind mps, but {found}, so the CPU computes. Install a build of torch and a '
        'driver for mps; --doctor true tests them.',
    ]


def test_the_machine_check_says_that_a_kind_was_never_run(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake('mps')
    monkeypatch.setattr(device, 'torch_name', lambda index: 'cpu')
    first, second, *others = machine._device()
    assert (first.works, first.says) == (True, f'{device.description(0)}, 16.0 of 20.0 GiB free')
    assert second.name == 'kind mps' and second.works is None and 'no run on such a device is known' in second.says
    assert len(others) == 3 and all(finding.works for finding in others)


def test_the_machine_check_names_a_device_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('shutil.which', lambda name: None)
    for kind, remedy in (('cpu', ''), ('xpu', 'the machine has a device of kind xpu: install a build of torch for it')):
        monkeypatch.setattr(dist, 'visible_kind', lambda kind=kind: kind)
        assert next(machine._device()).remedy == remedy


WITHOUT_POSIX = """
import os, sys, types
import torch, transformers, peft, datasets, tensorboard, psutil
from torch.utils.tensorboard import SummaryWriter
for name in ('resource', 'fcntl', 'pwd', 'grp', 'termios'):
    sys.modules[name] = None
locks = []
sys.modules['msvcrt'] = types.SimpleNamespace(LK_LOCK=1, locking=lambda handle, mode, size: locks.append(size))
for name in ('sched_getaffinity', 'getuid'):
    delattr(os, name)
import pkgutil, importlib, utils
names = [m.name for m in pkgutil.walk_packages(utils.__path__, 'utils.') if not m.name.endswith('__main__')]
for name in names:
    if '.old_commands.' not in name and name != 'utils.fast.triton_kernels':  # which needs triton, on a GPU only
        importlib.import_module(name)
from pathlib import Path
from utils.base import system
with system.locked(Path(sys.argv[1]) / 'lock'):
    assert locks == [1]
import llm_sft
code = llm_sft.main(sys.argv[2:])
assert system.peak_resident_bytes() > 2**27
print('imported', len(names))
sys.exit(code)
"""


@pytest.mark.slow
def test_a_run_needs_no_module_of_posix(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    """Everything is imported and a run trains where Python has no resource and no fcntl, as on Windows."""
    words = [*small_flags(model_dir, data_file, tmp_path / 'output'), '--max_steps', '2']
    done = subprocess.run(
        [sys.executable, '-c', WITHOUT_POSIX, str(tmp_path), *words],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split('imported ')[1]) > 120


def test_windows_flushes_files_opened_for_writing_and_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_jsonl(tmp_path / 'rows.jsonl', [1])
    modes = []
    original = os.open

    def opened(path: Any, mode: int) -> int:
        modes.append(mode)
        return original(path, mode)

    monkeypatch.setattr(system.os, 'open', opened)
    is_folder = Path.is_dir
    system.flush_to_disk(file)
    system.flush_to_disk(tmp_path)
    assert is_folder(tmp_path) and modes == [os.O_RDONLY, os.O_RDONLY]
    monkeypatch.setattr(system, 'os', types.SimpleNamespace(**{**vars(os), 'name': 'nt'}))
    system.flush_to_disk(tmp_path)
    system.flush_to_disk(file)
    assert modes[2:] == [os.O_RDWR]


def test_kernels_start_on_the_device_of_their_tensors() -> None:
    second = device.current(torch.device('cuda', 1))
    assert isinstance(second, torch.cuda.device) and second.idx == 1
    for kind in ('cpu', 'xpu', 'mps'):
        with device.current(torch.device(kind)):
            pass
