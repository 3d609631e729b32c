"""The pages: generated blocks, sizes, links, paths, commands, the two languages, and the notebook."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.runs import ROOT
from tools import docs, flag_table
from utils.cli.arguments import InferArguments, SftArguments
from utils.cli.parser import parse
from utils.loading.info import ModelInfo
from utils.preprocess import Template

README_BYTES = 9_000
TRANSLATED = ('data.md', 'templates.md', 'flags.md', 'models.md')
# Folders with modules, and all folders whose paths the pages name.
MODULES = ('utils', 'tools', 'tests')
FOLDERS = (*MODULES, 'scripts', 'benchmarks', 'ds_config', 'docs')
_PATH = re.compile(rf'(?<![\w./-])((?:{"|".join(FOLDERS)})/[\w./<>*-]*\w/?)')
_SEVERAL = re.compile(r'[<>*]')


def pages() -> list[Path]:
    found = docs.pages()
    assert len(found) >= 20
    return found


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def bash_lines(page: Path) -> list[str]:
    """Return the commands of a page's bash blocks, comments and line continuations removed."""
    blocks = re.findall(r'```bash\n(.*?)```', page.read_text(encoding='utf-8'), flags=re.DOTALL)
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [shlex.join(line) for line in words if line]


def slugs(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    text = re.sub(r'```.*?```', '', page.read_text(encoding='utf-8'), flags=re.DOTALL)
    headings = re.findall(r'^#+ (.+)$', text, flags=re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def test_generated_blocks_are_fresh_and_each_is_on_a_page() -> None:
    assert docs.main(['--check']) == 0
    found = Counter(name for p in pages() for name in re.findall(r'<!-- generated ([\w-]+) -->', p.read_text('utf-8')))
    assert set(found) == set(docs.BLOCKS)
    # Files that exist once in each language.
    assert {found[name] for name in ('models', 'template-names')} == {2}


def test_a_stale_block_is_found_and_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / 'page.md'
    monkeypatch.setattr(docs, 'ROOT', tmp_path)
    monkeypatch.setattr(docs, 'pages', lambda: [page])
    page.write_text('before\n<!-- generated template-names -->\nold\n<!-- end -->\nafter\n', encoding='utf-8')
    assert docs.main(['--check']) == 1
    assert docs.main(['--write']) == 0
    assert docs.main(['--check']) == 0
    text = page.read_text(encoding='utf-8')
    assert '`chatml`' in text
    assert 'old' not in text
    assert text.startswith('before\n')
    assert text.endswith('after\n')


def test_every_flag_is_in_the_table_of_both_languages() -> None:
    flags = {f.name for cls in (SftArguments, InferArguments) for f in fields(cls)}
    for name in ('docs/flags.md', 'docs/cn/flags.md'):
        text = (ROOT / name).read_text(encoding='utf-8')
        assert flags == set(re.findall(r'^\| `--(\w+)` \|', text, flags=re.MULTILINE))


def without_text(texts: dict[str, Any]) -> None:
    del texts['sft']['lora_rank']


def with_english_text(texts: dict[str, Any]) -> None:
    texts['sft']['lora_rank']['cn'] = texts['sft']['lora_rank']['en']


def with_older_help(texts: dict[str, Any]) -> None:
    texts['infer']['output_dir']['en'] = 'new folder'


def with_removed_flag(texts: dict[str, Any]) -> None:
    texts['common']['lora_rank'] = texts['sft']['lora_rank']


def with_unknown_table(texts: dict[str, Any]) -> None:
    texts['train'] = {'lora_rank': texts['sft']['lora_rank']}


MISSING = (
    '--lora_rank has no Chinese text. Add it to "sft", with the text as "cn": '
    '"lora_rank": {"en": "rank of the adapter", "cn": ""}'
)


@pytest.mark.parametrize(
    ('mutate', 'message'),
    [
        (without_text, MISSING),
        (with_english_text, MISSING),
        (
            with_older_help,
            'the help of --output_dir has changed. Correct its "cn" in "infer", and replace its "en" by '
            '"new folder for --export_native; it must not exist yet"',
        ),
        (with_removed_flag, '--lora_rank is not a flag of this table. Remove its entry from "common".'),
        (with_unknown_table, '--lora_rank is not a flag of this table. Remove its entry from "train".'),
    ],
)
def test_a_flag_without_its_chinese_text_is_named(
    mutate: Callable[[dict[str, Any]], None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = flag_table.read_texts()
    mutate(texts)
    page = tmp_path / 'page.md'
    page.write_text('<!-- generated flags-sft -->\n<!-- end -->\n', encoding='utf-8')
    monkeypatch.setattr(docs, 'ROOT', tmp_path)
    monkeypatch.setattr(docs, 'pages', lambda: [page])
    monkeypatch.setattr(flag_table, 'TEXTS', tmp_path / 'flags_cn.json')
    flag_table.TEXTS.write_text(json.dumps(texts), encoding='utf-8')
    for word in ('--check', '--write'):
        assert docs.main([word]) == 1
        assert capsys.readouterr().err == f'tools/flags_cn.json: {message}\n'
    assert page.read_text(encoding='utf-8') == '<!-- generated flags-sft -->\n<!-- end -->\n'


def test_chinese_texts_that_are_not_json_are_named_with_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flag_table, 'TEXTS', tmp_path / 'flags_cn.json')
    flag_table.TEXTS.write_text('{"common": {}\n "sft": {}}', encoding='utf-8')
    assert docs.main(['--check']) == 1
    assert capsys.readouterr().err == (
        "tools/flags_cn.json: not valid JSON: Expecting ',' delimiter: line 2 column 2 (char 15). "
        'Correct the JSON there.\n'
    )


def test_a_chinese_text_names_the_flags_and_numbers_of_the_english_help() -> None:
    entries = [entry for table in flag_table.read_texts().values() for entry in table.values()]
    assert len(entries) >= 100
    for entry in entries:
        words = [set(re.findall(r'--\w+|\d+(?:\.\d+)?(?:e-\d+)?', entry[key])) for key in ('en', 'cn')]
        assert words[0] == words[1], entry


@pytest.mark.parametrize('name', docs.READMES)
def test_a_readme_is_short(name: str) -> None:
    assert (ROOT / name).stat().st_size <= README_BYTES


@pytest.mark.parametrize('name', docs.READMES)
def test_a_readme_shows_output_and_status_on_its_first_screen(name: str) -> None:
    screen = '\n'.join((ROOT / name).read_text(encoding='utf-8').splitlines()[:40])
    for needed in ('scripts/quickstart.sh', '189 of 204', 'GPU', 'SmolLM2-135M', 'torch 2.13'):
        assert needed in screen


def test_links_and_anchors_resolve() -> None:
    checked = 0
    for page in pages():
        text = page.read_text(encoding='utf-8')
        for target in re.findall(r'\]\((?!https?:)([^)\s]+)\)', text):
            file, _, anchor = target.partition('#')
            there = (page.parent / file) if file else page
            assert there.exists(), f'{named(page)}: {target}'
            assert not anchor or anchor in slugs(there), f'{named(page)}: {target}'
            checked += 1
    assert checked >= 60


def test_every_page_is_linked_from_a_readme() -> None:
    linked = {
        (page.parent / target.partition('#')[0]).resolve()
        for page in pages()
        for target in re.findall(r'\]\((?!https?:)([^)\s#]+)[^)]*\)', page.read_text(encoding='utf-8'))
    }
    missing = [named(page) for page in pages() if page.resolve() not in linked]
    assert not missing


def test_paths_that_pages_name_exist() -> None:
    checked = 0
    for page in pages():
        text = re.sub(r'https?://\S+', '', page.read_text(encoding='utf-8'))
        for path in _PATH.findall(text):
            if _SEVERAL.search(path):
                continue
            places = [ROOT / path, page.parent / path]
            assert any(place.exists() for place in places), f'{named(page)} names {path}'
            checked += 1
    assert checked >= 30


def test_the_architecture_names_what_is_there() -> None:
    text = (ROOT / 'docs' / 'architecture.md').read_text(encoding='utf-8')
    assert not [name for name in FOLDERS if f'{name}/' not in text]
    files = {*re.findall(r'[\w.-]+\.(?:py|ipynb)', text.split('```')[1]), 'Dockerfile'}
    assert not [name for name in files if not (ROOT / name).is_file()]

    rooms = {p.name for p in (ROOT / 'utils').iterdir() if (p / '__init__.py').is_file()}
    assert rooms == set(re.findall(r'^\| `(\w+)`(?: \*)? \|', text, flags=re.MULTILINE))
    # The important modules in the row of a room.
    for room, modules in re.findall(r'^\| `(\w+)`(?: \*)? \|[^|]*\|([^|]*)\|$', text, flags=re.MULTILINE):
        for module in re.findall(r'`(\w+)/?`', modules):
            places = (ROOT / 'utils' / room / f'{module}.py', ROOT / 'utils' / room / module)
            assert any(place.exists() for place in places), f'{room}: {module}'


def check_command(words: list[str]) -> bool:
    """Parse the arguments of a command for one of the programs; return False if it runs something else."""
    for number, word in enumerate(words):
        program = Path(word).name
        given = words[number + 1 :]
        if program == 'llm_sft.py' or (program in ('sft.sh', 'quickstart.sh') and word.startswith('scripts/')):
            parsed = parse(SftArguments, given, program=program, about='')
            assert not parsed.problems.found, parsed.problems.found
            return True
        if program == 'llm_infer.py':
            answers = parse(InferArguments, given, program=program, about='')
            assert not answers.problems.found, answers.problems.found
            return True
    return False


def test_commands_on_pages_name_programs_and_flags_that_exist() -> None:
    parsed = 0
    for page in pages():
        for line in bash_lines(page):
            words = shlex.split(line)
            for word in words:
                if re.fullmatch(r'(?:scripts|benchmarks)/[\w/]+\.(?:sh|py)|llm_\w+\.py', word):
                    assert (ROOT / word).is_file(), f'{named(page)}: {line}'
            if '-m' in words[1:2] and words[2].startswith(MODULES):
                module = ROOT / words[2].replace('.', '/')
                places = (module.with_suffix('.py'), module / '__main__.py')
                assert any(place.is_file() for place in places), f'{named(page)}: {line}'
            parsed += check_command(words)
    assert parsed >= 25


def test_a_wrong_flag_in_a_command_is_found() -> None:
    with pytest.raises(AssertionError, match='lora_r'):
        check_command(shlex.split('torchrun --nproc_per_node 2 llm_sft.py --lora_r 8'))
    with pytest.raises(AssertionError, match='learning_rate'):
        check_command(shlex.split('python llm_infer.py --ckpt_dir x --learning_rate 1'))


def test_both_languages_have_the_same_commands() -> None:
    pairs = [(ROOT / name, ROOT / other) for name, other in [docs.READMES]]
    pairs += [(ROOT / 'docs' / name, ROOT / 'docs' / 'cn' / name) for name in TRANSLATED]
    for english, chinese in pairs:
        assert bash_lines(english) == bash_lines(chinese), named(chinese)


def test_both_languages_name_the_same_flags_and_tests() -> None:
    pairs = [(ROOT / name, ROOT / other) for name, other in [docs.READMES]]
    pairs += [(ROOT / 'docs' / name, ROOT / 'docs' / 'cn' / name) for name in TRANSLATED]
    for english, chinese in pairs:
        words = [set(re.findall(r'--\w+|\btest_\w+|#\d+\b', p.read_text(encoding='utf-8'))) for p in (english, chinese)]
        assert words[0] == words[1], named(chinese)


def test_tests_that_pages_name_exist() -> None:
    code = '\n'.join(p.read_text(encoding='utf-8') for p in (ROOT / 'tests').rglob('test_*.py'))
    defined = set(re.findall(r'def (test_\w+)', code))
    files = {p.stem for p in (ROOT / 'tests').rglob('test_*.py')}
    checked = 0
    for page in pages():
        text = page.read_text(encoding='utf-8')
        for name in re.findall(r'`(test_\w+)`', text):
            # The style guide's example of a name.
            if name != 'test_user_tokens_are_never_trained_on':
                assert name in defined | files, f'{named(page)}: {name}'
                checked += 1
    assert checked >= 12


def test_entries_of_the_contributing_page_are_entries() -> None:
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    blocks = re.findall(r'```python\n(.*?)```', text, flags=re.DOTALL)
    made = [eval(f'{{{block}}}', {'ModelInfo': ModelInfo, 'Template': Template}) for block in blocks]
    assert [next(iter(entry)) for entry in made] == ['my-model', 'my-data', 'my-template']
    assert isinstance(made[0]['my-model'], ModelInfo)
    assert made[1]['my-data']() == [{'query': 'ping', 'response': 'pong'}]
    assert isinstance(made[2]['my-template'], Template)


def test_hooks_run_what_the_test_script_runs() -> None:
    config = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text(encoding='utf-8'))
    hooks = [hook for repo in config['repos'] for hook in repo['hooks']]
    assert [repo['repo'] for repo in config['repos']] == ['local']
    assert len(hooks) >= 4
    script = (ROOT / 'scripts' / 'test.sh').read_text(encoding='utf-8')
    for hook in hooks:
        assert hook['language'] == 'system'
        command = hook['entry'].removeprefix('.venv/bin/')
        assert command in script, hook['id']


def test_container_and_notebook_install_as_the_quick_start_does() -> None:
    container = (ROOT / 'Dockerfile').read_text(encoding='utf-8')
    install = re.search(r'^make_venv .*$', (ROOT / 'scripts/quickstart.sh').read_text(encoding='utf-8'), re.MULTILINE)
    assert install is not None
    assert install[0] in container
    assert install[0] in notebook_cells()[0]
    assert 'source scripts/venv.sh' in container
    assert len(container.splitlines()) <= 14


def notebook_cells() -> list[str]:
    content = json.loads((ROOT / 'quickstart.ipynb').read_text(encoding='utf-8'))
    assert (content['nbformat'], content['nbformat_minor']) == (4, 5)
    for cell in content['cells']:
        assert cell['cell_type'] in ('markdown', 'code')
        assert cell['id']
        assert cell['cell_type'] == 'markdown' or (cell['outputs'], cell['execution_count']) == ([], None)
    return [''.join(cell['source']) for cell in content['cells'] if cell['cell_type'] == 'code']


def test_the_notebook_trains_as_the_quick_start_does() -> None:
    """Its flags equal those of scripts/quickstart.sh, so the figures of the README apply to it."""
    script = (ROOT / 'scripts/quickstart.sh').read_text(encoding='utf-8').split("echo '2/3")[1].split('checkpoint=')[0]
    script = script.split('llm_sft.py')[1].split('--output_dir')[0].replace('\\\n', ' ')
    cell = next(cell for cell in notebook_cells() if 'llm_sft.py' in cell)
    given = ''.join(re.findall(r"^    f?'(.*)'$", cell, flags=re.MULTILINE)).split('--output_dir')[0]
    given = given.replace('{sql}', 'sql-demo#640').replace('{model}', '--model_type smollm2-135m-instruct')
    assert shlex.split(given)[1:] == shlex.split(script)


@pytest.mark.slow
def test_the_cells_of_the_notebook_run(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('NOTEBOOK_MODEL', f'--model_id_or_path {model_dir}')
    monkeypatch.setenv('NOTEBOOK_QUICK', 'true')
    monkeypatch.setenv('NOTEBOOK_OUTPUT', str(tmp_path / 'out'))
    before = dict(os.environ)
    space: dict[str, object] = {}
    for cell in notebook_cells():
        exec(compile(cell, 'quickstart.ipynb', 'exec'), space)
    assert dict(os.environ) == before
    printed = capfd.readouterr().out
    assert re.search(r'base model +\d of 2\b', printed)
    assert re.search(r'fine-tuned +\d of [12]\b', printed)
    assert 'first step: holds' in printed
    assert re.search(r'report: .*report\.html', printed)
