"""Complete signatures of presets, and errors for unknown option names.

The module `checks` checks the values of options.
"""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Collection
from typing import Any, TypeVar

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
  *fixed: str,
  of: Callable[..., Any] | None = None,
  of_inner: Collection[str] = (),
) -> Callable[[Function], Function]:
  """Gives a function a complete signature, and errors that list its options.

  A preset forwards its `**options` to `galore`. This decorator puts the names
  of those options into the signature of the preset. `help` then lists them, and
  `optax.inject_hyperparams`, which reads the signature, can inject them. An
  unknown name raises before any code of the preset runs.

  Args:
    *fixed: options of `of` that the function sets itself and does not accept.
    of: the function that receives `**options`; None if the decorated function
      does not have `**options`.
    of_inner: names of options of the inner optimizer, for a better error.

  Returns:
    A decorator. The function that it returns raises TypeError for a name that
    is not an option.

  Example:
    >>> def galore(*, rank=128, side='std'):
    ...   return rank, side
    >>> @names_options('side', of=galore)
    ... def left(learning_rate, **options):
    ...   return galore(side='left', **options)
    >>> inspect.signature(left)
    <Signature (learning_rate, *, rank=128)>
    >>> left(0.1, side='right')
    Traceback (most recent call last):
      ...
    TypeError: left() sets side itself. Options of left(): learning_rate, rank
  """

  def named(function: Function) -> Function:
    signature = inspect.signature(function)
    own = list(signature.parameters.values())
    unavailable = {*fixed}
    if of is not None:
      own.pop()
      taken = {parameter.name for parameter in own} | {*fixed}
      others = inspect.signature(of).parameters.values()
      optional = [x for x in others if x.default is not x.empty]
      own += [
        x for x in optional if x.kind is x.KEYWORD_ONLY and x.name not in taken
      ]
      unavailable |= {x.name for x in optional} | vars(of).get(_FIXED, set())
    signature = signature.replace(parameters=own)
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
    decorated: Any = called
    return decorated

  return named


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
    return f'{name} is called {ours} here; README has a table.'
  why = f'{function}() got an unexpected keyword argument {name!r}'
  if name in of_inner:
    return f'{why}, which is an option of its inner.'
  close = difflib.get_close_matches(name, names, n=1)
  return f'{why}, did you mean {close[0]!r}?' if close else f'{why}.'
