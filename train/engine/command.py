"""The command line of all programs, and how they report errors of the user.

`parse_options` parses the options of a program, a dataclass. `parse` does so
for a program of a config file, and applies `--KEY VALUE` to the config.
`user_errors` ends a program with one line if a file or an option is wrong.
"""

import contextlib
import dataclasses
import io
import itertools
import pathlib
import re
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

import tyro

from train.config import Config
from train.engine import run as run_lib
from train.engine.config_json import bases, choices, flatten
from train.engine.environment import environment
from train.engine.run import Run
from train.method import AdamW
from train.optimizers.registry import projects

USAGE = """usage: python -m {program} CONFIG [--KEY VALUE ...]

CONFIG is a Python file that holds `config = Config(...)`, such as
configs/quickstart.py. `python -m {program} CONFIG --help` documents every
key with the value that CONFIG gives it.
"""


class Options(Protocol):
  """The options of a program: a dataclass whose docstrings are its help."""

  program: ClassVar[str]
  """Name of the module that runs the program."""


class Program(Options, Protocol):
  """The options of a program that takes a config; the others have defaults."""

  def __init__(self, config: Config) -> None:
    """Sets the experiment."""

  @property
  def config(self) -> Config:
    """The experiment."""
    ...


Some = TypeVar('Some')
Given = TypeVar('Given', bound=Options)
Request = TypeVar('Request', bound=Program)


class UsageError(ValueError):
  """A command line that does not fit the options of a program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continued:
  """The options that name the run which a program writes or continues."""

  run: pathlib.Path | None = None
  """Directory to write to; None is runs/NAME, then runs/NAME-2 and so on."""
  resume: bool = False
  """Continue the run in --run, or else the newest run of this config, with the
  values that it was started with. Only options of saving, validation and the
  mesh may change."""
  branch: bool = False
  """Start a new run from the newest checkpoint of the run that --resume would
  continue. Options that are not given keep that run's values."""


@dataclasses.dataclass(frozen=True)
class Launch(Continued):
  """Pre-trains a model."""

  program: ClassVar[str] = 'train.pretrain'
  config: Annotated[Config, tyro.conf.arg(name='')]
  """The experiment."""
  tensorboard: bool = False
  """Write TensorBoard events too (needs the extra `tensorboard`)."""
  profile: bool = False
  """Write a profiler's trace of three steps into the run's directory."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
  """Ends the program with one line if the user must change something.

  Use it only for preparation. An error of training itself is a defect of this
  program, and keeps its traceback.
  """
  try:
    yield
  except (ValueError, OSError, ImportError) as error:
    # Some libraries put several lines into a message.
    print('error:', ' '.join(str(error).split('\n')), file=sys.stderr)
    raise SystemExit(2) from error


def check_least(least: int, **values: int | None) -> None:
  """Raises ValueError for an option of a program that is too small."""
  for name, value in values.items():
    if value is not None and value < least:
      raise ValueError(
        f'--{name.replace("_", "-")} must be at least {least}, got {value}'
      )


def check_given(**values: Sequence[str] | None) -> None:
  """Raises ValueError for an option of a program without any value."""
  for name, value in values.items():
    if value is not None and not value:
      raise ValueError(f'--{name.replace("_", "-")} needs a value, got none')


def parse_options(kind: type[Given], argv: Sequence[str]) -> Given:
  """Parses the command line of a program.

  Args:
    kind: the dataclass of the program's options. Its docstring describes the
      program, and the docstrings of its fields describe the options.
    argv: the arguments.

  Raises:
    ValueError: an option does not exist, or has a wrong value.
    SystemExit: help was requested.
  """
  with usage_errors(argv):
    return tyro.cli(
      kind,
      args=argv,
      prog=f'python -m {kind.program}',
      description=kind.__doc__,
    )


def parse_some(kind: type[Some], argv: Sequence[str]) -> tuple[Some, list[str]]:
  """Parses the options of a dataclass, and returns the other arguments.

  Raises:
    ValueError: an option has a wrong value.
  """
  with usage_errors(argv):
    return tyro.cli(kind, args=argv, return_unknown_args=True, add_help=False)


@contextlib.contextmanager
def usage_errors(argv: Sequence[str]) -> Iterator[None]:
  """Raises a ValueError of one line if tyro rejects the arguments.

  tyro prints its errors over several lines, and ends the program.

  Args:
    argv: the arguments that tyro parses.

  Raises:
    UsageError: an option does not exist, or has a value of another type.
    ValueError: the check of a dataclass rejects a value.
  """
  printed = io.StringIO()
  columns = {} if {'-h', '--help'} & set(argv) else {'COLUMNS': '9999'}
  try:
    with contextlib.redirect_stderr(printed), environment(columns):
      yield
  except SystemExit as stop:
    if not stop.code:
      raise
    error = refusal(stop) or UsageError(sentence(printed.getvalue()))
    raise error from None


def sentence(box: str) -> str:
  """Returns the text of an error that tyro prints as a box, as one line.

  It is the text up to the first blank row or rule, and the names of similar
  options. The terminal must be so wide that no row is wrapped.

  >>> rows = [' Title', ' ---', '  No --promt.', '  ---', '      --prompt STR']
  >>> sentence('\\n'.join(rows))
  'No --promt.; similar options: --prompt'
  """
  # The first line is the title. A terminal without UTF-8 has rules, but no
  # borders.
  rows = [line[2:].rstrip(' \u2502') for line in box.splitlines()[1:]]
  parts = [
    list(part) for is_text, part in itertools.groupby(rows, has_text) if is_text
  ]
  if not parts:
    return ' '.join(box.split())
  text = ' '.join(row.strip() for row in parts[0])
  # An error about a value documents its option in the form of a similar one.
  if 'Argument helptext:' in rows:
    return text
  names = [
    re.match(r' {4}(--[^ ,]+)', row) for part in parts[1:] for row in part
  ]
  similar = ', '.join(name[1] for name in names if name)
  return f'{text}; similar options: {similar}' if similar else text


def has_text(row: str) -> bool:
  """Whether a row of a box is neither blank nor a rule."""
  return bool(row.strip('-\u2500\u256f'))


def parse(
  argv: Sequence[str],
  kind: type[Request] = Launch,
  default: Callable[[str], Config] | None = None,
) -> Request:
  """Parses the command line of a training program.

  Args:
    argv: the path of a config file, then `--KEY VALUE ...`.
    kind: a dataclass whose field `config` is the experiment. Its other fields
      are options of the program that `kind.program` names.
    default: returns the config to which the options apply, from the path of the
      config file; None loads the file.

  Raises:
    ValueError, OSError: the file or a value is wrong.
    SystemExit: help was requested, or a key does not exist.
  """
  if not argv or argv[0].startswith('-'):
    wants_help = bool({'-h', '--help'} & set(argv))
    print(
      USAGE.format(program=kind.program),
      file=sys.stdout if wants_help else sys.stderr,
    )
    raise SystemExit(0 if wants_help else 2)
  path, *rest = argv
  config, rest = choose((default or load)(path), rest)
  try:
    with usage_errors(rest):
      return tyro.cli(
        kind,
        default=kind(config),
        args=rest,
        prog=f'python -m {kind.program} {path}',
        description=describe(kind),
        config=(tyro.conf.AvoidSubcommands,),
      )
  except UsageError as error:
    print(f'error: {error}', file=sys.stderr)
    print(f'valid keys: {", ".join(keys(config, kind))}', file=sys.stderr)
    raise SystemExit(2) from None


def refusal(stop: BaseException) -> ValueError | None:
  """Returns the ValueError of a config's own check, if it ended the program.

  tyro catches such an error and prints it over many lines, as it does for a key
  that does not exist.
  """
  error = stop.__context__
  while error is not None:
    frames = traceback.extract_tb(error.__traceback__)
    checked = any(frame.name == '__post_init__' for frame in frames)
    if checked and isinstance(error, ValueError):
      return error
    error = error.__context__
  return None


def source(argv: Sequence[str]) -> Run | None:
  """Returns the run that a command line resumes or branches from, if any.

  This is needed before the other options are parsed: they change the values of
  that run, not those of the config file.
  """
  found, _ = parse_some(Continued, argv)
  if not (found.resume or found.branch) or not argv or argv[0].startswith('-'):
    return None
  check_exists(argv[0])
  return run_lib.old(found.run, pathlib.Path(argv[0]).stem)


def load(path: str) -> Config:
  """Returns the `config` of a Python file."""
  check_exists(path)
  try:
    config = runpy.run_path(path).get('config')
  # A user's file can raise anything, and the user must correct it.
  except Exception as error:
    raise ValueError(f'{path}{line(error, path)}: {said(error)}') from error
  if not isinstance(config, Config):
    raise ValueError(f'{path} must hold `config = Config(...)`')
  return config


def check_exists(path: str) -> None:
  """Raises FileNotFoundError if the config file does not exist."""
  if not pathlib.Path(path).is_file():
    found = sorted(str(file) for file in pathlib.Path('configs').glob('*.py'))
    raise FileNotFoundError(
      f'no config file {path}; there are {", ".join(found) or "none here"}'
    )


def line(error: Exception, path: str) -> str:
  """Returns the line of a file that raised an error, '' if it is unknown."""
  if isinstance(error, SyntaxError):
    return f', line {error.lineno}'
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == path]
  return f', line {lines[-1]}' if lines else ''


def said(error: Exception) -> str:
  """Returns an error's message, with its type unless it is a ValueError.

  >>> said(KeyError('width')), said(ValueError('steps must be ...'))
  ("KeyError: 'width'", 'steps must be ...')
  """
  text = error.msg if isinstance(error, SyntaxError) else str(error)
  if type(error) is ValueError:
    return text
  return f'{type(error).__name__}: {text}'


def choose(config: Config, args: Sequence[str]) -> tuple[Config, list[str]]:
  """Applies options that select a class, such as `--optimizer AdamW`.

  The selected class has its own defaults. Fields without a default must follow,
  as in `--corpus TextFiles --corpus.train 'text/*.txt'`. `--adapter None`
  removes the adapter.

  Adding an adapter also selects AdamW, unless an option names the optimizer:
  the rank of the config's method may be meant for whole weights and be larger
  than the adapter's factors.

  Returns:
    The changed config, and the remaining arguments.
  """
  begun = config.adapter
  kinds_by_name = selectable()
  rest = spelled_apart(args, kinds_by_name)
  for name, kinds in kinds_by_name.items():
    while f'--{name}' in rest:
      at = rest.index(f'--{name}')
      kind = rest[at + 1] if at + 1 < len(rest) else ''
      if kind not in kinds:
        raise ValueError(
          f'--{name} must be one of {", ".join(kinds)}, got {kind!r}'
        )
      if kind != shown(type(getattr(config, name))):
        fresh = blank(kinds[kind])
        config = dataclasses.replace(config, **{name: fresh})
      del rest[at : at + 2]
  named = any(word.startswith('--optimizer') for word in args)
  if (
    begun is None
    and config.adapter is not None
    and projects(config.optimizer)
    and not named
  ):
    print(
      f'--adapter {shown(type(config.adapter))} is trained by AdamW instead of '
      f'{shown(type(config.optimizer))}; select another with --optimizer',
      file=sys.stderr,
    )
    config = dataclasses.replace(config, optimizer=AdamW())
  return config, rest


def spelled_apart(args: Sequence[str], names: Iterable[str]) -> list[str]:
  """Splits `--NAME=VALUE` into two arguments, for the given names only.

  >>> spelled_apart(['--seed=7', '--steps=9'], ['seed'])
  ['--seed', '7', '--steps=9']
  """
  prefixes = tuple(f'--{name}=' for name in names)
  return [
    part
    for word in args
    for part in (word.split('=', 1) if word.startswith(prefixes) else [word])
  ]


def selectable() -> dict[str, dict[str, type]]:
  """Returns, for each field with a choice, its classes by their names."""
  hints = typing.get_type_hints(Config)
  unions = {name: choices(hint) for name, hint in hints.items()}
  return {
    name: {shown(kind): kind for kind in kinds}
    | ({'None': types.NoneType} if types.NoneType in bases(hints[name]) else {})
    for name, kinds in unions.items()
    if len(kinds) > 1
  }


def shown(kind: type) -> str:
  """Returns the name of a class on the command line.

  >>> shown(types.NoneType), shown(Config)
  ('None', 'Config')
  """
  return 'None' if kind is types.NoneType else kind.__name__


def blank(kind: Any) -> Any:
  """Returns an instance with defaults; other fields are `tyro.MISSING`."""
  if kind is types.NoneType:
    return None
  required = [
    field.name
    for field in dataclasses.fields(kind)
    if field.default is dataclasses.MISSING
    and field.default_factory is dataclasses.MISSING
  ]
  return kind(**dict.fromkeys(required, tyro.MISSING))


def describe(kind: type) -> str:
  """Returns the first lines of a program's help text."""
  lines = [
    f'--{name} {{{",".join(kinds)}}} selects a class, with its own defaults.'
    for name, kinds in selectable().items()
  ]
  lines.append('AdamW trains an --adapter unless --optimizer is given.')
  return '\n\n'.join([kind.__doc__ or '', *lines])


def keys(config: Config, kind: type = Launch) -> list[str]:
  """Returns all keys that the command line accepts for this config."""
  options = [field.name for field in dataclasses.fields(kind)]
  named = dict.fromkeys(options) | flatten(config)
  del named['config']
  nested = {
    name for name in named if any(x.startswith(f'{name}.') for x in named)
  }
  without = (nested - selectable().keys()) | absent(config)
  return [
    '--' + name.replace('_', '-') for name in named if name not in without
  ]


def absent(config: Config) -> set[str]:
  """Returns optional parts of the model that are None in this config.

  tyro accepts the options of such a part, for example of a RoPE scaling, only
  if the config file sets the part.
  """
  hints = typing.get_type_hints(type(config.model))
  return {
    f'model.{field.name}'
    for field in dataclasses.fields(config.model)
    if getattr(config.model, field.name) is None
    and any(map(dataclasses.is_dataclass, bases(hints[field.name])))
  }
