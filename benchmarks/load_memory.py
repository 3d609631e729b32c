"""Peak anonymous memory while a checkpoint in an original 2023 layout is opened: load_memory.py [kind [dtype]]

Memory-mapped files do not count, because the system can drop them at any time (RssAnon in /proc/self/status).
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

HIDDEN, LAYERS, SHARDS = 2048, 16, 3
INNER = HIDDEN * 3
ALLOWED_ABOVE_MODEL_MB = 300


def anonymous_mb() -> float:
    """Return the process's anonymous resident memory in MB."""
    lines = Path('/proc/self/status').read_text(encoding='utf-8').splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('RssAnon')) / 1024


def qwen() -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Return the shapes and the config.json of a Qwen of 2 GB in bf16."""
    vocab = 50000
    shapes: dict[str, tuple[int, ...]] = {
        'transformer.wte.weight': (vocab, HIDDEN),
        'transformer.ln_f.weight': (HIDDEN,),
        'lm_head.weight': (vocab, HIDDEN),
    }
    for n in range(LAYERS):
        layer = {
            'ln_1.weight': (HIDDEN,), 'ln_2.weight': (HIDDEN,), 'attn.c_attn.weight': (3 * HIDDEN, HIDDEN),
            'attn.c_attn.bias': (3 * HIDDEN,), 'attn.c_proj.weight': (HIDDEN, HIDDEN), 'mlp.w1.weight': (INNER, HIDDEN),
            'mlp.w2.weight': (INNER, HIDDEN), 'mlp.c_proj.weight': (HIDDEN, INNER),
        }  # fmt: skip
        shapes |= {f'transformer.h.{n}.{name}': shape for name, shape in layer.items()}
    config = {
        'model_type': 'qwen', 'hidden_size': HIDDEN, 'num_hidden_layers': LAYERS, 'kv_channels': 128,
        'num_attention_heads': HIDDEN // 128, 'intermediate_size': 2 * INNER, 'vocab_size': vocab, 'seq_length': 2048,
        'no_bias': True, 'eos_token_id': 2,
    }  # fmt: skip
    return shapes, config


def baichuan2() -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Return shapes and config.json of a smaller Baichuan2-7B with its whole vocabulary and its normalised head."""
    vocab = 125696
    shapes: dict[str, tuple[int, ...]] = {
        'model.embed_tokens.weight': (vocab, HIDDEN), 'model.norm.weight': (HIDDEN,), 'lm_head.weight': (vocab, HIDDEN)
    }  # fmt: skip
    for n in range(LAYERS):
        layer = {
            'input_layernorm': (HIDDEN,), 'post_attention_layernorm': (HIDDEN,),
            'self_attn.W_pack': (3 * HIDDEN, HIDDEN), 'self_attn.o_proj': (HIDDEN, HIDDEN),
            'mlp.gate_proj': (INNER, HIDDEN), 'mlp.up_proj': (INNER, HIDDEN), 'mlp.down_proj': (HIDDEN, INNER),
        }  # fmt: skip
        shapes |= {f'model.layers.{n}.{name}.weight': shape for name, shape in layer.items()}
    config = {
        'model_type': 'baichuan', 'architectures': ['BaichuanForCausalLM'], 'hidden_size': HIDDEN,
        'num_hidden_layers': LAYERS, 'num_attention_heads': HIDDEN // 128, 'intermediate_size': INNER,
        'vocab_size': vocab, 'max_position_embeddings': 4096,
    }  # fmt: skip
    return shapes, config


def pack_gptq(shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> dict[str, Any]:
    """Return the layers as int8 tensors in GPTQ's layout, in groups of 128; the other tensors in fp16."""
    import torch

    settings = {'bits': 8, 'group_size': 128, 'quant_method': 'gptq', 'desc_act': False, 'sym': True}
    config['quantization_config'] = settings
    state: dict[str, Any] = {}
    for name, shape in shapes.items():
        if len(shape) == 1 or '.h.' not in name:
            state[name] = torch.zeros(shape, dtype=torch.float16)
            continue
        layer, (rows, columns) = name.removesuffix('.weight'), shape
        groups = columns // 128
        state[f'{layer}.qweight'] = torch.zeros((columns // 4, rows), dtype=torch.int32)
        state[f'{layer}.qzeros'] = torch.zeros((groups, rows // 4), dtype=torch.int32)
        state[f'{layer}.scales'] = torch.zeros((groups, rows), dtype=torch.float16)
        state[f'{layer}.g_idx'] = (torch.arange(columns) // 128).int()
    return state


def pack_nf4(shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> dict[str, Any]:
    """Return the layers packed like the 4-bit files of 2023; the other tensors in fp16."""
    import torch

    config['quantization_config'] = {'load_in_4bit': True}
    state: dict[str, Any] = {}
    for name, shape in shapes.items():
        if len(shape) == 1 or '.layers.' not in name:
            state[name] = torch.zeros(shape, dtype=torch.float16)
            continue
        count = shape[0] * shape[1]
        outer = [torch.zeros(count // 64 // 256), torch.zeros(256), 256, False, torch.float32, None, None]
        absmax = torch.zeros(count // 64, dtype=torch.uint8)
        layout = [absmax, torch.Size(shape), torch.float16, 64, [torch.tensor(0.1), outer], 'nf4', torch.zeros(16)]
        state[f'{name}.data'] = torch.zeros((count // 2, 1), dtype=torch.uint8)
        state[f'{name}.quant_state'] = layout
    return state


KINDS = {'qwen': '.safetensors', 'baichuan2': '.bin', 'qwen-int8': '.safetensors', 'baichuan2-4bits': '.bin'}


def write_checkpoint(folder: Path, kind: str) -> None:
    """Write a checkpoint of a kind, in shards."""
    import torch
    from safetensors.torch import save_file

    shapes, config = qwen() if kind.startswith('qwen') else baichuan2()
    if kind == 'qwen-int8':
        state = pack_gptq(shapes, config)
    elif kind == 'baichuan2-4bits':
        state = pack_nf4(shapes, config)
    else:
        state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    suffix, names, places = KINDS[kind], list(state), {}
    stem = 'model' if suffix == '.safetensors' else 'pytorch_model'
    for shard in range(SHARDS):
        file = f'{stem}-{shard + 1:05d}-of-{SHARDS:05d}{suffix}'
        content = {name: state.pop(name) for name in names[shard::SHARDS]}
        (save_file if suffix == '.safetensors' else torch.save)(content, folder / file)
        places |= dict.fromkeys(content, file)
    (folder / f'{stem}{suffix}.index.json').write_text(json.dumps({'weight_map': places}))
    (folder / 'config.json').write_text(json.dumps(config))


def measure(folder: Path, dtype: str) -> bool:
    """Print the model's size and the peak above the imported libraries; return whether the peak is within the bound."""
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen2.modeling_qwen2

    from utils.loading.legacy.gptq import packed_available
    from utils.model import load_model

    assert transformers.models.qwen2.modeling_qwen2, 'imported before the baseline is taken'
    if '"gptq"' in (folder / 'config.json').read_text() and packed_available():
        import gptqmodel

        assert gptqmodel
    before, peak, done = anonymous_mb(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(folder, torch_dtype=getattr(torch, dtype))
    done.set()
    watcher.join()
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / 2**20
    above, bound = peak - before, size + ALLOWED_ABOVE_MODEL_MB
    verdict = 'ok' if above < bound else 'TOO MUCH'
    print(f'{dtype}: model {size:.0f} MB, peak above the libraries {above:.0f} MB, bound {bound:.0f} MB: {verdict}')
    return above < bound


def main() -> int:
    """Measure one kind, or all kinds, each in a separate process."""
    if len(sys.argv) == 1:
        import subprocess

        done = [subprocess.run([sys.executable, __file__, kind], check=False) for kind in KINDS]
        return max(process.returncode for process in done)
    kind, dtype = sys.argv[1], (sys.argv[2] if len(sys.argv) > 2 else 'bfloat16')
    with tempfile.TemporaryDirectory() as name:
        # Written by another process, whose memory does not count here.
        write_in_child(Path(name), kind)
        size = sum(file.stat().st_size for file in Path(name).iterdir()) / 2**20
        print(f'{kind}: {size:.0f} MB on disk as {KINDS[kind]}', flush=True)
        return 0 if measure(Path(name), dtype) else 1


def write_in_child(folder: Path, kind: str) -> None:
    """Write a checkpoint in a separate process."""
    import multiprocessing

    child = multiprocessing.get_context('spawn').Process(target=write_checkpoint, args=(folder, kind))
    child.start()
    child.join()


if __name__ == '__main__':
    sys.exit(main())
