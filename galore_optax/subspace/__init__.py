"""How a subspace is found, kept and found anew. Read `finders` first."""

from galore_optax.subspace.finders import Coordinates as Coordinates
from galore_optax.subspace.finders import Gaussian as Gaussian
from galore_optax.subspace.finders import Gram as Gram
from galore_optax.subspace.finders import PowerIteration as PowerIteration
from galore_optax.subspace.finders import Randomized as Randomized
from galore_optax.subspace.finders import RandomOrthogonal as RandomOrthogonal
from galore_optax.subspace.finders import Svd as Svd
