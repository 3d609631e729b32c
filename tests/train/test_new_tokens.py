"""--new_tokens: tokens of a file in tokenizer and model. Their rows alone are trained, with tied and untied heads."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

import llm_infer
import llm_sft
from tests.support.exactness import LENGTHS, make_rows, plain_gradients
from tests.support.runs import ROOT, assert_equal, small_flags, weights, write_jsonl
from tests.support.tiny_models import make_model, make_tokenizer
from utils.base.errors import ConfigError
from utils.cli.arguments import SftArguments, to_dict
from utils.data.collator import Collator
from utils.estimate.gpus import Machine, mode_of
from utils.estimate.memory import trained_parameters
from utils.estimate.model_shape import measure
from utils.export.model_card import model_card
from utils.fast.layout import exact_head, use_padding_free
from utils.fast.scoring import Scorer
from utils.loading.adapter import load_adapter
from utils.loading.new_tokens import add_to_model, add_to_tokenizer, add_tokens, read_tokens
from utils.model import get_model_info
from utils.run.record import RunRecord, changed_flags
from utils.train.prepare import prepare_model

Run = Callable[..., Path]
Problems = Callable[[], list[str]]
TOKENS = ['<tool>', '</tool>', '温度']
ROWS = [{'query': f'what is 温度 {i}?', 'response': f'<tool>look up {i % 5}</tool> it is {i}.'} for i in range(40)]


def model_of(*, tied: bool, rows: int = 400, dtype: torch.dtype = torch.float32) -> Any:
    model = make_model(vocab_size=rows)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model.to(dtype)


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    file = tmp_path / 'tokens.txt'
    file.write_text('\n'.join(TOKENS) + '\n', encoding='utf-8')
    return file


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / 'rows.jsonl', ROWS)


def saved_to(folder: Path, *, tied: bool, rows: int = 400) -> Path:
    model_of(tied=tied, rows=rows).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize('rows', [400, 448])
@pytest.mark.parametrize('tied', [False, True])
def test_new_rows_start_as_the_mean_of_their_pieces(tied: bool, rows: int) -> None:
    model, tokenizer = model_of(tied=tied, rows=rows), make_tokenizer()
    size = len(tokenizer)
    before = (model.model.embed_tokens.weight.clone(), model.lm_head.weight.clone())
    old = make_tokenizer()
    ids = add_tokens(model, tokenizer, TOKENS)
    assert ids == [size, size + 1, size + 2] and len(tokenizer) == size + 3
    needed = max(rows, size + 3)
    assert (model.config.vocab_size, len(model.lm_head.weight)) == (needed, needed), 'enlarged only if needed'
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for table, earlier in zip((model.model.embed_tokens.weight, model.lm_head.weight), before, strict=True):
        assert torch.equal(table[:size], earlier[:size])
        for token, index in zip(TOKENS, ids, strict=True):
            pieces = old(token, add_special_tokens=False)['input_ids']
            assert len(pieces) > 1
            assert torch.allclose(table[index], earlier[pieces].mean(dim=0), atol=1e-7)
    assert tokenizer('a<tool>b')['input_ids'] == [*old('a')['input_ids'], size, *old('b')['input_ids']]


BAD = {
    'empty': ('', 'is empty. Write one token per line, or remove --new_tokens.'),
    'blank line': ('<a>\n\n<b>\n', 'line 2 is empty. Remove it.'),
    'only blanks': ('  \n', 'line 1 is empty. Remove it.'),
    'whitespace': ('<a b>\n', "line 1 ('<a b>') contains whitespace."),
    'around': (' <a>\n', "line 1 (' <a>') contains whitespace."),
    'duplicate': ('<a>\n<b>\n<a>\n', "line 3 repeats line 1 ('<a>'). Remove one of the two."),
}


@pytest.mark.parametrize('name', BAD)
def test_a_bad_file_is_refused_with_the_arguments(
    name: str, run_sft: Run, tmp_path: Path, problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / 'tokens.txt'
    content, message = BAD[name]
    file.write_text(content)
    monkeypatch.setattr('utils.run.open_model.locate', lambda *a, **k: pytest.fail('weights were looked for'))
    run_sft('--new_tokens', str(file), '--lora_rank', '0', expect=2)
    assert len(problems()) == 2 and any(message in line and str(file) in line for line in problems()), problems()


def test_a_file_that_cannot_be_read_is_refused(run_sft: Run, tmp_path: Path, problems: Problems) -> None:
    run_sft('--new_tokens', str(tmp_path / 'gone.txt'), expect=2)
    assert 'gone.txt cannot be read: No such file or directory (looked in ' in problems()[-1]
    (tmp_path / 'latin.txt').write_bytes(b'\xff\n')
    run_sft('--new_tokens', str(tmp_path / 'latin.txt'), expect=2)
    assert 'latin.txt is not UTF-8. Save it as UTF-8 text with one token per line.' in problems()[-1]
    (tmp_path / 'bom.txt').write_bytes('\ufeff<a>\r\n<b>\r\n'.encode())
    assert read_tokens(tmp_path / 'bom.txt') == ['<a>', '<b>']


def test_a_token_that_exists_is_refused_by_name(run_sft: Run, tmp_path: Path, problems: Problems) -> None:
    (tmp_path / 'tokens.txt').write_text('<new>\n<|im_end|>\na\n')
    run_sft('--new_tokens', str(tmp_path / 'tokens.txt'), expect=2)
    known = make_tokenizer().get_vocab()
    assert problems() == [
        f"--new_tokens: '{token}' is a token of this tokenizer already (id {known[token]}). Remove its line."
        for token in ('<|im_end|>', 'a')
    ]


def test_a_token_that_the_tokenizer_cannot_take_is_refused_by_name() -> None:
    tokenizer = make_tokenizer()
    known = tokenizer.get_vocab()
    spelled = next(
        text for index in known.values()
        if (text := tokenizer.decode([index])) not in known and tokenizer(text)['input_ids'] == [index]
    )  # fmt: skip
    with pytest.raises(ConfigError) as raised:
        add_to_tokenizer(tokenizer, ['<new>', '<|im_end|>', 'a', spelled, 'x</s>y'])
    assert raised.value.problems == (
        *(
            f'--new_tokens: {token!r} is a token of this tokenizer already (id {index}). Remove its line.'
            for token, index in (
                ('<|im_end|>', known['<|im_end|>']), ('a', known['a']), (spelled, tokenizer(spelled)['input_ids'][0])
            )
        ),
        "--new_tokens: 'x</s>y' contains '</s>', a special token of this tokenizer, which would no longer be found in "
        'it. Remove its line.',
    )  # fmt: skip
    assert tokenizer.get_vocab() == known


def test_a_token_of_unknown_characters_is_new_and_starts_as_the_unknown_token() -> None:
    tokenizer = make_tokenizer(metaspace='first')
    assert tokenizer('温')['input_ids'][-1] == tokenizer.unk_token_id
    model = model_of(tied=False)
    (index,) = add_tokens(model, tokenizer, ['温'])
    pieces = make_tokenizer(metaspace='first')('温')['input_ids']
    assert torch.allclose(model.lm_head.weight[index], model.lm_head.weight[pieces].mean(dim=0), atol=1e-7)


def test_tokens_of_the_tokenizer_without_a_row_get_the_same_row_each_time() -> None:
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    found = []
    for seed in (0, 1):
        model = model_of(tied=False, rows=size - 2)
        torch.manual_seed(seed)
        add_tokens(model, make_tokenizer(), TOKENS)
        found.append(model.model.embed_tokens.weight[size - 2 : size])
    assert torch.equal(*found)
    assert torch.allclose(found[0][0], model.model.embed_tokens.weight[: size - 2].mean(dim=0), atol=1e-6)


def prepared(model: Any, ids: list[int], **flags: Any) -> tuple[Any, SftArguments]:
    args = SftArguments(**{'lora_target_modules': ['q_proj', 'v_proj'], **flags})
    torch.manual_seed(1)
    return prepare_model(model, args, token_ids=ids).train(), args


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('tied', [False, True])
def test_loss_and_gradients_are_those_of_plain_training(tied: bool, dtype: torch.dtype) -> None:
    base, tokenizer = model_of(tied=tied, dtype=dtype), make_tokenizer()
    ids = add_tokens(base, tokenizer, TOKENS)
    rows = make_rows(len(tokenizer))
    for row in rows:
        row['input_ids'][1::5] = [ids[n % 3] for n in range(len(row['input_ids'][1::5]))]
    count = sum(row['trained'][1] - max(1, row['trained'][0]) for row in rows)
    off: dict[str, Any] = {'tuner_backend': 'peft', 'fused_norms': False, 'fused_mlp': False}
    plain, _ = prepared(copy.deepcopy(base), ids, **off)
    expected_loss, expected = plain_gradients(plain, rows, count)
    fast, args = prepared(copy.deepcopy(base), ids)
    inner = fast.get_base_model()
    assert use_padding_free(inner, args, longest=max(LENGTHS))
    head = exact_head(inner, args)
    assert head is not None and head.trained_rows is not None, 'the loss is computed in chunks'
    loss = Scorer(inner, head).loss(fast, Collator(5, pads=False)(rows), count)
    loss.backward()
    exact = dtype == torch.float32
    assert abs(float(loss.detach()) - expected_loss) < (1e-5 if exact else 3e-2)
    found = {name: p.grad for name, p in fast.named_parameters() if p.grad is not None}
    whole = [name for name in found if 'trainable_tokens' in name]
    assert found.keys() == expected.keys() and len(whole) == (1 if tied else 2)
    assert all(found[name].dtype == torch.float32 and found[name].shape == (3, 32) for name in whole)
    for name, grad in expected.items():
        bound = 1e-5 if exact else 0.05 * float(grad.abs().max()) + 1e-3
        assert float((found[name] - grad).abs().max()) < bound, name


@pytest.mark.parametrize('tied', [False, True])
def test_the_drift_compares_with_the_rows_of_the_base(tied: bool) -> None:
    base, tokenizer = model_of(tied=tied), make_tokenizer()
    ids = add_tokens(base, tokenizer, TOKENS)
    fast, args = prepared(copy.deepcopy(base), ids)
    with torch.no_grad():
        for name, parameter in fast.named_parameters():
            if 'trainable_tokens' in name:
                parameter.mul_(20)
    fast.eval()
    head = exact_head(fast.get_base_model(), args)
    assert head is not None
    rows = make_rows(len(tokenizer))
    expected = 0.0
    count = 0
    with torch.no_grad():
        for row in rows:
            start, end = row['trained']
            q, p = (
                model(input_ids=torch.tensor([row['input_ids']])).logits[0].log_softmax(-1) for model in (fast, base)
            )
            span = slice(max(start, 1) - 1, end - 1)
            expected += float((p.exp() * (p - q))[span].sum())
            count += end - max(start, 1)
        batch = Collator(5, pads=False)(rows)
        use_padding_free(fast.get_base_model(), args, longest=max(LENGTHS))
        found = Scorer(fast.get_base_model(), head).divergence(fast, fast.disable_adapter, batch)
    assert expected > 0.01
    assert found == pytest.approx(expected / count, rel=1e-4)


@pytest.mark.parametrize('saved', [None, ['embed_tokens'], ['embed_tokens', 'lm_head']])
@pytest.mark.parametrize('tied', [False, True])
def test_the_estimate_counts_what_is_trained(tied: bool, saved: list[str] | None, tokens_file: Path) -> None:
    model, tokenizer = model_of(tied=tied, rows=448), make_tokenizer()
    shape = measure(model)
    flags: dict[str, Any] = {'new_tokens': str(tokens_file), 'lora_modules_to_save': saved}
    tuned, args = prepared(model, add_tokens(model, tokenizer, TOKENS), **flags)
    mode = mode_of(args, get_model_info(None, 'any'), shape, Machine())
    assert trained_parameters(shape, mode) == sum(p.numel() for p in tuned.parameters() if p.requires_grad)


def assert_loads_exactly(base: Path, checkpoint: Path, stored: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Check that the rows of an adapter that is trained on are those of its file, without rounding."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    add_tokens(model, make_tokenizer(), TOKENS)
    tuned = load_adapter(model, checkpoint, base, dropout=0.0)
    found = get_peft_model_state_dict(tuned)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == torch.float32 for name, tensor in stored.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize(('tied', 'dtype'), [(True, 'bf16'), (False, 'fp32')])
def test_a_run_resumes_repeats_goes_on_answers_and_merges(
    tied: bool, dtype: str, run_sft: Run, tmp_path: Path, tokens_file: Path, rows_file: Path, problems: Problems,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder = saved_to(tmp_path / 'base', tied=tied)
    flags = ('--model_id_or_path', str(folder), '--dataset', str(rows_file), '--dtype', dtype, '--report_samples', '2')
    adding = ('--new_tokens', str(tokens_file))
    whole = run_sft(*flags, *adding)
    checkpoint = whole / 'checkpoint-6'
    size = len(make_tokenizer())
    assert RunRecord.read(checkpoint).added_tokens == TOKENS
    assert len(AutoTokenizer.from_pretrained(checkpoint)) == size + 3
    assert '<tool>' in (whole / 'sample.txt').read_text()
    rows = {step: {n: t for n, t in weights(whole, step).items() if 'tokens_delta' in n} for step in (3, 6)}
    assert len(rows[6]) == (1 if tied else 2)
    assert all(t.shape == (3, 32) and t.dtype == torch.float32 for t in rows[6].values())
    assert all(not torch.equal(rows[3][name], rows[6][name]) for name in rows[6])

    caplog.clear()
    more = adding if tied else ()  # without the flag, the tokens are those of the checkpoint
    resumed = run_sft(*flags, *more, '--resume_from_checkpoint', str(whole / 'checkpoint-3'))
    assert_equal(resumed / 'checkpoint-6', whole / 'checkpoint-6')
    assert 'the run that is resumed had' not in caplog.text
    assert json.loads((whole / 'sft_args.json').read_text())['new_tokens'] == str(tokens_file)
    assert run_sft(*flags, *adding, '--resume_from_checkpoint', 'last') == tmp_path / 'output', 'it is complete'
    tokens_file.write_text('<other>\n')  # the run folder has a copy
    before = set(whole.parent.iterdir())
    assert llm_sft.main(['--from_run', str(whole)]) == 0
    (repeated,) = set(whole.parent.iterdir()) - before
    assert_equal(repeated / 'checkpoint-6', whole / 'checkpoint-6')
    on = run_sft(*flags, '--adapter', str(checkpoint), '--max_steps', '2', '--eval_steps', '1')
    again = run_sft(
        *flags, '--max_steps', '2', '--eval_steps', '1', '--resume_from_checkpoint', str(on / 'checkpoint-1')
    )
    assert_equal(again / 'checkpoint-2', on / 'checkpoint-2')
    assert RunRecord.read(on).added_tokens == TOKENS
    assert_loads_exactly(folder, checkpoint, rows[6], torch.float32 if dtype == 'fp32' else torch.bfloat16)

    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--max_new_tokens', '6', '--do_sample', 'false']) == 0
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--merge_lora_and_save', 'true']) == 0
    proof = json.loads((whole / 'proofs.json').read_text())['merge']
    assert proof['passed'] and f'{"tied" if tied else "separate"} head' in proof['says']
    assert 'on a fixed text, the new tokens and 2 of your rows; rounding explains up to ' in proof['says']
    merged = AutoModelForCausalLM.from_pretrained(f'{checkpoint}-merged', dtype=torch.float32)
    config = json.loads((Path(f'{checkpoint}-merged') / 'config.json').read_text())
    assert config['vocab_size'] == len(merged.lm_head.weight) == size + 3
    assert AutoTokenizer.from_pretrained(f'{checkpoint}-merged').convert_tokens_to_ids(TOKENS) == [
        size, size + 1, size + 2,
    ]  # fmt: skip
    trained = rows[6]['base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta']
    rounded = trained.to(torch.bfloat16).float() if dtype == 'bf16' else trained
    assert torch.equal(merged.model.embed_tokens.weight[size:], rounded)
    assert llm_infer.main(['--ckpt_dir', f'{checkpoint}-merged', '--max_new_tokens', '4', '--do_sample', 'false']) == 0

    for earlier in ('--resume_from_checkpoint', '--adapter'):
        run_sft(*flags, *adding, earlier, str(whole / 'checkpoint-3'), expect=2)
        assert (
            f'{whole / "checkpoint-3"} was trained with different new tokens (<tool>, </tool>, 温度).'
            in (problems()[-1])
        )


TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}<|done|>{% endfor %}"
    '{% if add_generation_prompt %}<|turn|>assistant: {% endif %}'
)


@pytest.mark.slow
def test_the_markers_of_a_chat_template_become_tokens_at_which_answers_stop(
    run_sft: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / 'turns.jinja'
    file.write_text(TEMPLATE)
    markers = tmp_path / 'markers.txt'
    markers.write_text('<|turn|>\n<|done|>\n<tool>\n')
    rows = [{'query': f'say <|done|> {i}', 'response': f'<tool>{i}'} for i in range(20)]
    data = write_jsonl(tmp_path / 'rows.jsonl', rows)
    flags = ('--dataset', str(data), '--chat_template', str(file), '--max_steps', '2', '--eval_steps', '2')
    streamed = ('--streaming', 'true', '--stream_val_rows', '4')
    run = run_sft(*flags, *streamed, '--new_tokens', str(markers))
    assert 'the vocabulary of this tokenizer does not' not in caplog.text and 'never learnt' not in caplog.text
    ids = dict(zip(('<|turn|>', '<|done|>', '<tool>'), range(len(make_tokenizer()), 500), strict=False))
    checkpoint = run / 'checkpoint-2'
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--merge_lora_and_save', 'true']) == 0
    for folder in (checkpoint, Path(f'{checkpoint}-merged')):
        served = AutoTokenizer.from_pretrained(folder)
        assert {token: served.convert_tokens_to_ids(token) for token in ids} == ids
        assert served.decode(list(ids.values()), skip_special_tokens=True) == '<|turn|><tool>', 'ends are not shown'
        text = served.apply_chat_template([{'role': 'user', 'content': 'a'}], tokenize=False)
        assert served(text, add_special_tokens=False)['input_ids'][-1] == ids['<|done|>']
    settings = json.loads((Path(f'{checkpoint}-merged') / 'generation_config.json').read_text())
    assert ids['<|done|>'] in settings['eos_token_id'] and ids['<tool>'] not in settings['eos_token_id']
    assert '⟦<tool>' in (run / 'sample.txt').read_text()


@pytest.mark.slow
def test_all_weights_are_trained_with_new_tokens_too(run_sft: Run, tokens_file: Path, rows_file: Path) -> None:
    flags = ('--sft_type', 'full', '--only_save_model', 'false', '--dataset', str(rows_file))
    whole = run_sft(*flags, '--new_tokens', str(tokens_file), '--learning_rate', '1e-3')
    resumed = run_sft(*flags, '--learning_rate', '1e-3', '--resume_from_checkpoint', str(whole / 'checkpoint-3'))
    assert_equal(resumed / 'checkpoint-6', whole / 'checkpoint-6')
    size = len(make_tokenizer()) + 3
    assert json.loads((whole / 'checkpoint-6' / 'config.json').read_text())['vocab_size'] == size
    assert llm_infer.main(['--ckpt_dir', str(whole / 'checkpoint-6'), '--max_new_tokens', '4']) == 0


@pytest.mark.slow
def test_a_dry_run_and_a_data_check_count_with_the_new_tokens(
    model_dir: Path,
    rows_file: Path,
    tokens_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    run_sft: Run,
) -> None:
    flags = [*small_flags(model_dir, rows_file, tmp_path / 'output'), '--new_tokens', str(tokens_file)]
    assert llm_sft.main([*flags, '--dry_run', 'true']) == 0
    said = capsys.readouterr().out
    assert 'and 192 in rows of new tokens' in said
    run = run_sft('--dataset', str(rows_file), '--new_tokens', str(tokens_file), '--max_steps', '1')
    tokens = json.loads((run / 'run.json').read_text())['data']['train']['tokens']
    assert f'{tokens:,} training tokens an epoch' in said
    bare = run_sft('--dataset', str(rows_file), '--max_steps', '1')
    assert json.loads((bare / 'run.json').read_text())['data']['train']['tokens'] > tokens
    assert llm_sft.main([*flags, '--check_dataset', 'true']) == 0


@pytest.mark.slow
def test_a_base_with_another_tokenizer_is_refused(
    run_sft: Run, tmp_path: Path, tokens_file: Path, rows_file: Path, problems: Problems
) -> None:
    base = saved_to(tmp_path / 'base', tied=True)
    flags = ('--model_id_or_path', str(base), '--dataset', str(rows_file))
    checkpoint = run_sft(*flags, '--new_tokens', str(tokens_file), '--max_steps', '3') / 'checkpoint-3'
    changed = make_tokenizer()
    changed.add_tokens(['<other>'])
    changed.save_pretrained(base)
    for name in ('--resume_from_checkpoint', '--adapter'):
        run_sft(*flags, name, str(checkpoint), expect=2)
    assert llm_infer.main(['--ckpt_dir', str(checkpoint), '--eval_human', 'false']) == 2
    size = len(make_tokenizer())
    ids = [', '.join(str(first + n) for n in range(3)) for first in (size, size + 1)]
    message = (
        f'{checkpoint}: its new tokens had the ids {ids[0]} in training, and the tokenizer of the base model '
        f'now gives them {ids[1]}. Put back the tokenizer files with which the run was trained.'
    )
    assert problems() == [message] * 3


@pytest.mark.slow
def test_an_adapter_with_rows_and_without_a_record_is_refused(
    run_sft: Run, tokens_file: Path, rows_file: Path, problems: Problems
) -> None:
    run = run_sft('--new_tokens', str(tokens_file), '--dataset', str(rows_file), '--max_steps', '3')
    run_sft('--resume_from_checkpoint', str(run / 'checkpoint-3'), '--lora_modules_to_save', 'lm_head', expect=2)
    assert problems()[-1].startswith('--lora_modules_to_save: ')
    for name in ('sft_args.json', 'manifest.json'):
        (run / 'checkpoint-3' / name).unlink()
    (run / 'sft_args.json').unlink()
    run_sft('--adapter', str(run / 'checkpoint-3'), expect=2)
    assert (
        'the adapter has embedding rows of new tokens, but no sft_args.json that names these tokens.' in problems()[-1]
    )


def test_models_that_cannot_have_new_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_of(tied=False), make_tokenizer()
    added = add_to_tokenizer(tokenizer, TOKENS)
    model.config.vocab_size_per_layer_input = 400
    with pytest.raises(
        ConfigError, match='LlamaForCausalLM has an embedding in each layer, and these embeddings cannot be enlarged'
    ):
        add_to_model(model, added)
    del model.config.vocab_size_per_layer_input

    model.lm_head.bias = torch.nn.Parameter(torch.arange(400.0))
    add_to_model(model, added)
    assert float(model.lm_head.bias[added.ids[0]]) == pytest.approx(sum(added.pieces[0]) / len(added.pieces[0]))
    with pytest.raises(
        ConfigError, match='the output head of LlamaForCausalLM has a bias, but PEFT leaves out this bias'
    ):
        prepared(model, added.ids)
    tuned, _ = prepared(model, added.ids, lora_modules_to_save=['lm_head'])
    assert tuned.peft_config['default'].trainable_token_indices == {'model.embed_tokens': added.ids}

    tied = model_of(tied=True)
    ids = add_tokens(tied, make_tokenizer(), TOKENS)
    tied.config.tie_word_embeddings = False  # as in a config that states it for the whole model only
    with pytest.raises(ConfigError, match='in the output head of LlamaForCausalLM. Add --lora'):
        prepared(tied, ids)


def test_ids_and_tables_that_cannot_get_rows_are_refused() -> None:
    tokenizer = make_tokenizer()
    added = add_to_tokenizer(tokenizer, TOKENS)
    model = model_of(tied=False)
    model.generation_config.eos_token_id = [2, added.ids[1]]
    with pytest.raises(ConfigError, match=f'the model uses the id {added.ids[1]} as its eos_token_id, and its tokeni'):
        add_to_model(model, added)
    model.generation_config.eos_token_id = 2
    model.config.pad_token_id = added.ids[0]
    with pytest.raises(ConfigError, match=f'the model uses the id {added.ids[0]} as its pad_token_id, and its tokeni'):
        add_to_model(model, added)

    quantised = model_of(tied=False)
    quantised.lm_head.weight = torch.nn.Parameter(torch.zeros(400, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match='the embedding or the output head of LlamaForCausalLM is quantised'):
        add_to_model(quantised, added)
    sharded = model_of(tied=False)
    sharded.model.embed_tokens.weight = torch.nn.Parameter(torch.zeros(0))
    with pytest.raises(ConfigError, match='the weights of LlamaForCausalLM are sharded, so rows cannot be added'):
        add_to_model(sharded, added)


def test_the_tokens_and_not_their_file_decide_whether_a_run_fits() -> None:
    flags = to_dict(SftArguments(new_tokens='a.txt'))
    record = RunRecord(flags=flags, added_tokens=['<a>'])
    moved = RunRecord(flags={**flags, 'new_tokens': 'b.txt'}, added_tokens=['<a>'])
    assert changed_flags(record, moved) == []
    assert changed_flags(record, RunRecord(flags=flags, added_tokens=['<b>'])) == [('new_tokens', ['<b>'], ['<a>'])]
    assert changed_flags(record, RunRecord(flags=flags)) == [('new_tokens', [], ['<a>'])]


def test_the_card_of_an_adapter_says_how_it_is_opened() -> None:
    base = {'id': 'a/b', 'sha256': 'c', 'covers': 'd'}
    record = RunRecord(flags=to_dict(SftArguments()), base_model=base, added_tokens=TOKENS)
    progress = {'step': 1, 'log_history': []}
    assert 'It adds 3 tokens to the tokenizer of the base model.' in model_card('a', record, progress, [])
    assert 'It adds' not in model_card('a', record.with_flags(sft_type='full'), progress, [])


def test_sharded_weights_are_refused(
    run_sft: Run, problems: Problems, tokens_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('utils.cli.machine.has_package', lambda name: True)
    adding = ('--new_tokens', str(tokens_file))
    run_sft(*adding, '--fsdp', 'true', expect=2)
    run_sft(*adding, '--deepspeed_config_path', str(ROOT / 'ds_config/zero3.json'), expect=2)
    for start in ('--fsdp true shards the embedding, and --new_tokens cannot enlarge', '--deepspeed_config_path '):
        assert any(line.startswith(start) and '--new_tokens' in line for line in problems())


@pytest.mark.slow
@pytest.mark.optional
def test_a_quantised_base_trains_the_rows(run_sft: Run, tokens_file: Path, rows_file: Path) -> None:
    pytest.importorskip('bitsandbytes')
    flags = ('--quantization_bit', '4', '--new_tokens', str(tokens_file), '--dataset', str(rows_file))
    whole = run_sft(*flags)
    resumed = run_sft(*flags, '--resume_from_checkpoint', str(whole / 'checkpoint-3'))
    assert_equal(resumed / 'checkpoint-6', whole / 'checkpoint-6')
    assert llm_infer.main(['--ckpt_dir', str(whole / 'checkpoint-6'), '--merge_lora_and_save', 'true']) == 0
    assert json.loads((whole / 'proofs.json').read_text())['merge']['passed']
