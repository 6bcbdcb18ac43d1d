"""The optimizers that a config can name, each read off its preset's signature.

A row of `METHODS` is all that a method needs here: the name that configs and
`--optimizer` use, the preset, and its cells of README's table. Fields, types,
defaults and help of `Galore(rank=64)` are those of `galore_adamw`. From these
rows come the choices of `train.config`, `python -m train.plan --compare`, the
bench of methods and README's table (`table`).
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
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro

import galore_optax
from galore_optax.precision import in_float32

Preset = Callable[..., optax.GradientTransformation]
Bytes = Callable[[int, int, int], int]

CONFIG_SETS = {'clip_norm': None}
"""Options of presets that a config has for all methods, in another place."""

PLAIN = (int, float, bool, str, types.NoneType, tuple[str, ...])
"""Types that a command line can say, beside a Literal."""


def adamw(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
) -> optax.GradientTransformation:
  """AdamW on the whole gradient, with moments in float32: the baseline.

  Args:
    learning_rate: a number, or a schedule of the step.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled, times the learning rate.
  """
  return in_float32(
    optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
  )


def adam_8bit(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  """Adam on the whole gradient, with moments in blocks of 8 bits.

  Args:
    learning_rate: a number, or a schedule of the step.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
  """
  adam = optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)
  return galore_optax.quantize_state(adam)


def optax_galore(
  learning_rate: optax.ScalarOrSchedule,
  *,
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 1.0,
  weight_decay: float = 0.0,
) -> optax.GradientTransformation:
  """optax.contrib.galore as it comes, to compare with.

  It is built twice because a leaf that it does not project leaves an array of
  size zero in its state, which Orbax refuses to save. Where no leaf has two
  axes it is Adam, with the same result for each leaf.

  Args:
    learning_rate: a number, or a schedule of the step.
    rank: directions kept of each weight with two axes.
    update_proj_gap: updates from one subspace to the next.
    scale: multiplies every update.
    weight_decay: decoupled, times the learning rate.
  """
  projected = optax.contrib.galore(
    learning_rate,
    rank=rank,
    update_proj_gap=update_proj_gap,
    scale=scale,
    weight_decay=weight_decay,
  )
  plain = optax.chain(
    optax.scale_by_adam(),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )
  return masking_none(
    optax.partition(
      {'projected': projected, 'plain': plain},
      lambda params: jax.tree.map(
        lambda x: 'projected' if x.ndim == 2 else 'plain', params
      ),
    )
  )


def masking_none(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Returns a transformation that receives `MaskedNode` instead of None.

  None marks a frozen weight. optax.contrib.galore would treat it as an array.
  """

  def masked(tree: Any) -> Any:
    return jax.tree.map(
      lambda x: optax.MaskedNode() if x is None else x,
      tree,
      is_leaf=lambda x: x is None,
    )

  def init(params: Any) -> optax.OptState:
    return tx.init(masked(params))

  def update(
    updates: Any, state: optax.OptState, params: Any = None
  ) -> tuple[Any, optax.OptState]:
    structure = jax.tree.structure(updates)
    weights = None if params is None else masked(params)
    updates, state = tx.update(masked(updates), state, weights)
    return structure.unflatten(jax.tree.leaves(updates)), state

  return optax.GradientTransformation(init, update)


def read(name: str, preset: Preset) -> type:
  """Returns a frozen dataclass of what a command line can say to a preset.

  Its `build(learning_rate)` calls the preset. An option without such a type
  (a mapping, a function) keeps the preset's default.

  >>> kind = read('Baseline', adamw)
  >>> kind(b1=0.8)
  Baseline(b1=0.8, b2=0.999, eps=1e-08, weight_decay=0.0)
  >>> inspect.getdoc(kind)
  'AdamW on the whole gradient, with moments in float32: the baseline.'
  """
  texts = documented(preset)
  fields = []
  for parameter in options(preset):
    kind = narrowed(parameter.annotation)
    if kind is not None and parameter.name not in CONFIG_SETS:
      text = tyro.conf.arg(help=texts.get(parameter.name))
      default = dataclasses.field(default=parameter.default)
      fields.append((parameter.name, Annotated[kind, text], default))
  given = {
    parameter.name: CONFIG_SETS[parameter.name]
    for parameter in options(preset)
    if parameter.name in CONFIG_SETS
  }

  def build(self, learning_rate: optax.ScalarOrSchedule):
    """Returns the transformation."""
    return preset(learning_rate, **vars(self), **given)

  summary = (inspect.getdoc(preset) or '').split('\n\n')[0]
  namespace = {'build': build, '__doc__': summary, '__module__': __name__}
  return dataclasses.make_dataclass(
    name, fields, frozen=True, namespace=namespace
  )


def options(preset: Preset) -> list[inspect.Parameter]:
  """Returns the parameters of a preset after its learning rate."""
  return list(inspect.signature(preset).parameters.values())[1:]


def narrowed(annotation: Any) -> Any:
  """Returns what a command line can say of a type, None if nothing.

  >>> narrowed(int | collections.abc.Callable)
  <class 'int'>
  >>> narrowed(str | collections.abc.Sequence[str] | None)
  tuple[str, ...] | None
  >>> narrowed(dict[str, int] | None)
  """
  union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
  members = typing.get_args(annotation) if union else (annotation,)
  strings = collections.abc.Sequence[str]
  kinds = [tuple[str, ...] if x == strings else x for x in members]
  kinds = [x for x in kinds if x in PLAIN or typing.get_origin(x) is Literal]
  if tuple[str, ...] in kinds:
    # A lone string is a tuple of one.
    kinds = [kind for kind in kinds if kind is not str]
  if not set(kinds) - {types.NoneType}:
    return None
  return functools.reduce(operator.or_, kinds)


def documented(preset: Preset) -> dict[str, str]:
  """Returns the docstring's Args by name, one line each.

  Where it says '**options: those of `galore`', galore's are among them.

  >>> documented(optax_galore)['scale']
  'multiplies every update.'
  """
  doc = inspect.getdoc(preset) or ''
  section = re.search(r'^Args:\n((?:  .*\n?|\n)+)', doc, re.MULTILINE)
  entries = re.findall(
    r'^  (\**\w+): (.*(?:\n    .*)*)', section[1] if section else '', re.M
  )
  texts = {name: ' '.join(text.split()) for name, text in entries}
  for name in re.findall(r'`(\w+)`', texts.pop('**options', '')):
    texts = documented(getattr(galore_optax, name)) | texts
  return texts


class Method(NamedTuple):
  """One row: an optimizer that configs can name."""

  name: str
  """Of its class in this module."""
  title: str
  """In tables."""
  preset: Preset
  """`f(learning_rate, *, ...)`."""
  cells: str = ''
  """Its cells of README's table: subspace, inner, residual, moments, and the
  elements of state for a weight [m, n], m <= n, at rank r or density d. A
  baseline has none."""
  num_bytes: Bytes | None = None
  """The state's bytes for float32 weights, of m, n, r; the density is r / m."""


class Variant(NamedTuple):
  """A row of README's table that is a method with other options."""

  name: str
  """Of the method."""
  options: dict[str, Any]
  """Options that make it another row."""
  cells: str
  """As in `Method`."""
  num_bytes: Bytes
  """As in `Method`."""

  @property
  def given(self) -> str:
    """Its options as in a call."""
    return ', '.join(f'{k}={v!r}' for k, v in self.options.items())


def codes(size: int) -> int:
  """Returns the bytes of a moment of so many elements in 8 bits.

  >>> codes(257)
  265
  """
  return size + 4 * -(-size // 256)


ROWS = (
  Method(
    *('Galore', 'GaLore', galore_optax.galore_adamw),
    'svd | Adam | none | keep | r m + 2 r n',
    lambda m, n, r: 4 * (r * m + 2 * r * n),
  ),
  Method(
    *('Galore8bit', '8-bit GaLore', galore_optax.galore_adamw_8bit),
    'svd | Adam, 8 bits | none | keep | r m + 2 r n of 1 byte',
    lambda m, n, r: 4 * r * m + 2 * codes(r * n),
  ),
  Method(
    *('GaloreAdafactor', 'GaLore Adafactor', galore_optax.galore_adafactor),
    'svd | Adafactor | none | keep | r m + r + n',
    lambda m, n, r: 4 * (r * m + r + n),
  ),
  Method(
    *('GaloreMuon', 'GaLore Muon', galore_optax.galore_muon),
    'svd | Muon | none | keep | r m + r n',
    lambda m, n, r: 4 * (r * m + r * n),
  ),
  Method(
    *('Frugal', 'FRUGAL', galore_optax.frugal),
    'svd | any | sign or SGD | reset | d m^2 + 2 d m n (Adam)',
    lambda m, n, r: 4 * (r * m + 2 * r * n),
  ),
  Method(
    *('Fira', 'Fira', galore_optax.fira),
    'svd | Adam | scaled by channel | keep | r m + 2 r n + 1',
    lambda m, n, r: 4 * (r * m + 2 * r * n + 1),
  ),
  Method(
    *('Apollo', 'APOLLO', galore_optax.apollo),
    'Gaussian, a seed | Adam | whole, by channel | keep | 2 r n + 2',
    lambda m, n, r: 4 * (2 * r * n + 2),
  ),
  Method(
    *('ApolloMini', 'APOLLO-Mini', galore_optax.apollo_mini),
    'Gaussian, a seed | Adam | whole, by matrix | keep | 2 n + 2',
    lambda m, n, r: 4 * (2 * n + 2),
  ),
  Method(
    *('Badam', 'BAdam', galore_optax.badam),
    'one layer of L, in turns | any | none | reset | 2 m n / L (Adam)',
    lambda m, n, r: 4 * 2 * n,
  ),
  Method(
    *('AdaLomo', 'AdaLomo', galore_optax.adalomo),
    'whole | factored RMS | - | - | m + n',
    lambda m, n, r: 4 * (m + n),
  ),
  Method(
    *('Lomo', 'LOMO', galore_optax.lomo),
    'whole | SGD | - | - | 0',
    lambda m, n, r: 0,
  ),
  Method(
    *('ScaleSgd', 'SCALE', galore_optax.scale_sgd),
    'whole | SGD by column | - | - | 0 (head: m n)',
    lambda m, n, r: 0,
  ),
  Method('AdamW', 'AdamW', adamw),
  Method('Adam8bit', '8-bit Adam', adam_8bit),
  Method('OptaxGalore', 'optax.contrib.galore', optax_galore),
)
METHODS = {row.name: row for row in ROWS}
"""Every method by the name of its class."""

VARIANTS = (
  Variant(
    *('Galore', {'moments': 'rotate'}),
    'svd | Adam | none | rotate | r m + 2 r n',
    lambda m, n, r: 4 * (r * m + 2 * r * n),
  ),
  Variant(
    *('Galore', {'side': 'full'}),
    'svd, both sides | Adam | none | keep | r (m + n) + 2 r^2',
    lambda m, n, r: 4 * (r * (m + n) + 2 * r * r),
  ),
  Variant(
    *('Frugal', {'subspace': 'power'}),
    'power iteration | any | sign or SGD | reset | d m^2 + 2 d m n (Adam)',
    lambda m, n, r: 4 * (r * m + 2 * r * n),
  ),
  Variant(
    *('Frugal', {'subspace': 'random'}),
    'random, a seed | any | sign or SGD | reset | 2 d m n + 1 (Adam)',
    lambda m, n, r: 4 * (2 * r * n + 1),
  ),
  Variant(
    *('Frugal', {'subspace': 'columns'}),
    'coordinates | any | sign or SGD | reset | d m + 2 d m n (Adam)',
    lambda m, n, r: 4 * (r + 2 * r * n),
  ),
  Variant(
    *('Frugal', {'subspace': 'entries'}),
    'coordinates | any | sign or SGD | reset | 3 d m n (Adam)',
    lambda m, n, r: 4 * 3 * r * n,
  ),
  Variant(
    *('Fira', {'bits': 8}),
    'svd | Adam, 8 bits | scaled by channel | keep | r m + 2 r n of 1 byte + 1',
    lambda m, n, r: 4 * r * m + 2 * codes(r * n) + 4,
  ),
  Variant(
    *('Apollo', {'bits': 8}),
    'Gaussian, a seed | Adam, 8 bits | whole, by channel | keep | '
    '2 r n of 1 byte + 2',
    lambda m, n, r: 2 * codes(r * n) + 8,
  ),
)
"""What README's table shows beside each method at its defaults."""

CLASSES = {name: read(name, row.preset) for name, row in METHODS.items()}
"""What a config names: `from train.method import Galore`."""

globals().update(CLASSES)

Optimizer = functools.reduce(operator.or_, CLASSES.values())
"""What `Config.optimizer` may be."""


def projects(optimizer: Any) -> bool:
  """Returns whether a method has a rank or a density to project with.

  >>> projects(CLASSES['Galore']()), projects(CLASSES['AdamW']())
  (True, False)
  """
  names = {field.name for field in dataclasses.fields(optimizer)}
  return not names.isdisjoint({'rank', 'density'})


def limit_growth(limit: float) -> optax.GradientTransformation:
  """Scales gradients so that no norm grows by more than `limit` in a step.

  A norm is of one weight: the last two axes of an array of more.

  >>> tx = limit_growth(1.5)
  >>> g = {'w': jnp.ones(4)}
  >>> _, state = tx.update(g, tx.init(g))
  >>> print(tx.update({'w': 10 * g['w']}, state)[0]['w'].round(4))
  [1.5 1.5 1.5 1.5]

  References:
    Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024, limits the
    norm of what it adds so.
  """

  def init(params: Any) -> optax.OptState:
    # No norm yet, so no limit.
    first = lambda w: jnp.full(w.shape[:-2], jnp.inf, jnp.float32)
    return GrowthState(jax.tree.map(first, params))

  def update(
    grads: Any, state: optax.OptState, params: Any = None
  ) -> tuple[Any, optax.OptState]:
    del params
    norms = jax.tree.map(_norm, grads)
    shrink = lambda norm, last: jnp.minimum(
      # After a zero gradient a bound of zero would hold for ever.
      limit * jnp.where(last > 0, last, jnp.inf) / jnp.where(norm > 0, norm, 1),
      1,
    )
    factors = jax.tree.map(shrink, norms, state.norms)
    last = jax.tree.map(jnp.multiply, factors, norms)
    return jax.tree.map(_times, grads, factors), GrowthState(last)

  return optax.GradientTransformation(init, update)


class GrowthState(NamedTuple):
  """State of `limit_growth`."""

  norms: Any  # [...], float32: of each weight's gradient, as it was limited


def _norm(g: jax.Array) -> jax.Array:
  axes = tuple(range(g.ndim))[-2:]
  return jnp.sqrt(jnp.sum(jnp.square(g.astype(jnp.float32)), axes))


def _times(g: jax.Array, factor: jax.Array) -> jax.Array:
  by = factor.reshape(factor.shape + (1,) * (g.ndim - factor.ndim))
  return (g.astype(jnp.float32) * by).astype(g.dtype)


def lines() -> list[tuple[str, Variant]]:
  """Returns the rows of README's table by what its first cell says."""
  found = []
  for name, row in METHODS.items():
    own = [Variant(name, {}, *row[3:])] if row.cells else []
    for variant in own + [x for x in VARIANTS if x.name == name]:
      given = f'({variant.given})' if variant.options else ''
      call = row.preset.__name__ + given
      found.append((call, variant))
  return found


def table() -> str:
  """Returns the methods at their defaults as a Markdown table.

  >>> print(table().splitlines()[0])
  | method | subspace | inner | residual | moments | elements of state |
  """
  head = ('method', 'subspace', 'inner', 'residual', 'moments')
  rows = [' | '.join([*head, 'elements of state']), ' | '.join(6 * ['---'])]
  rows += [
    f'`{call}` | {row.cells}' for call, row in lines() if not row.options
  ]
  return '\n'.join(f'| {row} |' for row in rows)
