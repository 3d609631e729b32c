"""Before training: our ids against those of the tokenizer's own chat template, on the user's rows and on probes."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from utils.base import dist
from utils.base.errors import ConfigError
from utils.base.files import write_json
from utils.base.logger import logger
from utils.base.names import LOCK_JSON
from utils.cli.resolution import log_decision
from utils.encode.chat_template_encoder import AutoEncoder
from utils.encode.encoded import (
    ADDED_END,
    CONTROL_TOKENS,
    FULL_DIFFERS,
    MERGED_BOUNDARY,
    RENDERED_DIFFERENTLY,
    Encoded,
    RowRefused,
)
from utils.encode.encoder import Encoder
from utils.encode.guarded_tokenizer import CLOSE_TAG, OPEN_TAG, map_strings
from utils.encode.template_encoder import TemplateEncoder
from utils.formats.conversation import Row
from utils.loading.image_processors import Images
from utils.preprocess import AUTO, TEMPLATE_MAPPING
from utils.proofs.as_written import REASONING_KEYS, messages_as_written, tools_as_written
from utils.run.folder import Run
from utils.run.lock import check_repeated_template
from utils.run.record import record_proof

Verdict = Literal['equal', 'explained', 'different', 'refused', 'alone']
# Rows of the user's, spread over the set, that are checked.
ROWS = 200
# What may keep a row's ids from being the chat template's: each is counted, named and shown to the user.
_EXPLAINS = {MERGED_BOUNDARY, CONTROL_TOKENS, RENDERED_DIFFERENTLY, FULL_DIFFERS, ADDED_END}
_THINK_BLOCK = re.compile(rf'(?:{OPEN_TAG}).*?(?:{CLOSE_TAG})|.*(?:{CLOSE_TAG})', re.DOTALL)
_THINK_TAG = re.compile(f'{OPEN_TAG}|{CLOSE_TAG}')


def probes() -> list[Row]:
    """Return conversations of every kind that a template may treat in a way of its own; `origin` names the kind."""
    kinds = json.loads(Path(__file__).with_name('probes.json').read_text(encoding='utf-8'))
    return [Row(messages=k['messages'], tools=k.get('tools'), origin=f'probe: {k["kind"]}') for k in kinds]


def template_hash(encoder: Encoder) -> str:
    """Return the sha256 of what the template is: its text, or the entry of TEMPLATE_MAPPING."""
    own = TEMPLATE_MAPPING[encoder.name]
    content = encoder.tokenizer.chat_template if own is None else dataclasses.asdict(own)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def note_template(run: Run, encoder: Encoder, repeats: str | None) -> None:
    """Write down which template is trained; raises ConfigError where the run that is repeated had another."""
    sha256 = template_hash(encoder)
    if repeats is not None:
        check_repeated_template(Path(repeats), sha256)
    run.note(template_sha256=sha256)
    run.lock['template_sha256'] = sha256
    if dist.is_main():
        write_json(run.folder / LOCK_JSON, run.lock)


def note_thinking(run: Run, encoder: Encoder, switched: tuple[int, int]) -> None:
    """Decide and write down whether the model that is trained is asked with the template's thinking switch.

    `switched` is how many of how many rows were rendered with it. Where none was, there is nothing to decide.
    """
    rows, of = switched
    if rows:
        run.decide('thinking', encoder.switch if 2 * rows > of else None, _how_many(rows, of, encoder.switch))
        run.note(thinking_rows={'switched': rows, 'of': of})


def _how_many(rows: int, of: int, switch: str | None) -> str:
    return f'{rows} of {of} rows looked at have a reply that reasons, rendered with {switch}'


def ask_as_trained(encoder: Encoder, record: Mapping[str, Any]) -> None:
    """Have replies asked for with the template's thinking switch where most of the trained ones were rendered so."""
    switch = record.get('thinking')
    if switch is None or switch != encoder.switch:
        return
    encoder.asks_to_think = True
    count = record['thinking_rows']
    log_decision('thinking', switch, f'the run trained so: {_how_many(count["switched"], count["of"], switch)}')


def _rendering(encoder: Encoder, row: Row, *, prompt: bool = False, inert: bool = False) -> str:
    """Return what transformers prints of the row as written under the tokenizer's chat template, or of its prompt.

    `inert` gives the template stand-ins for control tokens that the row spells, so that it takes them for text too.
    """
    messages: list[Any] = list(encoder.open_images(row)[0].messages)
    settings: Mapping[str, Any] = {}
    if isinstance(encoder, AutoEncoder):
        messages = encoder.in_its_form(messages if row.images or _shows(row) else messages_as_written(row), row)
        settings = encoder.settings_of(row)
    system = encoder.system if not isinstance(encoder, TemplateEncoder) or encoder.template.has_system else None
    if system is not None and messages[0]['role'] != 'system':
        messages.insert(0, {'role': 'system', 'content': system})
    tools: Any = tools_as_written(row)
    if inert:
        messages = [{**map_strings(message, encoder.text.guard), 'role': message['role']} for message in messages]
        tools = map_strings(tools, encoder.text.guard)
    text = encoder.tokenizer.apply_chat_template(
        messages[:-1] if prompt else messages,
        tools=tools,
        add_generation_prompt=prompt,
        tokenize=False,
        **settings,
    )
    return encoder.text.unguard(str(text))


def _own_ids(encoder: Encoder, row: Row, *, prompt: bool = False) -> list[int]:
    """Return the ids of that rendering, as transformers tokenises it."""
    text = _rendering(encoder, row, prompt=prompt)
    ids: list[int] = encoder.tokenizer(text, add_special_tokens=False)['input_ids']
    return ids


def _one_slot(ids: list[int], images: Images | None) -> list[int]:
    """Return ids with one slot for each image, as a chat template prints it."""
    if images is None:
        return ids
    return [token for before, token in zip([None, *ids], ids, strict=False) if token != images.slot or before != token]


def _bare(text: str) -> str:
    """Return the text without think tags and blanks."""
    return ''.join(_THINK_TAG.sub('', text).split())


def _without_blocks(text: str) -> str:
    """Return the text without think blocks and blanks."""
    return ''.join(_THINK_TAG.sub('', _THINK_BLOCK.sub('', text)).split())


def _shows(row: Row) -> bool:
    return bool(row.images) or any('</img>' in message['content'] for message in row.messages)


class _Check:
    """One row under one encoder: its ids, those of the chat template, and what is wrong."""

    def __init__(self, encoder: Encoder, row: Row) -> None:
        alone = copy.copy(encoder)
        alone.max_length = -1
        self.encoder, self.row = encoder, row
        self.encoded: Encoded = alone.encode([row])[0]
        self.prompt = alone.encode_prompts([row])[0]
        self.ours = _one_slot(self.encoded.input_ids, encoder.images)
        self.theirs: list[int] = []

    def faults(self) -> list[str]:
        """Return what would keep the tuned model from being used as it was trained, whatever the template is."""
        ids, (_, end) = self.encoded.input_ids, self.encoded.trained
        control = {*self.encoder.text.control_ids.values(), self.encoder.tokenizer.eos_token_id}
        found = []
        if ids[: len(self.prompt)] != self.prompt:
            where = self.context(_one_slot(self.prompt, self.encoder.images), 'the prompt')
            found.append(f'the prompt that inference gives is not how the trained row begins: {where}')
        if ids[end - 1] not in control and control & set(ids[end:]):
            dropped = next(token for token in ids[end:] if token in control)
            found.append(
                f'the end of turn {self.encoder.tokenizer.decode([dropped])!r} carries no loss: the model would never '
                'learn to stop'
            )
        return found

    def verdict(self) -> Verdict:
        """Return how the ids stand to the chat template's; raises what the template raises on the row."""
        self.theirs = _own_ids(self.encoder, self.row)
        if self.encoder.name != AUTO:
            return 'equal' if self.ours == self.theirs else 'different'
        notes = set(self.encoded.notes)
        if CONTROL_TOKENS not in notes:
            before = _own_ids(self.encoder, self.row, prompt=True)
            if self.ours[: len(before)] != before:
                self.theirs = before
                return 'different'
        if self.ours == self.theirs:
            return 'equal'
        return 'explained' if notes & _EXPLAINS and self._is_explained(notes) else 'different'

    def _is_explained(self, notes: set[str]) -> bool:
        """Return whether the notes account for the whole difference: each excuses what it names, and no more."""
        inert = CONTROL_TOKENS in notes
        full, prompt = (_rendering(self.encoder, self.row, prompt=prompt, inert=inert) for prompt in (False, True))
        ours = ''.join(self.encoded.pieces)
        if ADDED_END in notes and not notes & (_EXPLAINS - {ADDED_END}):
            return self.ours[:-1] == self.theirs
        if not notes & {RENDERED_DIFFERENTLY, FULL_DIFFERS}:
            # The text is the template's own: only where tokens begin and end is another.
            return ours == full and self._spells(ours, notes)
        follows = ours[len(prompt) :]
        written = (
            messages_as_written(self.row)[-1] if not _shows(self.row) else {'content': self.row.messages[-1]['content']}
        )
        # Reasoning that the template does not print is counted by the account.
        reasoning = (str(written.get(key) or '') for key in REASONING_KEYS)
        said = [written['content'], *(text for text in reasoning if _bare(text) in _bare(full))]
        is_whole = all(_bare(text) in _bare(ours) for text in said if isinstance(text, str))
        # A template that prints a closed block after every chat leaves nothing outside of blocks.
        plain = _without_blocks if _without_blocks(follows) else _bare
        before, reply, after = plain(full).rpartition(plain(follows))
        # Where an end is added, what the template prints after every chat is skipped: the prompt has it too.
        is_left = not after or (ADDED_END in notes and after in plain(prompt))
        is_printed = bool(before or reply) and is_left
        return ours.startswith(prompt) and is_printed and (
            is_whole or 'tool_calls' in written
        ) and self._spells(ours, notes)  # fmt: skip

    def _spells(self, text: str, notes: set[str]) -> bool:
        """Return whether the ids are those of the text, but for blanks that a tokenizer does not give back."""
        ids = self.encoded.input_ids[:-1] if ADDED_END in notes else self.encoded.input_ids
        return _bare(self.encoder.tokenizer.decode(ids)) == _bare(text)

    def context(self, other: list[int], name: str) -> str:
        """Return the first token in which the row's ids differ from others, and the text before it."""
        ours, decode = self.ours, self.encoder.tokenizer.decode
        at = next((i for i, (a, b) in enumerate(zip(ours, other, strict=False)) if a != b), min(len(ours), len(other)))

        def token(ids: list[int]) -> str:
            return f'{decode(ids[at : at + 1])!r} ({ids[at]})' if at < len(ids) else 'nothing more'

        before = decode(ours[max(at - 6, 0) : at])
        return f'token {at}, after {before!r}, is {token(ours)}, {name} has {token(other)}'


def prove_template(encoder: Encoder, rows: Sequence[Row], run_dir: Path) -> None:
    """Check rows and probes and record the outcome; raises ConfigError where the run would train what it must not.

    A registered template may differ from the tokenizer's own: it was chosen, and that it differs is said once. Images
    are compared as the one slot that a chat template prints for each; a registered template's are not.
    """
    started = time.perf_counter()
    own = bool(encoder.tokenizer.chat_template)
    counts: Counter[Verdict] = Counter()
    first: str | None = None
    outcome: dict[str, Any] = {'passed': False}
    try:
        for row in [*(row for row in rows if encoder.name == AUTO or not _shows(row)), *probes()]:
            verdict, difference = _judge(encoder, row, own=own)
            counts[verdict] += 1
            first = first or difference
        says = _sentence(encoder.name, own, counts, sum(counts.values()) - len(probes()), first)
        outcome = {'passed': True, 'says': says, **{name: counts[name] for name in sorted(counts)}}
        logger.info(f'template: {says}')
    except ConfigError as error:
        outcome['says'] = error.problems[0]
        raise
    finally:
        record_proof(run_dir, 'template', {**outcome, 'seconds': round(time.perf_counter() - started, 2)})


def _judge(encoder: Encoder, row: Row, *, own: bool) -> tuple[Verdict, str | None]:
    """Return the verdict on a row and where it differs; raises ConfigError for what nothing explains."""
    from jinja2.exceptions import TemplateError

    try:
        check = _Check(encoder, row)
    except (RowRefused, ConfigError) as error:
        if isinstance(error, ConfigError) and not row.origin.startswith('probe: '):
            raise
        return 'refused', None
    if faults := check.faults():
        raise ConfigError(*(f'template {encoder.name}, {row.origin}: {fault}.' for fault in faults))
    if not own:
        return 'alone', None
    try:
        verdict = check.verdict()
    except (
        TemplateError,
        TypeError,
        ArithmeticError,
        RecursionError,
    ):  # the tokenizer's template cannot say what the registered one says
        return 'different' if encoder.name != AUTO else 'refused', f'its own template refuses {row.origin}'
    if verdict != 'different':
        return verdict, None
    where = check.context(check.theirs, 'the chat template')
    if encoder.name == AUTO:
        raise ConfigError(
            f"template auto, {row.origin}: the ids are not those of the tokenizer's chat template, and no counted "
            f'reason explains it: {where}. Choose a --template_type, and please report this chat template.'
        )
    return verdict, f'{row.origin}: {where}'


def _sentence(name: str, own: bool, counts: Counter[Verdict], rows: int, first: str | None) -> str:
    tried = sum(counts.values())
    what = f'{tried} conversations ({rows} of your rows, {tried - rows} probes)'
    refused = f', {counts["refused"]} cannot be said in it' if counts['refused'] else ''
    holds = '; in all of them the prompt of inference begins what is trained and the end of turn carries loss'
    if not own:
        return f"the tokenizer has no chat template to compare '{name}' with; {what} were tried{refused}{holds}"
    told = f"{counts['equal']} of {what} give the ids of the tokenizer's own chat template"
    explained = f', {counts["explained"]} differ for reasons that are counted' if counts['explained'] else ''
    if counts['different']:
        differs = f"'{name}' was chosen and is trained: it differs in {counts['different']}, first {first}"
        return f'{told}; {differs}{refused}{holds}'
    return f'{told}{explained}{refused}{holds}'


def check_trained_template(encoder: Encoder, record: dict[str, Any], checkpoint: Path, *, typed: bool) -> None:
    """Raise ConfigError where the template that serves is not the one trained; only warn where it was typed."""
    trained, serves = record.get('template_sha256'), template_hash(encoder)
    if trained is None or trained == serves or record.get('template_type') != encoder.name:
        return
    if encoder.name == AUTO:
        what = 'the chat template of this tokenizer'
        is_whole = not (checkpoint / 'adapter_config.json').is_file()
        remedy = 'put back the chat_template.jinja that the run wrote'
        remedy = remedy if is_whole else f'take the trained one from {checkpoint / "chat_template.jinja"}'
    else:
        what, remedy = f"the entry '{encoder.name}' of TEMPLATE_MAPPING", 'put the entry back as it was'
    text = (
        f'{what} has changed since {checkpoint.name} was trained (sha256 {trained[:12]}, now {serves[:12]}): '
        f'answers would be to prompts it never saw. To fix it, {remedy}; or type --template_type to go on all the same.'
    )
    if not typed:
        raise ConfigError(text)
    logger.warning(text)
