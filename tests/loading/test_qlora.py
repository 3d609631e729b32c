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
    assert f'quantization_bit = 0 because rounding to {bits} bits would lose the adapter' in caplog.text

    dense = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    untuned = probe_logits(dense, tokenizer)
    adapted = probe_logits(PeftModel.from_pretrained(dense, str(checkpoint)).eval(), tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(run / 'checkpoint-6-merged', dtype=torch.float32).eval()
    assert 'quantization_config' not in merged.config.to_dict()
    assert float((probe_logits(merged, tokenizer) - adapted).abs().max()) < 1e-4
    assert float((untuned - adapted).abs().max()) > 0.05


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
