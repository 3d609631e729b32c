"""The allowed values of flags, and names of files, that several packages of utils use."""

from __future__ import annotations

from typing import Literal

SftType = Literal['lora', 'full']
DtypeName = Literal['bf16', 'fp16', 'fp32']
PushStrategy = Literal['end', 'push_best', 'push_last', 'checkpoint', 'all_checkpoints']
# The choices of --loss_scope: which replies carry loss.
LossScope = Literal['last_round', 'all_rounds']
# The choices of --text_rows: the rows of a text file.
TextRows = Literal['document', 'paragraph']
# The choices of --overlong: what happens to a row that is longer than --max_length.
Overlong = Literal['cut', 'drop', 'refuse', 'split']
HubName = Literal['modelscope', 'huggingface']
Kind = Literal['model', 'dataset']

# The flags that decide which template is used, and how it is steered.
TEMPLATE_FLAGS = ('template_type', 'chat_template', 'template_settings')

SFT_ARGS = 'sft_args.json'
LOCK_JSON = 'lock.json'
# The value of --resume_from_checkpoint that stands for the newest checkpoint whose run fits the command.
LAST = 'last'
# The script of llama.cpp that --gguf runs, and the repository that has it.
CONVERTER = 'convert_hf_to_gguf.py'
LLAMA_CPP = 'https://github.com/ggml-org/llama.cpp'
