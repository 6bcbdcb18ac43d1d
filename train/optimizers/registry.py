"""The registry of the optimizers that a config can name.

`METHODS` has one row for each: the name for configs and `--optimizer`, the
preset, and the cells of its line in README's table. Fields, types, defaults and
help of the class `Galore` are read from the signature and docstring of
`galore_adamw`. `train.method` serves these classes. After a change of the rows
or of a preset's options, run

  python -m train.optimizers.stub > train/method.pyi

The choices of `train.config`, `python -m train.plan --compare`, the method
benchmark and README's table (`table`) all come from these rows.
"""

import collections.abc
import dataclasses
import functools
import inspect
import operator
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import optax
import tyro

import galore_optax
from train.optimizers import baselines

Preset: TypeAlias = Callable[..., optax.GradientTransformation]
Bytes: TypeAlias = Callable[[int, int, int], int]

CONFIG_SETS = {'clip_norm': None}
"""Options of presets that `Config` sets for all methods, and their values."""

COMMAND_LINE_TYPES = (int, float, bool, str, types.NoneType, tuple[str, ...])
"""Types of options that a command line can express, in addition to Literal."""


def options_class(name: str, preset: Preset) -> type[Any]:
  """Returns a frozen dataclass of a preset's options.

  Its method `build(learning_rate)` calls the preset. Options whose type a
  command line cannot express (a mapping, a function) are left out, and keep the
  preset's default.

  Args:
    name: name of the class.
    preset: the preset.

  Example:
    >>> kind = options_class('Baseline', baselines.adamw)
    >>> kind(b1=0.8)
    Baseline(b1=0.8, b2=0.999, eps=1e-08, weight_decay=0.0)
    >>> inspect.getdoc(kind)
    'AdamW on whole gradients, with float32 moments.'
  """
  docs = argument_docs(preset)
  names = [parameter.name for parameter in options(preset)]
  fixed = {key: value for key, value in CONFIG_SETS.items() if key in names}
  fields = []
  for parameter in options(preset):
    kind = command_line_type(parameter.annotation)
    if kind is not None and parameter.name not in fixed:
      text = tyro.conf.arg(help=docs.get(parameter.name))
      default = dataclasses.field(default=parameter.default)
      fields.append((parameter.name, Annotated[kind, text], default))

  def build(
    self: Any, learning_rate: optax.ScalarOrSchedule
  ) -> optax.GradientTransformation:
    """Returns the preset's transformation with these options."""
    return preset(learning_rate, **vars(self), **fixed)

  summary = (inspect.getdoc(preset) or '').split('\n\n')[0]
  # Pickle looks the class up by name in the module that serves it.
  module = 'train.method'
  namespace = {'build': build, '__doc__': summary, '__module__': module}
  return dataclasses.make_dataclass(
    name, fields, frozen=True, namespace=namespace
  )


def options(preset: Preset) -> list[inspect.Parameter]:
  """Returns the parameters of a preset, without its learning rate."""
  return list(inspect.signature(preset).parameters.values())[1:]


def command_line_type(annotation: Any) -> Any:
  """Returns the part of a type that a command line can express, or None.

  >>> command_line_type(int | collections.abc.Callable)
  <class 'int'>
  >>> command_line_type(str | collections.abc.Sequence[str] | None)
  tuple[str, ...] | None
  >>> command_line_type(dict[str, int] | None)
  """
  strings = collections.abc.Sequence[str]
  members = [
    tuple[str, ...] if member == strings else member
    for member in union_members(annotation)
  ]
  kinds = [
    member
    for member in members
    if member in COMMAND_LINE_TYPES or typing.get_origin(member) is Literal
  ]
  if tuple[str, ...] in kinds:
    # On a command line, one string is a tuple of length 1.
    kinds = [kind for kind in kinds if kind is not str]
  if not set(kinds) - {types.NoneType}:
    return None
  return functools.reduce(operator.or_, kinds)


def union_members(annotation: Any) -> tuple[Any, ...]:
  """Returns the members of a union; another type is its only member.

  >>> union_members(int | None)
  (<class 'int'>, <class 'NoneType'>)
  """
  if typing.get_origin(annotation) in (types.UnionType, typing.Union):
    return typing.get_args(annotation)
  return (annotation,)


def argument_docs(preset: Preset) -> dict[str, str]:
  """Returns the docstring's Args by name, each on one line.

  An entry such as '**options: those of `galore`' adds the Args of `galore`.

  >>> argument_docs(baselines.optax_galore)['scale']
  'multiplies every update.'
  """
  doc = inspect.getdoc(preset) or ''
  section = re.search(r'^Args:\n((?:  .*\n?|\n)+)', doc, re.MULTILINE)
  entries = re.findall(
    r'^  (\**\w+): (.*(?:\n    .*)*)', section[1] if section else '', re.M
  )
  texts = {name: ' '.join(text.split()) for name, text in entries}
  for name in re.findall(r'`(\w+)`', texts.pop('**options', '')):
    texts = argument_docs(getattr(galore_optax, name)) | texts
  return texts


class Method(NamedTuple):
  """A row: an optimizer that configs can name."""

  name: str
  """Name of its class in `train.method`."""
  title: str
  """Name in tables."""
  preset: Preset
  """`f(learning_rate, *, ...)`, which builds the optimizer."""
  cells: str = ''
  """Cells of its line in README's table, divided by ' | ': subspace, inner
  optimizer, residual, moments, and the number of elements of the state for a
  weight [m, n], m <= n, at rank r or density d. A baseline has none."""
  num_bytes: Bytes | None = None
  """Returns the bytes of the state for a float32 weight from m, n and r. If the
  method has a density, the density is r / m."""


class Variant(NamedTuple):
  """A line of a table: a method with some options."""

  name: str
  """Name of the method."""
  options: dict[str, Any]
  """Options that differ from the defaults."""
  cells: str
  """As in `Method`."""
  num_bytes: Bytes
  """As in `Method`."""

  @property
  def given(self) -> str:
    """The options as they appear in a call."""
    return ', '.join(f'{k}={v!r}' for k, v in self.options.items())


def quantized_bytes(size: int) -> int:
  """Returns the bytes of a moment of `size` elements, quantized to 8 bits.

  >>> quantized_bytes(257)
  265
  """
  return size + 4 * -(-size // 256)


ROWS = (
  Method(
    name='Galore',
    title='GaLore',
    preset=galore_optax.galore_adamw,
    cells='svd | Adam | none | keep | r m + 2 r n',
    num_bytes=lambda m, n, r: 4 * (r * m + 2 * r * n),
  ),
  Method(
    name='Galore8bit',
    title='8-bit GaLore',
    preset=galore_optax.galore_adamw_8bit,
    cells='svd | Adam, 8 bits | none | keep | r m + 2 r n of 1 byte',
    num_bytes=lambda m, n, r: 4 * r * m + 2 * quantized_bytes(r * n),
  ),
  Method(
    name='GaloreAdafactor',
    title='GaLore Adafactor',
    preset=galore_optax.galore_adafactor,
    cells='svd | Adafactor | none | keep | r m + r + n',
    num_bytes=lambda m, n, r: 4 * (r * m + r + n),
  ),
  Method(
    name='GaloreMuon',
    title='GaLore Muon',
    preset=galore_optax.galore_muon,
    cells='svd | Muon | none | keep | r m + r n',
    num_bytes=lambda m, n, r: 4 * (r * m + r * n),
  ),
  Method(
    name='Frugal',
    title='FRUGAL',
    preset=galore_optax.frugal,
    cells='svd | any | sign or SGD | reset | d m^2 + 2 d m n (Adam)',
    num_bytes=lambda m, n, r: 4 * (r * m + 2 * r * n),
  ),
  Method(
    name='Fira',
    title='Fira',
    preset=galore_optax.fira,
    cells='svd | Adam | scaled by channel | keep | r m + 2 r n + 1',
    num_bytes=lambda m, n, r: 4 * (r * m + 2 * r * n + 1),
  ),
  Method(
    name='Apollo',
    title='APOLLO',
    preset=galore_optax.apollo,
    cells='Gaussian, a seed | Adam | whole, by channel | keep | 2 r n + 2',
    num_bytes=lambda m, n, r: 4 * (2 * r * n + 2),
  ),
  Method(
    name='ApolloMini',
    title='APOLLO-Mini',
    preset=galore_optax.apollo_mini,
    cells='Gaussian, a seed | Adam | whole, by matrix | keep | 2 n + 2',
    num_bytes=lambda m, n, r: 4 * (2 * n + 2),
  ),
  Method(
    name='Badam',
    title='BAdam',
    preset=galore_optax.badam,
    cells='one layer of L, in turns | any | none | reset | 2 m n / L (Adam)',
    num_bytes=lambda m, n, r: 4 * 2 * n,
  ),
  Method(
    name='AdaLomo',
    title='AdaLomo',
    preset=galore_optax.adalomo,
    cells='whole | factored RMS | - | - | m + n',
    num_bytes=lambda m, n, r: 4 * (m + n),
  ),
  Method(
    name='Lomo',
    title='LOMO',
    preset=galore_optax.lomo,
    cells='whole | SGD | - | - | 0',
    num_bytes=lambda m, n, r: 0,
  ),
  Method(
    name='ScaleSgd',
    title='SCALE',
    preset=galore_optax.scale_sgd,
    cells='whole | SGD by column | - | - | 0 (head: m n)',
    num_bytes=lambda m, n, r: 0,
  ),
  Method(name='AdamW', title='AdamW', preset=baselines.adamw),
  Method(name='Adam8bit', title='8-bit Adam', preset=baselines.adam_8bit),
  Method(
    name='OptaxGalore',
    title='optax.contrib.galore',
    preset=baselines.optax_galore,
  ),
)
METHODS = {row.name: row for row in ROWS}
"""All methods, by the name of their class."""

VARIANTS = (
  Variant(
    name='Galore',
    options={'moments': 'rotate'},
    cells='svd | Adam | none | rotate | r m + 2 r n',
    num_bytes=lambda m, n, r: 4 * (r * m + 2 * r * n),
  ),
  Variant(
    name='Galore',
    options={'side': 'full'},
    cells='svd, both sides | Adam | none | keep | r (m + n) + 2 r^2',
    num_bytes=lambda m, n, r: 4 * (r * (m + n) + 2 * r * r),
  ),
  Variant(
    name='Frugal',
    options={'subspace': 'power'},
    cells='power iteration | any | sign or SGD | reset | '
    'd m^2 + 2 d m n (Adam)',
    num_bytes=lambda m, n, r: 4 * (r * m + 2 * r * n),
  ),
  Variant(
    name='Frugal',
    options={'subspace': 'random'},
    cells='random, a seed | any | sign or SGD | reset | 2 d m n + 1 (Adam)',
    num_bytes=lambda m, n, r: 4 * (2 * r * n + 1),
  ),
  Variant(
    name='Frugal',
    options={'subspace': 'columns'},
    cells='coordinates | any | sign or SGD | reset | d m + 2 d m n (Adam)',
    num_bytes=lambda m, n, r: 4 * (r + 2 * r * n),
  ),
  Variant(
    name='Frugal',
    options={'subspace': 'entries'},
    cells='coordinates | any | sign or SGD | reset | 3 d m n (Adam)',
    num_bytes=lambda m, n, r: 4 * 3 * r * n,
  ),
  Variant(
    name='Fira',
    options={'bits': 8},
    cells='svd | Adam, 8 bits | scaled by channel | keep | '
    'r m + 2 r n of 1 byte + 1',
    num_bytes=lambda m, n, r: 4 * r * m + 2 * quantized_bytes(r * n) + 4,
  ),
  Variant(
    name='Apollo',
    options={'bits': 8},
    cells='Gaussian, a seed | Adam, 8 bits | whole, by channel | keep | '
    '2 r n of 1 byte + 2',
    num_bytes=lambda m, n, r: 2 * quantized_bytes(r * n) + 8,
  ),
)
"""Lines of the method benchmark in addition to each method at its defaults."""

CLASSES = {
  name: options_class(name, row.preset) for name, row in METHODS.items()
}
"""The classes of options that configs name, such as `Galore`."""


def projects(optimizer: Any) -> bool:
  """Returns whether a method has an option `rank` or `density`.

  >>> projects(CLASSES['Galore']()), projects(CLASSES['AdamW']())
  (True, False)
  """
  names = {field.name for field in dataclasses.fields(optimizer)}
  return not names.isdisjoint({'rank', 'density'})


def table_lines() -> list[tuple[str, Variant]]:
  """Returns each method, then its variants, by the call that builds it."""
  found = []
  for name, row in METHODS.items():
    preset = row.preset.__name__
    if row.num_bytes is not None:
      found.append((preset, Variant(name, {}, row.cells, row.num_bytes)))
    found += [
      (f'{preset}({variant.given})', variant)
      for variant in VARIANTS
      if variant.name == name
    ]
  return found


def table() -> str:
  """Returns the methods at their defaults as a Markdown table.

  >>> print(table().splitlines()[0])
  | method | subspace | inner | residual | moments | elements of state |
  """
  head = ('method', 'subspace', 'inner', 'residual', 'moments')
  rows = [' | '.join([*head, 'elements of state']), ' | '.join(6 * ['---'])]
  rows += [
    f'`{call}` | {line.cells}'
    for call, line in table_lines()
    if not line.options
  ]
  return '\n'.join(f'| {row} |' for row in rows)
