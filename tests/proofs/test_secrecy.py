"""The files and the output of a run hold no secret of a flag, variable or configuration, no pickle, no home path."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.runs import run_program, small_flags
from tests.support.tiny_models import make_model, make_tokenizer
from utils.base.leak_scan import find_secrets, scan_tree
from utils.cli.arguments import SftArguments
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


def test_deepspeeds_own_state_is_excepted_and_named(tmp_path: Path) -> None:
    state = tmp_path / 'checkpoint-3' / 'global_step3' / 'mp_rank_00_model_states.pt'
    state.parent.mkdir(parents=True)
    state.write_bytes(pickle.dumps([1]))
    prove_secrecy(tmp_path, SftArguments())
    proof = json.loads((tmp_path / 'proofs.json').read_text())['secrecy']
    assert proof['passed'] and proof['excepted'] == ['checkpoint-3/global_step3/mp_rank_00_model_states.pt']
    assert '1 files with the state of DeepSpeed are excepted' in proof['says']
