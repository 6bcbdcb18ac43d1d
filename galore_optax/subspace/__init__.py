"""How a subspace is found, kept and found anew. Read `finders` first."""

from galore_optax.subspace.finders import Coordinates as Coordinates
from galore_optax.subspace.finders import Gaussian as Gaussian, Gram as Gram
from galore_optax.subspace.finders import PowerIteration as PowerIteration
from galore_optax.subspace.finders import Randomized as Randomized, Svd as Svd
from galore_optax.subspace.finders import RandomOrthogonal as RandomOrthogonal
