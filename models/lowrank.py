"""Low-rank factors of weights: LoRA, ReLoRA, and kernels W = A B.

`adapt` adds factors to a model's parameters, and `merge` multiplies them into
the kernels. `hook` makes a model compute with its factors; pass it to
`models.llama.Layers` as `intercept`. The linen modules themselves have no code
for factors. `models.peft` reads and writes them as adapters.

Shapes: L layers; in and out are the sides of a kernel [L, in, out]; r is the
rank of its factors lora_a [L, in, r] and lora_b [L, r, out]; B batch.

Sources: Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021; Lialin et
al., `ReLoRA <https://arxiv.org/abs/2307.05695>`_, 2023.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext

from models import cross_entropy, noise

PyTree: TypeAlias = Any

Flat: TypeAlias = dict[str, Any]
"""Leaves of a nested dict by their paths, such as 'blocks/mlp/up/kernel'."""
Role: TypeAlias = Literal['factor', 'beneath', 'rest']

FACTORS = ('lora_a', 'lora_b')
"""Names of the factors A and B in the dict that holds the kernel."""


@dataclasses.dataclass(frozen=True)
class Lora:
  """LoRA: two factors per kernel, x W + alpha / rank * dropout(x) A B."""

  rank: int = 8
  """Number of columns of A and of rows of B."""
  alpha: float = 16.0
  """Scale of the factors' product, which is multiplied by alpha / rank."""
  dropout: float = 0.0
  """Dropout rate on the input of A in training."""
  targets: tuple[str, ...] | None = None
  """Regexes on the paths of the kernels that get factors; None selects all
  kernels of the transformer layers."""
  rest: Literal['frozen', 'trained'] = 'frozen'
  """Whether weights without factors (embedding, norms, head) are trained."""
  lomo: float = 0.0
  """Trains the weights that LoRA freezes with plain SGD (LOMO), at this
  multiple of the learning rate. 0 keeps them frozen."""

  def __post_init__(self) -> None:
    """Checks the fields as far as this is possible without a model."""
    _check_rank(self)
    if not 0 < self.alpha < math.inf:
      raise ValueError(
        f'adapter.alpha must be positive and finite, got {self.alpha}'
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(
        f'adapter.dropout is a share in [0, 1), got {self.dropout}'
      )
    if not 0 <= self.lomo < math.inf:
      raise ValueError(
        f'adapter.lomo must be finite and not negative, got {self.lomo}'
      )

  @property
  def scale(self) -> float:
    """Multiplier of the factors' product."""
    return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Relora(Lora):
  """ReLoRA: merges the factors into the kernels periodically and restarts them.

  The sum of many low-rank updates is not low-rank. ReLoRA is therefore suitable
  for pre-training.
  """

  rest: Literal['frozen', 'trained'] = 'trained'
  """Whether weights without factors (embedding, norms, head) are trained."""
  every: int = 1000
  """Number of steps between merges."""
  reset: float = 0.999
  """Share of the entries of the factors' moments that a merge sets to 0, chosen
  at random."""
  restart_warmup: int = 50
  """Number of steps after a merge in which the learning rate rises from 0."""

  def __post_init__(self) -> None:
    """Checks the fields as far as this is possible without a model."""
    super().__post_init__()
    if self.every < 1:
      raise ValueError(f'adapter.every must be at least 1, got {self.every}')
    if not 0 <= self.reset <= 1:
      raise ValueError(f'adapter.reset is a share in [0, 1], got {self.reset}')
    if not 0 <= self.restart_warmup < self.every:
      raise ValueError(
        'adapter.restart_warmup must be at least 0 and below adapter.every = '
        f'{self.every}, got {self.restart_warmup}'
      )


@dataclasses.dataclass(frozen=True)
class Factored:
  """Replaces each kernel by two factors, x A B, for pre-training."""

  rank: int = 8
  """Number of columns of A and of rows of B."""
  targets: tuple[str, ...] | None = None
  """Regexes on the paths of the kernels that are replaced; None selects all
  kernels of the transformer layers."""

  def __post_init__(self) -> None:
    """Checks the fields as far as this is possible without a model."""
    _check_rank(self)

  @property
  def scale(self) -> float:
    """Multiplier of the factors' product."""
    return 1.0


Adapter: TypeAlias = Lora | Relora | Factored


def _check_rank(adapter: Adapter) -> None:
  if adapter.rank < 1:
    raise ValueError(f'adapter.rank must be at least 1, got {adapter.rank}')


def adapt(params: PyTree, adapter: Adapter, key: jax.Array) -> PyTree:
  """Returns parameters with factors.

  `Lora` and `Relora` add float32 factors to each kernel. A is uniform in
  +-1 / sqrt(in), the distribution of a weight of torch's `Linear`. B is 0, so
  that the model's function does not change. `Factored` replaces each kernel by
  two normal factors of the kernel's type, whose product has the kernel's
  standard deviation.

  Args:
    params: Parameters of a model whose layers are stacked in params['blocks'].
    adapter: The kind of factors, with their rank and targets.
    key: Random key for the factors.

  Returns:
    Parameters with the factors 'lora_a' and 'lora_b' next to, or instead of,
    'kernel'.

  Raises:
    ValueError: A target matches no kernel of a layer, or a matched kernel is
      smaller than the rank.

  Example:
    >>> params = {'blocks': {'up': {'kernel': jnp.ones((2, 5, 7))}}}
    >>> params = adapt(params, Lora(rank=3), jax.random.key(0))
    >>> jax.tree.map(jnp.shape, params['blocks']['up'])
    {'kernel': (2, 5, 7), 'lora_a': (2, 5, 3), 'lora_b': (2, 3, 7)}
  """
  flat = flatten(params)
  for number, path in enumerate(_targets(flat, adapter)):
    a, b = (f'{path.rpartition("/")[0]}/{name}' for name in FACTORS)
    kernel_key = jax.random.fold_in(key, number)
    if isinstance(adapter, Factored):
      factors = _factors(flat.pop(path), adapter.rank, kernel_key)
    else:
      factors = fresh_factors(flat[path].shape, adapter.rank, kernel_key)
    flat[a], flat[b] = factors
  return unflatten(flat)


def fresh_factors(
  shape: Sequence[int], rank: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns new LoRA factors A [..., in, r] and B [..., r, out]; B is 0.

  Args:
    shape: Shape [..., in, out] of the kernel.
    rank: Rank of the factors, r.
    key: Random key for A.
  """
  *layers, rows, columns = shape
  bound = rows**-0.5
  a = jax.random.uniform(
    key, (*layers, rows, rank), jnp.float32, minval=-bound, maxval=bound
  )
  return a, jnp.zeros((*layers, rank, columns), jnp.float32)


def _factors(
  kernel: jax.Array, rank: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns normal A and B whose product has the standard deviation of kernel.

  A and B have the same standard deviation.
  """
  *layers, rows, columns = kernel.shape
  std = jnp.sqrt(jnp.std(kernel.astype(jnp.float32)) / rank**0.5)
  key_a, key_b = jax.random.split(key)
  a = std * jax.random.normal(key_a, (*layers, rows, rank))
  b = std * jax.random.normal(key_b, (*layers, rank, columns))
  return a.astype(kernel.dtype), b.astype(kernel.dtype)


def merge(params: PyTree, adapter: Adapter) -> PyTree:
  """Returns parameters of the same model function, without factors.

  The scaled product of the factors is added to the kernel. Products and sums
  are computed in float32 and rounded once, to the type of the kernel.

  Args:
    params: Parameters with factors.
    adapter: The adapter that they were made with.

  Returns:
    Parameters with a kernel instead of each pair of factors.

  Example:
    >>> params = {'up': {'kernel': jnp.ones((2, 2)),
    ...                  'lora_a': jnp.ones((2, 1)), 'lora_b': jnp.eye(2)[:1]}}
    >>> merge(params, Lora(rank=1, alpha=3.0))['up']['kernel']
    Array([[4., 1.],
           [4., 1.]], dtype=float32)
  """
  flat = flatten(params)
  for path in [path for path in flat if path.endswith(FACTORS[0])]:
    parent = path.rpartition('/')[0]
    a, b = (flat.pop(f'{parent}/{name}') for name in FACTORS)
    total, kernel = product(a, b, adapter.scale), flat.get(f'{parent}/kernel')
    dtype = a.dtype
    if kernel is not None:
      total, dtype = kernel.astype(jnp.float32) + total, kernel.dtype
    flat[f'{parent}/kernel'] = total.astype(dtype)
  return unflatten(flat)


def product(a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
  """Returns the float32 product scale * A B [..., in, out]."""
  a, b = (x.astype(jnp.float32) for x in (a, b))
  return scale * jnp.matmul(a, b, precision='highest')


def roles(params: PyTree) -> dict[str, Role]:
  """Returns the role of each weight, by its path.

  The roles are 'factor', 'beneath' for a kernel that has factors, and 'rest'
  for all other weights.

  Example:
    >>> roles({'up': {'kernel': 0, 'lora_a': 0, 'lora_b': 0}, 'norm': 0})
    {'up/kernel': 'beneath', 'up/lora_a': 'factor', 'up/lora_b': 'factor',
     'norm': 'rest'}
  """
  flat = flatten(params)

  def role(path: str) -> Role:
    parent, _, name = path.rpartition('/')
    if name in FACTORS:
      return 'factor'
    has_factors = name == 'kernel' and f'{parent}/{FACTORS[0]}' in flat
    return 'beneath' if has_factors else 'rest'

  return {path: role(path) for path in flat}


def optimized(params: PyTree, adapter: Adapter) -> PyTree:
  """Returns a tree of bools: whether the optimizer trains each weight.

  Kernels that have factors are not trained. The rest is trained unless a `Lora`
  has rest='frozen'.

  Example:
    >>> params = {'up': {'kernel': 0, 'lora_a': 0, 'lora_b': 0}, 'norm': 0}
    >>> optimized(params, Lora())['norm'], optimized(params, Relora())['norm']
    (False, True)
  """
  frozen = {'beneath'}
  if isinstance(adapter, Lora) and adapter.rest == 'frozen':
    frozen.add('rest')
  return unflatten(
    {path: role not in frozen for path, role in roles(params).items()}
  )


def hook(adapter: Adapter) -> Callable[..., Any]:
  """Returns a linen interceptor that makes a model compute with its factors.

  It changes each module that has factors; such a module must be a linear map
  with a 'kernel' or, for `Factored`, without one. Dropout is applied only if a
  batch has 'noise' [B, 2] uint32, one random key per example. The noise is an
  entry of the layers' input x, and each layer returns new noise for the next.

  Args:
    adapter: The adapter that the parameters were made with.

  Returns:
    A function for `nn.intercept_methods`, or for `Layers.intercept`.
  """
  dropout = adapter.dropout if isinstance(adapter, Lora) else 0.0
  # Noise of the layers that are being computed, innermost last.
  noises: list[jax.Array] = []

  def intercept(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: InterceptorContext,
  ) -> Any:
    module, method = context.module, context.method_name
    if method == 'setup' and _is_factored(module):
      # Skip `Linear.setup`, which would require a kernel.
      return None
    x = args[0] if args else None
    if isinstance(x, dict) and 'noise' in x:
      noises.append(x['noise'])
      try:
        y = next_fun(*args, **kwargs)
      finally:
        noises.pop()
      if method == 'enter':
        return {**y, 'noise': x['noise']}
      # With remat, the call of a layer is nested in a second call of the same
      # layer. Both compute the new noise from the noise of the input, so that
      # it is folded only once.
      is_layer = method == '__call__' and isinstance(y, dict)
      return {**y, 'noise': noise.folded(x['noise'], 0)} if is_layer else y
    if method != '__call__' or not _has_param(module, FACTORS[0]):
      return next_fun(*args, **kwargs)
    a, b = (module.get_variable('params', name) for name in FACTORS)
    dropped: jax.Array = args[0]
    if noises and dropout:
      keys = noise.folded(noises[-1], zlib.crc32(str(module.name).encode()))
      dropped = noise.drop(dropped, keys, dropout)
    low = cross_entropy.multiply(cross_entropy.multiply(dropped, a), b)
    if isinstance(adapter, Factored):
      bias = module.get_variable('params', 'bias')
      return low if bias is None else low + _row(bias, low)
    return next_fun(*args, **kwargs) + adapter.scale * low

  return intercept


def _has_param(module: nn.Module, name: str) -> bool:
  return module.has_variable('params', name)


def _is_factored(module: nn.Module) -> bool:
  """Returns whether a linear map has factors instead of a kernel."""
  has_factors = _has_param(module, FACTORS[0])
  return has_factors and not _has_param(module, 'kernel')


def _row(bias: jax.Array, y: jax.Array) -> jax.Array:
  """Returns a bias in the type of y, with leading axes of size 1."""
  return jnp.expand_dims(bias.astype(y.dtype), range(y.ndim - 1))


def _targets(flat: Flat, adapter: Adapter) -> list[str]:
  """Returns the sorted paths of the kernels that get factors."""
  kernels = sorted(
    path
    for path, leaf in flat.items()
    if path.startswith('blocks/') and path.endswith('/kernel')
    if len(leaf.shape) == 3
  )
  chosen = kernels
  if adapter.targets is not None:
    chosen = _matched(adapter.targets, kernels)
  for path in chosen:
    _, rows, columns = flat[path].shape
    if adapter.rank > min(rows, columns):
      raise ValueError(
        f'adapter.rank must be in 1..{min(rows, columns)} for {path} of shape '
        f'{flat[path].shape}, got {adapter.rank}'
      )
  return chosen


def _matched(targets: Sequence[str], kernels: Sequence[str]) -> list[str]:
  """Returns the kernels whose whole path matches one of the regexes."""
  try:
    regexes = [re.compile(target) for target in targets]
  except re.error as error:
    raise ValueError(
      f'adapter.targets: {error.pattern!r} is no regular expression: {error}'
    ) from error
  unused = [x.pattern for x in regexes if not any(map(x.fullmatch, kernels))]
  if unused or not regexes:
    raise ValueError(
      f'adapter.targets {unused} match no kernel of a layer; a regex must match'
      f' a whole path. Paths: {", ".join(kernels)}'
    )
  return [path for path in kernels if any(x.fullmatch(path) for x in regexes)]


def flatten(tree: PyTree) -> Flat:
  """Returns the leaves of a nested dict by their paths."""
  return dict(flax.traverse_util.flatten_dict(tree, sep='/'))


def unflatten(flat: Flat) -> PyTree:
  """Returns a nested dict, the inverse of `flatten`."""
  return flax.traverse_util.unflatten_dict(flat, sep='/')
