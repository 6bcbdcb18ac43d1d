"""This module holds how a description sees what is behind any wrapper."""

import contextlib
import contextvars
from collections.abc import Sequence

from galore_optax.projection import Projection

_seen: contextvars.ContextVar[list[Projection | None] | None]
_seen = contextvars.ContextVar('seen', default=None)


@contextlib.contextmanager
def observe():
  """Yields a list to which each `galore` adds its projections at `init`.

  So a description finds them behind any wrapper.
  """
  seen: list[Projection | None] = []
  token = _seen.set(seen)
  try:
    yield seen
  finally:
    _seen.reset(token)


def show(projections: Sequence[Projection | None]) -> None:
  """Adds projections to the list of whoever observes."""
  seen = _seen.get()
  if seen is not None:
    seen.extend(projections)
