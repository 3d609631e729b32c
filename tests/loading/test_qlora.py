"""LoRA on 4- and 8-bit weights: gradients after an evaluation, resuming, and merging into the dense base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_infer

pytest.importorskip('bitsandbytes')
pytestmark = pytest.mark.optional
Run = Callable[..., Path]


def history(run: Path) -> list[dict[str, Any]]:
    state = json.loads((run / 'checkpoint-6' / 'trainer_state.json').read_text())
    return [{k: v for k, v in e.items() if 'runtime' not in k and 'second' not in k} for e in state['log_history']]


@pytest.mark.slow
@pytest.mark.parametrize('bits', ['4', '8'])
def test_qlora_learns_after_evaluations_resumes_and_merges_on_the_dense_base(
    bits: str, run_sft: Run, model_dir: Path, tokenizer: Any, problems: Callable[[], list[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from utils.export.merge import probe_logits

    flags = ('--quantization_bit', bits, '--dtype', 'fp32', '--eval_steps', '2', '--learning_rate', '0.02')
    run = run_sft(*flags)
    norms = [e['grad_norm'] for e in history(run) if 'grad_norm' in e]
    assert len(norms) == 6 and min(norms) > 1e-3, 'an evaluation in 4 bits must not stop the gradients'
    losses = [e['eval_loss'] for e in history(run) if 'eval_loss' in e]
    assert losses == sorted(losses, reverse=True) and losses[0] - losses[-1] > 0.01
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(run / 'checkpoint-4'))
    assert history(resumed) == history(run)

    checkpoint = run / 'checkpoint-6'
    words = ['--ckpt_dir', str(checkpoint), '--merge_lora_and_save', 'true']
    assert llm_infer.main([*words, '--quantization_bit', bits]) == 2
    assert problems()[0].endswith('Remove --quantization_bit to merge into the unquantised base.')
    assert llm_infer.main(words) == 0
    assert f'quantization_bit = 0 because merging needs unquantised weights: rounding to {bits} bits' in caplog.text

    dense = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    untuned = probe_logits(dense, tokenizer)
    adapted = probe_logits(PeftModel.from_pretrained(dense, str(checkpoint)).eval(), tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(run / 'checkpoint-6-merged', dtype=torch.float32).eval()
    assert 'quantization_config' not in merged.config.to_dict()
    assert float((probe_logits(merged, tokenizer) - adapted).abs().max()) < 1e-4
    assert float((untuned - adapted).abs().max()) > 0.05


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('double', [False, True])
def test_adapters_on_4_bits_in_one_step_compute_like_peft(dtype: torch.dtype, double: bool) -> None:
    import bitsandbytes
    from peft import LoraConfig, get_peft_model

    from utils.fast.lora import fuse_lora

    torch.manual_seed(0)
    holder = torch.nn.Sequential()
    for name, outputs in (('first', 96), ('second', 32)):
        layer = bitsandbytes.nn.Linear4bit(
            64, outputs, compute_dtype=dtype, quant_type='nf4', compress_statistics=double
        )
        layer.load_state_dict(torch.nn.Linear(64, outputs).state_dict())
        layer.support_avx512bf16_for_cpu = False
        holder.add_module(name, layer.to('cpu'))
    holder.is_loaded_in_4bit = True  # as transformers sets it; PEFT chooses its layer by it
    model = get_peft_model(holder, LoraConfig(target_modules=['first', 'second'], r=4, lora_dropout=0.0))
    adapted = [model.base_model.model.first, model.base_model.model.second]
    factors = [factor for layer in adapted for factor in (layer.lora_A, layer.lora_B)]
    weights = [factor['default'].weight for factor in factors]
    for weight in weights:
        torch.nn.init.normal_(weight, std=0.05)
    x = torch.randn(3, 7, 64, dtype=dtype, requires_grad=True)

    def computed() -> tuple[list[torch.Tensor], int]:
        """Return the outputs, the gradients, and the saved bytes of tensors as large as x."""
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.numel() == x.numel():
                saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outs = [layer(x) for layer in adapted]
            grads = torch.autograd.grad(sum(out.float().square().sum() for out in outs), [x, *weights])
        return [*outs, *grads], sum(saved.values())

    expected, of_peft = computed()
    assert fuse_lora(model) == (2, 2) and type(adapted[0]).__name__ == 'FusedLinear4bit'
    found, bytes_saved = computed()
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and (ours - theirs).norm() <= bound * theirs.norm()
    assert bytes_saved == x.numel() * x.element_size(), 'both layers save the same x'
    assert dtype == torch.float32 or of_peft >= 2 * bytes_saved
    with model.disable_adapter():
        plain = adapted[0](x)
    assert torch.equal(plain, adapted[0].base_layer(x)) and not torch.equal(plain, found[0])


def test_the_path_without_gradients_is_off_on_every_cpu(model_dir: Path) -> None:
    """On a CPU without avx512_bf16 the run above would pass without the workaround."""
    import bitsandbytes

    from utils.cli.arguments import SftArguments
    from utils.loading.weights import locate
    from utils.model import get_model_info
    from utils.run.open_model import open_model

    info = get_model_info(None, str(model_dir))
    args = SftArguments(model_id_or_path=str(model_dir), quantization_bit=4, dtype='fp32')
    model, _, _ = open_model(args, info, locate(info, revision='master'), trains=True)
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14 and not any(layer.support_avx512bf16_for_cpu for layer in layers)
