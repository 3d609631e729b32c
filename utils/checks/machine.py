"""The machine check (--doctor true): tries what training needs of a machine, and names remedies for failures."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from utils.base import device, dist
from utils.cli.arguments import SftArguments
from utils.cli.parser import Parsed
from utils.hub.clients import TOKEN_VARIABLES, ping

_REQUIRED = Path(__file__).parents[2] / 'requirements.txt'
_OPTIONAL = {
    'bitsandbytes': 'for --quantization_bit and 8-bit optimizers',
    'deepspeed': 'for --deepspeed_config_path',
    'flash-attn': 'for --use_flash_attn true, on an NVIDIA GPU',
    'flash-linear-attention': 'a fast kernel for Qwen3.5 and Qwen3-Next, on an NVIDIA GPU',
    'causal-conv1d': 'a fast kernel for Qwen3.5, Qwen3-Next and LFM2, on an NVIDIA GPU',
}
_DEADLINE_SECONDS = 120
# The kinds of devices on which this toolkit was never run.
_NEVER_RUN = ('xpu', 'npu', 'mps')
_ENOUGH_GIB = 10


class Finding(NamedTuple):
    """The result of one check: its name, whether it succeeded, what was observed, and the remedy.

    `works` is None for a note, which does not prevent training. `remedy` is '' if none is known or needed.
    """

    name: str
    works: bool | None
    says: str
    remedy: str = ''


def check_machine(parsed: Parsed[SftArguments]) -> int:
    """Run all checks and print each finding. Returns 1 if a check failed, else 0.

    Raises ConfigError if the command line has problems.
    """
    parsed.problems.raise_if_any()
    failed = 0
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        'libraries': _libraries,
        'device': _device,
        '4-bit layer': _bitsandbytes,
        'all-reduce': _all_reduce,
        'disk': lambda: _disk(Path(parsed.args.output_dir)),
        'hubs': _hubs,
    }
    for name, check in checks.items():
        for finding in _guarded(name, check):
            mark = {True: 'ok  ', False: 'FAIL', None: 'note'}[finding.works]
            print(f'{mark} {finding.name}: {finding.says}' + (f'\n     -> {finding.remedy}' if finding.remedy else ''))
            failed += finding.works is False
    print('this machine can train' if not failed else f'{failed} checks failed')
    return int(failed > 0)


def _guarded(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # a broken installation may raise any exception, which is reported as a finding
        remedy = f'{sys.executable} -m pip install -r {_REQUIRED.name}'
        yield Finding(name, False, f'{type(error).__name__}: {error}', remedy)


def _libraries() -> Iterator[Finding]:
    """Yield one finding for all required libraries, and one for each optional library.

    The first finding names the required libraries that are missing or do not have a tested version.
    """
    from packaging.requirements import Requirement

    wrong: list[str] = []
    missing = False
    lines = [line.split('#')[0].strip() for line in _REQUIRED.read_text(encoding='utf-8').splitlines()]
    for required in map(Requirement, filter(None, lines)):
        name = required.name
        try:
            found = version(name)
        except PackageNotFoundError:
            found = 'missing'
            missing = True
        if found == 'missing' or not required.specifier.contains(found, prereleases=True):
            wrong.append(f'{name} {found} (tested with {required.specifier})')

    if wrong:
        remedy = f'{sys.executable} -m pip install -r {_REQUIRED.name}'
        yield Finding('libraries', False if missing else None, ', '.join(wrong), remedy)
    else:
        yield Finding('libraries', True, 'each library has a version that the tests ran with')

    for name, use in _OPTIONAL.items():
        try:
            yield Finding(name, True, version(name))
        except PackageNotFoundError:
            yield Finding(name, None, f'not installed; {use}', f'{sys.executable} -m pip install {name}')


def _device() -> Iterator[Finding]:
    """Yield the findings about the devices, and then one finding for each dtype.

    If there is no device besides the CPU, one finding says so. The finding for a dtype says whether a matrix product
    and its gradient are correct on the first device, or on the CPU if there is no other device.
    """
    import torch

    count = device.count()
    for index in range(count):
        free, total = device.memory(index)
        name = f'{device.description(index)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free'
        yield Finding(f'device {device.torch_name(index)}', True, name)
    if not count:
        yield _no_device()
    elif device.kind() in _NEVER_RUN:
        says = 'decided from the documentation of torch and tested with a stand-in; no run on such a device is known'
        yield Finding(f'kind {device.kind()}', None, says)

    if device.kind() == 'cuda':
        yield from _nvidia(count)

    used = device.torch_name(0)
    torch.manual_seed(0)
    left = torch.randn(64, 64, device=used)
    right = torch.randn(64, 64, device=used)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = f'{str(dtype).removeprefix("torch.")} on {used.partition(":")[0]}'
        factor = left.to(dtype, copy=True).requires_grad_()

        started = time.perf_counter()
        product = factor @ right.to(dtype)
        (gradient,) = torch.autograd.grad(product.float().sum(), factor)
        # In the gradient of sum(left @ right) with respect to left, each row equals the row sums of right.
        pairs = ((product.detach(), left @ right), (gradient, right.sum(dim=1).expand(64, 64)))
        apart = max(float((found.float() - wanted).abs().max() / wanted.abs().max()) for found, wanted in pairs)
        seconds = time.perf_counter() - started
        works = apart < {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
        yield Finding(name, works, f'product and gradient are within {apart:.1e} of float32 ({seconds:.3f} s)')


def _nvidia(count: int) -> Iterator[Finding]:
    """Yield a finding for each NVIDIA GPU: that torch has no kernels for it, or which attention kernel is used.

    Yields nothing for AMD GPUs.
    """
    import torch

    from utils.fast.attention import kernel_for, trial_error
    from utils.fast.attention_choice import AttentionCase

    if torch.version.hip is not None:
        return
    built_for = torch.cuda.get_arch_list()
    for index in range(count):
        capability = torch.cuda.get_device_capability(index)
        name = f'kernels for {device.torch_name(index)}'
        if not _is_built_for(capability, built_for):
            wanted = f'sm_{capability[0]}{capability[1]}'
            says = f'torch {torch.__version__} has none for {wanted}, only for {", ".join(built_for)}'
            remedy = (
                'install a build of torch for an older CUDA (cu126 has sm_70), or for a newer one if the GPU is newer'
            )
            yield Finding(name, False, says, remedy)
            continue

        case = AttentionCase('cuda', capability, torch.bfloat16, heads=8, key_heads=2, query_width=128, value_width=128)
        used = torch.device('cuda', index)
        kernel = kernel_for(case, used)
        error = trial_error(kernel, case, used)
        says = f'{kernel}; output and gradients are within {error:.1e} of fp32'
        if kernel == 'flash':
            yield Finding(f'attention on {device.torch_name(index)}', True, says)
            continue
        reason = 'it failed its trial' if capability >= (8, 0) else 'it needs compute capability 8.0'
        yield Finding(
            f'attention on {device.torch_name(index)}', None, f'{says}. The flash kernel is not used: {reason}'
        )


def _is_built_for(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Return whether torch has kernels for a compute capability. `built_for` are names like sm_80 or compute_90.

    Code for sm_80 also runs on sm_86, but not on sm_90. Code for compute_90 runs on sm_90 and on all later GPUs,
    because the driver compiles it for the GPU.
    """
    major, minor = capability
    for name in built_for:
        kind, _, number = name.partition('_')
        digits = ''.join(c for c in number if c.isdigit())
        built = (int(digits[:-1]), int(digits[-1]))
        if kind == 'compute' and built <= capability:
            return True
        # A letter after the number (sm_90a) means that the code runs on this capability only.
        exact_only = digits != number
        if kind == 'sm' and built[0] == major and (built[1] == minor if exact_only else built[1] <= minor):
            return True
    return False


def _no_device() -> Finding:
    """Return the finding for a machine on which torch finds no device besides the CPU."""
    import torch

    seen = dist.visible_kind()
    remedy = ''
    if shutil.which('nvidia-smi'):
        remedy = 'install a CUDA build of torch, and a driver that fits it'
    elif seen != 'cpu':
        remedy = f'the machine has a device of kind {seen}: install a build of torch for it'
    return Finding('device', None, f'no GPU; {torch.get_num_threads()} CPU threads, {device.reason()}', remedy)


def _bitsandbytes() -> Iterator[Finding]:
    """Yield a finding that says whether a 4-bit layer computes correctly, or that this device does not support it.

    Yields nothing if bitsandbytes is not installed.
    """
    try:
        version('bitsandbytes')
    except PackageNotFoundError:
        return
    import bitsandbytes
    import torch

    if device.kind() in ('mps', 'npu'):
        yield Finding('4-bit layer', None, f'bitsandbytes does not run on {device.kind()}')
        return
    used = device.torch_name(0)
    plain = torch.nn.Linear(128, 64, bias=False)
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type='nf4', compute_dtype=torch.float32)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to(used)
    plain = plain.to(used)

    inputs = torch.randn(3, 128, device=used)
    with torch.no_grad():
        apart = float((layer(inputs) - plain(inputs)).abs().mean() / plain(inputs).abs().mean())
    yield Finding('4-bit layer', apart < 0.2, f'its output differs by {100 * apart:.0f} % from the unquantised layer')


def _all_reduce() -> Iterator[Finding]:
    """Yield a finding that says whether an all-reduce of two processes works.

    With several devices, it uses the backend that training on this machine would use. Otherwise, it uses gloo.
    """
    backend = dist.default_backend() if device.count() > 1 else 'gloo'
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    address = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'WORLD_SIZE': '2'}
    command = [sys.executable, '-m', 'utils.checks.machine', backend]
    started = time.perf_counter()
    workers = [
        subprocess.Popen(
            command,
            cwd=_REQUIRED.parent,
            env={**os.environ, **address, 'RANK': str(rank), 'LOCAL_RANK': str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    name = f'all-reduce of 2 processes over {backend}'
    remedy = 'check the firewall, and set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the network interface'
    try:
        outputs = [worker.communicate(timeout=_DEADLINE_SECONDS) for worker in workers]
    except subprocess.TimeoutExpired:
        yield Finding(name, False, f'no answer within {_DEADLINE_SECONDS} s', remedy)
        return
    finally:
        for worker in workers:
            worker.kill()

    seconds = time.perf_counter() - started
    if all(out.strip() == '3.0' for out, _ in outputs):
        yield Finding(name, True, f'correct sum in {seconds:.1f} s')
    else:
        last = next((error.strip().splitlines()[-1] for _, error in outputs if error.strip()), 'the sum is wrong')
        yield Finding(name, False, last, remedy)


def _disk(output_dir: Path) -> Iterator[Finding]:
    """Yield a finding that says whether a file can be written in --output_dir, and how much space is free there.

    If --output_dir does not exist, the nearest folder above it that exists is tried.
    """
    existing = next(p for p in (output_dir.absolute(), *output_dir.absolute().parents) if p.is_dir())
    gib = shutil.disk_usage(existing).free / 2**30
    try:
        with tempfile.TemporaryDirectory(dir=existing) as name, (Path(name) / 'a').open('wb') as stream:
            stream.write(bytes(1 << 20))
            os.fsync(stream.fileno())
            (Path(name) / 'a').rename(Path(name) / 'b')
    except OSError as error:
        yield Finding('disk', False, f'{existing}: {error}', 'choose another --output_dir')
        return
    if gib >= _ENOUGH_GIB:
        yield Finding('disk', True, f'{gib:.1f} GiB free at {existing}')
    else:
        remedy = 'free disk space or choose another --output_dir: saving needs room for two checkpoints'
        yield Finding('disk', None, f'{gib:.1f} GiB free at {existing}', remedy)


def _hubs() -> Iterator[Finding]:
    for name in TOKEN_VARIABLES:
        address, reached = ping(name)
        remedy = '' if reached else 'needed only for downloads and pushes: set HTTPS_PROXY, or use local directories'
        says = f'{address} {"answers" if reached else "does not answer"}'
        yield Finding(f'hub {name}', reached or None, says, remedy)


def _worker(backend: str) -> None:
    """Compute 1 + 2 by an all-reduce of two processes, and print the sum."""
    import torch
    import torch.distributed

    rank = int(os.environ['RANK'])
    used = 'cpu' if backend == 'gloo' else device.torch_name(rank)
    torch.distributed.init_process_group(backend)
    number = torch.tensor([float(rank + 1)], device=used)
    torch.distributed.all_reduce(number)
    print(number.item())
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    _worker(sys.argv[1])
