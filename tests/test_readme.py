"""The README's code runs, and the files and commands that it names exist."""

import importlib.util
import pathlib
import re

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / 'README.md').read_text()
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def blocks(language):
  """Returns the line number and the text of each code block in a language."""
  found = BLOCK.finditer(TEXT)
  return [
    (TEXT[: x.start()].count('\n') + 1, x[2]) for x in found if x[1] == language
  ]


def test_code_runs(capsys):
  names, losses = {}, []
  # Run the blocks in order, in one namespace, as a reader would type them.
  for line, code in blocks('python'):
    exec(compile('\n' * line + code, 'README.md', 'exec'), names)
    printed = re.findall(r'^\d\.\d+$', capsys.readouterr().out, re.MULTILINE)
    if 'for _ in range(3)' in code:
      losses.append([float(x) for x in printed])
  assert np.shape(losses) == (2, 3)
  assert np.all(np.diff(losses) < 0)


def test_its_line_stands_verbatim():
  line = 'tx = optax.chain(galore(rank=512, gap=200), optax.adamw(lr))'
  assert line in TEXT.splitlines()


@pytest.mark.parametrize(
  'path',
  sorted(ROOT.glob('*.md')) + sorted(ROOT.glob('tests/bench/**/*.md')),
  ids=lambda path: path.stem,
)
def test_links_lead_to_files(path):
  links = re.findall(r'\]\((?!http)(.+?)\)', path.read_text())
  for link in links:
    assert (path.parent / link).exists(), link


def test_commands_name_files_and_targets_that_exist():
  named = re.findall(r'\b((?:configs|tests)/[\w/.*]*\w)', TEXT)
  for path in named:
    assert list(ROOT.glob(path)), path
  for module in re.findall(r' -m ([\w.]+\w)', TEXT):
    assert importlib.util.find_spec(module), module
  targets = set(re.findall(r'\bmake\s([a-z-]+)', TEXT))
  assert targets > {'train', 'test', 'plan'}
  makefile = (ROOT / 'Makefile').read_text()
  for target in targets:
    assert re.search(rf'^{target}:', makefile, re.MULTILINE), target
