"""Writes a merged model as a GGUF file, with the converter of a llama.cpp checkout, and checks the file.

The converter writes the file under a hidden name. The model in the file is then compared with the merged model. If they
agree, the file is renamed, and a Modelfile for Ollama is written beside it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError
from utils.base.leak_scan import find_secrets
from utils.base.logger import logger
from utils.base.names import CONVERTER, LLAMA_CPP, SFT_ARGS
from utils.base.scrub import scrubber
from utils.encode.encoder import Encoder
from utils.encode.text_encoder import TextEncoder
from utils.export.merge import user_rows
from utils.export.ollama import NotExpressible, Turns, compare_turns, fits_modelfile, learn_turns, modelfile
from utils.formats.conversation import Row
from utils.loading.folder import stored_dtype
from utils.loading.gguf import gguf_problem, open_gguf
from utils.loading.gguf_header import GgufHeader, read_header
from utils.loading.template_settings import sources_of
from utils.model import load_model, load_tokenizer
from utils.proofs.template import probes
from utils.run.record import record_proof

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

# The largest allowed difference between the logits of the GGUF file and of the merged model, as a fraction of the
# largest logit, by the type of the file. The types with 16 and 8 bits round the weights.
_BOUND = {'f32': 1e-3, 'f16': 1e-2, 'bf16': 5e-2, 'q8_0': 1e-1}
_TYPES = {'float32': 'f32', 'float16': 'f16', 'bfloat16': 'bf16'}
# The number of conversations whose answers are compared, and the number of tokens of an answer.
_ANSWERS = 3
_TOKENS = 32
# The number of lines of the converter's output that are shown if it fails.
_SHOWN_LINES = 12


@dataclass(frozen=True, kw_only=True)
class GgufTarget:
    """The GGUF file to write, the type of its weights, and the llama.cpp checkout (None if there is none)."""

    file: Path
    type: str | None
    llama_cpp: Path | None


def write_gguf(
    folder: Path,
    encoder: Encoder,
    config: GenerationConfig,
    target: GgufTarget,
    *,
    run_dir: Path,
    device: Any,
) -> str:
    """Write the model in `folder` as a GGUF file, and a Modelfile for Ollama. Returns a text for the log.

    The text has the result of a check: on `device`, the model in the GGUF file and the model in `folder` answer the
    same prompts. The prompts are taken from the report of the run in `run_dir`. If the report has none, one fixed
    prompt is used. If transformers cannot read the GGUF file, only the chat templates are compared. Raises ConfigError
    if the converter fails, or if the two models differ by more than rounding explains.

    If `target` has no llama.cpp checkout, only the Modelfile is written, and a warning is logged. The text then has the
    commands that get llama.cpp and write the GGUF file.
    """
    rows = [row for row in user_rows(run_dir) if not row.is_text]
    kind = target.type or _TYPES.get(stored_dtype(folder) or '', 'f16')
    target.file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, CONVERTER, str(folder.absolute()), '--outtype', kind, '--outfile']
    if target.llama_cpp is None:
        ollama = _write_modelfile(folder, encoder, config, target.file, rows=rows, header=None)
        converts = shlex.join(['python', f'llama.cpp/{CONVERTER}', *command[2:], str(target.file.absolute())])
        logger.warning(
            f'--gguf {target.file}: this file is not written, because --llama_cpp is not given. Add --llama_cpp FOLDER '
            'to this command, and the file is written and compared.'
        )
        return (
            f'only {target.file.with_suffix(".Modelfile")} is written. {ollama}\nget llama.cpp: git clone --depth 1 '
            f'{LLAMA_CPP}\nor write the file without the comparison: {converts}\nthen {_serve(target.file)}'
        )

    started = time.perf_counter()
    unchecked = target.file.with_name(f'.aside-{target.file.name}')
    outcome: dict[str, Any] = {'passed': False}
    try:
        _convert([*command, str(unchecked.absolute())], target.llama_cpp, unchecked)
        proven = _prove(unchecked, folder, encoder, kind, rows=rows, device=device)
        ollama = _write_modelfile(folder, encoder, config, target.file, rows=rows, header=read_header(unchecked))
        unchecked.rename(target.file)
        outcome = {'passed': True, 'says': f'{target.file.name} ({kind}) {proven}. {ollama}'}
    except ConfigError as error:
        outcome['says'] = error.problems[0]
        raise
    finally:
        if (run_dir / SFT_ARGS).is_file():
            record_proof(run_dir, 'gguf', {**outcome, 'seconds': round(time.perf_counter() - started, 2)})
    return f'{outcome["says"]}\n{_serve(target.file)}'


def _serve(file: Path) -> str:
    name = file.stem.lower()
    return (
        f'serve it: llama-server -m {file} --jinja\n'
        f'      or: ollama create {name} -f {file.with_suffix(".Modelfile")}, then: ollama run {name}'
    )


def _convert(command: Sequence[str], checkout: Path, target: Path) -> None:
    """Run the converter of a llama.cpp checkout. If it fails, raises ConfigError with the last lines of its output.

    Environment variables that look like secrets are not passed to the converter, because its code is not trusted.
    """
    clean = scrubber(find_secrets(os.environ, {}))
    hidden = {name.removeprefix('the variable ') for name in find_secrets(os.environ, {})}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    target.unlink(missing_ok=True)
    logger.info(f'running {CONVERTER} of {checkout}')
    try:
        done = subprocess.run(
            command, cwd=checkout, env=environment, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, encoding='utf-8', errors='replace',
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(
            f'--llama_cpp {checkout}: {CONVERTER} cannot be run: {error.strerror}. Check the '
            'permissions of this folder and of Python.'
        ) from error

    shown = '\n'.join(clean(done.stdout).strip().splitlines()[-_SHOWN_LINES:])
    if done.returncode:
        raise ConfigError(
            f'--llama_cpp {checkout}: {CONVERTER} failed with exit code {done.returncode}. Update the checkout, and '
            f'install what its requirements.txt names. The last lines that the converter printed:\n{shown}'
        )
    if not target.is_file():
        raise ConfigError(
            f'--llama_cpp {checkout}: {CONVERTER} ended without an error, but wrote no file. Update the checkout. The '
            f'last lines that the converter printed:\n{shown}'
        )


def _prove(file: Path, folder: Path, encoder: Encoder, kind: str, *, rows: Sequence[Row], device: Any) -> str:
    """Compare a GGUF file with the model in `folder`, and return a text that says what is equal.

    If transformers cannot read the file, only the chat template is compared. Raises ConfigError if the chat template or
    the tokens are different, or if the logits differ by more than rounding explains. Prompts with different answers are
    only counted in the text.
    """
    header = read_header(file)
    tokenizer = load_tokenizer(folder)
    if fault := _template_fault(header, tokenizer):
        raise ConfigError(_refusal(file, fault))
    if unread := gguf_problem(file):
        return f'has the chat template of the merged model; its weights were not compared: {unread}'

    prompts = _prompts(encoder, rows)
    merged = load_model(folder, torch_dtype=_dtype(folder)).to(device).eval()
    dtype = merged.dtype
    answers = [_greedy(merged, ids) for ids in prompts]
    wanted = [_logits(merged, [*ids, *answer]) for ids, answer in zip(prompts, answers, strict=True)]
    del merged

    model, found = open_gguf(file, dtype)
    model.to(device).eval()
    if fault := _token_fault(found, tokenizer, rows):
        raise ConfigError(_refusal(file, fault))

    bound = _BOUND[kind]
    largest_difference = 0.0
    for ids, answer, logits in zip(prompts, answers, wanted, strict=True):
        difference = float((_logits(model, [*ids, *answer]) - logits).abs().max())
        allowed = bound * float(logits.abs().max())
        if not difference <= allowed:
            raise ConfigError(
                _refusal(file, f'its logits differ by up to {difference:.4g}. Rounding explains only {allowed:.4g}.')
            )
        largest_difference = max(largest_difference, difference)

    same = sum(_greedy(model, ids) == answer for ids, answer in zip(prompts, answers, strict=True))
    return (
        f'has the chat template and the tokens of the merged model, and answers {same} of {len(prompts)} prompts with '
        f'the same {_TOKENS} greedy tokens (largest difference of the logits {largest_difference:.3g})'
    )


def _refusal(file: Path, fault: str) -> str:
    target = file.with_name(file.name.removeprefix('.aside-'))
    return (
        f'--gguf {target}: not written, because {fault} Update the llama.cpp checkout, and report this to llama.cpp. '
        f'The rejected file is kept as {file}.'
    )


def _template_fault(header: GgufHeader, tokenizer: Any) -> str | None:
    """Return how the chat template in the file differs from that of the tokenizer, or None if both are equal."""
    wanted = tokenizer.chat_template
    if isinstance(wanted, dict):
        wanted = wanted.get('default')
    found = header.chat_template
    if found == wanted or (not found and not wanted):
        return None
    if found is None or wanted is None:
        return f'it has {"no" if found is None else "a"} chat template, unlike the merged model.'
    place = next(
        (n for n, (one, other) in enumerate(zip(found, wanted, strict=False)) if one != other),
        min(len(found), len(wanted)),
    )
    return f'its chat template and the chat template of the merged model differ from character {place + 1} on.'


def _token_fault(found: Any, tokenizer: Any, rows: Sequence[Row]) -> str | None:
    """Return a message about the first text for which two tokenizers give different ids, or None if there is none.

    `found` is the tokenizer in the GGUF file, and `tokenizer` is the tokenizer of the merged model. The texts are taken
    from `rows`, and from the test conversations that `probes` returns.
    """
    texts = [turn['content'] for row in [*rows, *probes()] for turn in row.messages]
    for text in texts:
        ids = found(text, add_special_tokens=False, verbose=False)['input_ids']
        if ids != tokenizer(text, add_special_tokens=False, verbose=False)['input_ids']:
            return f'its tokenizer gives other tokens for {text[:60]!r}.'
    return None


def _dtype(folder: Path) -> torch.dtype:
    """Return the data type of the weights in a model folder. Any type except bf16 and fp16 gives float32."""
    import torch

    dtypes = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
    return dtypes.get(stored_dtype(folder) or '', torch.float32)


def _prompts(encoder: Encoder, rows: Sequence[Row]) -> list[list[int]]:
    """Return the token ids of up to _ANSWERS prompts. They are taken from the first rows without images.

    If no row can be used, one prompt is returned: the prompt of a test conversation, or a fixed text.
    """
    chosen = [row for row in rows if not row.images][:_ANSWERS]
    if not chosen and not isinstance(encoder, TextEncoder):
        chosen = probes()[:1]
    prompts = [ids for ids in encoder.encode_prompts(chosen) if ids]
    return prompts or [encoder.tokenizer('The answer is')['input_ids']]


def _greedy(model: Any, ids: list[int]) -> list[int]:
    """Return the token ids with which the model continues a prompt by greedy decoding."""
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=False, max_new_tokens=_TOKENS, pad_token_id=0)
    inputs = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
    return list(output[0, len(ids) :].tolist())


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Return the logits of the model for token ids, as fp32 on the CPU."""
    import torch

    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids], device=model.device), use_cache=False).logits
    return logits.float().cpu()


def _write_modelfile(
    folder: Path,
    encoder: Encoder,
    config: GenerationConfig,
    gguf: Path,
    *,
    rows: Sequence[Row],
    header: GgufHeader | None,
) -> str:
    """Write a Modelfile (for Ollama) beside the GGUF file `gguf`. Returns a sentence for the log.

    The sentence says for how many conversations the Modelfile gives the same prompt as the chat template. The
    conversations are `rows` and fixed test conversations. If Ollama cannot express the chat template, the Modelfile has
    no TEMPLATE, and the sentence says why. `header` is the header of the GGUF file, or None if this file does not exist
    yet. If a Modelfile with a different text exists, it is renamed to <name>.old.
    """
    note = ''
    lost = ''
    system = encoder.system
    template: str | None = None
    try:
        turns, sentence = _ollama_turns(folder, encoder, rows, header)
        if system and (turns.before_system is None or not fits_modelfile(system)):
            # The SYSTEM line cannot hold this message, so TEMPLATE prints it.
            lost = 'the chat template has no place for it' if turns.before_system is None else ''
            turns, system = _with_default_system(turns, system), None
        template = turns.go_template()
    except NotExpressible as error:
        sentence = f'its Modelfile has no TEMPLATE: {error}. Use llama-server --jinja, which runs the chat template'
        note = (
            f'TEMPLATE is left out, because Ollama cannot express the chat template: {error}.\n'
            'Ollama takes a template of its own if one resembles the chat template. Otherwise it sends the bare text.'
        )
        if system and not fits_modelfile(system):
            lost = 'the Modelfile has no TEMPLATE, and SYSTEM cannot hold its quotation marks'
            system = None
    if lost:
        logger.warning(
            f'{gguf.with_suffix(".Modelfile").name} has no system message, because {lost}: {encoder.system!r}'
        )

    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    text = modelfile(
        gguf.name,
        template=template,
        system=system,
        stops=[encoder.tokenizer.decode([end]) for end in ends],
        config=config,
        max_length=encoder.max_length,
        note=note,
    )
    file = gguf.with_suffix('.Modelfile')
    if file.is_file() and file.read_text(encoding='utf-8') != text:
        earlier = file.with_name(f'{file.name}.old')
        file.replace(earlier)
        logger.warning(f'{file} is replaced. The earlier file is kept as {earlier}')
    file.write_text(text, encoding='utf-8')
    return f'{file.name}: {sentence}'


def _ollama_turns(folder: Path, encoder: Encoder, rows: Sequence[Row], header: GgufHeader | None) -> tuple[Turns, str]:
    """Return the texts for TEMPLATE in a Modelfile (for Ollama), and a sentence for the log.

    The sentence says for how many conversations TEMPLATE gives the same prompt as the chat template. The conversations
    are `rows` and fixed test conversations. Raises NotExpressible if TEMPLATE cannot express the chat template.
    """
    tokenizer = load_tokenizer(folder)
    if isinstance(encoder, TextEncoder):
        return Turns(opening='', before_reply='', after_reply='', before_answer=''), 'its TEMPLATE is the bare text'
    if not tokenizer.chat_template:
        raise NotExpressible('the merged model has no chat template')
    if any('strftime_now' in source for source in sources_of(tokenizer.chat_template)):
        raise NotExpressible("it prints today's date")

    settings = encoder.prompt_settings

    def render(messages: Any) -> str:
        return str(
            tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False, **settings)
        )

    turns = learn_turns(render)
    compared = compare_turns(turns, render, [*rows, *probes()])
    if _adds_bos(tokenizer, header):
        turns = turns.without_bos(tokenizer.bos_token)
    return turns, compared.sentence()


def _adds_bos(tokenizer: Any, header: GgufHeader | None) -> bool:
    """Return whether llama.cpp puts the bos token in front of a prompt.

    This setting is in the header of the GGUF file. If `header` is None, the setting of the tokenizer is returned.
    """
    if tokenizer.bos_token is None:
        return False
    if header is None:
        return bool(tokenizer('a')['input_ids'][0] == tokenizer.bos_token_id)
    model_adds = header.metadata.get('tokenizer.ggml.model') == 'llama'
    return bool(header.metadata.get('tokenizer.ggml.add_bos_token', model_adds))


def _with_default_system(turns: Turns, system: str) -> Turns:
    """Return a copy of `turns` that prints `system` in each prompt without a system message of its own.

    If the chat template has no place for a system message, returns `turns` unchanged.
    """
    if turns.before_system is None:
        return turns
    return replace(turns, opening=f'{turns.before_system}{system}{turns.after_system}')
