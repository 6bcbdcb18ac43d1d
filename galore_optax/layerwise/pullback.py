"""This module holds a backward pass that stops at each gradient.

`jax.vjp` returns all gradients of a function at once, so all of them exist at
once. `pull_back` runs the same operations in the same order, hands over each
gradient when it appears, and lets nothing that follows begin before what was
done with it is done.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.extend.core as jex
from jax import lax

PyTree = Any
Carry = TypeVar('Carry')


def pull_back(
  f: Callable[[list[jax.Array], PyTree], PyTree],
  x: PyTree,
  dy: PyTree,
  carry: Carry,
  *,
  num_params: int,
  read: Callable[[Carry, int], jax.Array],
  visit: Callable[[Carry, int, jax.Array], Carry],
) -> tuple[PyTree, Carry]:
  """Walks back through `f`, visiting each parameter's gradient in turn.

  Args:
    f: function of a list of parameters and of x.
    x: its other argument, floating leaves only.
    dy: cotangent of its result.
    carry: what the visits change.
    num_params: number of parameters.
    read: parameter i, given the carry. Called again where the backward pass
      needs the parameter, so that no copy of it waits for that.
    visit: `(carry, i, gradient of parameter i) -> carry`.

  Returns:
    Cotangent of x, and the last carry.

  Example:
    >>> f = lambda params, x: params[1] * (params[0] * x)
    >>> read = lambda carry, i: carry[i]
    >>> visit = lambda carry, i, g: carry[:i] + [carry[i] - g] + carry[i + 1:]
    >>> x, dy, params = jax.numpy.array([2.0, 1.0, 3.0]), 1.0, [5.0, 7.0]
    >>> params = [jax.numpy.float32(p) for p in params]
    >>> dx, params = pull_back(f, x[0], x[1], params, num_params=2, read=read,
    ...                        visit=visit)
    >>> print(dx, params[0], params[1])
    35.0 -9.0 -3.0
  """
  params = [read(carry, i) for i in range(num_params)]
  _, vjp = jax.vjp(f, params, x)
  closed = jax.make_jaxpr(vjp)(dy)
  jaxpr = closed.jaxpr
  index = {id(p): i for i, p in enumerate(params)}
  residuals = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  reread = {v: index[id(c)] for v, c in residuals.items() if id(c) in index}
  values = dict(zip(jaxpr.invars, jax.tree.leaves(dy), strict=True))

  def value(var):
    if isinstance(var, jex.Literal):
      return var.val
    if var in reread:
      return read(carry, reread[var])
    return residuals[var] if var in residuals else values[var]

  gradients = jaxpr.outvars[:num_params]
  due = _due(jaxpr, num_params, reread)
  segments = _segments(jaxpr, sorted({0, *due, len(jaxpr.eqns)}))
  for done, (stop, segment) in enumerate(segments, 1):
    run = jex.jaxpr_as_fun(jex.ClosedJaxpr(segment, []))
    made = run(*[value(v) for v in segment.invars])
    values |= zip(segment.outvars, made, strict=True)
    for i in range(num_params):
      if due[i] == stop:
        carry = visit(carry, i, value(gradients[i]))
    needed = {v for _, later in segments[done:] for v in later.invars}
    waiting = [v for v, last in zip(gradients, due, strict=True) if last > stop]
    needed |= set(_variables(waiting + jaxpr.outvars[num_params:]))
    names = [v for v in values if v in needed]
    # What follows waits for the visits; residuals are of the forward pass,
    # and holding them up would order nothing.
    held, carry = lax.optimization_barrier(([values[v] for v in names], carry))
    values = dict(zip(names, held, strict=True))
  dx = [value(v) for v in jaxpr.outvars[num_params:]]
  return jax.tree.unflatten(jax.tree.structure(x), dx), carry


def _due(
  jaxpr: jex.Jaxpr, num_params: int, reread: dict[jex.Var, int]
) -> list[int]:
  """Returns after how many operations each parameter can be changed.

  Its gradient is there, and nothing reads it any more.
  """
  due = [1] * num_params
  for count, eqn in enumerate(jaxpr.eqns, 1):
    for var in _variables(eqn.invars):
      if var in reread:
        due[reread[var]] = count
    for i in range(num_params):
      if jaxpr.outvars[i] in eqn.outvars:
        due[i] = count
  return due


def _segments(
  jaxpr: jex.Jaxpr, bounds: Sequence[int]
) -> list[tuple[int, jex.Jaxpr]]:
  """Cuts a program into pieces, each with the count of operations before it
  and in it; a piece returns what the program or a later piece reads."""
  needed, segments = set(_variables(jaxpr.outvars)), []
  for start, stop in reversed(list(itertools.pairwise(bounds))):
    eqns = jaxpr.eqns[start:stop]
    made = [v for eqn in eqns for v in eqn.outvars]
    read = dict.fromkeys(_variables(v for eqn in eqns for v in eqn.invars))
    inputs = [v for v in read if v not in made]
    piece = jaxpr.replace(
      constvars=[],
      invars=inputs,
      outvars=[v for v in made if v in needed],
      eqns=eqns,
      debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    needed |= set(inputs)
    segments.append((stop, piece))
  return segments[::-1]


def _variables(atoms: Iterable[Any]) -> list[jex.Var]:
  return [v for v in atoms if isinstance(v, jex.Var)]
