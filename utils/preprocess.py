"""Chat templates: from a conversation to token ids and the span of them that is trained.

The ids of a row are always `prompt + reply + end`, and the prompt alone is what inference feeds the model: the
prompt used at inference is a prefix of what was trained, whatever the template. Text that comes from data is
tokenised with special tokens inert, so no row can write a control token.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

IGNORE_INDEX = -100

Piece = str | tuple[int | str, ...]


class Message(TypedDict, total=False):
    """One turn. Only `role` and `content` are always there; the others where the row says them.

    `content` is '' where a turn holds calls alone. An item of `tool_calls` is {'type': 'function', 'id' where given,
    'function': {'name', 'arguments'}}; arguments are an object, or text where the row gives text that is none.
    `loss` is whether the turn carries loss, where the row itself decides it.
    """

    role: str
    content: str
    tool_calls: list[dict[str, Any]]
    name: str
    tool_call_id: str
    reasoning: str
    loss: bool


def said(message: Message) -> str:
    """Return what a turn says as one text: its content, and its calls as JSON."""
    calls = [call['function'] for call in message.get('tool_calls', ())]
    parts = [message['content'], json.dumps(calls, ensure_ascii=False) if calls else '']
    return '\n'.join(part for part in parts if part)


@dataclass(kw_only=True, slots=True)
class Row:
    """A conversation whose last message is the assistant's, the one that is trained."""

    messages: list[Message]
    tools: list[Any] | None = None
    images: list[str] = field(default_factory=list)
    # Where relative paths of images start: the data file's folder; None for what was typed.
    folder: str | None = None
    origin: str = ''
    # The row as it was read, not copied: never change it.
    written: Mapping[str, Any] = field(default_factory=dict)
    # Columns and keys that hold something and are not used, e.g. 'column `id`', 'message key `foo`'.
    unused: tuple[str, ...] = ()
    # What else is worth counting about a row that is used.
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Template:
    """The text around a conversation.

    A string is text with placeholders ({{SYSTEM}} in prefix; {{QUERY}} and {{ROUND}}, from 1, in prompt); a tuple
    holds token ids or names of tokenizer attributes. `chat_sep` joins rounds; None is a single-turn template.
    """

    prefix: tuple[Piece, ...]
    prompt: tuple[Piece, ...]
    chat_sep: tuple[Piece, ...] | None
    suffix: tuple[Piece, ...]

    @property
    def has_system(self) -> bool:
        """Return whether the template has a place for a system text."""
        return any(isinstance(piece, str) and '{{SYSTEM}}' in piece for piece in self.prefix)


_EOS: tuple[Piece, ...] = (('eos_token_id',),)
_OPENBUDDY = Template(
    prefix=('{{SYSTEM}}\n\n',), prompt=('User: {{QUERY}}\nAssistant: ',), chat_sep=('\n',), suffix=_EOS
)

# The replies that carry loss.
LossScope = Literal['last_round', 'all_rounds']

# The name of the template that is not text of ours: the tokenizer's own.
AUTO = 'auto'

TEMPLATE_MAPPING: dict[str, Template | None] = {
    AUTO: None,
    'default': Template(
        prefix=('{{SYSTEM}}\n\n',),
        prompt=('### Human:\n', '{{QUERY}}\n\n', '### Assistant:\n'),
        chat_sep=('\n\n',),
        suffix=_EOS,
    ),
    'default-generation': Template(prefix=(), prompt=('{{QUERY}}',), chat_sep=None, suffix=_EOS),
    'chatml': Template(
        prefix=('<|im_start|>system\n{{SYSTEM}}<|im_end|>\n',),
        prompt=('<|im_start|>user\n{{QUERY}}<|im_end|>\n<|im_start|>assistant\n',),
        chat_sep=('<|im_end|>\n',),
        suffix=('<|im_end|><|endoftext|>',),
    ),
    'baichuan': Template(prefix=(), prompt=((195,), '{{QUERY}}', (196,)), chat_sep=(), suffix=_EOS),
    'chatglm2': Template(
        prefix=((64790, 64792),),
        prompt=('[Round {{ROUND}}]\n\n问：{{QUERY}}\n\n答：',),
        chat_sep=('\n\n',),
        suffix=_EOS,
    ),
    'chatglm2-generation': Template(prefix=((64790, 64792),), prompt=('{{QUERY}}',), chat_sep=None, suffix=_EOS),
    'llama': Template(
        prefix=(('bos_token_id',), '[INST] <<SYS>>\n{{SYSTEM}}\n<</SYS>>\n\n'),
        prompt=('{{QUERY}} [/INST] ',),
        chat_sep=(' ', ('eos_token_id', 'bos_token_id'), '[INST] '),
        suffix=_EOS,
    ),
    'openbuddy': _OPENBUDDY,
    'openbuddy-llama': _OPENBUDDY,
    'internlm': Template(
        prefix=('<s>',),
        prompt=('<|User|>:{{QUERY}}<eoh>\n<|Bot|>:',),
        chat_sep=('<eoa>\n',),
        suffix=('<eoa></s>',),
    ),
    'xverse': Template(prefix=(), prompt=('Human: {{QUERY}}\n\nAssistant: ',), chat_sep=_EOS, suffix=_EOS),
    'ziya': Template(prefix=(('bos_token_id',),), prompt=('<human>:{{QUERY}}\n<bot>:',), chat_sep=('\n',), suffix=_EOS),
}


class RowRefused(ValueError):
    """A row that cannot be encoded: `reason`, under which it is counted, and `detail`, what in the row it is."""

    def __init__(self, reason: str, detail: str = '') -> None:
        super().__init__(f'{reason} [{detail}]' if detail else reason)
        self.reason, self.detail = reason, detail


# What may happen to a row while it is encoded: counted, and named with the first rows it happened to.
MERGED_BOUNDARY = 'a token would merge across the start of the reply: the reply is tokenised by itself'
CONTROL_TOKENS = 'control tokens typed inside the text: kept as plain text'
RENDERED_DIFFERENTLY = 'the chat template alters the reply (blanks, a think block): trained as written'
FULL_DIFFERS = (
    'the chat template prints the whole chat otherwise than the generation prompt: trained after the generation prompt'
)
THINKING_SWITCH = 'the reply reasons and the generation prompt closes the think block: rendered with {switch}'
CLOSED_THINKING = 'the reply reasons, and the generation prompt closes the think block, which no setting opens'
REASONING_AS_TEXT = 'the chat template has no key for reasoning: written as a think block before the reply'
REASONING_LEFT_OUT = 'the chat template prints no reasoning before the reply: it is left out'
ADDED_END = 'the chat template prints no end of turn: the token that ends it is added'
TOOLS_IGNORED = 'the template has no place for tools: they are left out of the prompt'
TOOL_CALL_AS_TEXT = 'the template has no form for tool calls: trained as plain text'
SYSTEM_IGNORED = "the template has no place for a system text: the row's is left out"
TAGS_AS_TEXT = 'image tags in the text, and the model sees no images: kept as plain text'
EARLIER_CHANGED = 'the chat template does not print an earlier reply: no loss on that reply'
EARLIER_MERGED = 'a token merges across the start of an earlier reply: no loss on that token'
NO_LOSS_MARKED = 'every reply of it is marked to carry no loss (weight, loss or train)'
CUT_PROMPT = 'longer than max_length: lost the beginning of its prompt'
CUT_REPLY = 'longer than max_length: lost the beginning of its reply'


@dataclass(kw_only=True, slots=True)
class Encoded:
    """A row as ids. `trained` is the half-open span that carries loss; `prompt_length` ids came before the reply.

    With loss on all rounds, `earlier` are the spans of the replies before it, in their order.
    """

    input_ids: list[int]
    trained: tuple[int, int]
    prompt_length: int
    notes: list[str] = field(default_factory=list)
    images: tuple[str, ...] = ()
    earlier: list[tuple[int, int]] = field(default_factory=list)
    # The text that was tokenised, cut where loss begins and ends: context, trained, context, trained, ...
    pieces: tuple[str, ...] = ()
    # How many characters of that text were lost at its front.
    cut: int = 0

    def as_item(self) -> dict[str, Any]:
        """Return the row as a data set gives it; `earlier` and `images` only where it has any."""
        item = {'input_ids': self.input_ids, 'trained': self.trained, 'prompt_length': self.prompt_length}
        extra = {'earlier': self.earlier, 'images': self.images}
        return {**item, **{name: value for name, value in extra.items() if value}}


def cut_front(row: Encoded, max_length: int) -> Encoded:
    """Return the row with its last `max_length` ids (-1: all), its spans moved and the cut noted."""
    surplus = len(row.input_ids) - max_length
    if max_length < 0 or surplus <= 0:
        return row
    start, end = row.trained
    return Encoded(
        input_ids=row.input_ids[surplus:],
        trained=(max(start - surplus, 0), end - surplus),
        prompt_length=max(row.prompt_length - surplus, 0),
        notes=[*row.notes, CUT_REPLY if surplus > row.prompt_length else CUT_PROMPT],
        images=row.images,
        pieces=row.pieces,
        earlier=[(max(start - surplus, 0), end - surplus) for start, end in row.earlier if end > surplus],
    )


def mark_pieces(row: Encoded, spans: Sequence[tuple[int, int]]) -> Encoded:
    """Return the row with the text of earlier replies, at these places of its prompt, marked as trained."""
    prompt, *others = row.pieces
    pieces: list[str] = []
    position = 0
    for start, end in spans:
        pieces += [prompt[position:start], prompt[start:end]]
        position = end
    return dataclasses.replace(row, pieces=(*pieces, prompt[position:], *others))


def without_last(row: Encoded) -> Encoded:
    """Return the row with no loss on its last reply; raises RowRefused where no other reply carries any."""
    if not row.earlier:
        raise RowRefused(NO_LOSS_MARKED)
    *pieces, prompt, reply, rest = row.pieces
    return dataclasses.replace(
        row, trained=row.earlier[-1], earlier=row.earlier[:-1], pieces=(*pieces, prompt + reply + rest)
    )
