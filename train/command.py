"""This module holds the command line of training, and its one error report."""

import contextlib
import dataclasses
import pathlib
import runpy
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

import tyro

from train.config import Config, flatten, variants

USAGE = """usage: python -m {program} CONFIG [--KEY VALUE ...]

CONFIG is a Python file that holds `config = Config(...)`, such as
configs/quickstart.py. `python -m {program} CONFIG --help` documents every
key with the value that CONFIG gives it.
"""


Request = TypeVar('Request')


@dataclasses.dataclass(frozen=True)
class Launch:
  """Pre-trains a model."""

  program: ClassVar[str] = 'train.pretrain'
  config: Annotated[Config, tyro.conf.arg(name='')]
  """What is trained."""
  run: pathlib.Path | None = None
  """Directory to write to; None is runs/NAME, then runs/NAME-2 and so on."""
  resume: bool = False
  """Continue the run in --run; without --run, the newest of this config."""
  tensorboard: bool = False
  """Write TensorBoard events too (needs the extra `tensorboard`)."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
  """Ends the program with one message where the user asked the impossible.

  Only preparation belongs inside: an error of training itself is ours, and
  keeps its traceback.
  """
  try:
    yield
  except (ValueError, OSError, ImportError) as error:
    print(f'error: {error}', file=sys.stderr)
    raise SystemExit(2) from error


def parse(
  argv: Sequence[str], kind: type[Request] = Launch
) -> tuple[Request, str]:
  """Returns what a command line asks for, and the name of its config file.

  Args:
    argv: the path of a config file, then `--KEY VALUE ...`.
    kind: a dataclass whose field `config` is the experiment and whose other
      fields are the options of its `program`.
  """
  if not argv or argv[0].startswith('-'):
    wants_help = bool({'-h', '--help'} & set(argv))
    print(
      USAGE.format(program=kind.program),
      file=sys.stdout if wants_help else sys.stderr,
    )
    raise SystemExit(0 if wants_help else 2)
  path, *rest = argv
  default, rest = choose(load(path), rest)
  try:
    request = tyro.cli(
      kind,
      default=kind(default),
      args=rest,
      prog=f'python -m {kind.program} {path}',
      description=describe(kind),
      config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
    )
  except SystemExit as stop:
    if stop.code:
      print(f'valid keys: {", ".join(keys(default, kind))}', file=sys.stderr)
    raise
  return request, pathlib.Path(path).stem


def load(path: str) -> Config:
  """Returns the `config` of a Python file."""
  if not pathlib.Path(path).is_file():
    found = sorted(str(file) for file in pathlib.Path('configs').glob('*.py'))
    raise FileNotFoundError(
      f'no config file {path}; there are {", ".join(found) or "none here"}'
    )
  try:
    config = runpy.run_path(path).get('config')
  except TypeError as error:
    raise ValueError(f'{path}: {error}') from error
  if not isinstance(config, Config):
    raise ValueError(f'{path} must hold `config = Config(...)`')
  return config


def choose(config: Config, args: Sequence[str]) -> tuple[Config, list[str]]:
  """Takes `--optimizer AdamW` and the like out of the arguments.

  Another method comes with its own defaults; what has none must follow, as in
  `--corpus TextFiles --corpus.train 'text/*.txt'`.
  """
  rest = list(args)
  for name, kinds in choices().items():
    while f'--{name}' in rest:
      at = rest.index(f'--{name}')
      kind = rest[at + 1] if at + 1 < len(rest) else ''
      if kind not in kinds:
        raise ValueError(
          f'--{name} must be one of {", ".join(kinds)}, got {kind!r}'
        )
      if kind != type(getattr(config, name)).__name__:
        fresh = blank(kinds[kind])
        config = dataclasses.replace(config, **{name: fresh})
      del rest[at : at + 2]
  return config, rest


def choices() -> dict[str, dict[str, type]]:
  """Returns the fields of a config that have a choice of classes."""
  hints = typing.get_type_hints(Config)
  unions = {
    name: [kind for kind in variants(hint) if dataclasses.is_dataclass(kind)]
    for name, hint in hints.items()
  }
  return {
    name: {kind.__name__: kind for kind in kinds}
    for name, kinds in unions.items()
    if len(kinds) > 1
  }


def blank(kind: Any) -> Any:
  """Returns an instance; the fields without a default are still to give."""
  required = [
    field.name
    for field in dataclasses.fields(kind)
    if field.default is dataclasses.MISSING
  ]
  return kind(**dict.fromkeys(required, tyro.MISSING))


def describe(kind: type) -> str:
  """Returns the help's first lines."""
  lines = [
    f'--{name} {{{",".join(kinds)}}}: another one, with its own defaults.'
    for name, kinds in choices().items()
  ]
  return '\n\n'.join([kind.__doc__ or '', *lines])


def keys(config: Config, kind: type = Launch) -> list[str]:
  """Returns every key that the command line takes with this config."""
  options = [field.name for field in dataclasses.fields(kind)][1:]
  named = [*options, *flatten(config)]
  nested = {
    name for name in named if any(x.startswith(f'{name}.') for x in named)
  }
  return [
    '--' + name.replace('_', '-')
    for name in named
    if name not in nested or name in choices()
  ]
