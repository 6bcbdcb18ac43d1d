"""Counts the flops of the matrix products and convolutions of a function."""

import math

import jax


def count(function, *args):
  """Returns two flops per multiply-add, from the operations that JAX traces."""
  return _of(jax.make_jaxpr(function)(*args).jaxpr)


def _of(jaxpr):
  total = 0
  for equation in jaxpr.eqns:
    name, parameters = equation.primitive.name, equation.params
    if name == 'dot_general':
      (left_axes, _), _ = parameters['dimension_numbers']
      left = equation.invars[0].aval.shape
      terms = math.prod(left[axis] for axis in left_axes)
      total += 2 * equation.outvars[0].aval.size * terms
    elif name == 'conv_general_dilated':
      kernel = equation.invars[1].aval
      features = kernel.shape[parameters['dimension_numbers'].rhs_spec[0]]
      terms = kernel.size // features
      total += 2 * equation.outvars[0].aval.size * terms
    for value in parameters.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        total += parameters.get('length', 1) * _of(inner)
  return total
