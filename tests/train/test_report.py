import base64
import dataclasses
import gc
import html.parser
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

from models.llama import Layers, LlamaConfig
from tests.train.test_config import CONFIG
from train import report
from train.engine import memory_table, metrics
from train.engine.config_json import flatten
from train.engine.run import Run
from train.method import AdamW, Galore

MODEL = LlamaConfig(
  vocab_size=31, width=12, mlp_width=20, num_heads=2, num_layers=3
)


def test_a_picture_of_many_weights_has_no_legend():
  # A legend of 60 names would leave no room, and matplotlib would warn.
  paths = [f'level_{i}/block/first/kernel' for i in range(60)]
  found = {}
  for number in (3, 60):
    lines = [{'step': 1, **dict.fromkeys(paths[:number], 0.5)}] * 2
    image = report.picture('energy', lines, {x: x for x in paths[:number]})
    svg = base64.b64decode(image.source.split('base64,')[1]).decode()
    found[number] = 'legend' in svg
  assert found == {3: True, 60: False}


def text(optimizer, width=100, stored='float32', model=MODEL):
  shapes = jax.eval_shape(Layers(model).init, jax.random.key(0))
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, stored), shapes)
  tx = optimizer.build(optax.constant_schedule(0.1))
  console = Console(file=io.StringIO(), width=width)
  console.print(
    memory_table.memory_table(shapes, like, tx, type(optimizer).__name__)
  )
  return console.file.getvalue()


def test_bytes_are_exact():
  # Each layer has four kernels of 12 x 12 and three of 12 x 20. The shorter
  # side is projected to 5.
  projected = 3 * (4 * 12 * 12 + 3 * 12 * 20)
  rest = 2 * 31 * 12 + 7 * 12
  state = 3 * (4 * (5 * 12 + 2 * 5 * 12) + 3 * (5 * 12 + 2 * 5 * 20))
  found = text(Galore(rank=5))
  assert f'{projected + rest:,} parameters, {4 * (projected + rest):,}' in found
  assert f'of projected weights: {4 * state:,} bytes' in found
  assert f'optimizer state: {4 * (state + 2 * rest):,} bytes' in found
  assert f'AdamW: {8 * (projected + rest):,} ' in found
  assert '3x12x20' in found and '3x5x20' in found


def test_weights_count_as_they_are_stored():
  number = 3 * (4 * 12 * 12 + 3 * 12 * 20) + 2 * 31 * 12 + 7 * 12
  found = text(Galore(rank=5), stored='bfloat16')
  assert f'{number:,} parameters, {2 * number:,} bytes' in found


def test_a_note_says_that_many_weights_stay_whole():
  # Keys and values [12, 6] are smaller than the rank: 2 of 16 parts of a layer.
  model = dataclasses.replace(MODEL, num_kv_heads=1)
  found = ' '.join(text(Galore(rank=8), model=model).split())
  assert '12% of the weights in attention and MLP stay whole: lower' in found
  assert 'stay whole' not in text(Galore(rank=8))


def test_the_table_fits_a_terminal():
  assert max(map(len, text(Galore(rank=5), width=80).splitlines())) <= 80


def test_adamw_projects_nothing():
  found = text(AdamW())
  assert 'of projected weights' not in found and '(100.0%)' in found


@pytest.mark.parametrize('rank', [pytest.param(4, marks=pytest.mark.slow), 5])
def test_nothing_is_allocated(rank):
  def stacks():
    # Only stacked kernels have three axes. A thread of another test may still
    # create batches, which have fewer.
    return {id(x): x for x in jax.live_arrays() if x.ndim > 2}

  before = stacks()  # keeps arrays of earlier tests, and so their ids
  text(Galore(rank=rank))
  if stacks().keys() > before.keys():
    gc.collect()  # an array in a reference cycle is not held
  assert stacks().keys() <= before.keys()


TITLES = [
  *('Summary', 'Curves', 'Subspaces', 'Time', 'Skipped steps', 'Memory'),
  *('Samples', 'Configuration'),
]


@pytest.fixture
def run(tmp_path):
  """Returns a run with the files that training writes, except checkpoints."""
  found = Run(tmp_path / 'a <run>')
  found.directory.mkdir()
  found.write(dataclasses.replace(CONFIG, model=MODEL, steps=9))
  weights = {'blocks/q/kernel': [0.25, 0.75], 'blocks/k/kernel': [0.5, 0.5]}
  with metrics.opened(found.metrics_path, step=0, tensorboard=False) as log:
    for step in range(1, 9):
      values = {'loss': 5 - step / 8, 'learning_rate': 0.1, 'grad_norm': 1.0}
      speed = {'tokens_per_second': 99.0, 'flops_per_second': 1e9}
      spent = {'data_seconds': 0.25, 'step_seconds': 0.75}
      skipped = {'skipped_steps': int(step in (3, 6))}
      log(step, values | (speed | spent if step > 1 else {}) | skipped)
    log(7, dict.fromkeys(['captured_energy', 'subspace_overlap'], weights))
    log(8, {'validation_loss': 4.125, 'evaluation_seconds': 2.0})
    log(8, {'save_seconds': 1.0})
  pairs = [('Say <b>', ' it & go.')]
  found.samples_path.write_text(json.dumps(pairs))
  return found


class Page(html.parser.HTMLParser):
  """Parses the page into section texts, pictures and external references."""

  def __init__(self, text):
    super().__init__()
    self.open, self.texts, self.pictures = [], {}, {}
    self.title = self.heading = ''
    self.outside = re.findall(r'(?:src|href)="(?!data:)|url\(|@import', text)
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    if tag == 'img':
      source = dict(attrs)['src']
      start = 'data:image/svg+xml;base64,'
      assert source.startswith(start)
      svg = base64.b64decode(source.removeprefix(start), validate=True)
      self.pictures.setdefault(self.heading, []).append(svg)
    elif tag not in ('meta', 'br'):
      assert tag not in ('script', 'link', 'iframe')
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open[-1:] == ['h2']:
      self.heading = data
      self.texts[data] = []
    elif self.open[-1:] == ['title']:
      self.title = data
    elif self.heading and data.strip():
      self.texts[self.heading].append(data)


def test_the_page_has_every_section(run):
  report.main([str(run.directory)])
  text = run.report_path.read_text()
  page = Page(text)
  assert list(page.texts) == TITLES and page.title == str(run.directory)
  assert not page.outside
  # Curves are loss, learning rate, norm and speed; subspaces are energy and
  # overlap.
  numbers = {title: len(x) for title, x in page.pictures.items()}
  assert numbers == {'Curves': 4, 'Subspaces': 2}
  for pictures in page.pictures.values():
    for svg in pictures:
      root = xml.etree.ElementTree.fromstring(svg)
      assert root.tag == '{http://www.w3.org/2000/svg}svg'
  cells = page.texts['Summary']
  assert cells[cells.index('steps') + 1] == '8 of 9'
  assert cells[cells.index('tokens per second') + 1] == '99'
  assert cells[cells.index('validation loss') + 1] == '4.1250'
  cells = page.texts['Subspaces']
  at = cells.index('blocks/q/kernel')
  assert cells[at + 1 : at + 5] == 2 * ['0.250', '0.500']
  # There are 7 timed steps of 0.75 seconds with 0.25 seconds of loading, a
  # validation of 2 seconds and a save of 1 second.
  cells = page.texts['Time']
  at = cells.index('steps')
  assert cells[at + 1 : at + 3] == ['5.2', '52.5%']
  assert page.texts['Skipped steps'][-3:] == ['skipped steps', '2', '3, 6']
  assert '3x12x20' in ''.join(page.texts['Memory'])
  assert page.texts['Samples'] == ['Say <b>', ' it & go.']
  assert set(flatten(run.config())) <= set(page.texts['Configuration'])


def test_a_run_that_has_just_begun_has_a_page(run):
  run.samples_path.unlink()
  run.metrics_path.write_text('{"step": 1, "loss": 3.0}\n')
  page = Page(report.page(run))
  assert list(page.texts) == TITLES
  assert page.texts['Skipped steps'] == ['None.']
  assert 'None' in page.texts['Samples'][0]
  assert 'No subspace' in page.texts['Subspaces'][0]


def test_speeds_and_images_of_any_task_are_on_the_page(run):
  with metrics.opened(run.metrics_path, step=8, tensorboard=False) as log:
    log(9, {'loss': 1.5, 'images_per_second': 1234.0})
  run.images_path.write_bytes(b'a picture')
  text = report.page(run)
  cells = Page(text.replace('image/png', 'image/svg+xml')).texts['Summary']
  assert cells[cells.index('images per second') + 1] == '1,234'
  assert cells[cells.index('tokens per second') + 1] == '99'
  for alt in ('images per second by step', 'tokens per second by step'):
    assert f'<img alt="{alt}" src="data:image/svg' in text
  code = base64.b64encode(b'a picture').decode()
  assert f'<img alt="samples" src="data:image/png;base64,{code}">' in text
  assert 'Pre-training writes them' not in text


@pytest.mark.parametrize('missing', ['config_path', 'metrics_path'])
def test_a_directory_without_a_run_has_no_page(missing, run, capsys):
  getattr(run, missing).unlink()
  with pytest.raises(SystemExit):
    report.main([str(run.directory)])
  said = capsys.readouterr().err
  assert said.startswith('error:') and getattr(run, missing).name in said
  assert not run.report_path.exists()


BROWSER = shutil.which('chromium') or shutil.which('chromium-browser')


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason='needs chromium')
def test_a_browser_shows_the_page(run, tmp_path):
  from PIL import Image

  report.main([str(run.directory)])
  url = run.report_path.resolve().as_uri()
  picture = tmp_path / 'page.png'
  browse = lambda *options: subprocess.run(
    [
      *(BROWSER, '--headless', '--no-sandbox', '--disable-gpu'),
      *(f'--user-data-dir={tmp_path / "profile"}', '--hide-scrollbars'),
      # Block all network access.
      *('--host-resolver-rules=MAP * ~NOTFOUND', *options, url),
    ],
    capture_output=True,
    check=True,
    text=True,
    timeout=120,
  )
  document = browse('--dump-dom').stdout
  assert [f'<h2>{title}</h2>' in document for title in TITLES] == [True] * 8
  browse(f'--screenshot={picture}', '--window-size=1000,4000')
  pixels = np.asarray(Image.open(picture).convert('RGB')).astype(int)
  assert pixels.shape == (4000, 1000, 3)
  # The curves must have been drawn near the top, in matplotlib's blue.
  blue = np.abs(pixels - [31, 119, 180]).max(-1) < 30
  assert blue[:1500].sum() > 200
  # The page must have content from the top to the configuration at the end.
  dark = (pixels.max(-1) < 160).any(1)
  assert dark[:200].any() and dark[2500:].any()
