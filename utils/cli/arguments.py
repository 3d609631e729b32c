"""The flags of both programs, each written once."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from utils.base.names import DtypeName, HubName, LossScope, PushStrategy, SftType


def flag(default: Any, help_text: str) -> Any:
    """Return a dataclass field: the default and the only help text of one flag."""
    return field(default=default, metadata={'help': help_text})


def list_flag(default: Sequence[str], help_text: str) -> Any:
    """Return a dataclass field for a list, written with blanks or commas."""
    return field(default_factory=lambda: list(default), metadata={'help': help_text})


@dataclass(kw_only=True)
class CommonArguments:
    """The flags that both programs take."""

    model_type: str | None = flag(None, 'key of MODEL_MAPPING; without it and --model_id_or_path: qwen-7b-chat')
    model_id_or_path: str | None = flag(
        None, 'hub model id or local directory; the model type is inferred where an entry matches'
    )
    model_revision: str = flag('master', 'hub revision; no effect with --model_type or a local directory')
    hub: HubName = flag('modelscope', 'where models and data sets come from and are pushed to')
    sft_type: SftType = flag('lora', 'lora, or full for all weights; QLoRA is lora with --quantization_bit 4 or 8')
    template_type: str | None = flag(None, "key of TEMPLATE_MAPPING; None: the model entry's own")
    seed: int = flag(42, 'global seed; rank r of a distributed run uses seed + r for dropout and the like')
    dtype: DtypeName | None = flag(
        None,
        "compute and storage type; None: the model entry's own, else bf16 where the device has it, "
        'else fp16 on a GPU and fp32 on a CPU',
    )
    dataset: list[str] = list_flag(['blossom-math-zh'], 'DATASET_MAPPING keys or data files; name#500 draws 500 rows')
    dataset_seed: int = flag(42, 'seed of the data work alone: sampling and the train/validation split')
    dataset_test_ratio: float = flag(0.01, 'validation share of a data set that brings no validation split')
    system: str = flag(
        'you are a helpful assistant!',
        "system prompt; a row's own wins; with template auto only a typed one is used",
    )
    loss_scope: LossScope = flag('last_round', "last_round: loss on a row's last reply; all_rounds: on every reply")
    max_length: int = flag(2048, 'tokens per sample; a longer one loses its front; -1: no limit')
    max_pixels: int | None = flag(
        None,
        "images of more pixels are scaled down to this many; None: the model's own limit. Fewer pixels, fewer tokens",
    )
    quantization_bit: Literal[0, 4, 8] = flag(0, 'quantise the base model with bitsandbytes on load; lora only')
    bnb_4bit_comp_dtype: DtypeName | None = flag(None, 'compute type of 4-bit layers; None: the same as --dtype')
    bnb_4bit_quant_type: Literal['nf4', 'fp4'] = flag('nf4', '4-bit number format')
    bnb_4bit_use_double_quant: bool = flag(True, 'quantise the 4-bit scales as well')
    use_flash_attn: bool | None = flag(
        None, 'None: where it is installed and the device supports it; true: an error if it cannot be had'
    )
    ignore_args_error: bool = flag(False, 'warn about unknown command-line words instead of refusing them (notebooks)')
    max_new_tokens: int = flag(2048, 'generation: tokens at the most')
    do_sample: bool = flag(True, 'generation: sample; false is greedy')
    temperature: float = flag(0.9, 'generation: divides the logits before sampling')
    top_k: int = flag(20, 'generation: sample from the k likeliest tokens; 0: from all')
    top_p: float = flag(0.9, 'generation: sample from the likeliest tokens that hold this share of probability')
    repetition_penalty: float = flag(1.0, 'generation: above 1 makes tokens already written less likely')

    @property
    def reads_data(self) -> bool:
        """Return whether what is asked for needs a data set."""
        return True


@dataclass(kw_only=True)
class SftArguments(CommonArguments):
    """The flags of llm_sft.py."""

    tuner_backend: Literal['swift', 'peft'] = flag(
        'swift', "peft, or swift: PEFT's layers and files, base and adapter computed in one step"
    )
    output_dir: str = flag('output', 'a run writes to <output_dir>/<model_type>/vN-<time>, N counting up')
    ddp_backend: Literal['nccl', 'gloo', 'mpi', 'ccl'] = flag(
        'nccl', 'torch.distributed backend; left untyped on a machine without GPU it is gloo'
    )
    resume_from_checkpoint: str | None = flag(None, 'checkpoint directory to go on from')
    check_dataset: bool = flag(
        False, 'train nothing: read the data, report what is wrong with it; exit code 1 where anything is'
    )
    dry_run: bool = flag(
        False,
        'train nothing, fetch nothing but cards of data sets: print decisions, data plan, downloads, memory per device '
        'and GPUs that fit',
    )
    train_dataset_sample: int = flag(
        20000,
        'training rows drawn from the whole training set; -1: all. '
        'The validation set is capped to this share of --dataset_test_ratio',
    )
    streaming: bool = flag(
        False, 'read, encode and train on rows as they come, for data larger than memory or disk; needs --max_steps'
    )
    stream_val_rows: int = flag(
        256, 'first rows of each streamed data set that are held out, where it brings no validation split; 0: none'
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            'help': "module names; None: the model entry's own; ALL: every linear layer but the output head; stacked "
            'experts are parameters, not in ALL, and named too: mlp.experts.gate_up_proj',
        },
    )
    lora_rank: int = flag(8, 'rank of the adapter')
    lora_alpha: int = flag(32, 'the adapter is scaled by alpha / rank')
    lora_dropout_p: float = flag(0.0, "dropout on the adapter's input")
    freeze_vision: bool = flag(True, 'keep what sees in a vision model as it is; false: LoRA names and full reach it')
    gradient_checkpointing: bool = flag(False, 'recompute activations in the backward pass: less memory, more time')
    deepspeed_config_path: str | None = flag(None, 'DeepSpeed configuration, a JSON file')
    fsdp: bool = flag(False, 'shard weights, gradients, optimizer over all processes (FSDP2); checkpoints hold weights')
    batch_size: int = flag(1, 'training rows per device and forward pass')
    eval_batch_size: int | None = flag(None, 'None: 1 with --predict_with_generate, else --batch_size')
    num_train_epochs: int = flag(1, 'passes over the training rows')
    max_steps: int = flag(-1, 'optimizer steps; 1 or more wins over --num_train_epochs, -1: whole epochs')
    optim: str = flag('adamw_torch', 'by its name in transformers; adamw_torch runs fused where nothing is sharded')
    learning_rate: float | None = flag(None, 'None: 1e-4 for lora, 2e-5 for full')
    weight_decay: float = flag(0.01, 'AdamW weight decay')
    gradient_accumulation_steps: int = flag(16, 'total batch = batch_size x this x world size')
    max_grad_norm: float = flag(1.0, 'gradients are clipped to this norm')
    predict_with_generate: bool = flag(False, 'evaluate by generation (ROUGE, BLEU) instead of by loss')
    lr_scheduler_type: str = flag('cosine', 'learning-rate schedule, by its name in transformers')
    warmup_ratio: float = flag(
        0.05, 'share of the steps in which the learning rate rises, at most half; no step has rate 0'
    )
    eval_steps: int = flag(50, 'steps between evaluations')
    save_steps: int | None = flag(None, 'steps between checkpoints; None: the same as --eval_steps')
    only_save_model: bool | None = flag(
        None,
        'checkpoints hold weights only and cannot be resumed; None: false for lora without DeepSpeed, else true',
    )
    save_total_limit: int = flag(2, '2 keeps the best and the last checkpoint; -1 keeps all')
    logging_steps: int = flag(5, 'steps between log lines')
    dataloader_num_workers: int = flag(1, 'processes that prepare batches; 0: the training process itself')
    push_to_hub: bool = flag(False, 'push to the model hub while training')
    hub_model_id: str | None = flag(None, 'repo or user/repo; None: <model_type>-<sft_type>')
    hub_private_repo: bool = flag(True, 'make the repository private when it is created')
    push_hub_strategy: PushStrategy = flag('push_best', 'what is pushed, and when')
    hub_token: str | None = flag(
        None, 'for pushing; None: the environment variable MODELSCOPE_API_TOKEN, with --hub huggingface HF_TOKEN'
    )
    padding_free: bool | None = flag(
        None,
        'rows of a batch laid end to end instead of padded; None: where the model proves exact in it; '
        'true: an error if it cannot be had',
    )
    packing: bool = flag(False, 'fill --max_length with several rows, none of which sees another; needs padding_free')
    group_by_length: bool = flag(
        True,
        'rearrange the rows of an optimizer step: padded batches of rows of like length; laid end to end, fewer ones, '
        'up to the tokens of the heaviest',
    )
    chunked_loss: bool = flag(True, 'output head at trained positions alone, in chunks; false: logits of the class')
    fused_norms: bool = flag(True, 'RMSNorm in one step that keeps its input alone, where its class does just that')
    fused_mlp: bool = flag(True, 'act(gate) * up of MLPs in one step that keeps gate and up alone, likewise')
    doctor: bool = flag(False, 'train nothing: try device, libraries, processes, disk, hubs; exit code 1 if one fails')
    from_run: str | None = flag(
        None, 'run folder: repeat it with its flags, those typed now win; data, weights and template must be the same'
    )
    show_samples: int = flag(1, 'training rows that are shown with what is trained of them, and kept in sample.txt')
    report_samples: int = flag(3, 'rows that untuned and tuned model answer for the report, up to 64 tokens; 0: none')
    test_oom_error: bool = flag(False, 'longest training rows first, so that an out-of-memory error shows at once')
    preflight: bool = flag(True, 'first try a step, an evaluation and a checkpoint on the heaviest rows, and undo them')


@dataclass(kw_only=True)
class InferArguments(CommonArguments):
    """The flags of llm_infer.py."""

    ckpt_dir: str | None = flag(
        None, 'checkpoint directory written by llm_sft.py; not needed when a model is named: then it serves untuned'
    )
    eval_human: bool = flag(False, 'true: chat in the terminal; false: answer the validation rows')
    show_dataset_sample: int = flag(
        20, 'validation rows to answer; -1: all. All rows of a typed --dataset are answered, unless this is typed too'
    )
    use_streamer: bool = flag(True, 'print tokens as they come')
    merge_lora_and_save: bool = flag(False, 'merge the adapter into the base model and save it as <ckpt_dir>-merged')
    save_generation_config: bool = flag(True, 'write the generation settings used to generation_config.json')
    export_native: bool = flag(
        False, 'write the untuned model, 2023 layouts included, as a plain folder of its native class to --output_dir'
    )
    output_dir: str | None = flag(None, 'folder that --export_native writes; must not be there yet')
    infer_batch_size: int = flag(16, 'validation rows answered at once')
    result_path: str | None = flag(
        None,
        'file for the answers; None: <ckpt_dir>/infer_result.jsonl (-2, -3 ... where it is there already), '
        'untuned output/<model>/untuned/',
    )

    @property
    def reads_data(self) -> bool:
        """Return whether rows are answered: not when chatting, merging or exporting."""
        return not (self.eval_human or self.merge_lora_and_save or self.export_native)

    def answers_whole_dataset(self, typed: Collection[str]) -> bool:
        """Return whether every row of --dataset is answered: where it was typed, and no share of it to hold out."""
        return self.reads_data and 'dataset' in typed and 'dataset_test_ratio' not in typed


def flag_types(cls: type) -> dict[str, Any]:
    """Return the declared type of each flag of an arguments class, in order."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def to_dict(args: CommonArguments) -> dict[str, Any]:
    """Return every argument by name, secrets left out."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name != 'hub_token'}


# Settings of generation, not of training: a run that evaluates by loss never used them.
GENERATION = ('max_new_tokens', 'do_sample', 'temperature', 'top_k', 'top_p', 'repetition_penalty')
HUB_FLAGS = ('hub_model_id', 'hub_private_repo', 'push_hub_strategy', 'hub_token')
