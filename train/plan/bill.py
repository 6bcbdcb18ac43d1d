"""Arithmetic, memory traffic and kernels of a config's training step on a GPU.

As in `train.plan.footprint`, the programs are compiled for a GPU that need not
be there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from train.config import Config, WholeTree
from train.engine import step as step_lib
from train.engine.task import task_of
from train.plan import cards as cards_lib
from train.plan.cards import GPUS
from train.plan.cost import Cost, cost_of
from train.plan.footprint import Cards, mesh_of, on_card, placed_step, shared

PyTree = Any

ESTIMATED = ('rtx4090', 'h100')
"""GPUs whose times are estimated, whatever GPU the program was compiled for."""


@dataclasses.dataclass(frozen=True)
class Bill:
  """Cost of the update and of the training step, on each device.

  The cost is that of a step between two refreshes of the bases, so it does not
  include a refresh.
  """

  config: str
  """Path of the config."""
  method: str
  """Name of the optimizer."""
  device: str
  """Short name of the GPU that the programs are compiled for."""
  devices: int
  """Number of GPUs that share the step."""
  attention: str
  """'cudnn' or 'blockwise'."""
  elements: int
  """Number of trained weights, on all devices together."""
  update: Cost
  """Cost of an update of all weights at once: from gradients to new weights."""
  step: Cost
  """Cost of the config's whole training step, including its own update."""

  @property
  def parts(self) -> dict[str, Cost]:
    """The costs of the two programs, by name."""
    return {'update': self.update, 'step': self.step}

  def to_json(self) -> dict[str, Any]:
    """Returns the fields as a dict, with a dict of sums for each program."""
    bill = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name not in self.parts
    }
    for name, cost in self.parts.items():
      estimates = {
        f'estimate_{key}': cost.seconds(GPUS[key]) for key in ESTIMATED
      }
      bill[name] = cost.to_json() | estimates
    return bill


@cards_lib.cudnn()
def make_bill(
  config: Config, cards: Cards, *, path: str = '', method: str = ''
) -> Bill:
  """Returns the bill of a config. The arguments are those of `make_plan`."""
  config = on_card(shared(config, cards))
  mesh = mesh_of(config, cards)
  of_step = placed_step(config, task_of(config), mesh)
  update, params, optimizer, grads = whole_update(config, mesh)
  return Bill(
    config=path,
    method=method or type(config.optimizer).__name__,
    device=cards.device,
    devices=config.mesh.size,
    attention=config.resolved_model.attention_kind,
    elements=sum(x.size for x in jax.tree.leaves(params)),
    update=cost_of(cards_lib.optimized(update, params, optimizer, grads)),
    step=cost_of(cards_lib.optimized(*of_step)),
  )


def whole_update(
  config: Config, mesh: jax.sharding.Mesh
) -> tuple[Callable, PyTree, PyTree, PyTree]:
  """Returns a jitted update of all weights at once, and its arguments.

  It is the optimizer update inside `train.engine.step.make_step`, without
  forward and backward pass. It does not depend on the config's own update,
  which may be layer-wise.

  Returns:
    A function from weights, optimizer state and gradients to the next weights
    and state, which donates weights and state; then the shapes of its three
    arguments.
  """
  config = dataclasses.replace(config, update=WholeTree())
  tx = config.transformation()
  task = task_of(config)
  _, state, _ = placed_step(config, task, mesh)
  params, _ = step_lib.split_trained(state.params, task.trained)

  def update(
    params: PyTree, optimizer: PyTree, grads: PyTree
  ) -> tuple[PyTree, PyTree]:
    updates, optimizer = tx.update(grads, optimizer, params)
    return optax.apply_updates(params, updates), optimizer

  places = jax.tree.map(lambda x: x.sharding, (params, state.optimizer))
  jitted = jax.jit(update, donate_argnums=(0, 1), out_shardings=places)
  return jitted, params, state.optimizer, params
