"""How one weight is projected: its sides, its rank, and the two products.

A leaf of the parameters has a plan: a `Projection`, or a `Whole` if it is not
projected. Both have `inner_params`, `project` and `unproject`. The module
`plan` makes them.

Axes: i input (rows of a Flax kernel), o output (columns); m the projected
side, n the other side, r the rank. Leading axes (layers, experts) are batch.
Batch axes may share a basis, as the taps of a convolution do in a Tucker-2
decomposition; K is the number of matrices that share one.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp

from galore_optax import checks
from galore_optax.precision import at_least_float32

Basis: TypeAlias = tuple[jax.Array, ...]
"""For each projected side: orthonormal rows [..., r, m], or indices [..., r] of
coordinates. It is empty for a leaf that is not projected."""

Side: TypeAlias = Literal['std', 'reverse_std', 'left', 'right', 'both', 'full']
"""The side of a weight to project; 'full' is another name of 'both'."""


@dataclasses.dataclass(frozen=True)
class SharedBasis:
  """A value of `galore(axes=...)`: several matrices of a weight share a basis.

  Without axes it applies only to the convolutions that the regex matches. The
  taps of a kernel share a basis for the input channels and one for the output
  channels. The table in `galore_optax.names` states which axes are taps.

  With `side='both'` this is the Tucker-2 decomposition: the projected gradient
  of a kernel [kh, kw, in, out] is G_hwio A_ai B_bo, of shape [kh, kw, a, b].
  The basis A [a, in] is found from the unfolding [in, kh kw out] of the
  gradient, and B [b, out] from the unfolding [out, kh kw in], each by the
  `subspace` of `galore`.

  The rank of both sides is the integer `rank`, which both sides must exceed by
  default. A share is the share of each side: rank=0.25 gives a = in / 4 and
  b = out / 4, rounded, so that 1.0 loses nothing.

  The inner optimizer receives the projected gradient as a stack of matrices,
  one for each tap, and so does a residual rule. With explicit axes other
  matrices share a basis: `SharedBasis(-2, -1, -3)` is one basis for all experts
  [E, in, out].

  State of a kernel [kh, kw, in, out] with both sides: bases of a in + b out
  elements, and the inner's state for kh kw a b elements.

  Example:
    >>> import galore_optax as go, optax
    >>> tucker = {'.*': go.SharedBasis(side='both')}
    >>> tx = go.galore(optax.adam(0.1), rank=4, axes=tucker)
    >>> state = tx.init({'conv': {'kernel': jnp.ones((3, 3, 8, 16))}})
    >>> [x.shape for x in jax.tree.leaves(state.basis)]
    [(4, 8), (4, 16)]
    >>> state.inner[0].mu['conv']['kernel'].shape
    (3, 3, 4, 4)

  References:
    Xiao et al., `COAP <https://arxiv.org/abs/2412.00071>`_, 2024.
  """

  input: int | Sequence[int] | None = None
  """Input axes of each matrix; None for the channels of a convolution."""
  output: Any = None
  """Output axes of each matrix; None for the channels of a convolution."""
  shared: int | Sequence[int] | None = None
  """Axes of the matrices that share a basis; None for the taps of a
  convolution. Each index of all other axes, such as layers, has a basis."""
  side: Side | None = None
  """The projected side of these weights; None for that of `galore`."""

  def __post_init__(self) -> None:
    """Raises ValueError unless the axes are integers, all of them or none."""
    if self.side is not None:
      checks.check_one_of(get_args(Side), side=self.side)
    axes = self.input, self.output, self.shared
    if axes != (None, None, None) and not all(map(are_axes, axes)):
      raise ValueError(
        'SharedBasis must have input, output and shared axes, each an integer'
        f' or several, or none of them for a convolution, got {axes!r}'
      )


Axes: TypeAlias = tuple[int | Sequence[int], Any] | SharedBasis
"""The input axes and the output axes of a weight. All other axes are batch.
`...` as output axes stands for all axes that are not input axes. In a
`SharedBasis` some batch axes share their bases."""

ROWS, COLUMNS = -2, -1


@dataclasses.dataclass(frozen=True)
class Whole:
  """The plan of a leaf that is not projected.

  The inner optimizer receives the leaf in its own shape, in float32 at least.
  """

  path: str
  """Path of the weight, its keys joined by '/'."""
  shape: tuple[int, ...]
  """Shape of the weight."""
  reason: str = dataclasses.field(default='', compare=False)
  """Why the leaf is not projected, for tables."""
  too_small: bool = dataclasses.field(
    default=False, compare=False, kw_only=True
  )
  """Whether the leaf is a matrix that is not projected because of its size."""

  rank, sides = None, ()

  def inner_params(self, w: Any) -> Any:
    """Returns the parameter that the inner optimizer receives: the weight."""
    return at_least_float32(w)

  def project(self, g: jax.Array, basis: Basis) -> jax.Array:
    """Returns the gradient in float32 at least."""
    return at_least_float32(g)

  def unproject(self, low: jax.Array, basis: Basis) -> jax.Array:
    """Returns the update unchanged."""
    return low


@dataclasses.dataclass(frozen=True)
class Projection:
  """The plan of a projected leaf. It is static: it holds no array.

  Example:
    >>> p = Projection('w', (5, 3), ((0,), (1,)), (2,), (COLUMNS,))
    >>> low_rn = p.project(jnp.ones((5, 3)), (jnp.eye(2, 3),))
    >>> low_rn.shape, p.unproject(low_rn, (jnp.eye(2, 3),)).shape
    ((2, 5), (5, 3))
  """

  path: str
  """Path of the weight, its keys joined by '/'."""
  shape: tuple[int, ...]
  """Shape of the weight."""
  axes: tuple[tuple[int, ...], tuple[int, ...]]
  """Input axes and output axes of the weight, non-negative."""
  ranks: tuple[int, ...]
  """Number r of basis vectors of each projected side."""
  sides: tuple[int, ...]
  """Projected axes of the matrix [i, o]: ROWS, COLUMNS, or both."""
  reason: str = dataclasses.field(default='', compare=False)
  """Why the leaf is projected, for tables."""
  shared: tuple[int, ...] = dataclasses.field(default=(), kw_only=True)
  """Batch axes of the matrices that share their bases, non-negative."""

  @property
  def rank(self) -> int:
    """Number r of basis vectors of the first projected side."""
    return self.ranks[0]

  @property
  def batch_axes(self) -> tuple[int, ...]:
    """The axes that are neither input nor output, those that share last."""
    used = self.axes[0] + self.axes[1] + self.shared
    own = (axis for axis in range(len(self.shape)) if axis not in used)
    return (*own, *self.shared)

  @property
  def matrix_shape(self) -> tuple[int, ...]:
    """Shape [..., i, o] of the weight as a stack of matrices."""
    i, o = (math.prod(self.shape[axis] for axis in axes) for axes in self.axes)
    return (*(self.shape[axis] for axis in self.batch_axes), i, o)

  @property
  def batch(self) -> tuple[int, ...]:
    """Shape of the stack of matrices."""
    return self.matrix_shape[:-2]

  @property
  def num_matrices(self) -> int:
    """Number k of matrices in the stack."""
    return math.prod(self.batch)

  @property
  def bases(self) -> tuple[int, ...]:
    """Shape of the stack of bases: the batch without the axes that share."""
    return self.batch[: len(self.batch) - len(self.shared)]

  @property
  def num_bases(self) -> int:
    """Number k of bases of a side."""
    return math.prod(self.bases)

  @property
  def low_shape(self) -> tuple[int, ...]:
    """Shape [..., r, n] of the projected gradient; [..., r, r] for both sides.

    The side n comes last whichever side is projected. A block of 8-bit
    codes then covers entries of one basis vector, which are of similar size.
    """
    both = len(self.sides) > 1
    n = self.ranks[-1] if both else self.matrix_shape[-3 - self.sides[0]]
    return (*self.batch, self.rank, n)

  def inner_params(self, w: Any) -> jax.Array:
    """Returns the parameter that the inner receives: zeros [..., r, n]."""
    return jnp.zeros(self.low_shape, jnp.promote_types(w.dtype, jnp.float32))

  def project(self, g: jax.Array, basis: Basis) -> jax.Array:
    """Returns the low-rank gradient [..., r, n] in float32 at least.

    Cost: at most 2 r i o flops a side.

    Args:
      g: gradient in the weight's shape.
      basis: rows or indices of each projected side.
    """
    x_mn = orient(to_matrix(self, g), self.sides[0])
    return at_least_float32(self.project_sides(x_mn, basis))

  def unproject(self, low: jax.Array, basis: Basis) -> jax.Array:
    """Returns P^T low in the weight's shape, in float32 at least.

    For a basis P with orthonormal rows, the projection of the result is `low`.
    """
    x = orient(low, self.sides[0])
    for side, rows in zip(self.sides, basis, strict=True):
      rows_rm = self._for_each_matrix(rows)
      x = _unproject_side(x, rows_rm, side, self.matrix_shape[side])
    return from_matrix(self, x)

  def project_sides(
    self, x_mn: jax.Array, rows: Sequence[jax.Array]
  ) -> jax.Array:
    """Returns `x` with each projected side m replaced by r.

    Args:
      x_mn: a matrix [..., m, n] with the first projected side first.
      rows: [..., r, m] for each projected side, or indices [..., r]. Axes that
        share a basis are absent.
    """
    for side, rows_of_side in zip(self.sides, rows, strict=True):
      axis = ROWS if side == self.sides[0] else COLUMNS
      x_mn = _project_side(x_mn, self._for_each_matrix(rows_of_side), axis)
    return x_mn

  def _for_each_matrix(self, rows: jax.Array) -> jax.Array:
    """Returns rows [..., r, m] or indices [..., r] with the axes that share."""
    if not self.shared:
      return rows
    num = len(self.bases)
    ones = (1,) * len(self.shared)
    x = rows.reshape(*self.bases, *ones, *rows.shape[num:])
    if jnp.issubdtype(rows.dtype, jnp.integer):
      # Indices do not broadcast. They are small.
      return jnp.broadcast_to(x, (*self.batch, *rows.shape[num:]))
    return x


def map_plans(
  f: Callable[..., Any], plans: Sequence[Any], tree: Any, *trees: Any
) -> Any:
  """Returns a tree of f(plan, leaf, ...) for each leaf of `tree`.

  Args:
    f: a function of a plan, a leaf, and the subtrees of the other trees at the
      place of that leaf.
    plans: one for each leaf.
    tree: parameters or gradients.
    *trees: trees with the structure of `tree`, or with subtrees as its leaves.

  Example:
    >>> plans = [Whole('w', ())]
    >>> map_plans(lambda p, x, y: p.rank or y, plans, {'w': 0}, {'w': 3})
    {'w': 3}
  """
  leaves, treedef = jax.tree.flatten(tree)
  rest = [treedef.flatten_up_to(other) for other in trees]
  return treedef.unflatten(map(f, plans, leaves, *rest))


class Recorded(NamedTuple):
  """The plans and multipliers that `init` records, by path."""

  plans: dict[str, Projection | Whole]
  """The plan of each leaf, whether it is projected or not."""
  multipliers: dict[str, tuple[Any, Any]]
  """Multipliers of learning rate and weight decay, if there are groups."""


_recording: contextvars.ContextVar[Recorded | None] = contextvars.ContextVar(
  'recording', default=None
)


@contextlib.contextmanager
def recording_plans() -> Iterator[Recorded]:
  """Yields a record to which each `galore` adds its plans at `init`.

  `describe` and `state_shardings` thereby find the plans behind any wrapper.
  The plans cannot be part of the state: flax serializes arrays only, and a
  seed does not have the shape of a basis.
  """
  recorded = Recorded({}, {})
  token = _recording.set(recorded)
  try:
    yield recorded
  finally:
    _recording.reset(token)


def record_plans(plans: Sequence[Projection | Whole]) -> None:
  """Records the plans if a `recording_plans()` context is active.

  A `Whole` does not replace a `Projection`: another `galore` in the same
  transformation may project the leaf.
  """
  recorded = _recording.get()
  if recorded is None:
    return
  for p in plans:
    if isinstance(p, Projection) or p.path not in recorded.plans:
      recorded.plans[p.path] = p


def record_multipliers(multipliers: dict[str, tuple[Any, Any]]) -> None:
  """Records multipliers if a `recording_plans()` context is active."""
  recorded = _recording.get()
  if recorded is not None:
    recorded.multipliers.update(multipliers)


def are_axes(axes: Any) -> bool:
  """Whether a value is an integer or several of them.

  >>> are_axes(-1), are_axes((0, 1)), are_axes(None)
  (True, True, False)
  """
  if isinstance(axes, tuple | list):
    return all(map(checks.is_integer, axes))
  return checks.is_integer(axes)


def projected_sides(side: Side, i: int, o: int) -> tuple[int, ...]:
  """Returns the axes of an [i, o] matrix that `side` projects.

  'std' is the shorter side (the input if both are equal). 'reverse_std' is
  the longer side (the output if both are equal). These are the rules of the
  PyTorch reference for its weights [out, in].

  >>> projected_sides('std', 32, 64) == (ROWS,)
  True
  >>> projected_sides('reverse_std', 32, 32) == (COLUMNS,)
  True
  """
  shorter, longer = (ROWS, COLUMNS) if i <= o else (COLUMNS, ROWS)
  sides = {
    'std': (shorter,),
    'reverse_std': (longer,),
    'left': (ROWS,),
    'right': (COLUMNS,),
    'both': (ROWS, COLUMNS),
    'full': (ROWS, COLUMNS),
  }
  return sides[side]


def orient(x: jax.Array, side: int) -> jax.Array:
  """Returns `x` with the projected side second to last: [..., m, n].

  The function is its own inverse.

  >>> orient(jnp.zeros((3, 4, 7)), COLUMNS).shape
  (3, 7, 4)
  """
  return x if side == ROWS else jnp.swapaxes(x, ROWS, COLUMNS)


def unfold(x: jax.Array, side: int) -> jax.Array:
  """Returns the matrices [k, m, K n] of which the bases of a side are found.

  The matrices that share a basis are next to each other: a column for each of
  their columns.

  Args:
    x: matrices [k, ..., i, o]; those of the axes between share a basis.
    side: the projected side.

  >>> unfold(jnp.zeros((4, 3, 3, 5, 7)), COLUMNS).shape
  (4, 7, 45)
  """
  x = orient(x, side)
  if x.ndim == 3:
    return x
  k, m = x.shape[0], x.shape[-2]
  return jnp.moveaxis(x, -2, 1).reshape(k, m, -1)


def to_matrix(projection: Projection, x: jax.Array) -> jax.Array:
  """Returns a weight-shaped array as a stack of matrices [..., i, o].

  >>> p = Projection('w', (2, 3, 5), ((0,), (1, 2)), (1,), (ROWS,))
  >>> to_matrix(p, jnp.zeros((2, 3, 5))).shape
  (2, 15)
  """
  x = x.transpose(
    projection.batch_axes + projection.axes[0] + projection.axes[1]
  )
  return x.reshape(projection.matrix_shape)


def from_matrix(projection: Projection, x: jax.Array) -> jax.Array:
  """Returns a stack [..., i, o] in the weight's shape; inverts `to_matrix`.

  >>> p = Projection('w', (2, 3, 5), ((0,), (1, 2)), (1,), (ROWS,))
  >>> from_matrix(p, jnp.zeros((2, 15))).shape
  (2, 3, 5)
  """
  order = projection.batch_axes + projection.axes[0] + projection.axes[1]
  x = x.reshape([projection.shape[axis] for axis in order])
  return x.transpose([order.index(axis) for axis in range(len(order))])


def overlap(new: jax.Array, old: jax.Array) -> jax.Array:
  """Returns `P_new P_old^T` [..., r, r] for two bases of one side.

  >>> overlap(jnp.array([0, 2]), jnp.array([2, 3]))
  Array([[0., 0.],
         [1., 0.]], dtype=float32)
  """
  if jnp.issubdtype(new.dtype, jnp.integer):
    return jnp.float32(new[..., :, None] == old[..., None, :])
  return _matmul(new, jnp.swapaxes(old, -2, -1))


def _project_side(x: jax.Array, rows: jax.Array, axis: int) -> jax.Array:
  """Returns `x` with an axis m replaced by r: the product with a basis."""
  x_mn = orient(x, axis)
  if jnp.issubdtype(rows.dtype, jnp.integer):
    low_rn = jnp.take_along_axis(x_mn, rows[..., None], axis=-2)
  else:
    low_rn = _matmul(rows, x_mn)
  return orient(low_rn, axis)


def _unproject_side(
  x: jax.Array, rows: jax.Array, side: int, m: int
) -> jax.Array:
  """Returns `x` with a side r replaced by m; transposes `_project_side`."""
  if jnp.issubdtype(rows.dtype, jnp.integer):
    return orient(_scatter(rows, orient(x, side), m), side)
  return _matmul(rows.mT, x) if side == ROWS else _matmul(x, rows)


def _scatter(index_r: jax.Array, low_rn: jax.Array, m: int) -> jax.Array:
  """Returns zeros [..., m, n] with the rows of `low` at the indices."""
  *batch, r, n = low_rn.shape
  zeros_mn = jnp.zeros((m, n), low_rn.dtype)
  whole_kmn = jax.vmap(
    lambda index_r, low_rn: zeros_mn.at[index_r].set(low_rn)
  )(index_r.reshape(-1, r), low_rn.reshape(-1, r, n))
  return whole_kmn.reshape(*batch, m, n)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns `a @ b`, summed in float32 at least."""
  dtype = jnp.promote_types(a.dtype, b.dtype)
  sum_dtype = jnp.promote_types(dtype, jnp.float32)
  if dtype == sum_dtype:
    return a.astype(dtype) @ b.astype(dtype)
  # XLA's CPU backend does not compile bfloat16 products with float32 sums for
  # every shape, so it multiplies float32 copies.
  return jax.lax.platform_dependent(
    a.astype(dtype),
    b.astype(dtype),
    cpu=lambda a, b: a.astype(sum_dtype) @ b.astype(sum_dtype),
    default=lambda a, b: jnp.matmul(a, b, preferred_element_type=sum_dtype),
  )
