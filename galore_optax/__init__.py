"""GaLore as an ordinary optax transformation.

Importing this package makes `optax.chain` aware of `galore` stages, so that
`optax.chain(galore(rank=512, gap=200), optax.adamw(lr))` keeps low-rank state.
A chain without such a stage computes exactly the same as in optax.

Read the core first, `galore`, and then a preset. Every method computes an
update of the form

  update = unproject(inner(project(G))) * scale + residual(rest of G) + decay
"""

from galore_optax.chain import chain as chain, install_chain
from galore_optax.galore import Galore as Galore, GaloreState as GaloreState
from galore_optax.galore import Inners as Inners, galore as galore
from galore_optax.galore import quantize_bases as quantize_bases
from galore_optax.layerwise.step import layerwise as layerwise
from galore_optax.memory import describe as describe
from galore_optax.moments import Rotate as Rotate
from galore_optax.paths import Elsewhere as Elsewhere, Optional as Optional
from galore_optax.presets.adafactor import galore_adafactor as galore_adafactor
from galore_optax.presets.adafactor import (
  scale_by_galore_factored_rms as scale_by_galore_factored_rms,
)
from galore_optax.presets.adamw import galore_adamw as galore_adamw
from galore_optax.presets.adamw import galore_adamw_8bit as galore_adamw_8bit
from galore_optax.presets.badam import badam as badam
from galore_optax.presets.frugal import frugal as frugal
from galore_optax.presets.groups import Group as Group, grouped as grouped
from galore_optax.presets.inner import (
  scale_by_galore_adam as scale_by_galore_adam,
)
from galore_optax.presets.lomo import adalomo as adalomo, lomo as lomo
from galore_optax.presets.muon import galore_muon as galore_muon
from galore_optax.presets.scale import scale_sgd as scale_sgd
from galore_optax.presets.scaled import apollo as apollo
from galore_optax.presets.scaled import apollo_mini as apollo_mini, fira as fira
from galore_optax.quantized.rounding import (
  apply_updates_stochastic as apply_updates_stochastic,
)
from galore_optax.quantized.state import quantize_state as quantize_state
from galore_optax.projection import SharedBasis as SharedBasis
from galore_optax.residual import Scaled as Scaled, Sgd as Sgd, Sign as Sign
from galore_optax.sharding import state_shardings as state_shardings
from galore_optax.subspace.finders import Coordinates as Coordinates
from galore_optax.subspace.finders import Gaussian as Gaussian, Gram as Gram
from galore_optax.subspace.finders import PowerIteration as PowerIteration
from galore_optax.subspace.finders import Randomized as Randomized, Svd as Svd
from galore_optax.subspace.finders import RandomOrthogonal as RandomOrthogonal
from galore_optax.subspace.store import Lazy as Lazy, Packed as Packed
from galore_optax.subspace.refresh import Staggered as Staggered


install_chain()
