"""The registry of chat templates, which turn a conversation into token ids.

The ids of a conversation are always the ids of the text before the last reply, then of this reply, then of its end. In
inference, the model receives exactly the ids before the reply. So for every template, the ids in inference are a prefix
of the ids in training. Text from data is tokenised with special tokens disabled, so this text never becomes a control
token.
"""

from __future__ import annotations

from dataclasses import dataclass

Piece = str | tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Template:
    """The text and control tokens around the turns of a conversation.

    A conversation is `prefix`, then `prompt` and the reply for each round, then `suffix`. `chat_sep` is written between
    two rounds. If `chat_sep` is None, the template allows only one round.

    Each field is a tuple of pieces. A piece is a text or a tuple. A text can have placeholders: {{SYSTEM}} in `prefix`,
    {{QUERY}} and {{ROUND}} (counted from 1) in `prompt`. Without a system text, {{SYSTEM}} becomes ''. A tuple contains
    token ids, or names of tokenizer attributes that contain a token id, such as 'eos_token_id'.
    """

    prefix: tuple[Piece, ...]
    prompt: tuple[Piece, ...]
    chat_sep: tuple[Piece, ...] | None
    suffix: tuple[Piece, ...]

    @property
    def has_system(self) -> bool:
        """Return whether the template has a placeholder for a system text."""
        return any(isinstance(piece, str) and '{{SYSTEM}}' in piece for piece in self.prefix)


_EOS: tuple[Piece, ...] = (('eos_token_id',),)
_OPENBUDDY = Template(
    prefix=('{{SYSTEM}}\n\n',), prompt=('User: {{QUERY}}\nAssistant: ',), chat_sep=('\n',), suffix=_EOS
)

# The name that selects the chat template of the tokenizer. TEMPLATE_MAPPING has no template for this name, only None.
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
