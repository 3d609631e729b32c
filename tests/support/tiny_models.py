"""A toy tokenizer and 2-layer models, made in the test process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = ['<unk>', '<s>', '</s>']
CONTROL = ['<|im_start|>', '<|im_end|>', '<|endoftext|>', '<eoh>', '<eoa>']
SPECIAL = [*PLAIN, *CONTROL]
TEXTS = [
    'you are a helpful assistant!\n\n### Human:\nwhat is the answer?\n\n### Assistant:\nthe answer is 42.',
    '[INST] <<SYS>>\nsystem\n<</SYS>>\n\nuser question [/INST] assistant reply',
    'User: hello there\nAssistant: hi, how can I help you today? 你好，世界。今天的天气很好。问：答：',
    '<human>:name a colour\n<bot>:blue, green, red and yellow {"key": [1, 2, 3]}',
    'count 0 1 2 3 4 5 6 7 8 9 and a b c d e f g h i j k l m n o p q r s t u v w x y z',
]


def make_tokenizer(
    *,
    chat_template: str | None = CHATML,
    vocab_size: int = 400,
    metaspace: str | None = None,
    control: Sequence[str] = CONTROL,
) -> Any:
    """Return a BPE tokenizer trained on a few sentences, with the control tokens of several templates or other ones.

    Byte-level like GPT-2's. With `metaspace` ('first', 'always') blanks become ▁ as in Llama, with one before the text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token='<unk>'))
    if metaspace is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace)
        backend.decoder = decoders.Metaspace(prepend_scheme=metaspace)
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[*PLAIN, *control],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token='<unk>', bos_token='<s>', eos_token='</s>', pad_token='<|endoftext|>'
    )
    tokenizer.add_special_tokens({'additional_special_tokens': list(control)})
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(
    *, seed: int = 0, vocab_size: int = 400, layers: int = 2, intermediate_size: int = 64, tied: bool = False
) -> Any:
    """Return a 2-layer Llama with random fp32 weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=5,
        )
    )
