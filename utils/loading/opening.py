"""Opens the model and the tokenizer of a folder in native classes: classes of transformers or of this project.

Code in the folder is never run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from utils.base import dist
from utils.base.errors import ConfigError, error_text
from utils.base.files import read_json
from utils.base.logger import logger
from utils.loading.devices import resolve_device_map
from utils.loading.folder import check_model_dir, read_config
from utils.loading.gguf import dense_directory
from utils.loading.info import LoadOptions, ModelInfo
from utils.loading.layers import exclude_towers
from utils.loading.packed import keep_trainable, loading_settings
from utils.loading.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# The libraries raise these errors if a file is damaged or belongs to a different model, or if a package is missing.
_LIBRARY_ERRORS = (
    ImportError, OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError,
    RuntimeError,
)  # fmt: skip

# Texts on which two tokenizers are compared. Tokenizers differ most in how they treat spaces, line breaks, digits,
# punctuation and characters of several bytes.
_PROBE_TEXTS = (
    'a', ' a', '  a', '    return x', 'a  b   c', 'a\nb', '\n    a\n\n\tb ', "I'm 12345, it's 3.14!", 'Été é ﬁ Ⅳ',
    '你好，世界 🌍', 'def f(x):\n    return  x ** 2\n', 'User: hi\nAssistant:', ' ', '...  --', '▁a ▁', 'ABC abcDEF',
)  # fmt: skip

# Matches the names of the tensors of the language model in a multimodal checkpoint. On the hub, the names of Gemma 3
# start with `language_model.`. In folders that transformers 5 saved, they start with `model.language_model.`.
_LANGUAGE = re.compile(r'^(?:language_model\.(model\.|lm_head\.)|(model\.)language_model\.|(lm_head\.))')


def language_name(name: str) -> str:
    """Return the name that a tensor of a multimodal checkpoint has in the class of the language model alone.

    `name` is the name in the checkpoint. For example, language_model.model.norm.weight becomes model.norm.weight.
    """
    return _LANGUAGE.sub(r'\1\2\3', name)


def get_model_tokenizer_default(model_dir: Path, info: ModelInfo, options: LoadOptions) -> tuple[PreTrainedModel, Any]:
    """Return the model and the tokenizer of a folder, both in native classes.

    The folder has the layout of transformers, or the layout of the Python code that was published with the model in
    2023. Code in the folder is never run.
    """
    return read_model(model_dir, info, options), read_tokenizer(model_dir, info)


def get_text_model_tokenizer(model_dir: Path, info: ModelInfo, options: LoadOptions) -> tuple[PreTrainedModel, Any]:
    """Return the language model of a multimodal checkpoint and the tokenizer. Vision and audio towers are not opened.

    AutoModelForCausalLM opens Gemma 3 and 4 with their towers. LoRA would then also be put on the layers of the towers,
    because these layers have the same names as layers of the language model. So the class of transformers for the
    language model alone is used. An adapter for this class does not fit the class with towers. Merging writes the whole
    checkpoint, with the towers. If config.json has no text_config, `get_model_tokenizer_default` opens the folder.

    Raises ConfigError if the model or the tokenizer cannot be opened.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    from utils.loading.legacy.opening import check_loading
    from utils.loading.weight_files import read_state

    if 'text_config' not in read_config(model_dir):
        return get_model_tokenizer_default(model_dir, info, options)

    # The names are changed here and not with key_mapping of from_pretrained, because save_pretrained would undo a
    # key_mapping and write the names of the multimodal checkpoint.
    state = {language_name(name): tensor for name, tensor in read_state(model_dir).items() if _LANGUAGE.match(name)}

    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False).get_text_config()
        cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        keywords = options.keywords(lambda: cls(config))
        # With ignore_mismatched_sizes, a wrong shape is not an error here. check_loading then names the tensors.
        model, found = cls.from_pretrained(
            None,
            config=config,
            state_dict=state,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **keywords,
        )
    except (*_LIBRARY_ERRORS, StrictDataclassError) as error:
        raise ConfigError(f'the language model in {model_dir} cannot be opened: {error_text(error)}') from error

    check_loading(found, model_dir, type(model).__name__, unexpected=False)

    if (model_dir / 'generation_config.json').is_file():
        model.generation_config = GenerationConfig.from_pretrained(model_dir)

    return model, read_tokenizer(model_dir, info)


def get_unpacked_model_tokenizer(model_dir: Path, info: ModelInfo, options: LoadOptions) -> tuple[PreTrainedModel, Any]:
    """Return the gpt-oss model and its tokenizer.

    If config.json says that the experts are packed in 4 bits (MXFP4), they are unpacked, because packed experts get no
    gradient. In this case, ConfigError is raised if the options ask for quantisation.
    """
    if not (model_dir / 'config.json').is_file() or 'quantization_config' not in read_config(model_dir):
        return get_model_tokenizer_default(model_dir, info, options)

    from transformers import Mxfp4Config

    if options.quantization_config is not None:
        raise ConfigError(
            '--quantization_bit cannot quantise gpt-oss: its experts are packed in 4 bits already. '
            'Remove --quantization_bit.'
        )

    logger.info('the experts are unpacked from 4 bits: in 16 bits they take about 4 times the size of their files')
    options = replace(options, quantization_config=Mxfp4Config(dequantize=True))
    model, tokenizer = get_model_tokenizer_default(model_dir, info, options)

    # Without this line, transformers saves the unpacked experts under the names of packed experts. Then it cannot open
    # the saved model.
    model._weight_conversions = []

    return model, tokenizer


def read_model(model_dir: Path, info: ModelInfo, options: LoadOptions) -> PreTrainedModel:
    """Return the model of a folder. Raises ConfigError if the model cannot be opened."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from utils.loading.legacy.opening import make_generation_savable

    if problem := check_model_dir(model_dir):
        raise ConfigError(problem)

    try:
        model = _open_layout(model_dir, info, options.keywords())
    except ConfigError:
        raise
    except UnpicklingError:  # The error text is not shown, because it explains how to run the file's code.
        raise ConfigError(
            f'the model in {model_dir} cannot be opened: a .bin file in it is damaged, or holds more than tensors. '
            'Only tensors are loaded, because other objects can run code. Use the safetensors files of this model.'
        ) from None
    except (*_LIBRARY_ERRORS, SafetensorError, StrictDataclassError) as error:
        raise ConfigError(f'the model in {model_dir} cannot be opened: {error_text(error)}') from error

    make_generation_savable(model)
    return model


def _open_layout(model_dir: Path, info: ModelInfo, keywords: dict[str, Any]) -> PreTrainedModel:
    """Return the model of a folder. config.json tells which function must open it.

    Three kinds of folders can be opened:
    - a release of 2023 in a layout of its own, which is converted
    - a folder that was saved by a class of this project
    - a folder for a class of transformers

    Raises ConfigError for any other folder, and for a folder of another family than `info` names.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from utils.loading.legacy.opening import open_original, open_saved
    from utils.loading.legacy.registry import FAMILIES, find_family, find_saved

    config = read_config(model_dir)
    model_type = config['model_type']

    expected = FAMILIES.get(info.family or '')
    native = CONFIG_MAPPING_NAMES.get(model_type)
    if expected and native != expected.config_class and model_type not in expected.model_types:
        raise ConfigError(
            f"{model_dir}: config.json has model_type '{model_type}', but the --model_type of this "
            f'command is of the family {expected.name} ({" or ".join(expected.model_types)}). Give the --model_type '
            'whose weights are in this folder.'
        )

    if family := find_family(config, info.family):
        return open_original(family, model_dir, **keywords)

    if settings := loading_settings(config):
        keywords['quantization_config'] = settings

    if family := find_saved(config):
        return open_saved(family, model_dir, **keywords)

    if model_type not in CONFIG_MAPPING_NAMES:
        remote = ' It asks for code of its own (auto_map), which is never run.' if 'auto_map' in config else ''
        raise ConfigError(
            f"{model_dir}: model_type '{model_type}' is not a native class of transformers.{remote} "
            'Say with --model_type which registered model this is, or convert the model to a native class.'
        )

    return _open_native(model_dir, keywords)


def _open_native(model_dir: Path, keywords: dict[str, Any]) -> PreTrainedModel:
    """Return the model of a folder in a class of transformers.

    The class for text only is used if there is one, else the class for text and images. Raises ConfigError if tensors
    are missing or have a wrong shape.
    """
    import transformers as t

    from utils.loading.legacy.opening import check_loading, drop_unsupported_attention

    config = t.AutoConfig.from_pretrained(model_dir, trust_remote_code=False)

    text_only = (
        type(config) in t.MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in t.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    )
    auto = t.AutoModelForCausalLM if text_only else t.AutoModelForImageTextToText
    classes = t.MODEL_FOR_CAUSAL_LM_MAPPING if text_only else t.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    keywords['device_map'] = resolve_device_map(keywords['device_map'], lambda: auto.from_config(config))

    if cls := classes.get(type(config), None):
        keywords = drop_unsupported_attention(cls, keywords)
        exclude_towers(keywords['quantization_config'], lambda: auto.from_config(config))

    # With ignore_mismatched_sizes, a wrong shape is not an error here. check_loading then names the tensors.
    model, loading = auto.from_pretrained(
        model_dir, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **keywords
    )
    check_loading(loading, model_dir, type(model).__name__, unexpected=False)

    if unused := sorted(loading['unexpected_keys']):
        logger.warning(
            f'{model_dir}: {type(model).__name__} does not use {len(unused)} tensors of the weight files, for example '
            f'{unused[0]}. The model is used without them.'
        )

    return model


def read_tokenizer(model_dir: Path, info: ModelInfo) -> Any:
    """Return the tokenizer of a folder. If the tokenizer has no pad token, its eos_token is used for padding.

    Raises ConfigError if the files cannot be read or if the tokenizer has no eos_token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from utils.loading.legacy.registry import find_family, find_saved

    config = read_config(model_dir) if (model_dir / 'config.json').is_file() else {}
    family = find_family(config, info.family)

    # AutoTokenizer reads model_type in config.json. It fails if the model_type is one of this project.
    opener = PreTrainedTokenizerFast if find_saved(config) else AutoTokenizer

    try:
        if family and family.tokenizer and family.vocabulary and (model_dir / family.vocabulary).is_file():
            tokenizer = family.tokenizer(model_dir)
        else:
            tokenizer = _match_tokenizer_file(opener.from_pretrained(model_dir, trust_remote_code=False), model_dir)

        processor_template = model_dir / 'chat_template.json'  # Processors of 2024 stored the template in this file.
        if not tokenizer.chat_template and processor_template.is_file():
            tokenizer.chat_template = read_json(processor_template)['chat_template']

        tokenizer('a')  # Wrong settings cause an error only when a text is encoded.
    except Exception as error:  # For a damaged file, the libraries raise errors of many types.
        raise ConfigError(f'the tokenizer in {model_dir} cannot be opened: {error_text(error)}') from error

    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f'the tokenizer in {model_dir} has no eos_token, so a reply would have no end to learn. '
            'Set eos_token in its tokenizer_config.json.'
        )

    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info(f'pad_token = {tokenizer.eos_token!r} (eos_token) because the tokenizer has none')

    return tokenizer


def _match_tokenizer_file(tokenizer: Any, model_dir: Path) -> Any:
    """Return a tokenizer that encodes test texts in the same way as tokenizer.json, if there is such a tokenizer.

    If `tokenizer` encodes them in this way, it is returned. Otherwise, PreTrainedTokenizerFast opens the folder. If its
    result encodes them in this way, the result is returned. If it does not, `tokenizer` is returned.

    Some classes of transformers 5 read only the vocabulary from tokenizer.json, and use rules of their own. For
    example, LlamaTokenizer then loses a space at the start of a text.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = model_dir / 'tokenizer.json'
    if not file.is_file() or type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer

    of_file = Tokenizer.from_file(str(file))
    of_file.no_truncation()
    of_file.no_padding()
    wanted = [encoding.ids for encoding in of_file.encode_batch(list(_PROBE_TEXTS), add_special_tokens=False)]

    found = tokenizer(list(_PROBE_TEXTS), add_special_tokens=False, verbose=False)['input_ids']
    if found == wanted:
        return tokenizer

    by_file = PreTrainedTokenizerFast.from_pretrained(model_dir, trust_remote_code=False)
    if by_file(list(_PROBE_TEXTS), add_special_tokens=False, verbose=False)['input_ids'] != wanted:
        return tokenizer  # Settings in other files change the ids of both tokenizers.

    text = next(text for text, one, other in zip(_PROBE_TEXTS, found, wanted, strict=True) if one != other)
    logger.info(
        f'the tokenizer is opened as PreTrainedTokenizerFast, because {type(tokenizer).__name__} would encode {text!r} '
        f'differently from {file.name}'
    )
    return by_file


def unembedded_from(model: Any, tokenizer: Any) -> int | None:
    """Return the first token id that has no row in the model's embedding.

    Returns None if the embedding has a row for every id of the tokenizer.
    """
    embedding = int(model.config.get_text_config().vocab_size)  # Under ZeRO-3, the weight has no shape.
    return embedding if len(tokenizer) > embedding else None


def check_embedded(embedding: int, ids: Sequence[int], where: str) -> None:
    """Raise ConfigError if a token id has no row in the model's embedding, which has `embedding` rows.

    `where` is the start of the message. It says where the ids come from.
    """
    largest = max(ids, default=0)
    if largest >= embedding:
        raise ConfigError(
            f'{where}: it contains the token id {largest}, but the model has only {embedding} embeddings. Remove the '
            'text of this token, or use the model and the tokenizer of one repository or folder.'
        )


def open_entry(model_dir: Path, info: ModelInfo, options: LoadOptions) -> tuple[PreTrainedModel, Any]:
    """Return the model and the tokenizer of a folder, opened by `info.get_function` or by the default function."""
    get_function = info.get_function or get_model_tokenizer_default
    return get_function(model_dir, info, options)


def get_model_tokenizer(info: ModelInfo, weights: Weights, options: LoadOptions) -> tuple[PreTrainedModel, Any]:
    """Return the model and the tokenizer of a registry entry, opened from `weights`.

    name_or_path of the model is set to its public id, so that the path of downloaded weights is not saved. Raises
    ConfigError if the model cannot be opened, or if the eos or pad token has no row in the embedding. Logs a warning if
    only other tokens have no row.
    """
    path = weights.path
    if path.is_file():
        with dist.local_main_first():
            path = dense_directory(path)

    model, tokenizer = open_entry(path, info, options)
    keep_trainable(model)

    model.name_or_path = info.public_id
    model.config._name_or_path = info.public_id

    first = unembedded_from(model, tokenizer)
    if first is None:
        return model, tokenizer

    if max(tokenizer.eos_token_id, tokenizer.pad_token_id) >= first:
        raise ConfigError(
            f'{path}: the tokenizer has {len(tokenizer)} tokens, but the model has only {first} embeddings: they do '
            'not belong together. Use the model and the tokenizer of one repository or folder.'
        )

    logger.warning(
        f'the tokenizer has {len(tokenizer)} tokens, but the model has only {first} embeddings. The model can neither '
        f'read nor write the last {len(tokenizer) - first} tokens, from {tokenizer.convert_ids_to_tokens(first)!r} on. '
        'Data that contains one of these tokens is refused.'
    )
    return model, tokenizer
