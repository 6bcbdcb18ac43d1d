"""A training step that updates each layer as soon as its gradients exist.

Read `step` first: it defines the step and the sums of projected gradients.
`passes` defines the model's interface, the forward and the backward pass.
`stack` reads and writes one layer of a stack. `weights` defines how weights are
stored between steps.
"""

from galore_optax.layerwise.step import layerwise as layerwise
