"""Peak anonymous memory while a 2 GB checkpoint in an original 2023 layout is opened: python benchmarks/load_memory.py

Memory-mapped files can be dropped by the system at any time and do not count (RssAnon in /proc/self/status).
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

HIDDEN, LAYERS, VOCAB, SHARDS = 2048, 16, 50000, 3
ALLOWED_ABOVE_MODEL_MB = 300


def anonymous_mb() -> float:
    """Return the process's anonymous resident memory in MB."""
    lines = Path('/proc/self/status').read_text(encoding='utf-8').splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('RssAnon')) / 1024


def write_checkpoint(folder: Path) -> None:
    """Write a Qwen of 2 GB in bf16, fused as its hub files are, in shards."""
    import torch
    from safetensors.torch import save_file

    inner = HIDDEN * 3
    shapes = {
        'transformer.wte.weight': (VOCAB, HIDDEN),
        'transformer.ln_f.weight': (HIDDEN,),
        'lm_head.weight': (VOCAB, HIDDEN),
    }
    for n in range(LAYERS):
        shapes |= {
            f'transformer.h.{n}.ln_1.weight': (HIDDEN,),
            f'transformer.h.{n}.ln_2.weight': (HIDDEN,),
            f'transformer.h.{n}.attn.c_attn.weight': (3 * HIDDEN, HIDDEN),
            f'transformer.h.{n}.attn.c_attn.bias': (3 * HIDDEN,),
            f'transformer.h.{n}.attn.c_proj.weight': (HIDDEN, HIDDEN),
            f'transformer.h.{n}.mlp.w1.weight': (inner, HIDDEN),
            f'transformer.h.{n}.mlp.w2.weight': (inner, HIDDEN),
            f'transformer.h.{n}.mlp.c_proj.weight': (HIDDEN, inner),
        }
    names = list(shapes)
    weight_map = {}
    for shard in range(SHARDS):
        chosen = names[shard::SHARDS]
        file = f'model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors'
        save_file({name: torch.zeros(shapes[name], dtype=torch.bfloat16) for name in chosen}, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
    config = {
        'model_type': 'qwen', 'architectures': ['QWenLMHeadModel'], 'hidden_size': HIDDEN, 'num_hidden_layers': LAYERS,
        'num_attention_heads': HIDDEN // 128, 'intermediate_size': 2 * inner, 'vocab_size': VOCAB, 'kv_channels': 128,
        'layer_norm_epsilon': 1e-6, 'rotary_emb_base': 10000, 'seq_length': 2048, 'no_bias': True, 'rotary_pct': 1.0,
        'use_dynamic_ntk': True, 'use_logn_attn': True, 'tie_word_embeddings': False, 'eos_token_id': 2,
    }  # fmt: skip
    (folder / 'config.json').write_text(json.dumps(config))


def main() -> None:
    """Print the model's size and the peak above the imported libraries."""
    import torch
    import transformers.models.qwen2.modeling_qwen2

    from utils.model import load_model

    assert transformers.models.qwen2.modeling_qwen2, 'imported before the baseline is taken'
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder)
        before, peak, done = anonymous_mb(), 0.0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.005):
                peak = max(peak, anonymous_mb())

        watcher = threading.Thread(target=watch)
        watcher.start()
        model = load_model(folder, torch_dtype=torch.bfloat16)
        done.set()
        watcher.join()
        size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    above = peak - before
    print(f'model {size:.0f} MB, peak anonymous memory above the libraries {above:.0f} MB')
    bound = size + ALLOWED_ABOVE_MODEL_MB
    print(f'bound {bound:.0f} MB: {"ok" if above < bound else "TOO MUCH"}')


if __name__ == '__main__':
    main()
