"""A tokenizer, chats and golden texts for templates."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.support.tiny_models import SPECIAL, make_tokenizer
from utils.formats.conversation import Message, Row

TOKENIZER = make_tokenizer()
TOKENIZERS = (TOKENIZER, make_tokenizer(metaspace='first'), make_tokenizer(metaspace='always'))


def chat(*texts: str, system: str | None = None) -> Row:
    """Return a row of alternating user and assistant turns."""
    roles = ('user', 'assistant')
    messages: list[Message] = [{'role': roles[i % 2], 'content': text} for i, text in enumerate(texts)]
    head: list[Message] = [{'role': 'system', 'content': system}] if system is not None else []
    return Row(messages=[*head, *messages], origin='test:1')


GOLDEN = {
    'default': 'be kind\n\n### Human:\nhi\n\n### Assistant:\nyo\n\n### Human:\nwho?\n\n### Assistant:\n[me</s>]',
    'chatml': (
        '<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n'
        '<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\n[me<|im_end|><|endoftext|>]'
    ),
    'baichuan': '#195#hi#196#yo#195#who?#196#[me</s>]',
    'chatglm2': '#64790##64792#[Round 1]\n\n问：hi\n\n答：yo\n\n[Round 2]\n\n问：who?\n\n答：[me</s>]',
    'llama': '<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nhi [/INST] yo </s><s>[INST] who? [/INST] [me</s>]',
    'openbuddy': 'be kind\n\nUser: hi\nAssistant: yo\nUser: who?\nAssistant: [me</s>]',
    'openbuddy-llama': 'be kind\n\nUser: hi\nAssistant: yo\nUser: who?\nAssistant: [me</s>]',
    'internlm': '<s><|User|>:hi<eoh>\n<|Bot|>:yo<eoa>\n<|User|>:who?<eoh>\n<|Bot|>:[me<eoa></s>]',
    'xverse': 'Human: hi\n\nAssistant: yo</s>Human: who?\n\nAssistant: [me</s>]',
    'ziya': '<s><human>:hi\n<bot>:yo\n<human>:who?\n<bot>:[me</s>]',
    'auto': (
        '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>user\nwho?<|im_end|>\n'
        '<|im_start|>assistant\n[me<|im_end|>]\n'
    ),
    'default-generation': '[me</s>]',
    'chatglm2-generation': '#64790##64792#[me</s>]',
}
FOREIGN_IDS = (195, 196, 64790, 64792)
TEXT = st.lists(
    st.sampled_from(
        [*SPECIAL, '{{QUERY}}', '{{SYSTEM}}', '{{ROUND}}', '{{ system }}', ' ', '\n', '\n\n', 'a', 'answer', '你好',
         '1', '[/INST]', '### Human:', '</', 's>', '<|im_', 'end|>', '\u200b', '\ue000', '\\', '"']
    ),
    min_size=1,
    max_size=6,
).map(''.join)  # fmt: skip
TOOLS_TEMPLATE = (
    '{% if tools %}{{ "tools: " + (tools | tojson) + "\n" }}{% endif %}'
    '{% for m in messages %}{{ "<|im_start|>" + m.role + "\n" }}'
    '{% if m.tool_calls %}{% for c in m.tool_calls %}{{ "<call>" + (c.function | tojson) + "</call>" }}{% endfor %}'
    '{% else %}{{ m.content }}{% endif %}{{ "<|im_end|>\n" }}{% endfor %}'
    '{% if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}'
)
# Like DeepSeek-V3.1 and EXAONE 4: closed, unless a variable opens it.
SWITCHED = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}"
    "{{- '<think>\\n' + (m.reasoning_content or '') + '</think>\\n\\n' }}{% endif %}"
    "{{- m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}"
    "{%- if not enable_thinking %}{{ '</think>\\n\\n' }}{% endif %}{% endif %}"
)


def trl_templates() -> dict[str, str]:
    """Return the chat templates of trl by name, without importing trl. Skips the test if trl is not installed."""
    spec = find_spec('trl')
    if spec is None or spec.origin is None:
        pytest.skip('trl is not installed: pip install -r requirements-all.txt')
    folder = Path(spec.origin).parent / 'chat_templates'
    return {path.stem: path.read_text(encoding='utf-8') for path in sorted(folder.glob('*.jinja'))}
