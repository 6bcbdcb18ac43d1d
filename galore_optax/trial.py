"""Trial updates of a transformation on small arrays, before training.

`decay`, `quantized.state` and `presets.inner` call an inner optimizer in this
way at `init`, and raise if it would compute wrong updates with them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax.extend.core as jex
import jax.numpy as jnp
import optax

# Names of primitives that run their body exactly once.
CALLS = {
  'jit',
  'pjit',
  'closed_call',
  'core_call',
  'checkpoint',
  'remat2',
  'custom_jvp_call',
  'custom_vjp_call',
  'custom_vjp_call_jaxpr',
}

# Extra arguments of optax transformations that are functions of the weights.
FUNCTIONS = ('value_fn', 'obj_fn', 'grad_fn')


class NeedsFunctionError(TypeError):
  """A transformation calls a function of the weights, such as the loss."""


def try_update(
  inner: optax.GradientTransformation, grads: Any, state: Any, params: Any
) -> tuple[Any, Any]:
  """Calls an update with the extra arguments that optax transformations read.

  Args:
    inner: the transformation.
    grads: gradients of the trial.
    state: state of the transformation.
    params: weights of the trial.

  Returns:
    Updates and the next state.

  Raises:
    NeedsFunctionError: the update calls `value_fn` or another function.
    TypeError: the update requires an extra argument that optax does not have.

  Example:
    >>> tx, g = optax.polyak_sgd(), jnp.array([2.0])
    >>> print(try_update(tx, g, tx.init(g), g)[0])
    [-0.5]
  """
  tx = optax.with_extra_args_support(inner)
  extra: dict[str, Any] = {name: _refused(name) for name in FUNCTIONS}
  extra |= {'value': jnp.ones([]), 'grad': grads}
  # A line search rejects arguments that `value_fn` does not have, and some
  # transformations accept only the arguments in their signature. Hence several
  # sets of arguments are tried.
  line_search = ('value', 'grad', 'value_fn')
  each_function = [(name,) for name in FUNCTIONS]
  for names in [tuple(extra), line_search, *each_function, ()]:
    some = {name: extra[name] for name in names}
    try:
      return tx.update(grads, state, params, **some)
    except NeedsFunctionError:
      raise
    except TypeError:
      continue
  return tx.update(grads, state, params, value=extra['value'])


def _refused(name: str) -> Callable[..., Any]:
  """Returns a function that raises NeedsFunctionError when it is called."""

  def function(*args: Any, **kwargs: Any) -> NoReturn:
    raise NeedsFunctionError(name)

  return function


def reaches(jaxpr: Any, inputs: Sequence[bool]) -> list[bool]:
  """Returns which outputs of a program may depend on some of its inputs.

  A loop counts as one operation: each output of a loop depends on all its
  inputs.

  Args:
    jaxpr: the program, a `jax.extend.core.Jaxpr`.
    inputs: for each input of the program, whether it is one of those inputs.

  Returns:
    A boolean for each output of the program.

  Example:
    >>> import jax
    >>> f = lambda x, y, z: (x + y, jnp.where(z > 0, z, 0.0))
    >>> jaxpr = jax.make_jaxpr(f)(1.0, 2.0, 3.0).jaxpr
    >>> reaches(jaxpr, [True, False, False])
    [True, False]
  """
  marked = {v for v, yes in zip(jaxpr.invars, inputs, strict=True) if yes}
  for eqn in jaxpr.eqns:
    found = _through(eqn, _are_marked(eqn.invars, marked))
    marked |= {v for v, yes in zip(eqn.outvars, found, strict=True) if yes}
  return _are_marked(jaxpr.outvars, marked)


def _are_marked(atoms: Sequence[Any], marked: set[Any]) -> list[bool]:
  # Literals are constants, which depend on no input. They are not hashable.
  return [isinstance(x, jex.Var) and x in marked for x in atoms]


def _through(eqn: Any, inputs: list[bool]) -> list[bool]:
  """Returns which outputs of one operation may depend on some inputs."""
  name, params = eqn.primitive.name, eqn.params
  if name == 'cond':
    index, *operands = inputs
    branches = [reaches(x.jaxpr, operands) for x in params['branches']]
    return [index or any(outs) for outs in zip(*branches, strict=True)]
  body = params.get('jaxpr', params.get('call_jaxpr'))
  if name in CALLS and body is not None:
    return reaches(getattr(body, 'jaxpr', body), inputs)
  return [any(inputs)] * len(eqn.outvars)
