"""A training step that updates each layer as soon as its gradients exist.

Read `step` first: the step, what it asks of a model, and the sums of projected
gradients. `passes` takes a batch through the layers and back, `stack` reads and
writes one layer, `weights` says how weights are stored between steps.
"""

from galore_optax.layerwise.step import layerwise as layerwise
