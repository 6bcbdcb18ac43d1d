"""Elements of a stack equal its slices, and compile as one kernel."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_optax.unstack import unstack
from tests.galore_optax.program import normal32

STACKS = {
  'floats': lambda: normal32((5, 3, 4)),
  'nan': lambda: normal32((5, 3)).at[0, 0].set(jnp.nan),
  'infinity': lambda: normal32((5, 3)).at[0, 0].set(-jnp.inf),
  'bfloat16': lambda: normal32((5, 3)).astype(jnp.bfloat16),
  'seeds': lambda: jnp.arange(5, dtype=jnp.uint32) + jnp.uint32(4294967290),
  'codes': lambda: jnp.arange(15, dtype=jnp.uint8).reshape(5, 3),
  'tree': lambda: {'a': normal32((5, 3)), 'b': (jnp.arange(5),)},
}


@pytest.mark.parametrize('kind', STACKS)
def test_elements_are_slices(kind):
  stack = STACKS[kind]()
  want = [
    jax.tree.map(lambda x, i=i: np.asarray(x)[i], stack) for i in range(5)
  ]
  for f in (unstack, jax.jit(unstack, static_argnums=1)):
    chex.assert_trees_all_equal(f(stack, 5), want)


def test_elements_of_a_batch_have_derivatives():
  stack = normal32((2, 3, 4))
  f = lambda stack: jnp.stack([x**2 for x in unstack(stack, 3)])
  squares = jax.jit(jax.vmap(f))(stack)
  chex.assert_trees_all_equal(squares, np.square(stack))
  slope_of = jax.jit(lambda x: jax.jvp(f, (x,), (jnp.ones((3, 4)),))[1])
  slope = slope_of(stack[0])
  np.testing.assert_allclose(slope, 2 * stack[0], rtol=1e-6)


def kernels(f, *args):
  """The number of different fused computations of a compiled function."""
  text = jax.jit(f).lower(*args).compile().as_text()
  parts = re.split(r'\n(?=%|ENTRY)', text)
  fused = [x for x in parts if x.startswith(('%fused', '%wrapped'))]
  return len(set(map(without_names, fused)))


def without_names(text):
  """A computation with numbers instead of names, and without metadata."""
  text = re.sub(r', metadata=\{[^}]*\}', '', text)
  names = {}
  text = re.sub(
    r'%[\w.\-]+', lambda x: names.setdefault(x[0], f'%{len(names)}'), text
  )
  return re.sub(r'[\w.\-]+: ', '', text)


def test_elements_are_one_kernel():
  """If XLA no longer needs it, the second assertion fails: use slices."""
  stack = normal32((40, 3, 4))
  assert kernels(lambda x: unstack(x, 40), stack) < 10
  assert kernels(lambda x: [x[i] for i in range(40)], stack) >= 40
