"""Compares the encoded ids with the ids of the tokenizer's own chat template, for rows of the user and for probes.

A probe is a short conversation that tests one special case of templates.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import secrets
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from utils.base import dist
from utils.base.errors import ConfigError
from utils.base.files import write_json
from utils.base.logger import logger
from utils.base.names import LOCK_JSON, TEMPLATE_FLAGS
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
from utils.encode.text_encoder import TextEncoder
from utils.formats.conversation import Row
from utils.formats.json_text import Spelling
from utils.loading.chat_template import hash_template_file, hash_templates, write_templates
from utils.loading.image_processors import Images
from utils.loading.template_settings import split_settings
from utils.preprocess import AUTO, TEMPLATE_MAPPING
from utils.proofs.as_written import REASONING_KEYS, messages_as_written, tools_as_written
from utils.run.folder import Run
from utils.run.lock import check_repeated_template
from utils.run.record import RunRecord, Trained, record_proof

# The result of the comparison for one row. equal: the ids are the same. explained: they differ, and the notes of the
# row say why. different: they differ for another reason. refused: the row cannot be rendered. alone: there is no chat
# template to compare with.
Verdict = Literal['equal', 'explained', 'different', 'refused', 'alone']
# The number of rows of the user that are checked. They are spread over the data.
ROWS = 200
# Notes are remarks of the encoder on a row, which are counted and shown to the user. These notes explain why the ids of
# a row differ from the ids of the chat template.
_EXPLAINS = {MERGED_BOUNDARY, CONTROL_TOKENS, RENDERED_DIFFERENTLY, FULL_DIFFERS, ADDED_END}
_PROBE = 'probe: '
_THINK_BLOCK = re.compile(rf'(?:{OPEN_TAG}).*?(?:{CLOSE_TAG})|.*(?:{CLOSE_TAG})', re.DOTALL)
_THINK_TAG = re.compile(f'{OPEN_TAG}|{CLOSE_TAG}')


def probes() -> list[Row]:
    """Return the probes as rows: one conversation for each special case of templates. `origin` names the case."""
    written = json.loads(Path(__file__).with_name('probes.json').read_text(encoding='utf-8'))
    return [
        Row(messages=probe['messages'], tools=probe.get('tools'), origin=f'{_PROBE}{probe["kind"]}')
        for probe in written
    ]


def template_hash(encoder: Encoder) -> str:
    """Return the sha256 of the encoder's template.

    With --template_type auto, the text of the tokenizer's chat template is hashed. Otherwise, the entry of
    TEMPLATE_MAPPING is hashed.
    """
    own = TEMPLATE_MAPPING[encoder.name]
    return hash_templates(encoder.tokenizer.chat_template if own is None else dataclasses.asdict(own))


def note_template(run: Run, encoder: Encoder, repeats: str | None) -> None:
    """Write the hash of the template to sft_args.json and lock.json.

    If a flag chooses the chat template, this template is also written to the run folder. `repeats` is the folder of the
    run that this run repeats, or None. Raises ConfigError if that run used a different template.
    """
    sha256 = template_hash(encoder)
    if repeats is not None:
        check_repeated_template(Path(repeats), sha256)
    run.note(template_sha256=sha256)
    run.lock['template_sha256'] = sha256
    if path := run.record.flags.get('chat_template'):
        run.lock['chat_template'] = {'path': path, 'sha256': hash_template_file(Path(path))}
    if not dist.is_main():
        return

    write_json(run.folder / LOCK_JSON, run.lock)
    if any(run.record.flags.get(name) is not None for name in TEMPLATE_FLAGS[1:]):
        write_templates(run.folder, encoder.tokenizer.chat_template)


def note_thinking(run: Run, encoder: Encoder, switched: tuple[int, int]) -> None:
    """Decide and record whether prompts of the trained model use the thinking switch, e.g. enable_thinking=True.

    `switched` is (number of rows rendered with the switch, number of all rows). If no row was rendered with the switch,
    nothing is recorded.
    """
    rows, total = switched
    if rows:
        switch = encoder.switch if 2 * rows > total else None
        run.decide('thinking', switch, _thinking_reason(rows, total, encoder.switch))
        run.note(thinking_rows={'switched': rows, 'of': total})


def _thinking_reason(rows: int, total: int, switch: str | None) -> str:
    return f'{rows} of {total} checked rows have a reply with reasoning, rendered with {switch}'


def ask_as_trained(encoder: Encoder, record: RunRecord) -> None:
    """If most replies in training were rendered with the thinking switch, make the encoder use it in all prompts."""
    switch = record.thinking
    count = record.thinking_rows
    if switch is None or count is None or switch != encoder.switch:
        return
    encoder.asks_to_think = True
    reason = _thinking_reason(count['switched'], count['of'], switch)
    log_decision('thinking', switch, f'the run was trained with it: {reason}')


def _rendering(
    encoder: Encoder, row: Row, *, prompt: bool = False, inert: bool = False, reply: str | None = None
) -> str:
    """Return the text of a row as the tokenizer's chat template renders it.

    With --template_type auto, the messages of a row without images are read from its source data. With `prompt`, only
    the prompt is rendered. With `reply`, this text replaces the last message. With `inert`, control tokens in the
    messages are replaced by placeholders during the rendering, so that the template treats them as plain text.
    """
    messages: list[Any] = list(encoder.open_images(row)[0].messages)
    settings: Mapping[str, Any] = {}
    if isinstance(encoder, AutoEncoder):
        if not _has_images(row):
            messages = messages_as_written(row)
        messages = encoder.chats.in_its_form(messages, row)
        settings = encoder.chats.settings_of(row)

    system = encoder.system
    if isinstance(encoder, TemplateEncoder) and not encoder.template.has_system:
        system = None
    if system is not None and messages[0]['role'] != 'system':
        messages.insert(0, {'role': 'system', 'content': system})

    if reply is not None:
        messages = [*messages[:-1], {'role': 'assistant', 'content': reply}]
    tools: Any = tools_as_written(row)
    if inert:
        messages = [{**map_strings(message, encoder.text.guard), 'role': message['role']} for message in messages]
        tools = map_strings(tools, encoder.text.guard)

    # The encoder renders the template with its settings in front of it. Here the same settings are passed as keywords.
    in_front, template = split_settings(encoder.tokenizer.get_chat_template(tools=tools))
    spelling = Spelling()
    text = encoder.tokenizer.apply_chat_template(
        spelling.hide(messages[:-1] if prompt else messages),
        tools=spelling.hide(tools),
        chat_template=template,
        add_generation_prompt=prompt,
        tokenize=False,
        **settings,
        **in_front,
    )
    return encoder.text.unguard(spelling.show(str(text)))


def _template_ids(encoder: Encoder, row: Row, *, prompt: bool = False) -> list[int]:
    """Return the ids of the text that `_rendering` returns for the row or for its prompt."""
    text = _rendering(encoder, row, prompt=prompt)
    ids: list[int] = encoder.tokenizer(text, add_special_tokens=False)['input_ids']
    return ids


def _one_token_per_image(ids: list[int], images: Images | None) -> list[int]:
    """Return the ids with one image token for each image, as in a chat template. Encoded ids have several per image."""
    if images is None:
        return ids
    return [token for before, token in zip([None, *ids], ids, strict=False) if token != images.slot or before != token]


def _bare(text: str) -> str:
    """Return the text without think tags and without whitespace."""
    return ''.join(_THINK_TAG.sub('', text).split())


def _without_blocks(text: str) -> str:
    """Return the text without think blocks and without whitespace."""
    return ''.join(_THINK_TAG.sub('', _THINK_BLOCK.sub('', text)).split())


def _has_images(row: Row) -> bool:
    return bool(row.images) or any('</img>' in message['content'] for message in row.messages)


class _Check:
    """Compares the ids of one row from the encoder (`ours`) with the ids from the chat template (`theirs`)."""

    def __init__(self, encoder: Encoder, row: Row) -> None:
        unlimited = copy.copy(encoder)
        unlimited.max_length = -1
        self.encoder = encoder
        self.row = row
        self.encoded: Encoded = unlimited.encode([row])[0]
        self.prompt = unlimited.encode_prompts([row])[0]
        self.ours = _one_token_per_image(self.encoded.input_ids, encoder.images)
        self.theirs: list[int] = []

    def faults(self) -> list[str]:
        """Return a description of each fault of the row. The list is empty if there is no fault.

        Two faults are possible, with any template: the prompt of inference is not the beginning of the trained row, or
        the end-of-turn token carries no loss.
        """
        ids = self.encoded.input_ids
        _, end = self.encoded.trained
        control = {*self.encoder.text.control_ids.values(), self.encoder.tokenizer.eos_token_id}
        faults = []
        if ids[: len(self.prompt)] != self.prompt:
            where = self.first_difference(_one_token_per_image(self.prompt, self.encoder.images), 'the prompt')
            faults.append(f'the prompt of inference is not the beginning of the trained row: {where}')
        if ids[end - 1] not in control and control & set(ids[end:]):
            dropped = next(token for token in ids[end:] if token in control)
            faults.append(
                f'the end of turn {self.encoder.tokenizer.decode([dropped])!r} carries no loss: the model would never '
                'learn to stop'
            )
        return faults

    def verdict(self) -> Verdict:
        """Compare the ids of the row with the ids of the chat template.

        Returns 'equal', 'explained' (the encoder's notes about the row explain the difference) or 'different'. An error
        that the template raises for this row is not caught here.
        """
        self.theirs = _template_ids(self.encoder, self.row)
        if self.encoder.name != AUTO:
            return 'equal' if self.ours == self.theirs else 'different'

        notes = set(self.encoded.notes)
        if CONTROL_TOKENS not in notes:
            prompt = _template_ids(self.encoder, self.row, prompt=True)
            if self.ours[: len(prompt)] != prompt:
                self.theirs = prompt
                return 'different'
        if self.ours == self.theirs:
            return 'equal'
        return 'explained' if notes & _EXPLAINS and self._is_explained(notes) else 'different'

    def _is_explained(self, notes: set[str]) -> bool:
        """Return whether `notes` explain every difference between the row and the text of the chat template.

        Each note names a change that the encoder made in the row. A note explains a difference only if the named change
        can cause the difference.
        """
        inert = CONTROL_TOKENS in notes
        full = _rendering(self.encoder, self.row, inert=inert)
        prompt = _rendering(self.encoder, self.row, prompt=True, inert=inert)
        ours = ''.join(self.encoded.pieces)
        if ADDED_END in notes and not notes & (_EXPLAINS - {ADDED_END}):
            return self.ours[:-1] == self.theirs
        if not notes & {RENDERED_DIFFERENTLY, FULL_DIFFERS}:
            # With these notes, the texts must be equal: only the boundaries between tokens may differ.
            return ours == full and self._decodes_to(ours, notes)

        if not ours.startswith(prompt) or not self._ends_with_reply(full, ours[len(prompt) :], notes):
            return False
        return self._has_whole_reply(ours, full) and self._decodes_to(ours, notes)

    def _ends_with_reply(self, full: str, reply: str, notes: set[str]) -> bool:
        """Return whether `full`, the text that the chat template prints for the row, ends with `reply`.

        `reply` is the encoder's text after the prompt. Think blocks and whitespace are ignored. If the encoder added an
        end of turn to the reply, text that the template prints after every reply is ignored too.
        """
        # If a template prints a closed think block after every chat, `reply` may have no text outside of the block.
        plain = _without_blocks if _without_blocks(reply) else _bare
        before, found, after = plain(full).rpartition(plain(reply))
        is_last = not after or (ADDED_END in notes and plain(self._printed_after_reply(notes)).endswith(after))
        return bool(before or found) and is_last

    def _printed_after_reply(self, notes: set[str]) -> str:
        """Return the text that the template prints after the last message."""
        # A random text in place of the last message shows where that message ends.
        marker = secrets.token_hex(8)
        text = _rendering(self.encoder, self.row, inert=CONTROL_TOKENS in notes, reply=marker)
        return text.rpartition(marker)[2]

    def _has_whole_reply(self, ours: str, full: str) -> bool:
        """Return whether the encoder's text `ours` contains the whole last message of the source data.

        The reasoning of the message is required only if the chat template's text `full` contains it. For a message with
        tool calls, True is returned without a check.
        """
        if _has_images(self.row):
            message: Mapping[str, Any] = {'content': self.row.messages[-1]['content']}
        else:
            message = messages_as_written(self.row)[-1]
        if 'tool_calls' in message:
            return True

        texts = [message['content']]
        for key in REASONING_KEYS:
            # Reasoning that the template does not print is no error here: its characters are counted as not used.
            text = str(message.get(key) or '')
            if _bare(text) in _bare(full):
                texts.append(text)
        return all(_bare(text) in _bare(ours) for text in texts if isinstance(text, str))

    def _decodes_to(self, text: str, notes: set[str]) -> bool:
        """Return whether the ids of the row decode to `text`, ignoring an end of turn that the encoder added.

        Think tags are ignored. Whitespace is ignored too, because some tokenizers do not restore it exactly.
        """
        ids = self.encoded.input_ids[:-1] if ADDED_END in notes else self.encoded.input_ids
        return _bare(self.encoder.tokenizer.decode(ids)) == _bare(text)

    def first_difference(self, other: list[int], name: str) -> str:
        """Return a text that shows the first token at which `self.ours` and the ids `other` differ.

        `name` says what `other` is. Example with the name 'the prompt': "token 7, after 'Hello ', is 'you' (366), the
        prompt has 'me' (478)".
        """
        ours = self.ours
        decode = self.encoder.tokenizer.decode
        first = min(len(ours), len(other))
        for position, (our_id, other_id) in enumerate(zip(ours, other, strict=False)):
            if our_id != other_id:
                first = position
                break

        def token(ids: list[int]) -> str:
            return f'{decode(ids[first : first + 1])!r} ({ids[first]})' if first < len(ids) else 'nothing more'

        before = decode(ours[max(first - 6, 0) : first])
        return f'token {first}, after {before!r}, is {token(ours)}, {name} has {token(other)}'


def _check_text(encoder: Encoder, row: Row) -> None:
    """Raise ConfigError if the ids of a plain-text row are wrong, or if a token of the row carries no loss.

    The ids must be those that the tokenizer gives for the text, followed by the end-of-sequence token. If the text
    contains control tokens, it is sufficient that the ids decode to the text.
    """
    unlimited = copy.copy(encoder)
    unlimited.max_length = -1
    encoded = unlimited.encode([row])[0]
    ours = encoded.input_ids
    tokenizer = encoder.tokenizer
    written = str(row.written.get('text', row.messages[0]['content']))
    theirs: list[int] = tokenizer(written, verbose=False)['input_ids']
    theirs += [] if theirs[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]

    is_equal = ours == theirs
    if CONTROL_TOKENS in encoded.notes:
        # The encoder encodes the name of a control token as plain text, but the tokenizer as one id.
        is_equal = _bare(tokenizer.decode(ours[len(unlimited.beginning) : -1])) == _bare(written)
    if not is_equal or encoded.trained != (0, len(ours)):
        raise ConfigError(
            f"{row.origin}: the trained ids of this plain-text row should be the tokenizer's ids of the text and then "
            'the end-of-sequence token, but they are not. Please report this tokenizer.'
        )


def prove_template(encoder: Encoder, rows: Sequence[Row], run_dir: Path) -> None:
    """Compare encoded rows with the result of the tokenizer's chat template. Writes the outcome to proofs.json.

    Fixed test conversations (see `probes`) are compared too.

    With --template_type auto, the encoder uses the chat template. Then an unexplained difference raises ConfigError.

    With any other --template_type, the encoder uses a different template. Then the ids may differ: the first difference
    is only recorded, and rows with images are not compared.

    With every --template_type, raises ConfigError if a prompt or the loss of a row is wrong. The ids of plain-text rows
    are compared with the ids that the tokenizer gives for the text, and a difference raises ConfigError.
    """
    started = time.perf_counter()
    has_own = bool(encoder.tokenizer.chat_template)
    texts = [row for row in rows if row.is_text]
    chats = [row for row in rows if not row.is_text]
    compared = [row for row in chats if encoder.name == AUTO or not _has_images(row)]
    # Without a template there is nothing to try probes on.
    tried = [] if isinstance(encoder, TextEncoder) and not compared else [*compared, *probes()]
    counts: Counter[Verdict] = Counter()
    first: str | None = None
    outcome: dict[str, Any] = {'passed': False}
    try:
        for row in texts:
            _check_text(encoder, row)
        for row in tried:
            verdict, difference = _judge(encoder, row, has_own=has_own)
            counts[verdict] += 1
            first = first or difference
        sentences = [_sentence(encoder.name, has_own, counts, len(compared), first)] if tried else []
        if texts:
            sentences.append(
                f'{len(texts)} rows of plain text have the ids of the tokenizer and the end of sequence, and every '
                'token carries loss'
            )
        says = '; '.join(sentences)
        outcome = {'passed': True, 'says': says, **{name: counts[name] for name in sorted(counts)}}
        logger.info(f'template: {says}')
    except ConfigError as error:
        outcome['says'] = error.problems[0]
        raise
    finally:
        record_proof(run_dir, 'template', {**outcome, 'seconds': round(time.perf_counter() - started, 2)})


def _judge(encoder: Encoder, row: Row, *, has_own: bool) -> tuple[Verdict, str | None]:
    """Compare one encoded row with the tokenizer's chat template. Returns (verdict, text for the user or None).

    The text shows the first difference between the row and the chat template. It is None if no difference is to be
    shown. If `has_own` is False, the tokenizer has no chat template, and the verdict is 'alone'.

    Raises ConfigError if a prompt or the loss of the row is wrong. With --template_type auto, also raises ConfigError
    instead of returning the verdict 'different'.
    """
    from jinja2.exceptions import TemplateError

    try:
        check = _Check(encoder, row)
    except (RowRefused, ConfigError) as error:
        if isinstance(error, ConfigError) and not row.origin.startswith(_PROBE):
            raise
        return 'refused', None

    if faults := check.faults():
        raise ConfigError(
            *(
                f'{row.origin}: template {encoder.name}: {fault}. Use another --template_type, and please report this '
                'template.'
                for fault in faults
            )
        )
    if not has_own:
        return 'alone', None

    try:
        verdict = check.verdict()
    except (TemplateError, TypeError, ArithmeticError, RecursionError):
        # The tokenizer's chat template cannot render this conversation, but our encoder can.
        verdict = 'refused' if encoder.name == AUTO else 'different'
        return verdict, f"the tokenizer's own template refuses {row.origin}"
    if verdict != 'different':
        return verdict, None

    where = check.first_difference(check.theirs, 'the chat template')
    if encoder.name == AUTO:
        raise ConfigError(
            f"{row.origin}: template auto: the ids differ from those of the tokenizer's chat template, and no known "
            f'reason explains this: {where}. Use another --template_type (docs/templates.md), and please report this '
            'chat template.'
        )
    return verdict, f'{row.origin}: {where}'


def _sentence(name: str, has_own: bool, counts: Counter[Verdict], rows: int, first: str | None) -> str:
    """Return a sentence with the results of a passed check, for proofs.json and the log.

    `name` is the name of the template. `rows` is the number of compared rows from the user's data. All other
    conversations in `counts` are probes, which are fixed test conversations. `first` describes the first difference
    from the chat template, or is None.
    """
    tried = sum(counts.values())
    what = f'{tried} conversations ({rows} of your rows, {tried - rows} probes)'
    refused = f', {counts["refused"]} cannot be rendered in it' if counts['refused'] else ''
    holds = '; in all of them the trained text begins with the prompt of inference and the end of turn carries loss'
    if not has_own:
        return f"the tokenizer has no chat template to compare '{name}' with; {what} were tried{refused}{holds}"

    equal = f"{counts['equal']} of {what} give the ids of the tokenizer's own chat template"
    if counts['different']:
        differs = f"'{name}' was chosen and is trained: it differs in {counts['different']} (the first: {first})"
        return f'{equal}; {differs}{refused}{holds}'
    explained = f', {counts["explained"]} differ for reasons that are counted' if counts['explained'] else ''
    return f'{equal}{explained}{refused}{holds}'


def check_trained_template(encoder: Encoder, trained: Trained, *, typed: Collection[str]) -> None:
    """Raise ConfigError if the content of the template has changed since the training.

    `typed` has the names of all typed flags. If --chat_template or --template_settings was typed, a warning is logged
    instead of the error. If --template_type was typed with the value of the training, a warning is logged too. If only
    --template_type was typed, with another value, nothing is checked.
    """
    checkpoint = trained.checkpoint
    then = trained.record.template_sha256
    present = template_hash(encoder)
    if then is None or then == present:
        return

    steering = [name for name in TEMPLATE_FLAGS[1:] if name in typed]
    if steering:
        logger.warning(
            f'--{" and --".join(steering)}: {checkpoint.name} was trained with another template (sha256 {then[:12]}, '
            f'now {present[:12]}). The typed template is used, so the model gets prompts that it was not trained on.'
        )
        return
    if trained.record.flags.get('template_type') != encoder.name:
        return  # --template_type is typed, and a warning names the template of the run

    if encoder.name != AUTO:
        what = f"the entry '{encoder.name}' of TEMPLATE_MAPPING"
        remedy = 'Restore the entry'
    else:
        what = 'the chat template of this tokenizer'
        own = (checkpoint / 'adapter_config.json').is_file()
        own &= all(trained.record.flags.get(name) is None for name in TEMPLATE_FLAGS[1:])
        remedy = 'Restore the chat_template.jinja that the run wrote'
        if own:
            remedy = f'Copy the trained one from {checkpoint / "chat_template.jinja"}'
    changed = (
        f'--template_type {encoder.name}: {what} has changed since {checkpoint.name} was trained (sha256 '
        f'{then[:12]}, now {present[:12]})'
    )
    if 'template_type' not in typed:
        raise ConfigError(
            f'{changed}, so the model would get prompts that it was not trained on. {remedy}, or add --template_type '
            f'{encoder.name} to continue anyway.'
        )
    logger.warning(
        f'{changed}. The changed template is used, because --template_type is typed, so the model gets prompts that it '
        f'was not trained on. {remedy} to avoid this.'
    )
