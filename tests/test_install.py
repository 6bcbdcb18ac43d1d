"""Contents of the wheel, and of the environments that the Makefile creates."""

import email
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def commands(tmp_path, target, *, card):
  """Returns the commands that make would run, with or without a GPU.

  An `nvidia-smi` script that imitates the output in both cases stands in for
  the real program.
  """
  tool = tmp_path / 'nvidia-smi'
  # The real nvidia-smi prints driver failures to stdout.
  answer = 'GPU 0: NVIDIA GeForce RTX 4090' if card else 'NVIDIA-SMI has failed'
  tool.write_text(f'#!/bin/sh\necho "{answer}"\n')
  tool.chmod(0o755)
  return subprocess.run(
    ['make', '--dry-run', '--always-make', target],
    capture_output=True,
    check=True,
    cwd=ROOT,
    env=os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}'},
    text=True,
  ).stdout


@pytest.mark.parametrize('target', ['train', 'train-layerwise'])
@pytest.mark.parametrize(
  'card, extra', [(True, 'train-cuda'), (False, 'train')]
)
def test_training_has_jax_for_the_card_that_is_there(
  tmp_path, target, card, extra
):
  text = commands(tmp_path, target, card=card)
  assert f"pip install -q -e '.[{extra}]'" in text


@pytest.mark.parametrize(
  'target', ['train', 'test', 'slow', 'peers', 'lint', 'docs', 'release']
)
def test_the_cuda_compiler_stays_out_of_the_environment(tmp_path, target):
  # The plan extra installs the CUDA compiler. On a machine without a GPU, JAX
  # would then print an error at every start.
  assert 'plan]' not in commands(tmp_path, target, card=False)


@pytest.mark.slow
def test_the_wheel_holds_only_the_library(tmp_path):
  # Build from a copy, because a `build` folder in the checkout may hold files
  # of an older tree.
  source = tmp_path / 'source'
  source.mkdir()
  for name in ('pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  for name in ('galore_optax', 'models', 'train', 'configs'):
    ignore = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, source / name, ignore=ignore)
  subprocess.run(
    [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '.', '-w', '..'],
    check=True,
    cwd=source,
  )
  (wheel,) = tmp_path.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
    (metadata,) = (n for n in names if n.endswith('.dist-info/METADATA'))
    found = email.message_from_bytes(archive.read(metadata))
  ours = {
    str(path.relative_to(source))
    for path in (source / 'galore_optax').rglob('*')
    if path.is_file() and path.name != 'README.md'
  }
  assert 'galore_optax/py.typed' in ours
  assert {name for name in names if '.dist-info/' not in name} == ours
  needed = [x for x in found.get_all('Requires-Dist') if 'extra' not in x]
  assert sorted(x.split('>=')[0] for x in needed) == ['jax', 'optax']
  assert found['License-Expression'] == 'Apache-2.0'
  assert 'Typing :: Typed' in found.get_all('Classifier')
  code = 'import galore_optax; print(galore_optax.__file__)'
  run = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    check=True,
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(wheel)},
    text=True,
  )
  assert run.stdout.startswith(str(wheel))
