"""The code of the READMEs runs, and the names and links in them exist.

`galore_optax/README.md` has a table of features that work together. Each cell
is tried here, on shapes only.
"""

import importlib.util
import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import galore_optax as go
from train.optimizers import registry

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ('galore_optax', 'train', 'models', 'configs', 'tests')
READMES = ['README.md', *(f'{folder}/README.md' for folder in FOLDERS)]
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
# `make peers` runs the blocks that need other libraries.
PEERS = '<!-- peers -->\n'
LINK = re.compile(r'\]\((?!\w+:)([^)\s]+)\)')

each_readme = pytest.mark.parametrize('name', READMES)


def text_of(name):
  return (ROOT / name).read_text()


def table(name, mark):
  """Returns the rows of the table between two comments, as lists of cells."""
  between = re.compile(rf'<!-- {mark} -->\n(.*?)\n<!-- /{mark} -->', re.DOTALL)
  head, _, *rows = between.search(text_of(name))[1].splitlines()
  return [list(map(str.strip, row.split('|')[1:-1])) for row in [head, *rows]]


def section(name, heading):
  """Returns a section of a page, without the heading."""
  return text_of(name).split(f'\n## {heading}\n')[1].split('\n## ')[0]


@each_readme
def test_code_runs_and_prints_what_the_page_shows(name, capsys):
  names, losses, printed = {}, [], None
  # Run the blocks in order, in one namespace, as a reader would type them.
  for found in BLOCK.finditer(text_of(name)):
    language, code = found.groups()
    if text_of(name)[: found.start()].endswith(PEERS):
      continue
    if language == 'python':
      line = text_of(name)[: found.start()].count('\n') + 1
      exec(compile('\n' * line + code, name, 'exec'), names)
      printed = capsys.readouterr().out
      if 'for _ in range(3)' in code:
        losses.append([float(x) for x in printed.split()])
        printed = None
    elif not language and printed:
      assert printed == code
      printed = None
  assert not printed, f'{name} does not show {printed}'
  assert all(len(values) == 3 for values in losses)
  assert np.all(np.diff(losses) < 0)


def test_both_loops_are_there():
  for name in READMES[:2]:
    assert 'for _ in range(3)' in text_of(name)


def test_its_line_stands_verbatim():
  line = 'tx = optax.chain(galore(rank=512, gap=200), optax.adamw(lr))'
  assert line in text_of('README.md').splitlines()


def slug(heading):
  """Returns the anchor of a heading, as browsers of repositories make it."""
  kept = re.sub(r'[^\w\- ]', '', heading.replace('`', '').lower())
  return kept.strip().replace(' ', '-')


def anchors(path):
  prose = BLOCK.sub('', path.read_text())
  return {slug(x) for x in re.findall(r'^#+ (.+)$', prose, re.MULTILINE)}


@pytest.mark.parametrize(
  'path',
  [
    *(ROOT / name for name in [*READMES, 'CHANGELOG.md']),
    *sorted(ROOT.glob('tests/bench/**/*.md')),
    *sorted(ROOT.glob('configs/**/results/*.md')),
  ],
  ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_lead_to_files(path):
  for link in LINK.findall(BLOCK.sub('', path.read_text())):
    target, _, anchor = link.partition('#')
    found = path.parent / target if target else path
    # A folder has no page on the site.
    assert found.is_file(), link
    if anchor:
      assert anchor in anchors(found), link


@each_readme
def test_commands_name_files_and_targets_that_exist(name):
  text = text_of(name)
  for path in re.findall(r'(?<![\w/.])((?:configs|tests)/[\w/.*]*\w)', text):
    assert list(ROOT.glob(path)), path
  for module in re.findall(r' -m ([\w.]+\w)', text):
    assert importlib.util.find_spec(module), module
  makefile = text_of('Makefile')
  for target in re.findall(r'\bmake\s([a-z-]+)', ' '.join(code_of(text))):
    assert re.search(rf'^{target}:', makefile, re.MULTILINE), target


def code_of(text):
  """Returns the code of a page, from blocks and from lines."""
  prose = BLOCK.sub('', text)
  return [x[1] for x in BLOCK.findall(text)] + re.findall('`([^`]+)`', prose)


def test_the_first_page_names_the_commands():
  targets = set(re.findall(r'\bmake\s([a-z-]+)', text_of('README.md')))
  assert targets > {'train', 'test', 'plan', 'docs', 'release'}


def test_figures_stand_on_the_pages_that_their_paragraph_links_to():
  checked = 0
  for paragraph in BLOCK.sub('', text_of('README.md')).split('\n\n'):
    links = [link.partition('#')[0] for link in LINK.findall(paragraph)]
    pages = [x for x in links if x.startswith(('configs/', 'tests/bench/'))]
    sources = ''.join(text_of(x) for x in pages if not x.endswith('.png'))
    figures = re.findall(
      r'(?<![\w.])(?:\d+(?:,\d{3})+|\d+\.\d+)(?![\w.%])', paragraph
    )
    if sources:
      assert not [x for x in figures if x not in sources], paragraph
      checked += len(figures)
  assert checked > 12


def test_differences_to_adamw_are_those_of_the_benchmark():
  page = text_of('configs/studies/results/methods.md')
  titles = {row.preset.__name__: row.title for row in registry.ROWS}
  text = section('README.md', 'Which method should I use?')
  rows = re.findall(r'^\| (.+) \| (.+) \| (.+) \| (.+) \|$', text, re.MULTILINE)
  for name, megabytes, *differences in rows[2:]:
    name = name.strip('`').partition(',')[0]
    title = titles.get(name, name)
    found = re.findall(
      rf'^\| {title} \|.*\| (?:-|(\S+) \+- (\S+)) \| ([\d,]+) \|$',
      page,
      re.MULTILINE,
    )
    assert len(found) == 2, title
    for shown, (mean, interval, kilobytes) in zip(
      differences, found, strict=True
    ):
      size = float(kilobytes.replace(',', '')) / 1000
      assert megabytes == f'{size:.1f}'
      assert shown == (f'{mean} ± {interval}' if mean else '0')


def test_the_table_of_methods_is_the_generated_one():
  rows = registry.table().splitlines()
  assert '\n'.join(rows) in text_of('galore_optax/README.md')


def test_every_public_name_has_a_task():
  text = section('galore_optax/README.md', 'Public names by task')
  listed = set(re.findall(r'`(\w+)`', text))
  exported = {
    name
    for name, value in vars(go).items()
    if not name.startswith('_') and not inspect.ismodule(value)
  }
  # It runs once, at the import.
  assert exported - {'install_chain'} <= listed


def test_every_option_of_galore_is_in_the_table():
  text = section('galore_optax/README.md', 'Options of `galore`')
  rows = re.findall(r'^\| `(\w+)` \| (.+?) \|', text, re.MULTILINE)
  options = list(inspect.signature(go.galore).parameters.values())[1:]
  found = {name: default.strip('`') for name, default in rows}
  assert found == {x.name: repr(x.default) for x in options}


def test_every_config_is_listed_with_figures_of_its_docstring():
  rows = re.findall(
    r'^\| \[.*\]\((.+\.py)\) (\|.*)$', text_of('configs/README.md'), re.M
  )
  files = [
    str(path.relative_to(ROOT / 'configs'))
    for path in ROOT.glob('configs/**/*.py')
  ]
  assert sorted(name for name, _ in rows) == sorted(files)
  for name, cells in rows:
    for figure in re.findall(r'\d+\.\d+', cells):
      assert figure in text_of(f'configs/{name}'), f'{name}: {figure}'


@pytest.mark.parametrize(
  'page, folder, least', [('tests', 'bench', 10), ('configs', 'studies', 6)]
)
def test_every_program_and_result_is_listed(page, folder, least):
  text = text_of(f'{page}/README.md')
  for path in ROOT.glob(f'{page}/{folder}/results/*.md'):
    assert f']({folder}/results/{path.name})' in text, path.name
  programs = [
    *(path.parent for path in ROOT.glob(f'{page}/{folder}/*/__main__.py')),
    *(
      path
      for path in ROOT.glob(f'{page}/{folder}/*.py')
      if "__name__ == '__main__'" in path.read_text()
    ),
  ]
  assert len(programs) >= least
  for path in programs:
    assert f'`{page}.{folder}.{path.stem}`' in text, path.stem


def test_every_page_of_results_names_its_command():
  for path in ROOT.glob('configs/studies/results/*.md'):
    command = f'`python -m configs.studies.{path.stem}'
    assert command in path.read_text(), path.name


# The table of features that work together.

SHAPES = {
  'blocks': {'w': (2, 264, 520), 'norm': (2, 264)},
  'embed': (300, 264),
  'head': (264, 300),
}
PARAMS = jax.tree.map(
  lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
  SHAPES,
  is_leaf=lambda x: isinstance(x, tuple),
)
BATCH = jax.ShapeDtypeStruct((8,), jnp.int32)
HEAD, *ROWS = table('galore_optax/README.md', 'together')


class Model:
  """Layers x + norm tanh(x w) w^T with one matrix `w` each."""

  def embed(self, params, batch):
    return params['embed'][batch]

  def block(self, layer, x):
    return x + jnp.tanh(x @ layer['w']) @ layer['w'].T * layer['norm'][None]

  def loss(self, params, x, batch):
    return jnp.mean((x @ params['head']) ** 2), {}


def built(cell):
  """Returns the transformation of a cell's code, at a learning rate of 0.1."""
  return eval(cell.strip('`'), vars(go) | {'optax': optax, 'lr': 0.1})


def factory(cell):
  """Returns a function of the learning rate for a row."""
  name = cell.strip('`').removesuffix('(lr)')
  if hasattr(go, name):
    return getattr(go, name)
  return lambda learning_rate: go.galore(optax.adamw(learning_rate))


def run(tx):
  state = jax.eval_shape(tx.init, PARAMS)
  return jax.eval_shape(tx.update, PARAMS, state, PARAMS)


def run_layerwise(tx, **options):
  step = go.layerwise(Model(), tx, **options)
  state = jax.eval_shape(step.init, PARAMS)
  return jax.eval_shape(step, PARAMS, state, BATCH)


def num_bytes(tx):
  state = jax.eval_shape(tx.init, PARAMS)
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def on_mesh(row):
  mesh = jax.make_mesh((2,), ('fsdp',))
  place = NamedSharding(mesh, PartitionSpec())
  places = jax.tree.map(lambda _: place, PARAMS)
  go.state_shardings(built(row), PARAMS, places)


def inject(row):
  run(optax.inject_hyperparams(factory(row))(0.1))


def inject_static(row):
  names = inspect.signature(factory(row)).parameters
  static = {'rank', 'gap', 'density', 'switch_every', 'block_size', 'min_size'}
  run(
    optax.inject_hyperparams(
      factory(row), static_args=tuple(static & names.keys())
    )(0.1)
  )


FEATURES = {
  '`layerwise`': lambda row: run_layerwise(built(row), microbatches=2),
  'its `clip_norm`': lambda row: run_layerwise(built(row), clip_norm=1.0),
  'its `accumulate`': lambda row: run_layerwise(built(row), accumulate=2),
  '`quantize_bases`': lambda row: run(go.quantize_bases(built(row))),
  'mesh': on_mesh,
  '`grouped`': lambda row: run(
    go.grouped(factory(row), [go.Group('embed', rate=0.5)])(0.1)
  ),
  '`MultiSteps`': lambda row: run(optax.MultiSteps(built(row), 2)),
  '`apply_if_finite`': lambda row: run(optax.apply_if_finite(built(row), 3)),
  '`clip_by_global_norm`': lambda row: run(
    optax.chain(optax.clip_by_global_norm(1.0), built(row))
  ),
}


def test_the_table_has_every_method_and_feature():
  known = {'`inject_hyperparams`', '8-bit moments'} | FEATURES.keys()
  assert set(HEAD[1:]) == known
  presets = [row.preset.__name__ for row in registry.ROWS if row.cells]
  wanted = ['galore(optax.adamw(lr))', *(f'{name}(lr)' for name in presets)]
  assert [row[0].strip('`') for row in ROWS] == wanted


# The others take seconds each.
QUICK = {
  registry.METHODS[name].preset.__name__ for name in ('Lomo', 'ScaleSgd')
}


@pytest.mark.parametrize(
  'row',
  [
    pytest.param(
      row,
      marks=() if row[0][1:].split('(')[0] in QUICK else pytest.mark.slow,
      id=row[0].strip('`'),
    )
    for row in ROWS
  ],
)
def test_features_work_together_as_the_table_has_it(row):
  cells = dict(zip(HEAD, row, strict=True))
  name = cells.pop('method')
  for feature, cell in cells.items():
    if feature == '8-bit moments':
      check_eight_bits(name, cell)
    elif feature == '`inject_hyperparams`':
      check_injected(name, cell)
    elif cell.startswith('raises'):
      with pytest.raises(ValueError):
        FEATURES[feature](name)
    else:
      assert cell in ('yes', 'no effect'), cell
      FEATURES[feature](name)
  if cells['`quantize_bases`'] in ('yes', 'no effect'):
    packed = num_bytes(go.quantize_bases(built(name)))
    assert (packed < num_bytes(built(name))) == (
      cells['`quantize_bases`'] == 'yes'
    )


def check_eight_bits(name, cell):
  if cell.startswith('`'):
    run(built(cell))
    assert num_bytes(built(cell)) < 0.6 * num_bytes(built(name))
  else:
    assert cell in ('built in', 'no', 'no moments')
  if cell == 'no moments':
    assert num_bytes(built(name)) < 100


def check_injected(name, cell):
  if cell == 'static':
    with pytest.raises(ValueError, match='static_args'):
      inject(name)
    inject_static(name)
  else:
    assert cell == 'yes'
    inject(name)
