"""Every dotted name in a docstring, an error message or the README exists."""

import ast
import importlib
import inspect
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
OURS = ('galore_optax', 'models', 'train', 'configs', 'tests')
MODULES = sorted((ROOT / 'galore_optax').rglob('*.py'))
# Matches a dotted name in backticks: `a.b` or `a.b(...)`.
QUOTED = re.compile(r'`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)[`(]')
OF_OURS = re.compile(rf'(?<![\w./])(?:{"|".join(OURS)})(?:\.[A-Za-z_]\w*)+')
# `train.pt`, `models.md` and the like are files, not module names.
SUFFIXES = {'py', 'md', 'txt', 'json', 'jsonl'}


def imported(name):
  """Imports the module or the attribute that a dotted name denotes."""
  parts = name.split('.')
  for end in range(len(parts), 0, -1):
    try:
      found = importlib.import_module('.'.join(parts[:end]))
    except ImportError:
      continue
    for part in parts[end:]:
      found = getattr(found, part)
    return found
  raise AttributeError(name)


def is_written(name):
  """Returns whether a source file defines a name.

  The file is parsed, not imported, because some modules import heavy packages.
  """
  path, parts = ROOT, name.split('.')
  while parts and (path / parts[0]).is_dir():
    path = path / parts.pop(0)
  if parts and (path / f'{parts[0]}.py').exists():
    path = path / f'{parts.pop(0)}.py'
  else:
    path = path / '__init__.py'
  if not parts:
    return path.exists() or path.parent.is_dir()
  names = set()
  for node in ast.parse(path.read_text()).body if path.exists() else ():
    if isinstance(node, ast.Import | ast.ImportFrom):
      names |= {alias.asname or alias.name for alias in node.names}
    elif isinstance(node, ast.Assign):
      names |= {x.id for x in node.targets if isinstance(x, ast.Name)}
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
      names.add(node.target.id)
    else:
      names.add(getattr(node, 'name', None))
  return parts[0] in names


def documented(path):
  """Yields each definition in a file with a docstring, and that docstring."""
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, kinds) and ast.get_docstring(node):
      yield node, ast.get_docstring(node)


@pytest.mark.parametrize(
  'path', MODULES, ids=lambda path: f'{path.parent.name}/{path.stem}'
)
def test_a_quoted_name_of_the_library_resolves(path):
  own = path.relative_to(ROOT).with_suffix('').parts
  own = '.'.join(own[:-1] if own[-1] == '__init__' else own)
  for node, text in documented(path):
    values = {x.arg for x in ast.walk(node) if isinstance(x, ast.arg)}
    for name in QUOTED.findall(text):
      if name.split('.')[0] in values:
        continue  # The name is an attribute of a function argument.
      places = (name, f'galore_optax.{name}', f'{own}.{name}')
      assert any(map(resolves, places)), f'{path}: {name}'


def resolves(name):
  try:
    imported(name)
  except AttributeError:
    return False
  return True


def test_every_module_that_a_text_names_exists():
  texts = {'README.md': (ROOT / 'README.md').read_text()}
  for folder in OURS[:-1]:
    for path in sorted((ROOT / folder).rglob('*.py')):
      texts[path] = '\n'.join(text for _, text in documented(path))
    for path in sorted((ROOT / folder).rglob('*.md')):
      texts[path] = path.read_text()
  found = [
    (path, name)
    for path, text in texts.items()
    for name in OF_OURS.findall(text)
    if name.split('.')[-1] not in SUFFIXES
  ]
  assert len(found) > 40
  missing = [(path, name) for path, name in found if not is_written(name)]
  assert not missing


def test_messages_name_modules_that_exist():
  """The modules that the library's error messages recommend exist."""
  for path in MODULES:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Constant) and isinstance(node.value, str):
        for name in OF_OURS.findall(node.value):
          assert name.split('.')[-1] in SUFFIXES or resolves(name), name


def test_finders_are_names_of_the_subspace_package():
  """The error message of `galore(subspace=...)` recommends these names."""
  import galore_optax
  from galore_optax import subspace

  names = (
    *('Coordinates', 'Gaussian', 'Gram', 'Lazy', 'Packed', 'PowerIteration'),
    *('RandomOrthogonal', 'Randomized', 'Staggered', 'Svd'),
  )
  for name in names:
    assert inspect.isclass(getattr(subspace, name))
    assert getattr(galore_optax, name) is getattr(subspace, name)
