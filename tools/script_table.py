"""Generates the table of scripts in scripts/README.md.

It shows the model, mode, hardware, effective batch size and estimated memory of each script.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from utils.cli.arguments import SftArguments
from utils.cli.parser import parse
from utils.cli.resolution import Resolution
from utils.cli.resolve import resolve_sft
from utils.estimate.gpus import Machine, longest_batch, mode_of, need
from utils.estimate.memory import GIB, footprint
from utils.estimate.model_shape import known_shape

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Script:
    """The content of an sft.sh script: its header, its flags (`words`), and the processes and GPUs that it uses."""

    folder: Path
    header: str
    words: list[str]
    machine: Machine


def read_script(path: Path) -> Script:
    """Read a script under scripts/ without running it, and return its content.

    Shell expressions that divide a batch among processes are replaced by their values on one machine. Raises
    AssertionError if the flags contain any other shell expression.
    """
    text = path.read_text(encoding='utf-8')
    processes = int(found[1]) if (found := re.search(r'NPROC_PER_NODE:-(\d+)', text)) else 1
    gpus = found[1].split(',') if (found := re.search(r'CUDA_VISIBLE_DEVICES:-([\d,]+)', text)) else []
    command = text.split('llm_sft.py', 1)[1].replace('\\\n', ' ').replace('-- "$@"', '')
    sums = re.sub(r'\$\(\((\d+) / processes(?: / \$\{NNODES:-1\})?\)\)', lambda m: str(int(m[1]) // processes), command)
    assert '$' not in sums, f'{path}: {sums}'
    machine = Machine(processes=processes, devices=max(1, len(gpus) // processes), gpu=bool(gpus))
    return Script(folder=path.parent, header=text.splitlines()[1].lstrip('# '), words=sums.split(), machine=machine)


def _memory(done: Resolution[SftArguments], machine: Machine) -> str:
    """Return the estimated memory per device in GiB, as text. For a GPU, fragmentation and CUDA itself are included.

    Returns 'unknown' if the shape of the model is not known.
    """
    shape = known_shape(done.args.model_type)
    if shape is None or done.info is None:
        return 'unknown'
    batch = longest_batch(done.args)
    mode = mode_of(done.args, done.info, shape, machine)
    found = footprint(shape, mode, batch)
    return f'{need(found):.1f}' if machine.gpu else f'{found.peak / GIB:.1f}'


def script_table() -> str:
    """Return a Markdown table with one line for each sft.sh script under scripts/."""
    lines = ['| model | mode | hardware | effective batch | GiB per device, an estimate |', '|---|---|---|---|---|']
    for path in sorted((ROOT / 'scripts').glob('*/*/sft.sh')):
        script = read_script(path)
        done = resolve_sft(parse(SftArguments, script.words, program='llm_sft.py', about=''))
        args = done.args
        batch = args.batch_size * args.gradient_accumulation_steps * script.machine.processes
        mode = f'[{script.folder.name}]({script.folder.parent.name}/{script.folder.name}/sft.sh)'
        hardware = script.header.split('. ', 1)[1].rstrip('.')
        lines.append(f'| {args.model_type} | {mode} | {hardware} | {batch} | {_memory(done, script.machine)} |')
    return '\n'.join(lines)
