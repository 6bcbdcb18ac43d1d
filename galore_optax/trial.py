"""Trial updates of a transformation on small arrays, before training.

`decay`, `quantized.state` and `presets.inner` call an inner optimizer in this
way at `init`, and raise if it would compute wrong updates with them.

A model has hundreds of matrices, and an inner treats most of them alike. So a
trial traces the inner with the whole tree, and compiles each operation that is
applied to equal values only once; see `Traced`.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from galore_optax.sharding import compile_time_eval, without_abstract_mesh

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

# Those among them that no transformation of JAX treats in a special way.
INLINED = {'jit', 'pjit', 'closed_call'}

# Extra arguments of optax transformations that are functions of the weights.
FUNCTIONS = ('value_fn', 'obj_fn', 'grad_fn')

# Python's messages about the arguments of a call.
REJECTED = re.compile(r"unexpected keyword argument '(\w+)'")
MISSING = re.compile(r'missing \d+ required [\w-]+ arguments?: (.*)')
NAME = re.compile(r"'(\w+)'")


class NeedsFunctionError(TypeError):
  """A transformation calls a function of the weights, such as the loss."""


class HasTracersError(TypeError):
  """A transformation reads a tracer of an outer function."""


class CannotTryError(TypeError):
  """A transformation needs an argument for which a trial has no value."""


def try_update(
  inner: optax.GradientTransformation, grads: Any, state: Any, params: Any
) -> tuple[Any, Any]:
  """Calls an update with the extra arguments that optax transformations read.

  These are the loss `value`, the gradient `grad`, and the functions `value_fn`,
  `obj_fn` and `grad_fn`. The update receives those that its signature accepts.

  Args:
    inner: the transformation.
    grads: gradients of the trial.
    state: state of the transformation.
    params: weights of the trial.

  Returns:
    Updates and the next state.

  Raises:
    NeedsFunctionError: the update calls `value_fn` or another function.
    CannotTryError: the update requires another extra argument. The message is
      that of Python, which names the argument.
    TypeError: the update raises it for all sets of arguments.

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
  # sets of arguments are tried. The first error names a rejected argument.
  line_search = ('value', 'grad', 'value_fn')
  each_function = [(name,) for name in FUNCTIONS]
  sets: list[Sequence[str]] = [tuple(extra)]
  others = [line_search, *each_function, (), ('value',)]
  tried: set[Sequence[str]] = set()
  missing: TypeError | None = None
  last = TypeError('update was not called')
  while sets or others:
    names = sets.pop() if sets else others.pop(0)
    if names in tried:
      continue
    tried.add(names)
    some = {name: extra[name] for name in names}
    try:
      return tx.update(grads, state, params, **some)
    except NeedsFunctionError:
      raise
    except TypeError as error:
      last = error
      rejected = REJECTED.search(str(error))
      if rejected and rejected[1] in names:
        sets.append(tuple(x for x in names if x != rejected[1]))
      lacks = MISSING.search(str(error))
      if lacks and not set(NAME.findall(lacks[1])) & set(extra):
        missing = error
  if missing is not None:
    raise CannotTryError(str(missing)) from missing
  raise last


# Errors for a tracer whose value Python, or a trial, reads.
TRACED = (
  jax.errors.ConcretizationTypeError,
  jax.errors.TracerArrayConversionError,
  jax.errors.TracerIntegerConversionError,
  jax.errors.UnexpectedTracerError,
  HasTracersError,
)


def warn_untried(error: TypeError, unchecked: str) -> None:
  """Warns that an inner could not be tried, and why.

  A traced hyperparameter causes no warning. `inject_hyperparams` and a jitted
  `init` trace hyperparameters, and their values are unknown then.

  Args:
    error: the error of the trial.
    unchecked: the property of the inner that the trial would have checked.
  """
  if isinstance(error, TRACED):
    return
  warnings.warn(
    f'the inner could not be tried at init ({error}), so nothing has checked'
    f' that {unchecked}',
    stacklevel=2,
  )


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


class Shared(NamedTuple):
  """The structure of a tree in which several leaves may be one object."""

  treedef: Any
  """Structure of the tree."""
  places: tuple[int, ...]
  """For each leaf, its index in the list of distinct leaves."""

  @classmethod
  def of(cls, tree: Any) -> tuple[list[Any], 'Shared']:
    """Returns the distinct leaves of a tree, and its structure.

    >>> values, form = Shared.of(['a', 'b', 'a'])
    >>> values, form.rebuild([1, 2])
    (['a', 'b'], [1, 2, 1])
    """
    leaves, treedef = jax.tree.flatten(tree)
    distinct = {id(x): x for x in leaves}
    numbers = {key: i for i, key in enumerate(distinct)}
    places = tuple(numbers[id(x)] for x in leaves)
    return list(distinct.values()), cls(treedef, places)

  def rebuild(self, values: Sequence[Any]) -> Any:
    """Returns the tree with other distinct leaves."""
    return self.treedef.unflatten([values[i] for i in self.places])


class RunOnce:
  """Compiles a function of trees, and preserves leaves that are one object.

  Leaves of the arguments that are one object are one object inside the
  function. Leaves of the result that are one object inside the function are one
  array of the result.

  Example:
    >>> x, y = jnp.zeros(2), jnp.ones(2)
    >>> a, b, c = RunOnce(lambda tree: tree)([x, y, x])
    >>> a is c, a is b
    (True, False)
  """

  def __init__(self, f: Callable[..., Any]) -> None:
    """Does not run the function yet."""
    forms: dict[Shared, Shared] = {}

    def of_values(form: Shared, values: list[Any]) -> list[Any]:
      results, forms[form] = Shared.of(f(*form.rebuild(values)))
      return results

    self._f = f
    self._forms = forms
    self._run: Any = jax.jit(of_values, static_argnums=0)

  def __call__(self, *args: Any) -> Any:
    """Returns the result of the function."""
    values, form = Shared.of(args)
    if self._run is not None:
      try:
        results = self._run(form, values)
        return self._forms[form].rebuild(results)
      except TRACED:
        # The function reads values in Python, which a compiled one cannot.
        self._run = None
    return map_once(jnp.asarray, self._f(*args))


def kinds(tree: Any) -> Hashable:
  """Returns the structure of a tree and the kind of each leaf.

  A trial reads nothing else of the parameters, so a transformation that passed
  it passes it again for a tree with equal kinds.

  >>> x = {'w': jnp.ones((2, 3)), 'b': jnp.ones(3)}
  >>> kinds(x) == kinds({'w': jnp.ones((5, 7)), 'b': jnp.ones(7)})
  True
  """
  leaves, treedef = jax.tree.flatten(tree)
  return treedef, tuple((x.ndim, jnp.dtype(x.dtype)) for x in leaves)


def map_once(f: Callable[..., Any], *trees: Any) -> Any:
  """Returns `jax.tree.map(f, *trees)`; calls f once for equal arguments.

  Arguments are equal if they are one object. Their results are then one object.

  Example:
    >>> x = jnp.ones(2)
    >>> a, b = map_once(jnp.sin, [x, x])
    >>> a is b
    True
  """
  # The arguments are kept alive, so that their ids stay unique.
  known: dict[tuple[int, ...], tuple[Any, Any]] = {}

  def of_leaves(*leaves: Any) -> Any:
    key = tuple(map(id, leaves))
    if key not in known:
      known[key] = f(*leaves), leaves
    return known[key][0]

  return jax.tree.map(of_leaves, *trees)


def _abstract(x: Any) -> Any:
  """Returns the type of an array; a type is returned unchanged."""
  return x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)


UNKNOWN = object()
"""The result of a function that was not traced."""


class Traced:
  """A traced function, in which repeated operations are computed only once.

  The function is traced with the whole trees. Two operations are equal if they
  are the same primitive with the same parameters and the same operands. Leaves
  of the arguments are the same operand if they are one object. Equal operations
  compute equal values, so this does not depend on what the function is: a
  function that treats one path in another way applies other operations to it.

  A function that reads values in Python cannot be traced. It is then called
  with the arguments of each call.

  Example:
    >>> x, y = jnp.zeros(2), jnp.ones(2)
    >>> f = Traced(lambda tree: [jnp.sin(w) for w in tree], [x, x, y])
    >>> a, b, c = f([x, x, y])
    >>> a is b, a is c
    (True, False)
  """

  def __init__(self, f: Callable[..., Any], *args: Any) -> None:
    """Traces f(*args); only shapes and dtypes of the arguments are read.

    Args:
      f: a function of trees of arrays.
      *args: its arguments.
    """
    self.args = args
    """The arguments of the trace."""
    self.closed: Any = None
    """The program, a `jax.extend.core.ClosedJaxpr`; None if it is not known."""
    self.result: Any = UNKNOWN
    """The result, with shapes instead of arrays; `UNKNOWN` if it is not
    known."""
    self._f = f
    if any(x is UNKNOWN for x in args):
      return
    shapes = jax.tree.map(_abstract, args)
    trace = jax.make_jaxpr(f, return_shape=True)
    with contextlib.suppress(*TRACED):
      try:
        with without_abstract_mesh():
          self.closed, self.result = trace(*shapes)
      except TypeError:
        # The function reads the value of an array that depends on no argument.
        # This mode computes such arrays at once, which takes longer.
        with jax.ensure_compile_time_eval(), compile_time_eval():
          self.closed, self.result = trace(*shapes)

  def __call__(self, *args: Any) -> Any:
    """Returns the result for arguments of the same structure and shapes."""
    if self.closed is None:
      return self._f(*args)
    values = _interpret(self.closed, jax.tree.leaves(args), {})
    return jax.tree.structure(self.result).unflatten(values)

  @property
  def reads_tracers(self) -> bool:
    """Whether the function reads tracers of an outer function.

    Their values are not known, so no program of values can be run.
    """
    consts = () if self.closed is None else self.closed.consts
    return any(isinstance(x, Tracer) for x in consts)

  def fills(self) -> list[float | None]:
    """Returns for each leaf of the result the number that fills it, if any.

    >>> Traced(lambda x: [jnp.zeros_like(x), 2 * x], jnp.ones(2)).fills()
    [0.0, None]
    """
    if self.closed is None:
      return [None] * len(jax.tree.leaves(jax.eval_shape(self._f, *self.args)))
    return _fills(self.closed.jaxpr)


def require_values(*programs: Traced) -> None:
  """Raises HasTracersError if a program reads tracers of an outer function."""
  if any(program.reads_tracers for program in programs):
    raise HasTracersError('the inner has a traced hyperparameter')


def _fills(jaxpr: Any) -> list[float | None]:
  """Returns for each output of a program the number that fills it, if any.

  Only the operations of `jnp.full` are followed.
  """
  found: dict[Any, float | None] = {}

  def read(atom: Any) -> float | None:
    if not isinstance(atom, jex.Literal):
      return found.get(atom)
    is_number = np.ndim(atom.val) == 0 and not np.iscomplexobj(atom.val)
    return float(atom.val) if is_number else None

  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name in INLINED and not eqn.invars:
      body = eqn.params['jaxpr'] if 'jaxpr' in eqn.params else None
      if body is not None:
        found |= zip(eqn.outvars, _fills(body.jaxpr), strict=True)
    if name == 'broadcast_in_dim':
      found[eqn.outvars[0]] = read(eqn.invars[0])
  return list(map(read, jaxpr.outvars))


def _interpret(
  closed: Any, args: Sequence[Any], known: dict[Hashable, Any]
) -> list[Any]:
  """Evaluates a program; equal operations are evaluated once.

  Args:
    closed: the program.
    args: its inputs.
    known: the operations so far, with their operands and results. The operands
      are kept alive, so that the ids in the keys stay unique.

  Returns:
    The outputs.
  """
  jaxpr = closed.jaxpr
  values: dict[Any, Any] = dict(
    zip(jaxpr.constvars, closed.consts, strict=True)
  )
  values |= zip(jaxpr.invars, args, strict=True)

  def read(atom: Any) -> Any:
    # A literal has a key of its value, since each use is another object.
    return (
      _literal(atom, known) if isinstance(atom, jex.Literal) else values[atom]
    )

  for eqn in jaxpr.eqns:
    operands = [read(atom) for atom in eqn.invars]
    key = _key(eqn, operands)
    if key is None or key not in known:
      results = _apply(eqn, operands, known)
      if key is None:
        values |= zip(eqn.outvars, results, strict=True)
        continue
      known[key] = operands, results
    values |= zip(eqn.outvars, known[key][1], strict=True)
  return [read(atom) for atom in jaxpr.outvars]


def _literal(atom: Any, known: dict[Hashable, Any]) -> Any:
  """Returns the value of a literal: one object for equal values and types.

  Each use of a literal has an object of its own.
  """
  value = np.asarray(atom.val)
  key = 'literal', str(atom.aval), value.tobytes()
  return known.setdefault(key, atom.val)


def _key(eqn: Any, operands: Sequence[Any]) -> Hashable | None:
  """Returns a key that equal operations share; None if there is none.

  The key does not exist if the operation has an effect, or if its parameters
  are not hashable.
  """
  key = (
    eqn.primitive,
    tuple(eqn.params.items()),
    tuple(map(id, operands)),
  )
  try:
    hash(key)
  except TypeError:
    return None
  return None if eqn.effects else key


def _apply(
  eqn: Any, operands: Sequence[Any], known: dict[Hashable, Any]
) -> Sequence[Any]:
  """Returns the results of one operation."""
  name, params = eqn.primitive.name, eqn.params
  if name == 'optimization_barrier':
    # The identity. Leaves that wait for each other are still alike.
    return operands
  if name in INLINED:
    body = params['jaxpr'] if 'jaxpr' in params else params['call_jaxpr']
    return _interpret(body, operands, known)
  # Until JAX 0.9 the functions among the parameters were returned separately.
  bound: Any = eqn.primitive.get_bind_params(params)
  functions, params = bound if isinstance(bound, tuple) else ((), bound)
  # The context has the mesh of the operation, which may have other axis types
  # than the mesh outside.
  with eqn.ctx.manager:
    results = eqn.primitive.bind(*functions, *operands, **params)
  return results if eqn.primitive.multiple_results else [results]
