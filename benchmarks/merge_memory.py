"""Peak anonymous memory of merging an adapter into a base of 2 GB in 5 files, above the imported libraries.

Bound while the merged files are written: one file, the adapter and 500 MB. The peak of the whole command, which also
computes the logits of the base and of the merged model, is printed beside it. Memory-mapped files do not count, because
the system can drop them at any time (RssAnon in /proc/self/status).
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.load_memory import HIDDEN, INNER, LAYERS, anonymous_mb  # noqa: E402

SHARDS, VOCABULARY, RANK = 5, 50_000, 16
ALLOWED_MB = 500


def write_base(folder: Path) -> None:
    """Write a Llama with random weights in bf16, in several files."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from tests.support.tiny_models import make_tokenizer

    make_tokenizer().save_pretrained(folder)
    LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HIDDEN // 128,
        vocab_size=VOCABULARY, eos_token_id=2, bos_token_id=1, architectures=['LlamaForCausalLM'], dtype='bfloat16',
    ).save_pretrained(folder)  # fmt: skip

    shapes: dict[str, tuple[int, ...]] = {
        'model.embed_tokens.weight': (VOCABULARY, HIDDEN), 'model.norm.weight': (HIDDEN,),
        'lm_head.weight': (VOCABULARY, HIDDEN),
    }  # fmt: skip
    for layer in range(LAYERS):
        names = {'input_layernorm.weight': (HIDDEN,), 'post_attention_layernorm.weight': (HIDDEN,), **linear_shapes()}
        shapes |= {f'model.layers.{layer}.{name}': shape for name, shape in names.items()}

    places = {}
    for shard in range(SHARDS):
        file = f'model-{shard + 1:05}-of-{SHARDS:05}.safetensors'
        names = list(shapes)[shard * len(shapes) // SHARDS : (shard + 1) * len(shapes) // SHARDS]
        state = {name: torch.randn(shapes[name], dtype=torch.bfloat16) * 0.02 for name in names}
        save_file(state, folder / file, {'format': 'pt'})
        places |= dict.fromkeys(names, file)
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': places}))


def linear_shapes() -> dict[str, tuple[int, int]]:
    """Return the shapes of the linear layers of a block, by the names of their weights."""
    attention = {f'self_attn.{name}_proj.weight': (HIDDEN, HIDDEN) for name in 'qkvo'}
    inner = {f'mlp.{name}_proj.weight': (INNER, HIDDEN) for name in ('gate', 'up')}
    return {**attention, **inner, 'mlp.down_proj.weight': (HIDDEN, INNER)}


def write_adapter(folder: Path, base: Path) -> None:
    """Write an adapter on all linear layers, as a run does."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from utils.cli.arguments import SftArguments, to_dict
    from utils.run.record import RunRecord

    state = {}
    for layer in range(LAYERS):
        for name, (outputs, inputs) in linear_shapes().items():
            path = f'base_model.model.model.layers.{layer}.{name.removesuffix(".weight")}'
            state[f'{path}.lora_A.weight'] = torch.randn(RANK, inputs) * 0.02
            state[f'{path}.lora_B.weight'] = torch.randn(outputs, RANK) * 0.02
    folder.mkdir(parents=True)
    save_file(state, folder / 'adapter_model.safetensors', {'format': 'pt'})
    targets = [name.split('.')[1] for name in linear_shapes()]
    LoraConfig(r=RANK, target_modules=targets, task_type='CAUSAL_LM').save_pretrained(folder)
    args = SftArguments(model_id_or_path=str(base), template_type='auto', dtype='bf16', sft_type='lora')
    RunRecord(flags=to_dict(args)).write(folder)


class Watch:
    """Keeps the peak of the anonymous memory while a function runs."""

    def __init__(self) -> None:
        self.peak = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, anonymous_mb())

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def measure(checkpoint: Path, bound_mb: float) -> bool:
    """Merge with the program. Print the peaks, and return whether the peak of the writing is within the bound."""
    import peft
    import transformers.models.llama.modeling_llama

    import llm_infer
    import utils.export.write
    from utils.export.patch import Patch, write_patched

    assert peft and transformers.models.llama.modeling_llama, 'imported before the baseline is taken'
    libraries = anonymous_mb()
    writing: list[tuple[float, float]] = []

    def watched(patch: Patch, folder: Path) -> dict[str, str]:
        before = anonymous_mb()
        with Watch() as watch:
            hashes = write_patched(patch, folder)
        writing.append((before, watch.peak))
        return hashes

    module: Any = utils.export.write
    module.write_patched = watched
    with Watch() as whole:
        code = llm_infer.main(['--ckpt_dir', str(checkpoint), '--merge_lora_and_save', 'true'])
    if code or not writing:
        return False
    (before, peak), = writing  # fmt: skip
    above = peak - libraries
    verdict = 'ok' if above < bound_mb else 'TOO MUCH'
    print(f'before writing {before - libraries:.0f} MB, whole command {whole.peak - libraries:.0f} MB')
    print(f'while the files are written {above:.0f} MB, bound {bound_mb:.0f} MB: {verdict}')
    return above < bound_mb


def main() -> int:
    """Write base and adapter in another process, whose memory does not count here, and measure the merge."""
    with tempfile.TemporaryDirectory() as name:
        base, checkpoint = Path(name, 'base'), Path(name, 'run', 'checkpoint-1')
        for work in (write_base, write_adapter):
            folder = base if work is write_base else checkpoint
            words = (folder,) if work is write_base else (folder, base)
            child = multiprocessing.get_context('spawn').Process(target=work, args=words)
            child.start()
            child.join()
        files = [file.stat().st_size / 2**20 for file in sorted(base.glob('*.safetensors'))]
        adapter = (checkpoint / 'adapter_model.safetensors').stat().st_size / 2**20
        print(f'base {sum(files):.0f} MB, largest file {max(files):.0f} MB, adapter {adapter:.0f} MB', flush=True)
        return 0 if measure(checkpoint, max(files) + adapter + ALLOWED_MB) else 1


if __name__ == '__main__':
    sys.exit(main())
