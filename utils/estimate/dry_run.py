"""--dry_run true: print the decisions, data, downloads and memory of a run without starting the run."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from utils.base import dist
from utils.base.errors import ConfigError
from utils.cli.arguments import SftArguments
from utils.cli.resolution import Ready, run_name
from utils.data.sources import parse_source
from utils.estimate.gpus import UTILISATION, Machine, flops, gpus_that_fit, known_gpus, mode_of, need, seconds
from utils.estimate.memory import GIB, Batch, Footprint, Mode, footprint, trained_parameters
from utils.estimate.model_shape import Shape, known_shape, shape_of
from utils.estimate.work import Work, plan_work
from utils.hub import snapshot as hub
from utils.hub.clients import Listed
from utils.loading.devices import cpu_has_bf16
from utils.loading.gguf import dense_directory, find_packaged_file, is_gguf
from utils.loading.layers import named_by, what_all_adds
from utils.loading.weights import find_on_hub
from utils.run.processes import leave_out_unused, start_processes

_SHORT = 'under 1 s'
_ITEMS = ('weights', 'adapter', 'gradients', 'optimizer', 'activations', 'logits', 'peak')


@dataclass(kw_only=True)
class Found:
    """Where the model is, and what the run would download.

    `model_dir` is None if the model is not complete on this machine. `where` and the items of `downloads` are lines
    that dry_run prints.
    """

    model_dir: Path | None = None
    where: str = ''
    downloads: list[str] = field(default_factory=list)


def dry_run(done: Ready[SftArguments]) -> int:
    """Print what the run would do, and return the exit code 0.

    Writes only to the cache, and downloads only file lists and data set cards. If files of the model or of a data set
    are not on this machine, the output states at most an upper bound of the number of tokens. If no hub can be reached
    either, the output does not name these files.

    Raises ConfigError if the data, the DeepSpeed config or a word of --lora_target_modules cannot be used.
    """
    args = done.args
    info = done.info
    start_processes('gloo')
    found = _find_model(done)
    shape = _shape(done, found)
    data_is_here = _find_data(args, found)
    machine = _machine()

    if args.dtype is None:
        has_bf16 = machine.gpu or cpu_has_bf16()
        reason = f'this CPU has {"" if has_bf16 else "no "}bf16'
        if machine.gpu:
            reason = 'GPUs are assumed to have bf16'
        done.decide('dtype', 'bf16' if has_bf16 else 'fp32', reason)

    mode = None if shape is None else mode_of(args, info, shape, machine)
    if shape is not None and mode is not None and 'lora_target_modules' not in done.typed:
        done.decisions += _what_all_adds(shape, mode)
    has_vision = shape is not None and shape.tower > 0
    work = plan_work(done, found.model_dir, mode, data_is_here=data_is_here, has_vision=has_vision)

    _show('decisions', [*done.decisions, *(f'warning: {text}' for text in done.warnings)])
    _show('model', [found.where, *_about(args, shape, mode)])
    _show('data', work.lines)
    _show('would download', found.downloads or ['nothing: all files are here'])
    if shape is not None and mode is not None:
        _show(_device(mode), _memory(shape, mode, work.batch))
        _show('GPUs that this fits on, an estimate', _fitting(shape, mode, work.batch))
        _show('time, an estimate', _time(shape, mode, work))
    return 0


def _what_all_adds(shape: Shape, mode: Mode) -> list[str]:
    """Return a list with a line about the layers that --lora_target_modules all-linear would add, or an empty list."""
    added = set(shape.paths) - set(named_by(mode.targets, shape.paths))
    if mode.full or not added:
        return []
    more = trained_parameters(shape, replace(mode, targets=tuple(added)))
    return [what_all_adds(len(added), more, trained_parameters(shape, mode))]


def _show(title: str, lines: Iterable[str]) -> None:
    if dist.is_main():
        print('\n'.join([title, *(f'  {line}' for line in lines)]))


def _machine() -> Machine:
    """Return the number of processes of this run and the number of devices of each process.

    If this machine has no GPU, the names in CUDA_VISIBLE_DEVICES are counted as GPUs. A user can set this variable to
    plan a run on a different machine. Without any GPU, each process has one device.
    """
    named = [name for name in os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if name.strip() not in ('', '-1')]
    gpus = dist.visible_gpus() or len(named)
    return Machine(processes=dist.world_size(), devices=max(1, gpus // dist.local_world_size()), gpu=gpus > 0)


def _sizes(names: Sequence[str], files: dict[str, Listed]) -> str:
    total = sum(files[name][0] or 0 for name in names)
    more = ', ...' if len(names) > 6 else ''
    return f'{len(names)} files, {total / GIB:.2f} GiB: {", ".join(names[:6])}{more}'


def _read_gguf(done: Ready[SftArguments], gguf: Path) -> Path:
    """Return the folder with the weights of a GGUF file."""
    leave_out_unused(done.args, done.info, gguf)
    return dense_directory(gguf)


def _find_model(done: Ready[SftArguments]) -> Found:
    args = done.args
    info = done.info
    if info.embedded and (packaged := find_packaged_file(*info.embedded)):
        where = f'{run_name(args)}: in the package {info.embedded[0]}'
        return Found(model_dir=_read_gguf(done, packaged), where=where)

    if Path(info.model_id_or_path).is_dir():
        return Found(model_dir=Path(info.model_id_or_path), where=f'{info.model_id_or_path}: a local directory')

    if is_gguf(Path(info.model_id_or_path)):
        gguf = Path(info.model_id_or_path)
        return Found(model_dir=_read_gguf(done, gguf), where=f'{gguf}: a GGUF file')

    try:
        snapshot, names = find_on_hub(info, revision=args.model_revision, hub_name=args.hub)
    except ConfigError as error:
        repo = info.model_id_or_path
        if args.hub != 'modelscope' and info.hf_model_id:
            repo = info.hf_model_id
        unknown = f'model {args.hub}:{repo}, files unknown: {error.problems[0].split(". ")[0]}'
        return Found(where=f'{run_name(args)}: not on this machine', downloads=[unknown])

    if absent := snapshot.to_fetch(names):
        wanted = f'model {snapshot.repo}, {_sizes(absent, snapshot.files)}'
        return Found(where=f'{run_name(args)}: not complete on this machine', downloads=[wanted])

    folder = snapshot.client.cached(snapshot.repo, 'model')
    return Found(model_dir=folder, where=f'{run_name(args)}: {snapshot.repo} in the cache')


def _shape(done: Ready[SftArguments], found: Found) -> Shape | None:
    if found.model_dir is None or not (found.model_dir / 'config.json').is_file():
        return known_shape(done.args.model_type)
    return shape_of(found.model_dir, done.info)


def _find_data(args: SftArguments, found: Found) -> bool:
    """Return whether all data from hubs is on this machine.

    If a data set is not complete here, or no hub can list its files, a line about it is added to `found.downloads`.
    """
    before = len(found.downloads)
    for word in itertools.chain(*args.datasets_read()):
        entry = parse_source(word).entry
        if entry is None:
            continue
        try:
            snapshot = hub.find(entry.repos(args.hub), 'dataset')
            names = entry.names(snapshot)
        except ConfigError as error:
            what = f'data set {word}: {entry.repos(args.hub)[0]}, files unknown: '
            found.downloads.append(what + error.problems[0].split('. ')[0])
            continue

        if absent := snapshot.to_fetch(names):
            found.downloads.append(f'data set {word}: {snapshot.repo}, {_sizes(absent, snapshot.files)}')
    return len(found.downloads) == before


def _about(args: SftArguments, shape: Shape | None, mode: Mode | None) -> list[str]:
    if shape is None or mode is None:
        return [
            'its size is not known: its config.json is not on this machine, and utils/estimate/model_sizes.json has '
            'no entry for it'
        ]

    trained = trained_parameters(shape, mode)
    total = shape.parameters + (0 if mode.full else trained)
    whole = args.lora_modules_to_save if not mode.full and args.lora_modules_to_save else []
    lines = [
        f'{shape.model_class}, {shape.parameters:,} parameters',
        f'trained: {trained:,} of {total:,} ({100 * trained / total:.3g} %)'
        + (f', LoRA on {", ".join(mode.targets)}' if mode.targets else '')
        + (f', and whole: {", ".join(whole)}' if whole else '')
        + (f', and {mode.token_rows:,} in rows of new tokens' if mode.token_rows else ''),
    ]
    if shape.attention in ('mixed', 'padded mixed'):
        lines.append('layers without attention are counted as attention layers of the same width: a lower bound')
    if shape.tower:
        training = '' if args.freeze_vision else ' Its training (--freeze_vision false) is not counted.'
        lines.append(f'vision tower: {shape.tower:,} parameters, counted only as weights.{training}')
    return lines


def _device(mode: Mode) -> str:
    device = 'a GPU' if mode.gpu else 'this CPU'
    spread = f' of {mode.devices} that share the layers' if mode.devices > 1 else ''
    processes = f', {mode.processes} processes' if mode.processes > 1 else ''
    sharding = {'zero2': ', ZeRO-2', 'zero3': ', ZeRO-3', 'fsdp': ', FSDP2', '': ''}[mode.sharding]
    return f'memory of {device}{spread}{processes}{sharding}, GiB, an estimate'


def _memory(shape: Shape, mode: Mode, batch: Batch) -> list[str]:
    off = footprint(shape, replace(mode, checkpointing=False), batch)
    on = footprint(shape, replace(mode, checkpointing=True), batch)
    asked = ' (as asked)'
    without = 'without' + ('' if mode.checkpointing else asked)
    with_ = 'with' + (asked if mode.checkpointing else '')
    head = f'{"":12} {without:>20} {with_:>20} gradient checkpointing'

    def line(name: str) -> str:
        return f'{name:12} {_gib(off, name):>20} {_gib(on, name):>20}'

    lines = [head, *map(line, _ITEMS), 'the peak is the largest sum at one time: the items do not all occur together']
    if not mode.gpu:
        lines += [
            'this counts live tensors. On a CPU the first-step gate holds one more copy of the trained weights, and',
            'freed memory is kept for reuse: the process held 1 to 21 % more (benchmarks/estimate.py --kept)',
        ]
    return lines


def _gib(found: Footprint, name: str) -> str:
    value: int = getattr(found, name)
    return f'{value / GIB:.2f}'


def _fitting(shape: Shape, mode: Mode, batch: Batch) -> list[str]:
    each = mode.processes * mode.devices
    lines = []
    for value in (False, True):
        asked = replace(mode, checkpointing=value, gpu=True)
        names = ', '.join(gpus_that_fit(shape, asked, batch)) or 'none of the known ones'
        how = f'with{"" if value else "out"} gradient checkpointing'
        lines.append(f'{each} x, {how}, {need(footprint(shape, asked, batch)):.1f} GiB each: {names}')
    return [*lines, 'including 1 GiB for the CUDA context and libraries, and 5 % for fragmentation']


def _time(shape: Shape, mode: Mode, work: Work) -> list[str]:
    if work.tokens is None:
        return ['not known, because the number of tokens is not known']

    total = flops(shape, mode, work.tokens)
    fits = gpus_that_fit(shape, mode, work.batch)
    times = {name: _clock(seconds(total, tera, mode.processes)) for name, _, tera in known_gpus() if name in fits}
    each = ', '.join(f'{name} {time}' for name, time in times.items())
    if len(times) > 1 and set(times.values()) == {_SHORT}:
        each = f'{_SHORT} on each GPU that this fits on'
    bound = '' if work.counted else 'at most '
    return [
        f'{total:.3g} floating-point operations for {bound}{work.tokens:,} tokens',
        f'at {UTILISATION:.0%} of the peak of a GPU, which is assumed and not measured: {each or "none fits"}',
    ]


def _clock(value: float) -> str:
    if value < 1:
        return _SHORT
    if value < 60:
        return f'{value:.0f} s'
    if value < 3600:
        return f'{value / 60:.1f} min'
    return f'{value / 3600:.1f} h'
