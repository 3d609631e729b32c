"""The data check (--check_dataset true): reads the data of a run, prints its problems, and writes the report."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.base.files import write_json
from utils.base.logger import logger
from utils.checks.clean_copy import CleanCopy
from utils.checks.data_check import DataCheck
from utils.checks.repetition import Seen
from utils.cli.arguments import SftArguments, without_amount
from utils.cli.resolution import Ready, run_name
from utils.data.encode_plan import batches
from utils.data.plan import Plan
from utils.encode.encoder import Encoder
from utils.loading.folder import read_config
from utils.loading.gguf import dense_directory
from utils.loading.image_processors import open_images_of_folder
from utils.loading.new_tokens import add_to_tokenizer
from utils.loading.weights import locate
from utils.model import load_tokenizer
from utils.run.new_tokens import find_new_tokens
from utils.run.open_model import open_encoder
from utils.run.processes import leave_out_unused
from utils.run.rows import plan_of

_WEIGHTS = ('*.safetensors', '*.bin', '*.pt', '*.pth', '*.gguf', '*.onnx', '*.msgpack', '*.h5')


def check_dataset(done: Ready[SftArguments]) -> int:
    """Read the data that the run would read, and print its problems.

    Returns 1 if a row would stop the run, would be skipped, would lose its reasoning, tools or system text, or is
    suspect, or if no row can be trained on, else 0. Rows that an entry of DATASET_MAPPING skips on purpose do not
    count, and neither do notes. The last line that is printed says which code is returned, and why.

    Writes <output_dir>/<model>/dataset_report.json, and each finding as one line of dataset_report.jsonl.
    """
    args = done.args
    for warning in done.warnings:
        logger.warning(warning)
    weights = locate(done.info, revision=args.model_revision, hub_name=args.hub, skip=_WEIGHTS)
    leave_out_unused(args, done.info, weights.path)
    folder = dense_directory(weights.path) if weights.path.is_file() else weights.path
    config = read_config(folder) if (folder / 'config.json').is_file() else {}
    tokenizer = load_tokenizer(folder, model_type=args.model_type)
    new = add_to_tokenizer(tokenizer, find_new_tokens(args))
    images = open_images_of_folder(config, tokenizer, folder, max_pixels=args.max_pixels)
    encoder = open_encoder(
        args, tokenizer, system_typed='system' in done.typed, images=images, cuts=False, new_ids=new.ids
    )

    report = Path(args.output_dir) / run_name(args) / 'dataset_report.json'
    report.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(report.with_suffix('.jsonl').open('w', encoding='utf-8'))
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        copy = stack.enter_context(_open_copy(args, encoder)) if args.write_clean else None
        check = DataCheck(encoder, args.max_length, stream, Seen(Path(scratch) / 'seen.db'), _positions(config), copy)
        check.decisions += [line for line in done.decisions if line.startswith('train_dataset_sample = ')]
        for part in _plan(args, check).parts:
            for batch in batches(part.used()):
                check.examine(batch, is_val=part.is_val)
        if copy is not None:
            copy.finish()

    record = check.record(args)
    write_json(report, record)
    logger.info(f'report: {report}, every finding with its location: {report.with_suffix(".jsonl")}')
    print('\n'.join(check.lines(record)))
    return 0 if record['clean'] else 1


def _open_copy(args: SftArguments, encoder: Encoder) -> CleanCopy:
    return CleanCopy(
        Path(str(args.write_clean)), marks_loss=args.loss_scope is None, sees_images=encoder.images is not None
    )


def _positions(config: Mapping[str, Any]) -> int | None:
    """Return the maximum number of tokens per row (max_position_embeddings) that the config of a model states.

    Returns None if the config states no such number.
    """
    config = config.get('text_config') or config
    stated = config.get('max_position_embeddings') or config.get('n_positions')
    return stated if isinstance(stated, int) else None


def _plan(args: SftArguments, check: DataCheck) -> Plan:
    """Return the plan of the run, and count the lines that cannot be read.

    Later, the check reads the data a second time. Then these lines are not counted again.
    """
    planning = True

    def bad_line(place: str, problem: str) -> None:
        if planning:
            check.bad_line(place, problem)

    sample = args.train_dataset_sample
    if args.streaming:  # a stream trains every row, in each pass, and a share says only how often
        args = replace(args, dataset=[without_amount(word) for word in args.dataset])
        sample = -1
    plan = plan_of(args, sample, bad=bad_line)
    planning = False
    check.decisions += plan.decisions(args.loss_scope)
    return plan
