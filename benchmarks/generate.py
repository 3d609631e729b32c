"""Answer 64 rows with 64 new tokens each, in batches and one by one: python benchmarks/generate.py"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train import model_folder

from utils.infer.generation import generate_rows

ROWS, TOKENS, ALONE, BOUND = 64, 64, 8, 4.0


def main() -> None:
    """Print tokens per second of both and their ratio; only every eighth row is answered one by one."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(model_folder('smollm2'), dtype=torch.bfloat16).eval()
    # The model does not produce this token, so every answer has the same length.
    config = GenerationConfig(
        max_new_tokens=TOKENS, do_sample=False, eos_token_id=[49_151], pad_token_id=2, bos_token_id=1
    )
    rng = random.Random(0)
    prompts = [[rng.randrange(100, 40_000) for _ in range(rng.randint(30, 90))] for _ in range(ROWS)]

    def speed(batch_size: int, chosen: list[list[int]]) -> float:
        start = time.perf_counter()
        generate_rows(model, chosen, config, batch_size=batch_size)
        return len(chosen) * TOKENS / (time.perf_counter() - start)

    speed(1, prompts[:1])
    alone = speed(1, prompts[:: ROWS // ALONE])
    print(f'one by one {alone:.0f} tokens/s')
    for batch_size in (16, 64):
        together = speed(batch_size, prompts)
        ratio = together / alone
        print(f'batches of {batch_size} {together:.0f} tokens/s, {ratio:.1f} times one by one (bound {BOUND})')


if __name__ == '__main__':
    main()
