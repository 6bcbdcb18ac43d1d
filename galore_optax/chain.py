"""`chain`: an `optax.chain` that gives a `galore` stage its inner optimizer.

`optax.chain` passes the same params to every stage, so a stage cannot shrink
the state of the next stage. For this reason `galore()` without an inner is a
`Stage`, and `chain` makes everything after the stage its inner optimizer.
Importing `galore_optax` replaces `optax.chain` by this function.
"""

import functools
from collections.abc import Callable
from typing import Any

import optax

from galore_optax.stages import Galore, Stage, Stages, has_stages


def _below_ours(found: Callable[..., Any]) -> Callable[..., Any]:
  """Returns the `optax.chain` that our `chain` calls.

  Wrappers of other libraries are kept. A `chain` of this module from before a
  reload is replaced by the function that it called.

  Args:
    found: the current `optax.chain`.
  """
  # functools.wraps copies attributes, so a wrapper around our `chain` has this
  # mark too.
  mark: Any = getattr(found, '_galore_optax', (None, None))
  ours, below = mark
  return below if ours is found else found


_optax_chain = _below_ours(optax.chain)


@functools.wraps(_optax_chain)
def chain(
  *args: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """`optax.chain`, where everything after a `galore` stage is its inner."""
  for position, stage in enumerate(args):
    before, after = args[:position], args[position + 1 :]
    if isinstance(stage, Stage) and stage.around is not None and after:
      if any(isinstance(other, Stage) for other in after):
        several = 'for several ranks use optax.partition with a chain for each'
        raise ValueError(f'a chain takes one galore stage, got two; {several}')
      return chain(*before, stage.around(_optax_chain(*after)))
  if args and has_stages(args[0]):
    rest = _optax_chain(*args[1:]) if args[1:] else optax.identity()
    return followed_by(args[0], optax.with_extra_args_support(rest))
  return _optax_chain(*args)


vars(chain)['_galore_optax'] = chain, _optax_chain


def followed_by(first: Galore, rest: Any) -> Galore:
  """Returns `optax.chain(first, *rest)` as a `Galore`.

  Args:
    first: the first transformation.
    rest: an `optax.chain` of the others, which accepts extra arguments. Its
      state is a tuple.
  """
  stages = first.stages

  def finish(
    updates: Any, head: Any, state: Any, params: Any, extra_args: dict[str, Any]
  ) -> tuple[Any, Any]:
    """Passes the updates of `first` to the rest."""
    extra_args = {k: x for k, x in extra_args.items() if k != 'layer'}
    updates, tail = rest.update(updates, state[1:], params, **extra_args)
    return updates, (head, *tail)

  def update(
    updates: Any, state: Any, params: Any = None, **extra_args: Any
  ) -> tuple[Any, Any]:
    updates, head = stages.update(updates, state[0], params, **extra_args)
    return finish(updates, head, state, params, extra_args)

  def apply(
    low: Any,
    state: Any,
    params: Any = None,
    grads: Any = None,
    **extra_args: Any,
  ) -> tuple[Any, Any]:
    updates, head = stages.apply(low, state[0], params, grads, **extra_args)
    return finish(updates, head, state, params, extra_args)

  return Galore.of(
    Stages(
      init=lambda params: (stages.init(params), *rest.init(params)),
      update=update,
      plan=stages.plan,
      due=lambda state, **layer: stages.due(state[0], **layer),
      refresh=lambda grads, state, **layer: (
        stages.refresh(grads, state[0], **layer),
        *state[1:],
      ),
      project=lambda grads, state: stages.project(grads, state[0]),
      apply=apply,
      linear=stages.linear,
      with_keeper=lambda f: followed_by(stages.with_keeper(f), rest),
    )
  )


def install_chain() -> None:
  """Replaces `optax.chain` by our `chain`, unless a wrapper contains it.

  >>> install_chain()
  >>> optax.chain is chain
  True
  """
  if _below_ours(optax.chain) is _optax_chain:
    optax.chain = chain
