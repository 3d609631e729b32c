"""The files and the output of a run hold no secret of a flag, variable or configuration, no pickle, no home path."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.runs import run_program, small_flags
from tests.support.tiny_models import make_model, make_tokenizer
from tests.support.trackers import recorded, write_stand_ins
from utils.base.leak_scan import find_secrets, scan_tree
from utils.cli.arguments import SftArguments
from utils.cli.trackers import TRACKERS
from utils.proofs.secrecy import home_paths, prove_secrecy

CANARY = 'canary-7f3b9c2e5d81'
HOLDERS = (
    'MODELSCOPE_API_TOKEN', 'HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'WANDB_API_KEY', 'AWS_SECRET_ACCESS_KEY',
    'GITHUB_TOKEN', 'MY_PASSWORD',
)  # fmt: skip


@pytest.mark.slow
def test_a_canary_in_every_holder_is_found_nowhere(data_file: Path, tmp_path: Path) -> None:
    """Search the folder of a run, its output, archives and metadata for each spelling of a secret."""
    home = tmp_path / 'home'
    model = home / 'models' / 'tiny'
    make_model().save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    environment = {name: f'{CANARY}-{name}' for name in HOLDERS}
    words = small_flags(model, data_file, home / 'out')
    told = run_program('llm_sft.py', *words, '--hub_token', f'{CANARY}-typed', HOME=str(home), **environment)
    assert told.returncode == 0, told.stderr[-2000:]
    assert CANARY not in told.stdout + told.stderr
    run = next((home / 'out').glob('*/*'))
    secrets = find_secrets(environment, {'--hub_token': f'{CANARY}-typed'})
    assert len(secrets) == len(HOLDERS) + 1
    found = scan_tree(run, secrets)
    assert not [line for line in found if 'a pickle' not in line], found
    assert not list(home_paths(run, home, [str(model), str(home / 'out')]))


@pytest.mark.slow
def test_trackers_get_no_canary_no_home_path_and_no_user_name(data_file: Path, tmp_path: Path) -> None:
    """Every tracker is a stand-in that keeps all that it is given, the command line and the user that it sees."""
    home = tmp_path / 'home' / 'alice'
    model = home / 'models' / 'tiny'
    make_model().save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    stand_ins = write_stand_ins(tmp_path / 'packages')
    environment = {name: f'{CANARY}-{name}' for name in (*HOLDERS, 'COMET_API_KEY', 'SWANLAB_API_KEY')}
    uploads = ('WANDB_LOG_MODEL', 'WANDB_WATCH', 'HF_MLFLOW_LOG_ARTIFACTS', 'COMET_LOG_ASSETS', 'SWANLAB_LOG_MODEL')
    places = {'HOME': str(home), 'USER': 'alice', 'LOGNAME': 'alice', 'PYTHONPATH': str(stand_ins)}
    words = [*small_flags(model, data_file, home / 'out'), '--hub_token', f'{CANARY}-typed', '--report_to']
    told = run_program('llm_sft.py', *words, *TRACKERS, **places, **environment, **dict.fromkeys(uploads, 'true'))
    assert told.returncode == 0, told.stderr[-2000:]
    for name in uploads:
        assert f'the variable {name} has no effect: a tracker gets numbers and settings' in told.stderr

    secrets = find_secrets(environment, {'--hub_token': f'{CANARY}-typed'})
    assert len(secrets) == len(HOLDERS) + 3
    assert not scan_tree(stand_ins, secrets)
    given = recorded(stand_ins)
    assert {entry['call'].partition('.')[0] for entry in given} == {'wandb', 'swanlab', 'mlflow', 'trackio', 'comet_ml'}
    assert 'alice' not in json.dumps(given) and str(tmp_path) not in json.dumps([entry['args'] for entry in given])
    opened = [entry for entry in given if entry['call'].endswith(('.init', '.start', '.start_run'))]
    assert len(opened) == 5
    for entry in given:
        assert entry['user'] == 'user' and entry['argv'][0] == 'llm_sft.py' and '<secret>' in entry['argv']
        assert '~/models/tiny' in entry['argv']
    # The only calls that would upload files or weights.
    assert not [
        entry['call'] for entry in given if any(word in entry['call'] for word in ('rtifact', 'watch', 'asset'))
    ]

    run = next((home / 'out').glob('*/*'))
    written = b''.join(file.read_bytes() for file in (run / 'runs').iterdir())
    assert b'~/out/' in written and str(home).encode() not in written


def prove(folder: Path, args: SftArguments) -> tuple[bool, str]:
    prove_secrecy(folder, args)
    proof = json.loads((folder / 'proofs.json').read_text())['secrecy']
    (folder / 'proofs.json').unlink()
    return proof['passed'], proof['says']


Plant = Callable[[Path], None]
PLANTS: dict[str, tuple[Plant, str]] = {
    'a token': (
        lambda f: f.joinpath('a.txt').write_text(f'key: {CANARY}\n') and None,
        'a.txt: the value of --hub_token',
    ),
    'a pickle': (lambda f: f.joinpath('a').write_bytes(pickle.dumps([1])) and None, 'a: a pickle'),
    'a pickle by name': (lambda f: f.joinpath('optimizer.pt').touch(), 'optimizer.pt: a pickle by its name'),
    'a home path': (
        lambda f: f.joinpath('a.json').write_text(f'{{"x": "{Path.home()}/models/m"}}') and None,
        'a.json: a path of your home folder',
    ),
}


@pytest.mark.parametrize('name', PLANTS)
def test_what_is_planted_is_found(name: str, tmp_path: Path) -> None:
    args = SftArguments(hub_token=CANARY, model_id_or_path=f'{Path.home()}/typed/model', dataset=['a.jsonl#5'])
    (tmp_path / 'fine.json').write_text(f'{{"x": "{Path.home()}/typed/model/config.json"}}')
    passed, says = prove(tmp_path, args)
    assert passed and says.startswith('1 files, archives and metadata opened, contain none of ')
    plant, message = PLANTS[name]
    plant(tmp_path)
    passed, says = prove(tmp_path, args)
    assert not passed and message in says and CANARY not in says


@pytest.mark.parametrize('flag', [{'chat_template': 'own/t.jinja'}, {'score': ['own/score.py:short']}], ids=str)
def test_every_typed_path_is_allowed(flag: dict[str, str | list[str]], tmp_path: Path) -> None:
    home = f'{Path.home()}/'
    typed = {name: f'{home}{value}' if isinstance(value, str) else [home + value[0]] for name, value in flag.items()}
    (tmp_path / 'sft_args.json').write_text(json.dumps(typed))
    passed, says = prove(tmp_path, SftArguments(**typed))  # type: ignore[arg-type]
    assert passed, says


def test_deepspeeds_own_state_is_excepted_and_named(tmp_path: Path) -> None:
    state = tmp_path / 'checkpoint-3' / 'global_step3' / 'mp_rank_00_model_states.pt'
    state.parent.mkdir(parents=True)
    state.write_bytes(pickle.dumps([1]))
    prove_secrecy(tmp_path, SftArguments())
    proof = json.loads((tmp_path / 'proofs.json').read_text())['secrecy']
    assert proof['passed'] and proof['excepted'] == ['checkpoint-3/global_step3/mp_rank_00_model_states.pt']
    assert '1 files with the state of DeepSpeed are excepted' in proof['says']


def test_kinds_are_named_with_the_first_three_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, 'home', lambda: Path('/home/ann'))
    for number in range(5):
        (tmp_path / f'{number}.txt').write_text('/home/ann/models/own/x.json')
    prove_secrecy(tmp_path, SftArguments())
    kind = 'a path of your home folder'
    places = '; '.join(f'{number}.txt: {kind}' for number in range(3))
    assert f'the run folder contains {kind}: {places}; and 2 more. Remove these before you share' in caplog.text
    proof = json.loads((tmp_path / 'proofs.json').read_text())['secrecy']
    assert len(proof['found']) == 5 and not proof['passed']


def test_the_path_of_an_own_entry_counts_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, 'home', lambda: Path('/home/ann'))
    (tmp_path / 'a.txt').write_text('/home/ann/models/own/x.json')
    prove_secrecy(tmp_path, SftArguments(model_type='own'), ['/home/ann/models/own'])
    assert json.loads((tmp_path / 'proofs.json').read_text())['secrecy']['passed']


PATHS = [
    (b'/home/ann/data.json', True),
    (b'see "/home/ann/data.json", line 3', True),
    (b'\0\xff/home/ann/', True),
    (b'in /backup/home/ann/data.json', False),
    (b'in ~/home/ann/data.json or x/home/ann/y:/home/ann/z', True),
    (b'/home/ann/models/tiny/config.json', False),
    (b'/home/ann/models/tiny, /home/ann/other', True),
    (b'/home/anna/data.json and /home/ann', False),
    (b'file:///home/ann/data.json', True),
    (b'https://host//home/ann/data.json', False),
    (b'a/b//home/ann/data.json', False),
    (b'{"text": "in\\n/home/ann/data.json"}', True),
    (b'/home/ann/models/tiny-private/secret', True),
    (b'/home/ann/models/tiny.old/config.json', True),
    (b'read /home/ann/models/tiny: fine. And /home/ann/models/tiny.', False),
    (b'/home/ann/rows/a.jsonl /home/ann/rows/b.jsonl', False),
    (b'/home/ann/rows/of_b/b.jsonl', True),
    (b'/home/ann/rows/b.json', True),
    (b'/home/ann/rows-of-b/b.jsonl', True),
    (b'/home/ann/quoted/c.jsonl', False),
]


@pytest.mark.parametrize(('content', 'is_found'), PATHS)
def test_a_path_of_the_home_folder_is_found_where_it_begins(
    content: bytes, is_found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'log').write_bytes(content)
    typed = ['/home/ann/models/tiny/', '/home/ann/rows/*.jsonl', '~/quoted', 'relative']
    monkeypatch.setenv('HOME', '/home/ann')
    found = list(home_paths(tmp_path, Path('/home/ann'), typed))
    assert found == (['log: a path of your home folder'] if is_found else [])


def test_the_folder_to_which_a_linked_home_leads_is_found(tmp_path: Path) -> None:
    real = tmp_path / 'disk' / 'ann'
    real.mkdir(parents=True)
    linked = tmp_path / 'ann'
    linked.symlink_to(real)
    run = tmp_path / 'run'
    run.mkdir()
    for name, home in (('real', real), ('linked', linked)):
        (run / name).write_text(f'{home}/data.json')
    assert list(home_paths(run, linked, [])) == [f'{name}: a path of your home folder' for name in ('linked', 'real')]
