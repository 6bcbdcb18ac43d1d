"""Which packages may import which, checked on the import statements."""

import ast
import pathlib
import subprocess
import sys

import pytest

from train.method import METHODS

ROOT = pathlib.Path(__file__).parent.parent
OURS = {'galore_optax', 'models', 'train', 'configs', 'tests'}
HEAVY = {'flax', 'orbax', 'grain', 'tensorflow', 'tensorflow_datasets'}

# Maps each package to the packages of this repository that it may import.
ARROWS = {
  'galore_optax': {'galore_optax'},
  'models': {'models'},
  'train': {'train', 'models', 'galore_optax'},
  'configs': {'configs', 'train', 'models'},
  'configs/studies': {'configs', 'train', 'models', 'galore_optax'},
}

FILES = {
  *('pyproject.toml', 'README.md', 'LICENSE', 'Makefile', 'CHANGELOG.md'),
  *('.ci', '.gitignore', *OURS),
}


def imports(path):
  """Yields the packages that a file imports, at any level of its code."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name.split('.')[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path} imports relatively'
      yield node.module.split('.')[0]


def modules(package):
  found = sorted((ROOT / package).rglob('*.py'))
  assert found
  return found


@pytest.mark.parametrize('package', sorted(ARROWS))
def test_arrows(package):
  inside = [ROOT / name for name in ARROWS if name.startswith(f'{package}/')]
  for path in modules(package):
    if not any(path.is_relative_to(folder) for folder in inside):
      assert set(imports(path)) & OURS <= ARROWS[package], path


def test_configs_do_not_import_studies():
  for path in (ROOT / 'configs').glob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ImportFrom):
        assert not (node.module or '').startswith('configs.studies'), path


def test_the_library_needs_only_jax_and_optax():
  allowed = {'galore_optax', 'jax', 'optax', 'numpy', *sys.stdlib_module_names}
  for path in modules('galore_optax'):
    assert set(imports(path)) <= allowed, path


def test_importing_the_library_loads_nothing_heavy():
  code = 'import sys, galore_optax; print(*sys.modules)'
  run = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    check=True,
    cwd=ROOT,
    text=True,
  )
  loaded = {name.split('.')[0] for name in run.stdout.split()}
  assert 'galore_optax' in loaded and not loaded & HEAVY


def test_no_other_top_level_names():
  listing = subprocess.run(
    ['git', 'ls-files'], capture_output=True, check=True, cwd=ROOT, text=True
  )
  names = {line.split('/')[0] for line in listing.stdout.splitlines()}
  assert names <= FILES, names - FILES


# Maps each subpackage, and each core module, of the library to the parts that
# it may import. Every part may import the modules in FLOOR.
FLOOR = {
  *('axis_names', 'checks', 'closures', 'containers', 'edge', 'names'),
  *('options', 'orthogonal', 'paths', 'precision', 'projection', 'sharding'),
  *('trial', 'unstack'),
}
CORE = {
  *('galore', 'stages', 'chain', 'plan', 'decay', 'moments', 'residual'),
  *('memory', 'clipping', 'one_layer'),
}
INSIDE = {
  'quantized': FLOOR,
  'subspace': FLOOR | {'quantized'},
  'core': FLOOR | CORE | {'subspace', 'quantized'},
  'layerwise': FLOOR | CORE | {'quantized'},
  'presets': FLOOR | CORE | {'subspace', 'quantized'},
}


def parts(path):
  """Yields the parts of the library that a file imports, such as 'galore'."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      package, *rest = node.module.split('.')
      if package == 'galore_optax':
        yield from [rest[0]] if rest else [alias.name for alias in node.names]


@pytest.mark.parametrize(
  'path',
  modules('galore_optax'),
  ids=lambda path: f'{path.parent.name}/{path.stem}',
)
def test_arrows_inside_the_library(path):
  folder = path.parent.name
  if path.name == '__init__.py' and folder == 'galore_optax':
    return
  here = 'core' if folder == 'galore_optax' else folder
  if here == 'core' and path.stem in FLOOR:
    assert set(parts(path)) <= FLOOR
  else:
    assert set(parts(path)) <= INSIDE[here] | {folder}


def test_folders_of_the_library_are_one_level_deep():
  for path in modules('galore_optax'):
    assert len(path.relative_to(ROOT).parts) <= 3


# Places that name presets: the library, the list of methods, tests of single
# presets, and calls and options of other packages.
NAME_PRESETS = (
  'galore_optax/__init__.py',
  'galore_optax/presets/',
  'train/optimizers/registry.py',
  'tests/galore_optax/presets/',
  # Calls as other packages write them.
  'tests/parity/',
  'tests/peers/',
  'tests/trainers/',
  # Values of `optim` in transformers.
  'train/hf_args.py',
  'tests/train/test_hf_args.py',
)


def named_presets(path, presets):
  """Yields the presets that the code of a file names.

  A name is imported, is an attribute, or is a whole string. Names without an
  underscore are common words, so they count only as attributes of the library.
  """
  tree = ast.parse(path.read_text())
  library = {
    alias.asname or alias.name
    for node in ast.walk(tree)
    if isinstance(node, ast.Import)
    for alias in node.names
    if alias.name == 'galore_optax'
  }
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom):
      if (node.module or '').split('.')[0] == 'galore_optax':
        yield from presets & {alias.name for alias in node.names}
    elif isinstance(node, ast.Attribute) and node.attr in presets:
      base = node.value.id if isinstance(node.value, ast.Name) else ''
      if '_' in node.attr or base in library:
        yield node.attr
    elif isinstance(node, ast.Constant) and node.value in presets:
      if '_' in node.value:
        yield node.value


def test_presets_are_listed_once():
  presets = {
    row.preset.__name__
    for row in METHODS.values()
    if row.preset.__module__.startswith('galore_optax')
  }
  assert len(presets) > 10
  found = {
    str(path.relative_to(ROOT)): sorted(names)
    for package in sorted(OURS)
    for path in modules(package)
    if (names := {*named_presets(path, presets)})
  }
  assert 'train/optimizers/registry.py' in found
  others = {k: x for k, x in found.items() if not k.startswith(NAME_PRESETS)}
  assert not others, 'name presets by their classes in train.method'


def test_functions_are_shorter_than_a_screen_and_a_half():
  for path in modules('galore_optax'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef):
        doc = ast.get_docstring(node, clean=False) or ''
        length = node.end_lineno - node.lineno - len(doc.splitlines())
        assert length < 80, f'{path}: {node.name}'
