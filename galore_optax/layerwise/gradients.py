"""This module holds gradients of what stands before and after a layer stack."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax.layerwise import stack as stacks
from galore_optax.layerwise.parts import Parts

# Axes: K microbatches.

PyTree = Any


def loss_gradient(
  model: Any,
  tree: Parts,
  batch: PyTree,
  x: PyTree,
  rest: dict[str, Any],
  frozen: Collection[str] = (),
) -> tuple[jax.Array, PyTree, dict[str, Any], list[str], PyTree]:
  """Differentiates the loss with respect to what it reads.

  Args:
    model: the three functions of `layerwise`.
    tree: of the parameters.
    batch: microbatches [K, ...].
    x: input of the loss [K, ...].
    rest: weights outside the stack, by path.
    frozen: those without a gradient.

  Returns:
    Mean loss; sums beside the loss; gradients by path; the weights whose
    gradient the embedding completes; cotangent of x [K, ...].
  """
  num = jax.tree.leaves(batch)[0].shape[0]
  first = jax.tree.map(lambda a: a[0], (batch, x))
  embed = lambda rest: model.embed(tree.build(rest), first[0])
  loss = lambda rest: model.loss(tree.build(rest), first[1], first[0])
  moving = [name for name in rest if name not in frozen]
  by_loss = [name for name in _read_by(loss, rest) if name in moving]
  by_embed = [name for name in _read_by(embed, rest) if name in moving]
  # What nothing reads has a gradient of zero, and its update.
  by_embed += [n for n in moving if n not in by_loss and n not in by_embed]

  def part(part):
    part, x = part

    def loss(head, moving):
      params = tree.build({**rest, **head})
      value, sums = model.loss(params, stacks.join(moving, x), part)
      return value / num, sums

    head = {name: rest[name] for name in by_loss}
    grad = jax.value_and_grad(loss, (0, 1), has_aux=True)
    (value, sums), (head, dx) = grad(head, stacks.moving(x))
    return (value, sums, head), dx

  (value, sums, head), dx = sum_over(part, (batch, x))
  return value, sums, head, by_embed, dx


def embed_gradient(
  model: Any,
  tree: Parts,
  batch: PyTree,
  dx: PyTree,
  rest: dict[str, Any],
  names: list[str],
) -> dict[str, Any]:
  """Returns the gradients of the named weights through the embedding."""

  def part(part):
    part, dx = part

    def embed(read):
      params = tree.build({**rest, **read})
      return stacks.moving(model.embed(params, part))

    _, vjp = jax.vjp(embed, {name: rest[name] for name in names})
    return vjp(dx)[0], ()

  return sum_over(part, (batch, dx))[0]


def sum_over(
  f: Callable[[PyTree], tuple[PyTree, PyTree]], parts: PyTree
) -> tuple[PyTree, PyTree]:
  """Sums f's first result over microbatches [K, ...], stacks the second.

  Sums are float32 and come back in the type of what is summed.

  >>> sum_over(lambda x: (x, -x), jnp.arange(3.0))
  (Array(3., dtype=float32), Array([-0., -1., -2.], dtype=float32))
  """
  if jax.tree.leaves(parts)[0].shape[0] == 1:
    total, stacked = f(stacks.take(parts, 0))
    return total, jax.tree.map(lambda a: a[None], stacked)
  total, _ = jax.eval_shape(f, stacks.take(parts, 0))

  def body(acc, part):
    one, stacked = f(part)
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), acc, one), stacked

  full = lambda a: jnp.promote_types(a.dtype, jnp.float32)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, full(a)), total)
  acc, stacked = lax.scan(body, zeros, parts)
  return jax.tree.map(lambda a, b: a.astype(b.dtype), acc, total), stacked


def _read_by(
  f: Callable[[PyTree], PyTree], weights: dict[str, Any]
) -> list[str]:
  """Returns the weights that `f` reads."""
  jaxpr = jax.make_jaxpr(f)(weights).jaxpr
  used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars}
  used |= {id(v) for v in jaxpr.outvars}
  names = sorted(weights)
  pairs = zip(names, jaxpr.invars, strict=True)
  return [name for name, v in pairs if id(v) in used]
