"""A training step that updates each weight as its gradient appears.

Read `step` first: the step and what it asks of a model. `passes` holds the way
of a batch through the layers and back, `stack` the reading and writing of one
layer, `accumulate` the sums of projected gradients, `weights` how weights are
stored between steps.
"""

from galore_optax.layerwise.step import layerwise as layerwise
