"""The flags of both programs, with their types, defaults and help texts."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from utils.base.names import DtypeName, HubName, LossScope, Overlong, PushStrategy, SftType, TextRows


def flag(default: Any, help_text: str) -> Any:
    """Return the dataclass field for one flag. The field holds the default and the help text."""
    return field(default=default, metadata={'help': help_text})


def list_flag(default: Sequence[str], help_text: str) -> Any:
    """Return the dataclass field for a flag with a list of values. The user separates them by spaces or commas."""
    return field(default_factory=lambda: list(default), metadata={'help': help_text})


def without_amount(word: str) -> str:
    """Return a word of --dataset without its number of rows (name#500) or its share (name%0.3)."""
    return re.sub(r'(?<=.)[#%][\d.]+$', '', word)


@dataclass(kw_only=True)
class CommonArguments:
    """The flags that both programs have."""

    model_type: str | None = flag(None, 'key of MODEL_MAPPING; qwen-7b-chat if no model is named')
    model_id_or_path: str | None = flag(
        None, 'hub model id, local directory or GGUF file; the model type is inferred if an entry matches'
    )
    model_revision: str = flag('master', 'hub revision; no effect with --model_type or a local directory')
    hub: HubName = flag('modelscope', 'hub to download models and data sets from, and to push to')
    sft_type: SftType = flag(
        'lora', 'lora, or full to train all weights; for QLoRA use lora with --quantization_bit 4 or 8'
    )
    template_type: str | None = flag(None, 'key of TEMPLATE_MAPPING; None: the template of the model entry')
    chat_template: str | None = flag(
        None,
        'file with a Jinja chat template, or folder of a model or checkpoint that has one; template auto uses it '
        "instead of the tokenizer's own",
    )
    template_settings: list[str] | None = field(
        default=None,
        metadata={
            'help': 'variables of the chat template as name=value, e.g. enable_thinking=false; a value is true, false, '
            'none, a number, JSON or text. Checkpoints keep them'
        },
    )
    seed: int = flag(42, 'global seed; process r of a distributed run uses seed + r, e.g. for dropout')
    dtype: DtypeName | None = flag(
        None,
        'data type of weights and computation; None: that of the model entry, else bf16 if the device supports it, '
        'else fp16 on a GPU and fp32 on a CPU',
    )
    dataset: list[str] = list_flag(
        ['blossom-math-zh'],
        'DATASET_MAPPING keys, data files, or ids on a hub: owner/name[:subset][:split][@revision], with hf: or ms: in '
        'front for another hub than --hub; name#500 draws 500 rows; name%0.3 gives 30 % of the training rows',
    )
    val_dataset: list[str] | None = flag(
        None,
        'validation sets, named as in --dataset; no row of --dataset is then held out, and several sets are also '
        'evaluated one by one',
    )
    columns: list[str] | None = field(
        default=None,
        metadata={
            'help': 'names for the columns of data files, as NAME=COLUMN: the name in the file, then the name that is '
            'read, e.g. question=query,answer=response; NAME= leaves a column out; None: the names in the files',
        },
    )
    text_rows: TextRows = flag(
        'document', 'rows of .txt and .md files: document, one row a file; paragraph, rows end at blank lines'
    )
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
    max_length: int = flag(2048, 'maximum tokens per row; --overlong says what happens to a longer row; -1: no limit')
    overlong: Overlong = flag(
        'cut',
        'a row longer than --max_length: cut, it loses its beginning; drop, it is skipped and counted; refuse, the run '
        'stops and lists such rows; split, plain text becomes several rows, and a conversation is refused',
    )
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
    score: list[str] = list_flag(
        ['rouge'],
        'scores of generated answers: rouge (with BLEU), exact, json, or FILE.py:name, a function (answer, label, row) '
        'of a file of yours; the first one decides which checkpoint is best',
    )

    @property
    def reads_data(self) -> bool:
        """Return whether this command reads a data set."""
        return True

    def datasets_read(self) -> tuple[list[str], list[str]]:
        """Return the values of --dataset and the values of --val_dataset. The command reads rows of all of them."""
        return self.dataset, self.val_dataset or []


@dataclass(kw_only=True)
class SftArguments(CommonArguments):
    """The flags of llm_sft.py."""

    tuner_backend: Literal['swift', 'peft'] = flag(
        'swift', "peft, or swift: PEFT's layers and files, with base and adapter computed in one step"
    )
    output_dir: str = flag('output', 'a run writes to <output_dir>/<model_type>/vN-<time>, where N counts up')
    ddp_backend: Literal['nccl', 'gloo', 'mpi', 'ccl', 'xccl', 'hccl'] = flag(
        'nccl',
        'torch.distributed backend; the default is xccl on Intel GPUs, hccl on Ascend NPUs, and gloo without GPU',
    )
    resume_from_checkpoint: str | None = flag(
        None,
        'checkpoint directory to resume training from; last: the newest whole checkpoint under '
        '<output_dir>/<model_type> of a run with the same flags, data and weights, or a new run if there is none',
    )
    adapter: str | None = flag(
        None,
        'trained LoRA adapter (a checkpoint directory) to start from, on new rows with a new optimizer and schedule; '
        'its shape, base model and template are used',
    )
    check_dataset: bool = flag(
        False, 'do not train: read the data and report its problems; exit code 1 if there are any'
    )
    write_clean: str | None = flag(
        None,
        'new .jsonl or .jsonl.gz file for a cleaned copy of the data, in messages form; needs --check_dataset true',
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
    full_weights: Literal['fp32', 'bf16'] = flag(
        'fp32',
        'full fine-tuning: data type of the weights. fp32: 16 bytes per parameter with gradient and AdamW state; bf16: '
        '10 bytes, updates are rounded stochastically',
    )
    deepspeed_config_path: str | None = flag(None, 'DeepSpeed configuration, a JSON file')
    fsdp: bool = flag(
        False, 'shard weights, gradients and optimizer over all processes (FSDP2); checkpoints hold weights only'
    )
    batch_size: int = flag(1, 'training rows per device and forward pass')
    eval_batch_size: int | None = flag(
        None, 'validation rows per device and forward pass; None: 1 with --predict_with_generate, else --batch_size'
    )
    num_train_epochs: int | float = flag(1, 'passes over the training rows; a fraction ends within a pass, e.g. 0.5')
    max_steps: int = flag(-1, 'number of optimizer steps; 1 or more overrides --num_train_epochs; -1: whole epochs')
    max_minutes: float | None = flag(
        None,
        'end within this time, counted from the start of the program: steps are measured, and the schedule gets as '
        'many as fit, at most those of the other flags; a resumed run keeps its schedule and gets this time again',
    )
    optim: str = flag(
        'adamw_torch', 'optimizer, by its name in transformers; adamw_torch is fused if nothing is sharded'
    )
    learning_rate: float | None = flag(None, 'highest learning rate; None: 1e-4 for lora, 2e-5 for full')
    weight_decay: float = flag(0.01, 'AdamW weight decay')
    adam_beta1: float = flag(0.9, 'decay of the mean of the gradients, for optimizers of the Adam and Lion kind')
    adam_beta2: float = flag(0.999, 'decay of the mean of the squared gradients (Adam), or of the momentum (Lion)')
    adam_epsilon: float = flag(1e-8, 'added to the denominator of the update, for optimizers of the Adam kind')
    gradient_accumulation_steps: int = flag(
        16, 'batches per optimizer step; total batch = batch_size x this x number of processes'
    )
    max_grad_norm: float = flag(1.0, 'gradients are clipped to this norm')
    predict_with_generate: bool = flag(False, 'evaluate generated answers (--score) instead of the loss')
    lr_scheduler_type: str = flag('cosine', 'learning-rate schedule, by its name in transformers')
    min_lr_ratio: float | None = flag(
        None,
        'the learning rate ends at this share of --learning_rate, for cosine, linear, polynomial and '
        'warmup_stable_decay; None: the end of the schedule itself, which is 0 or near 0',
    )
    decay_ratio: float = flag(
        0.1, 'share of the steps, at the end, with a falling learning rate; for warmup_stable_decay only'
    )
    warmup_ratio: float = flag(
        0.05, 'share of the steps with a rising learning rate, at most half of them; no step has a rate of 0'
    )
    warmup_steps: int | None = flag(
        None, 'number of steps with a rising learning rate, at most half of all steps; None: --warmup_ratio decides'
    )
    eval_steps: int | float = flag(50, 'steps between evaluations; below 1: share of all steps, rounded up')
    drift: bool | None = flag(
        None,
        'at each evaluation, measure how far the model moved from its base on 32 neutral texts (eval_drift_kl); None: '
        'true for lora without DeepSpeed and FSDP',
    )
    early_stop: int = flag(
        0, 'end after this number of evaluations in a row that were not better than the best one before; 0: off'
    )
    save_steps: int | float | None = flag(
        None,
        'steps between checkpoints; below 1: share of all steps, rounded up to a step with an evaluation; None: same '
        'as --eval_steps',
    )
    only_save_model: bool | None = flag(
        None,
        'checkpoints hold weights only and cannot be resumed; None: false for lora without DeepSpeed and FSDP, else '
        'true',
    )
    save_total_limit: int = flag(2, 'number of checkpoints to keep; 2: the best and the last one; -1: all')
    logging_steps: int = flag(5, 'steps between log lines')
    report_to: list[str] = list_flag(
        ['tensorboard'],
        'trackers that get the log lines: tensorboard, wandb, swanlab, mlflow, trackio, comet; none: no tracker',
    )
    dataloader_num_workers: int | None = flag(
        None,
        'number of processes that prepare batches; 0: the training process prepares them; None: 1 with a GPU, '
        '0 on a CPU, on a Mac and with --streaming true',
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
        'become fewer, up to the tokens of the heaviest one; on CUDA up to 16,384 tokens, if the first-step trial '
        'finds that they fit',
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
    fused_rotary: bool = flag(
        True, 'on a GPU, compute the rotary embedding of queries and keys in one pass, if the class computes the same'
    )
    doctor: bool = flag(
        False, 'do not train: test device, libraries, processes, disk and hubs; exit code 1 if a test fails'
    )
    from_run: str | None = flag(
        None,
        'run folder to repeat with its flags; flags typed now override them; data, weights and template must be equal, '
        'unless a flag typed now changes them',
    )
    verify: bool = flag(
        False,
        'with --from_run: repeat its first --max_steps steps (default 20) and compare log lines and weights bit by '
        'bit; nothing is kept; exit code 1 if they differ',
    )
    show_samples: int = flag(
        1, 'number of training rows to show with the tokens that carry loss; sample.txt keeps them'
    )
    report_samples: int = flag(
        3, 'number of rows answered before and after tuning for the report, up to 64 tokens; 0: none'
    )
    compare_rows: int = flag(
        32,
        'number of validation rows whose loss before tuning is computed too, for the report and rows.jsonl; -1: all, '
        'which costs one more evaluation; 0: none',
    )
    test_oom_error: bool = flag(False, 'train the longest rows first, so that an out-of-memory error occurs at once')
    preflight: bool = flag(
        True, 'before training, try a step, an evaluation and a checkpoint on the heaviest rows, and undo them'
    )
    deterministic: bool = flag(
        False,
        'use only operations that give the same bits each time, also on a GPU, where others are faster; a resumed run '
        'is then bitwise identical there too',
    )


@dataclass(kw_only=True)
class InferArguments(CommonArguments):
    """The flags of llm_infer.py."""

    ckpt_dir: str | None = flag(
        None, 'checkpoint directory written by llm_sft.py; without it, name a model, which then answers untuned'
    )
    eval_human: bool = flag(False, 'true: chat in the terminal; false: answer the validation rows')
    show_dataset_sample: int = flag(
        20,
        'validation rows to answer; -1: all. A typed --dataset or --val_dataset is answered whole, unless this flag is '
        'typed too',
    )
    use_streamer: bool = flag(True, 'print tokens while they are generated')
    merge_lora_and_save: bool = flag(False, 'merge the adapter into the base model and save it as <ckpt_dir>-merged')
    gguf: str | None = flag(
        None,
        'new .gguf file for llama.cpp and Ollama, made from the merged model (--merge_lora_and_save true) or from a '
        'checkpoint with all weights; a Modelfile is written beside it',
    )
    gguf_type: Literal['f32', 'f16', 'bf16', 'q8_0'] | None = flag(
        None, 'data type of the weights in the file of --gguf; None: that of the merged model'
    )
    llama_cpp: str | None = flag(
        None,
        'folder of a llama.cpp checkout whose convert_hf_to_gguf.py writes --gguf; None: the commands are printed and '
        'only the Modelfile is written',
    )
    save_generation_config: bool = flag(True, 'write the generation settings of this command to generation_config.json')
    export_native: bool = flag(
        False,
        'write the untuned model, also one with a layout of 2023, to --output_dir as a folder of its native class',
    )
    output_dir: str | None = flag(None, 'new folder for --export_native; it must not exist yet')
    check_server: str | None = flag(
        None,
        'address of an OpenAI-style server, e.g. http://localhost:8000/v1: rows of the run are sent to it, and its '
        'prompts, greedy answers and first log probabilities are compared with those computed here; exit code 1 if any '
        'differs. Its key is read from the environment variable OPENAI_API_KEY',
    )
    served_model: str | None = flag(
        None, 'for --check_server: name of the model on the server; None: the only one that the server lists'
    )
    infer_batch_size: int = flag(16, 'number of validation rows answered in one batch')
    result_path: str | None = flag(
        None,
        'file for the answers; None: <ckpt_dir>/infer_result.jsonl (-2, -3 ... if it exists already), or '
        'output/<model>/untuned/ for an untuned model; with --check_server: file for its result; None: '
        'check_server.json there',
    )

    @property
    def reads_data(self) -> bool:
        """Return whether the program answers rows of data. It answers no rows if it chats, merges or exports."""
        return not (self.eval_human or self.merge_lora_and_save or self.export_native or self.gguf is not None)

    def datasets_read(self) -> tuple[list[str], list[str]]:
        """Return two lists: the values of --dataset and the values of --val_dataset. One of them is always empty.

        If --val_dataset is given, --dataset is not read, so the list for --dataset is empty.
        """
        return ([], self.val_dataset) if self.val_dataset else (self.dataset, [])

    def answers_whole_dataset(self, typed: Collection[str]) -> bool:
        """Return whether all rows of --dataset are answered, instead of the rows that a run would hold out.

        This is so if `reads_data` is True, --dataset was typed, and neither --dataset_test_ratio nor --val_dataset was
        typed. If a data set has a validation split, 'all rows' means all rows of this split.
        """
        others = {'dataset_test_ratio', 'val_dataset'}
        return self.reads_data and 'dataset' in typed and not others & set(typed)


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
