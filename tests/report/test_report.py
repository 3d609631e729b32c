"""report.html and the comparison of two runs: their content, and their layout in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_sft
from tests.support.runs import small_flags
from utils.cli.arguments import SftArguments
from utils.encode.chat_template_encoder import AutoEncoder
from utils.formats.conversation import Row
from utils.infer.generation import generate_batch, generation_config
from utils.loading.adapter import load_adapter
from utils.model import load_model, load_tokenizer
from utils.report.__main__ import main as report
from utils.report.svg import Series, chart

Run = Callable[..., Path]
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


@pytest.fixture(scope='module')
def runs(model_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two runs with reports: LoRA, and full fine-tuning."""
    output = tmp_path_factory.mktemp('runs')
    words = [*small_flags(model_dir, data_file, output), '--report_samples', '2']
    assert llm_sft.main([*words, '--system', '<be & kind>']) == 0
    assert llm_sft.main([*words, '--sft_type', 'full', '--learning_rate', '0.03', '--dataset_test_ratio', '0']) == 0
    found = sorted(output.glob('*/*'), key=lambda p: p.name)
    return found[0], found[1]


def test_a_report_holds_what_the_run_knows(runs: tuple[Path, Path]) -> None:
    run = runs[0]
    page = (run / 'report.html').read_text(encoding='utf-8')
    assert (run / 'run.json').is_file() and json.loads((run / 'history.json').read_text())[-1]['step'] == 6
    proofs = json.loads((run / 'proofs.json').read_text())
    assert proofs['template']['passed'] is True
    for text in (
        'Before and after', 'learning_rate', 'LoRA on', 'template_type = auto because',
        f'python llm_infer.py --ckpt_dir {run}/checkpoint-6 --eval_human true', 'characters of', 'reply text',
    ):  # fmt: skip
        assert text in page, text
    assert '&lt;be &amp; kind&gt;' in page and '<be & kind>' not in page, 'escaped'
    assert '<script' not in page and 'http' not in page.replace('http-equiv', ''), 'no script and no network'
    assert page.count('<polyline') >= 5


@pytest.mark.slow
@pytest.mark.parametrize('index', [0, 1])
def test_answers_are_those_of_the_untuned_and_of_the_tuned_model(
    runs: tuple[Path, Path], index: int, model_dir: Path
) -> None:
    answers = json.loads((runs[index] / 'answers.json').read_text(encoding='utf-8'))
    assert [a['split'] for a in answers] == [('validation', 'training')[index]] * 2
    untuned, checkpoint = load_model(model_dir, torch_dtype=torch.float32), runs[index] / 'checkpoint-6'
    system = ('<be & kind>', None)[index]
    encoder = AutoEncoder(load_tokenizer(model_dir), system=system, max_length=-1)
    rows = [Row(messages=a['messages'], origin='answers.json') for a in answers]
    args = SftArguments(max_new_tokens=64, do_sample=False)
    config = generation_config(args, encoder.tokenizer, encoder.stop_ids)

    def ask(model: Any) -> list[str]:
        ids = generate_batch(model.eval(), encoder.encode_prompts(rows), config)
        return [encoder.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in ids]

    assert [a['before'] for a in answers] == ask(untuned)
    tuned = load_adapter(untuned, checkpoint) if index == 0 else load_model(checkpoint, torch_dtype=torch.float32)
    assert [a['after'] for a in answers] == ask(tuned)
    assert [a['before'] for a in answers] != [a['after'] for a in answers]
    assert [a['wanted'] for a in answers] == [row.messages[-1]['content'] for row in rows]


def test_two_runs_are_compared(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / 'both.html'
    assert report([*map(str, runs), '--html', str(target)]) == 0
    printed = capsys.readouterr().out
    assert '  learning_rate: 0.01 -> 0.03\n' in printed and '  sft_type: lora -> full\n' in printed
    assert 'versions: the same' in printed
    assert target.read_text(encoding='utf-8').count('class="line2"') >= 3
    assert report([str(tmp_path), str(runs[0])]) == 2
    assert capsys.readouterr().err == (
        f'error: {tmp_path}: is not a run folder, because it has no sft_args.json. Give a run folder, '
        'output/<model>/vN-<time>.\n'
    )


def test_a_checkpoint_is_not_taken_for_its_run(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its report would be empty: the curve, the proofs and the answers are in the folder of the run."""
    checkpoint = runs[0] / 'checkpoint-6'
    for words in ([str(checkpoint)], [str(runs[1]), str(checkpoint), '--html', str(tmp_path / 'both.html')]):
        assert report(words) == 2
        assert capsys.readouterr().err == (
            f'error: {checkpoint}: is a checkpoint, not a run folder. Give the folder of its run: {runs[0]}\n'
        )
    assert not (checkpoint / 'report.html').exists() and not list(tmp_path.iterdir())

    alone = shutil.copytree(checkpoint, tmp_path / 'copy' / 'checkpoint-6')
    assert report([str(alone)]) == 2
    assert capsys.readouterr().err.endswith('not a run folder. Give a run folder, output/<model>/vN-<time>.\n')


def test_the_comparison_is_in_the_first_run_and_leads_with_the_loss(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert report([*map(str, runs)]) == 0
    page = runs[0] / f'compare_{runs[0].name}_{runs[1].name}.html'
    printed = capsys.readouterr().out
    assert page.is_file() and printed.endswith(f'curves: {page}\n') and not list(tmp_path.iterdir())
    page.unlink()

    results = printed.partition('results: ')[2].splitlines()[1:-1]
    names = [line.split(':')[0].strip() for line in results]
    assert names[:4] == ['eval_loss', 'eval_acc', 'eval_drift_kl', 'train_loss']
    assert not [name for name in names if 'runtime' in name or 'eval_samples' in name or 'epoch' in name]
    assert max(len(word) for line in results for word in line.split(': ')[1].split(' -> ')) <= 7, 'numbers are rounded'


def test_a_report_that_cannot_be_written_is_one_error(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / 'run'
    copy.mkdir()
    shutil.copy(runs[0] / 'sft_args.json', copy)
    (copy / 'report.html').mkdir()
    assert report([str(copy)]) == 2
    assert capsys.readouterr().err == (
        f'error: {copy}/report.html: the report cannot be written: Is a directory. Correct the permissions, or free '
        'disk space.\n'
    )


def test_a_report_is_made_again_from_the_folder(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    page = runs[1] / 'report.html'
    before = page.read_text(encoding='utf-8')
    page.unlink()
    assert report([str(runs[1])]) == 0
    assert page.read_text(encoding='utf-8') == before
    (runs[1] / 'broken').mkdir()
    assert report([str(runs[1] / 'broken')]) == 2


def test_points_that_are_not_finite_are_left_out_of_a_chart() -> None:
    drawn = chart('loss', [Series(name='loss', points=[(1, 2.0), (2, float('nan')), (3, 1.0)])])
    assert drawn.count('<circle') == 2 and 'nan' not in drawn
    assert chart('loss', [Series(name='loss', points=[(1, float('inf'))])]) == ''


# ---- in a browser ----

# Measures a page from an outer page, because the page itself may not run scripts.
PROBE = """<!doctype html><title>measuring</title><iframe id=f style="border:0;width:WIDTHpx;height:30000px"></iframe>
<pre id=o></pre><script>
const frame = document.getElementById('f');
frame.onload = () => {
  const page = frame.contentDocument, view = page.defaultView, cut = [], width = page.documentElement.clientWidth;
  const details = page.querySelectorAll('details'); details.forEach(d => d.open = true);
  for (const e of page.body.querySelectorAll('*')) {
    const box = e.getBoundingClientRect(), scrolls = e.closest('.wide');
    const outside = box.left < -0.5 || box.right > width + 0.5;
    if (!scrolls && outside) cut.push(e.tagName + ' ' + e.textContent.slice(0, 40));
  }
  for (const svg of page.querySelectorAll('svg')) {
    const room = svg.getBoundingClientRect();
    for (const e of svg.querySelectorAll('text, polyline')) {
      const box = e.getBoundingClientRect();
      if (box.left < room.left - 0.5 || box.right > room.right + 0.5 || box.top < room.top - 0.5 ||
          box.bottom > room.bottom + 0.5) cut.push('in svg: ' + e.textContent);
    }
  }
  const lines = [...page.querySelectorAll('polyline')].map(l => l.getTotalLength());
  const tables = [...page.querySelectorAll('.wide')].filter(t => t.scrollWidth > t.clientWidth + 1).length;
  document.getElementById('o').textContent = JSON.stringify({cut, lines, tables, width,
    overflow: page.documentElement.scrollWidth - width, ground: view.getComputedStyle(page.body).backgroundColor,
    text: view.getComputedStyle(page.body).color});
};
frame.src = 'report.html';
</script>"""


@pytest.fixture(scope='module')
def served(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Return the address and folder of a loopback server with the report: a page may measure others of its origin."""
    folder = tmp_path_factory.mktemp('served')
    shutil.copy(runs[0] / 'report.html', folder)
    for width in (400, 1400):
        (folder / f'probe{width}.html').write_text(PROBE.replace('WIDTH', str(width)))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_address[1]}', folder
    server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium found: apt-get install chromium')
@pytest.mark.parametrize('width', [400, 1400])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_a_real_browser_shows_the_whole_report(
    width: int, scheme: str, served: tuple[str, Path], tmp_path: Path
) -> None:
    address, _ = served
    words = [
        str(CHROMIUM), '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
        '--disable-background-networking', '--disable-component-update', '--disable-sync', '--enable-logging=stderr',
        f'--user-data-dir={tmp_path / "profile"}', f'--window-size={width + 100},1000',
        f'--blink-settings=preferredColorScheme={int(scheme == "light")}', '--virtual-time-budget=20000',
        '--dump-dom', f'{address}/probe{width}.html',
    ]  # fmt: skip
    shown = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in shown.stderr.splitlines() if 'CONSOLE' in line]
    assert not console, 'no console errors'
    match = re.search(r'<pre id="o">(.*?)</pre>', shown.stdout, re.DOTALL)
    assert match is not None and match[1], shown.stdout[-500:]
    found = json.loads(match[1])
    assert found['cut'] == [] and found['overflow'] <= 0 and found['width'] == width
    assert len(found['lines']) >= 5 and min(found['lines']) > 50, 'the curves are drawn'
    assert found['ground'] == {'light': 'rgb(255, 255, 255)', 'dark': 'rgb(20, 23, 27)'}[scheme]
    assert width == 400 or found['tables'] == 0, 'a desk needs no scrolling sideways'
