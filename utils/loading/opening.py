"""How a model and its tokenizer are opened."""

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
from utils.loading.devices import place
from utils.loading.folder import check_model_dir, read_config
from utils.loading.gguf import dense_directory
from utils.loading.info import LoadOptions, ModelInfo
from utils.loading.layers import spare_towers
from utils.loading.packed import keep_trainable, loading_settings
from utils.loading.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# What the libraries raise for files that are damaged, of another model, or need a package that is missing.
_DAMAGE = (
    ImportError, OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError,
    RuntimeError,
)  # fmt: skip
# Texts in which tokenizers' rules show: blanks, lines, digits, marks, letters of several bytes.
_PROBE_TEXTS = (
    'a', ' a', '  a', '    return x', 'a  b   c', 'a\nb', '\n    a\n\n\tb ', "I'm 12345, it's 3.14!", 'Été é ﬁ Ⅳ',
    '你好，世界 🌍', 'def f(x):\n    return  x ** 2\n', 'User: hi\nAssistant:', ' ', '...  --', '▁a ▁', 'ABC abcDEF',
)  # fmt: skip


def get_model_tokenizer_default(model_dir: Path, info: ModelInfo, options: LoadOptions) -> tuple[PreTrainedModel, Any]:
    """Return model and tokenizer in native classes, from a native or an original 2023 layout. Runs no code of it."""
    return read_model(model_dir, info, options), read_tokenizer(model_dir, info)


def get_text_model_tokenizer(model_dir: Path, info: ModelInfo, options: LoadOptions) -> tuple[PreTrainedModel, Any]:
    """Return the language model alone of a checkpoint that sees and hears too, and its tokenizer.

    AutoModelForCausalLM opens Gemma 3 and 4 with their towers, whose layers have the names LoRA is put on. What is
    saved merged is the language model, a native class of its own; an adapter fits this class, not the whole one.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    from utils.loading.weight_files import read_state

    if 'text_config' not in read_config(model_dir):
        return get_model_tokenizer_default(model_dir, info, options)
    # Not key_mapping of from_pretrained: what is saved later would get the names of the whole checkpoint back.
    state = {_LANGUAGE.sub(r'\1\2\3', k): v for k, v in read_state(model_dir).items() if _LANGUAGE.match(k)}
    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False).get_text_config()
        cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, found = cls.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **options.keywords(lambda: cls(config))
        )
    except (*_DAMAGE, StrictDataclassError) as error:
        raise ConfigError(f'the language model in {model_dir} cannot be opened: {error_text(error)}') from error
    if names := sorted(found['missing_keys']):
        raise ConfigError(
            f'{model_dir} lacks {len(names)} weights of {type(model).__name__}, first {names[0]}. Get it whole.'
        )
    if (model_dir / 'generation_config.json').is_file():
        model.generation_config = GenerationConfig.from_pretrained(model_dir)
    return model, read_tokenizer(model_dir, info)


def get_unpacked_model_tokenizer(model_dir: Path, info: ModelInfo, options: LoadOptions) -> tuple[PreTrainedModel, Any]:
    """Return gpt-oss with its 4-bit experts (MXFP4) unpacked, and its tokenizer: packed ones have no gradient."""
    if not (model_dir / 'config.json').is_file() or 'quantization_config' not in read_config(model_dir):
        return get_model_tokenizer_default(model_dir, info, options)
    from transformers import Mxfp4Config

    if options.quantization_config is not None:
        raise ConfigError(
            '--quantization_bit cannot quantise gpt-oss: its experts are packed in 4 bits already. Leave it out.'
        )
    logger.info('the experts are unpacked from 4 bits: in memory they take 4 times the size of their files')
    options = replace(options, quantization_config=Mxfp4Config(dequantize=True))
    model, tokenizer = get_model_tokenizer_default(model_dir, info, options)
    # Else transformers saves the unpacked experts under the names of packed ones, and cannot open them again.
    model._weight_conversions = []
    return model, tokenizer


# Where the language model stands in a text+vision checkpoint: Gemma 3 on the hub; what transformers 5 writes.
_LANGUAGE = re.compile(r'^(?:language_model\.(model\.|lm_head\.)|(model\.)language_model\.|(lm_head\.))')


def read_model(model_dir: Path, info: ModelInfo, options: LoadOptions) -> PreTrainedModel:
    """Return the model of a directory; whatever the libraries find wrong with it is raised as ConfigError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from utils.loading.legacy.opening import make_generation_savable

    if problem := check_model_dir(model_dir):
        raise ConfigError(problem)
    try:
        model = _open_layout(model_dir, info, options.keywords())
    except ConfigError:
        raise
    except UnpicklingError:  # whose text says how to run it all the same
        raise ConfigError(
            f'the model in {model_dir} cannot be opened: a .bin file in it holds more than tensors. '
            'That would be code, which is never run. Get the model as safetensors.'
        ) from None
    except (*_DAMAGE, SafetensorError, StrictDataclassError) as error:
        raise ConfigError(f'the model in {model_dir} cannot be opened: {error_text(error)}') from error
    make_generation_savable(model)
    return model


def _open_layout(model_dir: Path, info: ModelInfo, keywords: dict[str, Any]) -> PreTrainedModel:
    """Return the model from whichever layout its config.json names: one of ours, of a 2023 family, or native."""
    import transformers as t
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from utils.loading.legacy.opening import check_loading, fitting, open_original, open_saved
    from utils.loading.legacy.registry import FAMILIES, find_family, find_saved

    config = read_config(model_dir)
    found = config['model_type']
    named = FAMILIES.get(info.family or '')
    if named and CONFIG_MAPPING_NAMES.get(found) != named.config_class and found not in named.model_types:
        raise ConfigError(
            f"{model_dir}: config.json has model_type '{found}', which is neither family {named.name} "
            f'({" or ".join(named.model_types)}) nor the native class of it. Name the model_type that it is.'
        )
    if family := find_family(config, info.family):
        return open_original(family, model_dir, **keywords)
    if settings := loading_settings(config):
        keywords['quantization_config'] = settings
    if family := find_saved(config):
        return open_saved(family, model_dir, **keywords)
    if found not in CONFIG_MAPPING_NAMES:
        remote = ' It asks for code of its own (auto_map), which is never run.' if 'auto_map' in config else ''
        raise ConfigError(
            f"{model_dir}: model_type '{found}' is no native class of transformers.{remote} "
            'Name the registered model this is with --model_type, or convert it to a native class.'
        )
    native = t.AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    speaks, sees = t.MODEL_FOR_CAUSAL_LM_MAPPING, t.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    blind = type(native) in speaks or type(native) not in sees
    auto = t.AutoModelForCausalLM if blind else t.AutoModelForImageTextToText
    keywords['device_map'] = place(keywords['device_map'], lambda: auto.from_config(native))
    if cls := (speaks if blind else sees).get(type(native), None):
        keywords = fitting(cls, keywords)
        spare_towers(keywords['quantization_config'], lambda: auto.from_config(native))
    # Shapes that do not fit are let through to be named, where the library would log them and say to look there.
    model, loading = auto.from_pretrained(
        model_dir, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **keywords
    )
    check_loading(loading, model_dir, type(model).__name__, unexpected=False)
    if unused := sorted(loading['unexpected_keys']):
        logger.warning(f'{len(unused)} tensors of {model_dir} are not used by {type(model).__name__}: {unused[0]}, ...')
    return model


def read_tokenizer(model_dir: Path, info: ModelInfo) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from utils.loading.legacy.registry import find_family, find_saved

    config = read_config(model_dir) if (model_dir / 'config.json').is_file() else {}
    family = find_family(config, info.family)
    # AutoTokenizer asks config.json for a class, and does not know the model types that are ours.
    opener = PreTrainedTokenizerFast if find_saved(config) else AutoTokenizer
    try:
        if family and family.tokenizer and family.vocabulary and (model_dir / family.vocabulary).is_file():
            tokenizer = family.tokenizer(model_dir)
        else:
            tokenizer = _as_its_file_says(opener.from_pretrained(model_dir, trust_remote_code=False), model_dir)
        legacy = model_dir / 'chat_template.json'  # where processors of 2024 kept it
        if not tokenizer.chat_template and legacy.is_file():
            tokenizer.chat_template = read_json(legacy)['chat_template']
        tokenizer('a')  # settings that are wrong show at the first text
    except Exception as error:  # the libraries raise whatever they stumble over in a damaged file
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


def _as_its_file_says(tokenizer: Any, model_dir: Path) -> Any:
    """Return the tokenizer, or that of the folder's tokenizer.json where its class gives texts other ids than the file.

    A class of transformers 5 builds its rules by itself, of the file's vocabulary; LlamaTokenizer loses a blank at the
    start of a text that way.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = model_dir / 'tokenizer.json'
    if not file.is_file() or type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    own = Tokenizer.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    wanted = [one.ids for one in own.encode_batch(list(_PROBE_TEXTS), add_special_tokens=False)]
    found = tokenizer(list(_PROBE_TEXTS), add_special_tokens=False, verbose=False)['input_ids']
    if found == wanted:
        return tokenizer
    by_file = PreTrainedTokenizerFast.from_pretrained(model_dir, trust_remote_code=False)
    if by_file(list(_PROBE_TEXTS), add_special_tokens=False, verbose=False)['input_ids'] != wanted:
        return tokenizer  # settings beside the file change what both give
    text = next(text for text, one, other in zip(_PROBE_TEXTS, found, wanted, strict=True) if one != other)
    logger.info(
        f'tokenizer = that of {file.name} because {type(tokenizer).__name__} gives {text!r} and other texts other ids '
        'than the file'
    )
    return by_file


def unembedded_from(model: Any, tokenizer: Any) -> int | None:
    """Return the first id that the model does not embed where its tokenizer has such ids, else None."""
    embedding = int(model.config.get_text_config().vocab_size)  # ZeRO-3 leaves no shape on the weight
    return embedding if len(tokenizer) > embedding else None


def check_embedded(embedding: int, ids: Sequence[int], where: str) -> None:
    """Raise ConfigError where one of the ids is beyond the rows that the model embeds; `where` names the ids."""
    if (largest := max(ids, default=0)) >= embedding:
        raise ConfigError(
            f'{where}: it holds the token of id {largest}, the model embeds {embedding}. Leave out what spells this '
            'token, or take model and tokenizer from the same place.'
        )


def open_entry(model_dir: Path, info: ModelInfo, options: LoadOptions) -> tuple[PreTrainedModel, Any]:
    """Return model and tokenizer of a folder, opened as the entry says."""
    get_function = info.get_function or get_model_tokenizer_default
    return get_function(model_dir, info, options)


def get_model_tokenizer(info: ModelInfo, weights: Weights, options: LoadOptions) -> tuple[PreTrainedModel, Any]:
    """Return model and tokenizer; the model's name_or_path is the public id, never a path of this machine's cache."""
    path = weights.path
    if path.is_file():
        with dist.local_main_first():
            path = dense_directory(path)
    model, tokenizer = open_entry(path, info, options)
    keep_trainable(model)
    model.config._name_or_path = model.name_or_path = info.public_id
    if (first := unembedded_from(model, tokenizer)) is not None:
        needed = {tokenizer.eos_token_id, tokenizer.pad_token_id}
        if max(needed) >= first:
            raise ConfigError(
                f'the tokenizer has {len(tokenizer)} tokens, the model embeds {first}: they are not of one model. '
                'Get both from the same place.'
            )
        logger.warning(
            f'the tokenizer has {len(tokenizer)} tokens, the model embeds {first}: {len(tokenizer) - first} of them, '
            f'first {tokenizer.convert_ids_to_tokens(first)!r}, can be neither read nor written; data that holds one '
            'is refused'
        )
    return model, tokenizer
