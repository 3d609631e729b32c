"""Checks the flags that depend on the device of this machine, such as a GPU. No function imports torch."""

from __future__ import annotations

from typing import Any

from utils.base import dist
from utils.base.errors import Problems
from utils.cli.arguments import SftArguments
from utils.cli.ranges import is_of_bitsandbytes
from utils.cli.resolution import Resolution, run_name

# The backends of torch.distributed that need a kind of device, and how the device is called.
_BACKEND_DEVICES = {
    'nccl': ('cuda', 'a GPU of NVIDIA or AMD'),
    'xccl': ('xpu', 'an Intel GPU'),
    'hccl': ('npu', 'an Ascend NPU'),
}
_DEVICES = {'mps': 'the GPU of a Mac', 'npu': 'an Ascend NPU', 'xpu': 'an Intel GPU'}
_WITHOUT_BITSANDBYTES = ('mps', 'npu')


def check_device(done: Resolution[Any]) -> None:
    """Check that flash-attn and bitsandbytes run on the device of this machine, if the flags or the model need them.

    Adds a problem for a package that is needed and does not run. On a CPU, flash-attn is checked later, when the model
    is opened.
    """
    args = done.args
    kind = dist.visible_kind()
    if args.use_flash_attn and kind not in ('cuda', 'cpu'):
        done.problems.add(
            f'--use_flash_attn true: flash-attn does not run on {_DEVICES[kind]}. Leave --use_flash_attn out.'
        )
    if kind not in _WITHOUT_BITSANDBYTES:
        return

    if args.quantization_bit:
        done.problems.add(
            f'--quantization_bit {args.quantization_bit}: bitsandbytes does not run on {_DEVICES[kind]}. Remove '
            '--quantization_bit.'
        )
    elif done.info is not None and done.info.quantization == 'nf4':
        done.problems.add(
            f"the weights of '{run_name(args)}' are stored in 4 bits, and bitsandbytes, which reads them, does not run "
            f'on {_DEVICES[kind]}. Use --model_type with the unquantised model, e.g. baichuan2-7b-chat.'
        )


def settle_training_device(done: Resolution[SftArguments]) -> None:
    """Set the flags of training that follow the device, and add a problem for each flag that it does not support."""
    _settle_backend(done)
    _settle_workers(done)
    _check_training_device(done.args, done.problems)
    if dist.visible_kind() != 'cuda':
        done.without_effect(('fused_rotary',), 'its kernel is for GPUs of NVIDIA and AMD')


def _settle_backend(done: Resolution[SftArguments]) -> None:
    """With several processes, set --ddp_backend if it was not typed.

    Add a problem if a typed backend needs a device that is missing.
    """
    args = done.args
    kind = dist.visible_kind()
    backend = dist.default_backend()
    if 'ddp_backend' in done.typed:
        needed, device = _BACKEND_DEVICES.get(args.ddp_backend, (kind, ''))
        if needed != kind:
            done.problems.add(
                f'--ddp_backend {args.ddp_backend} needs {device}, and this machine has none. Use --ddp_backend '
                'gloo, or remove --ddp_backend.'
            )
    elif dist.world_size() > 1 and backend != args.ddp_backend:
        shows = 'no GPU' if kind == 'cpu' else f'a device of kind {kind}'
        done.decide('ddp_backend', backend, f'this machine shows {shows}')


def _settle_workers(done: Resolution[SftArguments]) -> None:
    """Decide --dataloader_num_workers, if it was not typed.

    On Linux a worker is a fork of the training process. Each page of memory that training changes after the fork is
    copied, and the worker keeps the old page. Without a GPU this memory holds the model and its activations: in
    training of SmolLM2-135M a worker kept 0.7 GiB, and steps took up to 12 % longer.
    """
    if done.args.dataloader_num_workers is not None:
        return
    if dist.visible_kind() in ('cpu', 'mps'):  # on a Mac a worker is a new process, which imports everything again
        done.decide('dataloader_num_workers', 0, 'on a CPU or a Mac, a worker process costs more than it saves')
    else:
        done.decide('dataloader_num_workers', 1, 'a worker prepares batches while the GPU computes')


def _check_training_device(args: SftArguments, problems: Problems) -> None:
    """Add a problem for each flag of training that the device of this machine does not support."""
    kind = dist.visible_kind()
    if kind in _WITHOUT_BITSANDBYTES and is_of_bitsandbytes(args.optim):
        problems.add(
            f'--optim {args.optim}: bitsandbytes does not run on {_DEVICES[kind]}. Use --optim adamw_torch; with '
            '--sft_type full, --full_weights bf16 saves memory.'
        )
    if kind != 'mps':
        return

    if args.deepspeed_config_path is not None:
        problems.add(
            '--deepspeed_config_path: DeepSpeed does not run on the GPU of a Mac. Remove --deepspeed_config_path.'
        )
    if args.fsdp:
        problems.add('--fsdp true: a Mac has one GPU, so nothing can be sharded. Remove --fsdp.')
    if args.dtype == 'fp16':
        problems.add(
            '--dtype fp16: training on the GPU of a Mac has no loss scaling, which fp16 needs. Use --dtype bf16 or '
            '--dtype fp32.'
        )
