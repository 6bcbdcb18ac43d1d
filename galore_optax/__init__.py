"""GaLore as an ordinary optax transformation.

Importing this package makes `optax.chain` aware of `galore` stages, so that
`optax.chain(galore(rank=512, gap=200), optax.adamw(lr))` keeps low-rank state.
A chain without such a stage is optax's own, result for result.

The methods are cells of one table. For a weight [m, n], m <= n, at rank r or
density d, moments in float32 and bases in the weight's dtype:
"""

import optax

from galore_optax import methods
from galore_optax.adafactor import (
  scale_by_galore_factored_rms as scale_by_galore_factored_rms,
)
from galore_optax.adam import scale_by_galore_adam as scale_by_galore_adam
from galore_optax.galore import chain as chain
from galore_optax.galore import galore as galore
from galore_optax.layerwise import layerwise as layerwise
from galore_optax.lazy import Lazy as Lazy
from galore_optax.lomo import adalomo as adalomo
from galore_optax.lomo import lomo as lomo
from galore_optax.presets import apollo as apollo
from galore_optax.presets import apollo_mini as apollo_mini
from galore_optax.presets import badam as badam
from galore_optax.presets import fira as fira
from galore_optax.presets import frugal as frugal
from galore_optax.presets import galore_adafactor as galore_adafactor
from galore_optax.presets import galore_adamw as galore_adamw
from galore_optax.presets import galore_adamw_8bit as galore_adamw_8bit
from galore_optax.quantization import (
  apply_updates_stochastic as apply_updates_stochastic,
)
from galore_optax.quantization import quantize_state as quantize_state
from galore_optax.refresh import Staggered as Staggered
from galore_optax.selection import Elsewhere as Elsewhere
from galore_optax.subspace import Coordinates as Coordinates
from galore_optax.subspace import Gaussian as Gaussian
from galore_optax.subspace import Gram as Gram
from galore_optax.subspace import PowerIteration as PowerIteration
from galore_optax.subspace import Randomized as Randomized
from galore_optax.subspace import RandomOrthogonal as RandomOrthogonal
from galore_optax.subspace import Svd as Svd
from galore_optax.table import describe as describe
from galore_optax.transform import GaloreState as GaloreState
from galore_optax.turns import Turns as Turns
from galore_optax.weights import quantize_bases as quantize_bases

optax.chain = chain
__doc__ = f'{__doc__}\n{methods.table()}\n'
