"""The trainers and settings that benchmarks/train.py compares."""

from __future__ import annotations

CONTESTANTS = ('plain', 'trl', 'trl_packing', 'padded', 'fast')
# The trainers measured in every setting.
ESSENTIAL = ('plain', 'trl_packing', 'fast')
NAMES = {
    'plain': 'Trainer + PEFT', 'trl': 'TRL SFTTrainer', 'trl_packing': 'TRL SFTTrainer, packing',
    'padded': 'ours, padded', 'fast': 'ours',
}  # fmt: skip
SETTINGS = ('lora_qkv', 'lora_all', 'full')
