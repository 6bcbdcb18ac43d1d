"""GaLore as an ordinary optax transformation.

Importing this package makes `optax.chain` aware of `galore` stages, so that
`optax.chain(galore(rank=512, gap=200), optax.adamw(lr))` keeps low-rank state.
A chain without such a stage is optax's own, result for result.

Read `galore`, the core, and then a preset: each method is a cell of one
algebra,

  update = unproject(inner(project(G))) * scale + residual(rest of G) + decay
"""

import optax

from .galore import Apart as Apart, Galore as Galore, GaloreState as GaloreState
from .galore import chain as chain, galore as galore
from .galore import quantize_bases as quantize_bases
from .layerwise.step import layerwise as layerwise
from .memory import describe as describe
from .moments import Rotate as Rotate
from .paths import Elsewhere as Elsewhere
from .presets.adafactor import galore_adafactor as galore_adafactor
from .presets.adafactor import (
  scale_by_galore_factored_rms as scale_by_galore_factored_rms,
)
from .presets.adamw import galore_adamw as galore_adamw
from .presets.adamw import galore_adamw_8bit as galore_adamw_8bit
from .presets.badam import badam as badam
from .presets.frugal import frugal as frugal
from .presets.inner import scale_by_galore_adam as scale_by_galore_adam
from .presets.lomo import adalomo as adalomo, lomo as lomo
from .presets.muon import galore_muon as galore_muon
from .presets.scale import scale_sgd as scale_sgd
from .presets.scaled import apollo as apollo, apollo_mini as apollo_mini
from .presets.scaled import fira as fira
from .quantized.rounding import (
  apply_updates_stochastic as apply_updates_stochastic,
)
from .quantized.state import quantize_state as quantize_state
from .residual import Scaled as Scaled, Sgd as Sgd, Sign as Sign
from .subspace.finders import Coordinates as Coordinates, Gaussian as Gaussian
from .subspace.finders import Gram as Gram, PowerIteration as PowerIteration
from .subspace.finders import Randomized as Randomized
from .subspace.finders import RandomOrthogonal as RandomOrthogonal, Svd as Svd
from .subspace.kept import Lazy as Lazy, Packed as Packed
from .subspace.refresh import Staggered as Staggered

optax.chain = chain
