"""Subspaces: how a basis is found, stored and refreshed.

Read `finders` first: it computes bases. `store` defines how the state stores a
basis, and `refresh` decides when a basis is found again. The names below are
values of `galore(subspace=..., gap=...)`.
"""

from galore_optax.subspace.finders import Coordinates as Coordinates
from galore_optax.subspace.finders import Gaussian as Gaussian, Gram as Gram
from galore_optax.subspace.finders import PowerIteration as PowerIteration
from galore_optax.subspace.finders import Randomized as Randomized, Svd as Svd
from galore_optax.subspace.finders import RandomOrthogonal as RandomOrthogonal
from galore_optax.subspace.store import Lazy as Lazy, Packed as Packed
from galore_optax.subspace.refresh import Staggered as Staggered
