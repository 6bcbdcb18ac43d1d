"""Complete signatures of presets, and errors for unknown option names.

The module `checks` checks the values of options.
"""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast, get_args, get_type_hints

Function = TypeVar('Function', bound=Callable[..., Any])

# Options of the PyTorch references (galore-torch, transformers, LLaMA-Factory,
# BAdam, LOMO), each with the name of the same option in this library.
THEIRS = {
  'lr': 'learning_rate',
  'beta1': 'b1',
  'beta2': 'b2',
  'betas': 'b1 and b2',
  'momentum': 'beta',
  'update_proj_gap': 'gap',
  'update_gap': 'gap',
  'proj_type': "side (its 'left' 'right')",
  'optim_target_modules': 'targets',
  'galore_rank': 'rank',
  'galore_scale': 'scale',
  'galore_update_interval': 'gap',
  'galore_proj_type': "side (its 'left' 'right')",
  'galore_target': 'targets',
  'switch_block_every': 'switch_every',
  'switch_mode': 'order',
  'start_block': 'start',
  'block_prefix_list': 'blocks',
  'clip_grad_norm': 'clip_norm',
  'max_grad_norm': 'clip_norm',
}

# The attribute of a decorated function with the options that it sets itself.
_FIXED = '_fixed_options'


def names_options(
  *, of: Callable[..., Any] | None = None, of_inner: Collection[str] = ()
) -> Callable[[Function], Function]:
  """Gives a function a complete signature, and errors that list its options.

  A preset forwards its `**options: Unpack[SomeTypedDict]` to `galore`. Type
  checkers read the TypedDict, but `inspect.signature` does not. This decorator
  sets a `__signature__` with the options of the TypedDict, and with the
  defaults that they have in the signature of `of`. `help` then lists them, and
  `optax.inject_hyperparams`, which reads the signature, can inject them. An
  unknown name raises before any code of the preset runs.

  Args:
    of: the function that the decorated function calls. The decorated function
      sets all options of `of` itself that are not in its own signature.
    of_inner: names of options of the inner optimizer, for a better error.

  Returns:
    A decorator. The function that it returns raises TypeError for a name that
    is not an option.

  Example:
    >>> from typing import TypedDict, Unpack
    >>> class RankOptions(TypedDict, total=False):
    ...   rank: int
    >>> def galore(*, rank=128, side='std'):
    ...   return rank, side
    >>> @names_options(of=galore)
    ... def left(learning_rate, **options: Unpack[RankOptions]):
    ...   return galore(side='left', **options)
    >>> inspect.signature(left)
    <Signature (learning_rate, *, rank=128)>
    >>> left(0.1, side='right')
    Traceback (most recent call last):
      ...
    TypeError: left() sets side itself. Options of left(): learning_rate, rank
  """

  # The options of `of` by name, and those that `of` sets itself.
  forwardable: dict[str, inspect.Parameter] = {}
  unavailable: set[str] = set()
  if of is not None:
    parameters = inspect.signature(of).parameters
    forwardable = {
      name: x for name, x in parameters.items() if x.default is not x.empty
    }
    unavailable = {*forwardable} | vars(of).get(_FIXED, set())

  def named(function: Function) -> Function:
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
      forwarded = _keys(parameters.pop())
      parameters += [x for name, x in forwardable.items() if name in forwarded]
    signature = signature.replace(parameters=parameters)
    names = tuple(signature.parameters)

    @functools.wraps(function)
    def called(*args: Any, **given: Any) -> Any:
      for name in given:
        if name not in names:
          sets = name in unavailable
          why = _why(function.__name__, name, names, sets, of_inner)
          options = f'Options of {function.__name__}(): {", ".join(names)}'
          raise TypeError(f'{why} {options}')
      return function(*args, **given)

    vars(called)['__signature__'] = signature
    vars(called)[_FIXED] = unavailable - {*names}
    return cast(Function, called)

  return named


def _keys(parameter: inspect.Parameter) -> Collection[str]:
  """Returns the keys of T for a parameter `**options: Unpack[T]`."""
  (typed_dict,) = get_args(parameter.annotation)
  return get_type_hints(typed_dict).keys()


def _why(
  function: str,
  name: str,
  names: Collection[str],
  sets: bool,
  of_inner: Collection[str],
) -> str:
  """Returns the reason why a function does not accept an option."""
  if sets:
    return f'{function}() sets {name} itself.'
  ours = THEIRS.get(name, '')
  if {*re.findall(r'\w+', ours)} & {*names, *of_inner}:
    return f'{name} is called {ours} here; train/README.md has a table.'
  why = f'{function}() got an unexpected keyword argument {name!r}'
  if name in of_inner:
    return f'{why}, which is an option of its inner.'
  close = difflib.get_close_matches(name, names, n=1)
  return f'{why}, did you mean {close[0]!r}?' if close else f'{why}.'
