"""GaLore as an ordinary optax transformation.

Importing this package makes `optax.chain` aware of `galore` stages, so that
`optax.chain(galore(rank=512, gap=200), optax.adamw(lr))` keeps low-rank state.
A chain without such a stage is optax's own, result for result.
"""

import optax

from galore_optax.galore import chain as chain
from galore_optax.galore import galore as galore
from galore_optax.layerwise.step import layerwise as layerwise
from galore_optax.layerwise.weights import quantize_bases as quantize_bases
from galore_optax.paths import Elsewhere as Elsewhere
from galore_optax.presets.adafactor import (
  scale_by_galore_factored_rms as scale_by_galore_factored_rms,
)
from galore_optax.presets.adam import (
  scale_by_galore_adam as scale_by_galore_adam,
)
from galore_optax.presets.adamw import apollo as apollo
from galore_optax.presets.adamw import apollo_mini as apollo_mini
from galore_optax.presets.adamw import badam as badam
from galore_optax.presets.adamw import fira as fira
from galore_optax.presets.adamw import frugal as frugal
from galore_optax.presets.adamw import galore_adafactor as galore_adafactor
from galore_optax.presets.adamw import galore_adamw as galore_adamw
from galore_optax.presets.adamw import galore_adamw_8bit as galore_adamw_8bit
from galore_optax.presets.lomo import adalomo as adalomo
from galore_optax.presets.lomo import lomo as lomo
from galore_optax.quantized.state import (
  apply_updates_stochastic as apply_updates_stochastic,
)
from galore_optax.quantized.state import quantize_state as quantize_state
from galore_optax.subspace.finders import Coordinates as Coordinates
from galore_optax.subspace.finders import Gaussian as Gaussian
from galore_optax.subspace.finders import Gram as Gram
from galore_optax.subspace.finders import PowerIteration as PowerIteration
from galore_optax.subspace.finders import Randomized as Randomized
from galore_optax.subspace.finders import RandomOrthogonal as RandomOrthogonal
from galore_optax.subspace.finders import Svd as Svd
from galore_optax.subspace.lazy import Lazy as Lazy
from galore_optax.subspace.refresh import Staggered as Staggered
from galore_optax.subspace.turns import Turns as Turns
from galore_optax.table import describe as describe
from galore_optax.transform import GaloreState as GaloreState

optax.chain = chain
