"""The flags of both programs, with their types, defaults and help texts."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from utils.base.names import DtypeName, HubName, LossScope, PushStrategy, SftType


def flag(default: Any, help_text: str) -> Any:
    """Return the dataclass field for one flag. The field holds the default and the help text."""
    return field(default=default, metadata={'help': help_text})


def list_flag(default: Sequence[str], help_text: str) -> Any:
    """Return the dataclass field for a flag with a list of values. The user separates them by spaces or commas."""
    return field(default_factory=lambda: list(default), metadata={'help': help_text})


@dataclass(kw_only=True)
class CommonArguments:
    """The flags that both programs have."""

    model_type: str | None = flag(None, 'key of MODEL_MAPPING; qwen-7b-chat if no model is named')
    model_id_or_path: str | None = flag(
        None, 'hub model id or local directory; the model type is inferred if an entry matches'
    )
    model_revision: str = flag('master', 'hub revision; no effect with --model_type or a local directory')
    hub: HubName = flag('modelscope', 'hub to download models and data sets from, and to push to')
    sft_type: SftType = flag(
        'lora', 'lora, or full to train all weights; for QLoRA use lora with --quantization_bit 4 or 8'
    )
    template_type: str | None = flag(None, 'key of TEMPLATE_MAPPING; None: the template of the model entry')
    seed: int = flag(42, 'global seed; process r of a distributed run uses seed + r, e.g. for dropout')
    dtype: DtypeName | None = flag(
        None,
        'data type of weights and computation; None: that of the model entry, else bf16 if the device supports it, '
        'else fp16 on a GPU and fp32 on a CPU',
    )
    dataset: list[str] = list_flag(['blossom-math-zh'], 'DATASET_MAPPING keys or data files; name#500 draws 500 rows')
    dataset_seed: int = flag(42, 'seed for drawing rows and for the train/validation split')
    dataset_test_ratio: float = flag(0.01, 'share of rows for validation, for data sets without a validation split')
    system: str = flag(
        'you are a helpful assistant!',
        "system prompt; a row's own prompt takes precedence; template auto uses this one only if it is typed",
    )
    loss_scope: LossScope | None = flag(
        None,
        'last_round: loss on the last reply of a row; all_rounds: loss on every reply; None: on every reply of rows '
        'with messages or conversations, on the last reply of all other rows',
    )
    max_length: int = flag(2048, 'maximum tokens per row; a longer row loses its beginning; -1: no limit')
    max_pixels: int | None = flag(
        None,
        'images with more pixels are scaled down to this number, so that they take fewer tokens; None: the limit of '
        'the model',
    )
    quantization_bit: Literal[0, 4, 8] = flag(
        0, 'quantise the base model with bitsandbytes when it is loaded, for lora only; 0: off'
    )
    bnb_4bit_comp_dtype: DtypeName | None = flag(None, 'compute type of 4-bit layers; None: same as --dtype')
    bnb_4bit_quant_type: Literal['nf4', 'fp4'] = flag('nf4', '4-bit number format')
    bnb_4bit_use_double_quant: bool = flag(True, 'also quantise the scales of 4-bit weights')
    use_flash_attn: bool | None = flag(
        None, 'None: use flash-attn if it is installed and the device supports it; true: fail if it cannot be used'
    )
    ignore_args_error: bool = flag(False, 'warn about unknown flags and words instead of refusing them (for notebooks)')
    max_new_tokens: int = flag(2048, 'generation: maximum tokens of an answer')
    do_sample: bool = flag(True, 'generation: sample; false: greedy decoding')
    temperature: float = flag(0.9, 'generation: the logits are divided by this number before sampling')
    top_k: int = flag(20, 'generation: sample only from the k most likely tokens; 0: from all tokens')
    top_p: float = flag(0.9, 'generation: sample only from the most likely tokens that together have this probability')
    repetition_penalty: float = flag(1.0, 'generation: values above 1 make tokens less likely that occur already')

    @property
    def reads_data(self) -> bool:
        """Return whether this command reads a data set."""
        return True


@dataclass(kw_only=True)
class SftArguments(CommonArguments):
    """The flags of llm_sft.py."""

    tuner_backend: Literal['swift', 'peft'] = flag(
        'swift', "peft, or swift: PEFT's layers and files, with base and adapter computed in one step"
    )
    output_dir: str = flag('output', 'a run writes to <output_dir>/<model_type>/vN-<time>, where N counts up')
    ddp_backend: Literal['nccl', 'gloo', 'mpi', 'ccl'] = flag(
        'nccl', 'torch.distributed backend; on a machine without GPU the default is gloo'
    )
    resume_from_checkpoint: str | None = flag(None, 'checkpoint directory to resume training from')
    adapter: str | None = flag(
        None,
        'trained LoRA adapter (a checkpoint directory) to start from, on new rows with a new optimizer and schedule; '
        'its shape, base model and template are used',
    )
    check_dataset: bool = flag(
        False, 'do not train: read the data and report its problems; exit code 1 if there are any'
    )
    dry_run: bool = flag(
        False,
        'do not train: print decisions, data plan, downloads, memory per device and GPUs that fit; fetches only the '
        'cards of data sets',
    )
    train_dataset_sample: int = flag(
        20000,
        'number of training rows drawn from all data sets together; -1: all. The validation rows are limited to this '
        'number x --dataset_test_ratio',
    )
    streaming: bool = flag(
        False, 'read, encode and train on rows as they come, for data larger than memory or disk; needs --max_steps'
    )
    stream_val_rows: int = flag(
        256,
        'number of rows at the start of each streamed data set without a validation split that are held out; 0: none',
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            'help': 'module names; None: those of the model entry, without an entry all-linear; all-linear (or ALL): '
            'every linear layer except the output head; re:PATTERN: linear layers whose whole path matches the regular '
            'expression. Stacked experts are parameters and not part of all-linear: name them too, e.g. '
            'mlp.experts.gate_up_proj',
        },
    )
    lora_rank: int = flag(8, 'rank of the adapter')
    lora_alpha: int = flag(32, 'the adapter is scaled by alpha / rank')
    lora_dropout_p: float = flag(0.0, 'dropout on the input of the adapter')
    use_dora: bool = flag(
        False, 'DoRA: the adapter also trains the length of each row of a weight; slower, and its layers are not fused'
    )
    use_rslora: bool = flag(False, 'rsLoRA: the adapter is scaled by alpha / sqrt(rank), for high ranks')
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            'help': 'layers that are trained whole beside the adapter, e.g. embed_tokens lm_head; both are one if they '
            'are tied. They need 16 bytes more per parameter'
        },
    )
    new_tokens: str | None = flag(
        None,
        'text file with new tokens, one per line; with lora only their rows of embedding and output head are trained '
        'beside the adapter',
    )
    freeze_vision: bool = flag(
        True, 'do not train the vision tower; false: LoRA target names and full fine-tuning include it'
    )
    gradient_checkpointing: bool = flag(False, 'recompute activations in the backward pass: less memory, more time')
    deepspeed_config_path: str | None = flag(None, 'DeepSpeed configuration, a JSON file')
    fsdp: bool = flag(
        False, 'shard weights, gradients and optimizer over all processes (FSDP2); checkpoints hold weights only'
    )
    batch_size: int = flag(1, 'training rows per device and forward pass')
    eval_batch_size: int | None = flag(
        None, 'validation rows per device and forward pass; None: 1 with --predict_with_generate, else --batch_size'
    )
    num_train_epochs: int = flag(1, 'passes over the training rows')
    max_steps: int = flag(-1, 'number of optimizer steps; 1 or more overrides --num_train_epochs; -1: whole epochs')
    optim: str = flag(
        'adamw_torch', 'optimizer, by its name in transformers; adamw_torch is fused if nothing is sharded'
    )
    learning_rate: float | None = flag(None, 'highest learning rate; None: 1e-4 for lora, 2e-5 for full')
    weight_decay: float = flag(0.01, 'AdamW weight decay')
    gradient_accumulation_steps: int = flag(
        16, 'batches per optimizer step; total batch = batch_size x this x number of processes'
    )
    max_grad_norm: float = flag(1.0, 'gradients are clipped to this norm')
    predict_with_generate: bool = flag(False, 'evaluate generated answers (ROUGE, BLEU) instead of the loss')
    lr_scheduler_type: str = flag('cosine', 'learning-rate schedule, by its name in transformers')
    warmup_ratio: float = flag(
        0.05, 'share of the steps with a rising learning rate, at most half of them; no step has a rate of 0'
    )
    eval_steps: int = flag(50, 'steps between evaluations')
    save_steps: int | None = flag(None, 'steps between checkpoints; None: same as --eval_steps')
    only_save_model: bool | None = flag(
        None,
        'checkpoints hold weights only and cannot be resumed; None: false for lora without DeepSpeed, else true',
    )
    save_total_limit: int = flag(2, 'number of checkpoints to keep; 2: the best and the last one; -1: all')
    logging_steps: int = flag(5, 'steps between log lines')
    dataloader_num_workers: int = flag(
        1, 'number of processes that prepare batches; 0: the training process prepares them'
    )
    push_to_hub: bool = flag(False, 'push to the model hub during training')
    hub_model_id: str | None = flag(None, 'repository to push to: repo or user/repo; None: <model_type>-<sft_type>')
    hub_private_repo: bool = flag(True, 'create the repository as a private one')
    push_hub_strategy: PushStrategy = flag('push_best', 'what is pushed, and when')
    hub_token: str | None = flag(
        None, 'token for pushing; None: environment variable MODELSCOPE_API_TOKEN, or HF_TOKEN with --hub huggingface'
    )
    padding_free: bool | None = flag(
        None,
        'concatenate the rows of a batch instead of padding them; None: if a test on the model shows that it is exact; '
        'true: fail if it cannot be used',
    )
    packing: bool = flag(
        False, 'fill --max_length with several rows that do not attend to each other; needs padding_free'
    )
    group_by_length: bool = flag(
        True,
        'rearrange the rows within an optimizer step: padded batches get rows of similar length; concatenated batches '
        'become fewer, up to the tokens of the heaviest one',
    )
    chunked_loss: bool = flag(
        True, 'compute the output head only where there is loss, in chunks; false: use the logits of the class'
    )
    fused_norms: bool = flag(
        True, 'compute RMSNorm in one step that keeps only its input, if its class computes the same'
    )
    fused_mlp: bool = flag(
        True, 'compute act(gate) * up of an MLP in one step that keeps only gate and up, if its class does the same'
    )
    doctor: bool = flag(
        False, 'do not train: test device, libraries, processes, disk and hubs; exit code 1 if a test fails'
    )
    from_run: str | None = flag(
        None,
        'run folder to repeat with its flags; flags typed now override them; data, weights and template must be equal',
    )
    show_samples: int = flag(
        1, 'number of training rows to show with the tokens that carry loss; sample.txt keeps them'
    )
    report_samples: int = flag(
        3, 'number of rows answered before and after tuning for the report, up to 64 tokens; 0: none'
    )
    test_oom_error: bool = flag(False, 'train the longest rows first, so that an out-of-memory error occurs at once')
    preflight: bool = flag(
        True, 'before training, try a step, an evaluation and a checkpoint on the heaviest rows, and undo them'
    )


@dataclass(kw_only=True)
class InferArguments(CommonArguments):
    """The flags of llm_infer.py."""

    ckpt_dir: str | None = flag(
        None, 'checkpoint directory written by llm_sft.py; without it, name a model, which then answers untuned'
    )
    eval_human: bool = flag(False, 'true: chat in the terminal; false: answer the validation rows')
    show_dataset_sample: int = flag(
        20, 'validation rows to answer; -1: all. A typed --dataset is answered whole, unless this flag is typed too'
    )
    use_streamer: bool = flag(True, 'print tokens while they are generated')
    merge_lora_and_save: bool = flag(False, 'merge the adapter into the base model and save it as <ckpt_dir>-merged')
    save_generation_config: bool = flag(True, 'write the generation settings of this command to generation_config.json')
    export_native: bool = flag(
        False,
        'write the untuned model, also one with a layout of 2023, to --output_dir as a folder of its native class',
    )
    output_dir: str | None = flag(None, 'new folder for --export_native; it must not exist yet')
    infer_batch_size: int = flag(16, 'number of validation rows answered in one batch')
    result_path: str | None = flag(
        None,
        'file for the answers; None: <ckpt_dir>/infer_result.jsonl (-2, -3 ... if it exists already), or '
        'output/<model>/untuned/ for an untuned model',
    )

    @property
    def reads_data(self) -> bool:
        """Return whether the program answers rows of data. It does not if it chats, merges or exports."""
        return not (self.eval_human or self.merge_lora_and_save or self.export_native)

    def answers_whole_dataset(self, typed: Collection[str]) -> bool:
        """Return whether every row of --dataset is answered.

        This is so if --dataset was typed and --dataset_test_ratio was not.
        """
        return self.reads_data and 'dataset' in typed and 'dataset_test_ratio' not in typed


def flag_types(cls: type) -> dict[str, Any]:
    """Return a dictionary from each flag of an arguments class to its declared type, in the order of the class."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def to_dict(args: CommonArguments) -> dict[str, Any]:
    """Return a dictionary from names to values of all arguments except the hub token."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name != 'hub_token'}


# The flags of generation. A run that evaluates by loss does not use these flags.
GENERATION = ('max_new_tokens', 'do_sample', 'temperature', 'top_k', 'top_p', 'repetition_penalty')
HUB_FLAGS = ('hub_model_id', 'hub_private_repo', 'push_hub_strategy', 'hub_token')
