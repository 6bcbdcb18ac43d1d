"""The training step: microbatches, gradient, update.

An update is applied where loss and gradient are finite; `skipped_steps` of the
metrics is 1 where it was not, and everything but the step is as it was.

`build` makes what `train.loop` repeats of a `train.task.Task`, for all weights
at once or, with `galore_optax.layerwise`, one after another. What a task does
not train is held fixed: it has no gradient, and the optimizer keeps nothing of
it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from galore_optax.clipping import global_norm
from galore_optax.galore import Galore
from galore_optax.layerwise import stack
from galore_optax.layerwise.step import Layerwise, layerwise
from galore_optax.layerwise.weights import is_stored
from galore_optax.sharding import state_shardings
from train import adapter as adapter_lib
from train import mesh as mesh_lib
from train import subspace
from train.config import Config, WholeTree
from train.method import projects
from train.task import Batch, Loss, Mask, PyTree, Task, everything

Init: TypeAlias = Callable[[jax.Array], 'State']
Step: TypeAlias = Callable[['State', Batch], tuple['State', PyTree]]

NO_SUMS = ('loss', 'grad_norm', 'projected_grad_norm')
"""Metrics of a layer-wise update that are no sums over the batch."""


class State(NamedTuple):
  """All that an update reads and writes."""

  step: jax.Array  # [], int32: updates done so far
  params: PyTree  # the model's parameters
  optimizer: optax.OptState  # the optimizer's state, made from params


def build(config: Config, task: Task) -> tuple[Init, Step]:
  """Returns what starts and what continues the training of a task."""
  schedule, trained = config.schedule(), task.trained
  tx = optimizer_of(config, task)
  if isinstance(config.update, WholeTree):
    step = make_step(
      task.loss,
      tx,
      schedule=schedule,
      microbatches=config.microbatches,
      trained=trained,
    )
  else:
    step = make_layerwise_step(
      tx,
      schedule=schedule,
      trained=trained,
      in_part=not (config.clip_norm and tx.clip == 'exact')
      and tx.accumulate == 1,
    )
  if config.learning_rate == 0:
    step = motionless(step)
  step = with_health(with_adapter(with_rates(step, config), config))
  start = starter(config, task)
  return lambda key: start(task.init(key)), step


def starter(config: Config, task: Task) -> Callable[[PyTree], 'State']:
  """Returns `parameters -> state` before the first update."""
  tx = optimizer_of(config, task)

  def start(params: PyTree) -> 'State':
    try:
      return init(params, tx, task.trained)
    except ValueError as error:
      if config.adapter is None or not projects(config.optimizer):
        raise
      raise ValueError(
        f'{error}. With adapter {type(config.adapter).__name__} the optimizer '
        f'trains factors of rank {config.adapter.rank}: take --optimizer '
        'AdamW, or a rank and targets that fit them'
      ) from error

  return start


def optimizer_of(config: Config, task: Task) -> Any:
  """Returns what makes the optimizer's state of a config."""
  if isinstance(config.update, WholeTree):
    return config.transformation()
  return make_layerwise(config, task)


def shardings(
  first: Init, config: Config, task: Task, mesh: jax.sharding.Mesh
) -> 'State':
  """Returns where each array of a state lives; `first` is that of `build`."""
  whole = mesh_lib.everywhere(mesh)
  key = jax.random.key(0)
  if mesh.size == 1:
    return jax.tree.map(lambda _: whole, jax.eval_shape(first, key))
  params = jax.eval_shape(task.init, key)
  places = mesh_lib.of_params(params, mesh)
  moving, _ = split(params, task.trained)
  of_moving, _ = split(places, lambda _: task.trained(params))
  optimizer = state_shardings(optimizer_of(config, task), moving, of_moving)
  return State(whole, places, optimizer)


def placed(step: Step, mesh: jax.sharding.Mesh, places: 'State') -> Step:
  """Returns a step on a mesh; the state stays where it was.

  Each device, and so each process, has the metrics whole.
  """
  out = places, mesh_lib.everywhere(mesh)
  step = mesh_lib.under(mesh, step)
  return jax.jit(step, donate_argnums=0, out_shardings=out)


def motionless(step: Step) -> Step:
  """Returns a step that moves no weight: a sum with 0 would lose a -0."""

  @functools.partial(jax.jit, donate_argnums=0)
  def same(state: State, batch: Batch) -> tuple[State, PyTree]:
    new, metrics = step(state, batch)
    return new._replace(params=state.params), metrics

  return same


def init(params: PyTree, tx: Any, trained: Mask = everything) -> State:
  """Returns the state before the first update."""
  moving, _ = split(params, trained)
  return State(jnp.zeros([], jnp.int32), params, tx.init(moving))


def with_health(step: Step) -> Step:
  """Returns a step whose metrics tell what a refresh noted of subspaces.

  `subspace` is what `train.subspace.health` finds; `refreshed` is 1 where this
  step was the last one that all matrices needed for a new subspace. Where none
  follows the gradient there is neither.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def around(state: State, batch: Batch) -> tuple[State, PyTree]:
    before = subspace.health(state.optimizer)
    state, metrics = step(state, batch)
    found = subspace.health(state.optimizer)
    if found:
      counts = map(subspace.refreshes, (before, found))
      refreshed = jnp.not_equal(*counts)
      metrics = metrics | {'subspace': found, 'refreshed': refreshed}
    return state, metrics

  return around


def with_rates(step: Step, config: Config) -> Step:
  """Returns a step whose metrics have the learning rate of each group."""
  if not config.groups:
    return step

  @functools.partial(jax.jit, donate_argnums=0)
  def around(state: State, batch: Batch) -> tuple[State, PyTree]:
    state, metrics = step(state, batch)
    rates = {
      f'learning_rate/{group.pattern}': group.rate * metrics['learning_rate']
      for group in config.groups
    }
    return state, metrics | rates

  return around


def with_adapter(step: Step, config: Config) -> Step:
  """Returns a step that draws a config's dropout, and restarts its ReLoRA.

  Both depend on the seed and the number of the step alone.
  """
  adapter, seed = config.adapter, config.seed
  noisy = getattr(adapter, 'dropout', 0) > 0
  restarts = adapter_lib.restarts(adapter)
  if not noisy and not restarts:
    return step

  @functools.partial(jax.jit, donate_argnums=0)
  def around(state: State, batch: Batch) -> tuple[State, PyTree]:
    if noisy:
      batch = adapter_lib.with_noise(batch, seed, state.step)
    state, metrics = step(state, batch)
    if restarts:
      params, optimizer = adapter_lib.restart(
        *(state.params, state.optimizer, state.step),
        adapter=adapter,
        weights=config.weights(),
        seed=seed,
      )
      state = State(state.step, params, optimizer)
    return state, metrics

  return around


def split(params: PyTree, trained: Mask) -> tuple[PyTree, PyTree]:
  """Returns what is trained and what is not; None stands for the other.

  >>> split({'a': 1, 'b': 2}, lambda params: {'a': True, 'b': False})
  ({'a': 1, 'b': None}, {'a': None, 'b': 2})
  """
  chosen = trained(params)
  pick = lambda wanted: jax.tree.map(
    lambda is_trained, w: w if is_trained == wanted else None, chosen, params
  )
  return pick(True), pick(False)


def join(moving: PyTree, still: PyTree) -> PyTree:
  """Inverts `split`; what neither has stays None.

  >>> join({'a': 1, 'b': None}, {'a': None, 'b': 2})
  {'a': 1, 'b': 2}
  """
  return jax.tree.map(
    lambda w, other: other if w is None else w,
    *(moving, still),
    is_leaf=lambda x: x is None or is_stored(x),
  )


class Beneath(NamedTuple):
  """A model, layer by layer, some of whose weights are held fixed.

  A block finds its own by the number of the layer, which goes from block to
  block with what they pass on.
  """

  layers: Any  # of the task
  still: PyTree  # what is not trained, as it is stored
  read: Callable[[Any], jax.Array]  # makes an array of a stored weight

  def embed(self, params: PyTree, batch: Batch) -> PyTree:
    """Returns what the first block reads."""
    x = self.layers.embed(join(params, self.still), batch)
    return {'x': x, 'layer': jnp.int32(0)}

  def block(self, layer_params: PyTree, x: PyTree) -> PyTree:
    """Returns what the next block reads."""
    mine = jax.tree.map(
      lambda w: self.read(stack.take(w, x['layer'])),
      self.still['blocks'],
      is_leaf=is_stored,
    )
    y = self.layers.block(join(layer_params, mine), x['x'])
    return {'x': y, 'layer': x['layer'] + 1}

  def loss(self, params: PyTree, x: PyTree, batch: Batch) -> Any:
    """Returns the loss, and sums."""
    return self.layers.loss(join(params, self.still), x['x'], batch)


def make_layerwise(config: Config, task: Task) -> Layerwise:
  """Returns the layer-wise update of a config that has one."""
  update = config.update
  assert not isinstance(update, WholeTree)
  return layerwise(
    task.layers,
    config.rule(),
    clip_norm=config.clip_norm,
    clip=update.clip,
    microbatches=config.microbatches,
    accumulate=update.accumulate,
    sums_dtype=update.sums,
    slices=dict.fromkeys(task.large, update.slices)
    if update.slices > 1
    else {},
    weights=config.weights(),
  )


def make_layerwise_step(
  update: Layerwise,
  *,
  schedule: optax.Schedule,
  trained: Mask = everything,
  in_part: bool = False,
) -> Step:
  """Returns the same as `make_step` for a layer-wise update.

  With `accumulate`, `projected_grad_norm` stands for `grad_norm`.

  Args:
    update: of each weight as its gradient appears.
    schedule: as in `make_step`.
    trained: as in `Task`.
    in_part: whether weights above a gradient that is not finite are updated,
      as no pass before told; `partial_steps` of the metrics is 1 then.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: State, batch: Batch) -> tuple[State, PyTree]:
    batch, weight = with_mean_weight(batch)
    moving, still = split(state.params, trained)
    run = update
    if jax.tree.leaves(still):
      model = Beneath(update.model, still, update.weights.read)
      run = dataclasses.replace(update, model=model)
    moving, optimizer, found = run(moving, state.optimizer, batch)
    params = join(moving, still)
    metrics = {name: found[name] for name in NO_SUMS if name in found}
    metrics['learning_rate'] = jnp.asarray(schedule(state.step))
    norm = found.get('projected_grad_norm', found.get('grad_norm'))
    bad, lost = ~jnp.isfinite(norm), ~jnp.isfinite(found['loss'])
    metrics['skipped_steps'] = jnp.int32(lost if in_part else bad)
    if in_part:
      metrics['partial_steps'] = jnp.int32(bad & ~lost)
    sums = {name: x for name, x in found.items() if name not in metrics}
    metrics |= with_own_weight(sums, batch, weight)
    return State(state.step + 1, params, optimizer), metrics

  return step


def make_step(
  loss: Loss,
  tx: optax.GradientTransformation,
  *,
  schedule: optax.Schedule,
  microbatches: int = 1,
  trained: Mask = everything,
) -> Step:
  """Returns the jitted `(state, batch) -> (state, metrics)`; donates state.

  The loss is the mean over what the whole batch scores, however that falls
  into microbatches. Metrics are `loss`, `grad_norm`, `learning_rate`,
  `skipped_steps`, the batch's `weight` and the sums that stand beside the
  loss, by name; `projected_grad_norm` stands for `grad_norm` where devices sum
  projected gradients.

  Args:
    loss: as in `Task.loss`.
    tx: the optimizer.
    schedule: the learning rate by step, for the metrics alone.
    microbatches: number of equal parts of the batch, one in memory at a time.
    trained: as in `Task`.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: State, batch: Batch) -> tuple[State, PyTree]:
    batch, weight = with_mean_weight(batch)
    moving, still = split(state.params, trained)
    gradient = functools.partial(mean_gradient, loss, microbatches)
    if sums_projected(tx):
      # Between refreshes the devices along 'data' send what galore projects.
      value, sums, grads, found = projected(
        gradient, tx, moving, still, state.optimizer, batch
      )
      update, name = tx.apply, 'projected_grad_norm'
    else:
      value, sums, grads = gradient(moving, still, batch)
      update, name, found = tx.update, 'grad_norm', state.optimizer
    norm = global_norm(grads)
    sound = jnp.isfinite(value) & jnp.isfinite(norm)

    def updated(kept: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
      updates, optimizer = update(grads, found, moving)
      return optax.apply_updates(moving, updates), optimizer

    # By this name `train.plan` knows which branch a step takes.
    with jax.named_scope('if_finite'):
      moving, optimizer = jax.lax.cond(
        sound, updated, lambda kept: kept, (moving, state.optimizer)
      )
    metrics = {
      'loss': value,
      name: norm,
      'learning_rate': jnp.asarray(schedule(state.step)),
      'skipped_steps': jnp.int32(~sound),
    }
    metrics |= with_own_weight(sums, batch, weight)
    return State(state.step + 1, join(moving, still), optimizer), metrics

  return step


def with_mean_weight(batch: Batch) -> tuple[Batch, jax.Array]:
  """Returns the batch with weights of mean 1, and their sum before."""
  weight = jnp.sum(batch['weights'])
  weights = batch['weights'] * (batch['weights'].size / weight)
  return {**batch, 'weights': weights}, weight


def with_own_weight(
  sums: dict[str, jax.Array], batch: Batch, weight: jax.Array
) -> dict[str, jax.Array]:
  """Undoes `with_mean_weight` for sums, which are linear in the weights."""
  share = weight / batch['weights'].size
  return {name: share * total for name, total in sums.items()} | {
    'weight': weight
  }


def sums_projected(tx: Any) -> bool:
  """Whether devices along 'data' send projected gradients for whole ones.

  It is exact where nothing reads more of a gradient than its projection: no
  residual rule, no clipping by its norm. Asked where a step is traced, under
  its mesh.
  """
  sides = jax.sharding.get_abstract_mesh().shape
  if sides.get('data', 1) == 1 or not isinstance(tx, Galore):
    return False
  # With all three sides XLA's partitioner fails at the embedding's gather.
  return tx.linear and min(sides['fsdp'], sides['tensor']) == 1


def traffic(config: Config) -> str:
  """Returns what devices along 'data' send each other, in words."""
  with jax.sharding.use_abstract_mesh(mesh_lib.absent(config.mesh)):
    whole_tree = isinstance(config.update, WholeTree)
    if whole_tree and sums_projected(config.transformation()):
      return 'mesh.data sums projected gradients, whole ones at a refresh'
  return (
    'mesh.data sums whole gradients; projected ones need update WholeTree, an '
    'optimizer that reads no more of them, clip_norm and norm_growth None, '
    'and mesh.fsdp or mesh.tensor 1'
  )


def projected(
  gradient: Callable,
  tx: Galore,
  moving: PyTree,
  still: PyTree,
  optimizer: PyTree,
  batch: Batch,
) -> tuple[jax.Array, PyTree, PyTree, PyTree]:
  """Returns loss, sums, the projected gradient, and the state refreshed.

  Each device along 'data' projects the gradient of its own rows, and what they
  sum has the size of the moments. The whole gradient is summed where a refresh
  is due, inside its branch.

  Args:
    gradient: `(moving, still, batch) -> loss, sums, gradient`.
    tx: a `galore` for which `sums_projected` holds.
    moving: what is trained.
    still: what is not.
    optimizer: the state of tx.
    batch: of all devices.
  """
  whole, own = PartitionSpec(), PartitionSpec('data')
  mean = functools.partial(jax.lax.pmean, axis_name='data')
  on_each = functools.partial(
    jax.shard_map,
    axis_names={'data'},
    # It would sum the gradients of what all devices have, which are whole.
    check_vma=False,
  )

  def of_rows(moving, still, batch):
    value, sums, grads = gradient(moving, still, batch)
    # With an axis in front, along which each device has its own.
    grads = jax.tree.map(lambda g: g[None], grads)
    return mean(value), jax.lax.psum(sums, 'data'), grads

  def project(grads, optimizer):
    return mean(tx.project(jax.tree.map(lambda g: g[0], grads), optimizer))

  def refreshed():
    total = jax.tree.map(lambda g: jnp.mean(g, 0), grads)
    return tx.refresh(mesh_lib.along_params(total), optimizer)

  value, sums, grads = on_each(
    of_rows, in_specs=(whole, whole, own), out_specs=(whole, whole, own)
  )(moving, still, batch)
  optimizer = jax.lax.cond(tx.due(optimizer), refreshed, lambda: optimizer)
  low = on_each(project, in_specs=(own, whole), out_specs=whole)(
    grads, optimizer
  )
  return value, sums, low, optimizer


def mean_gradient(
  loss: Loss, microbatches: int, moving: PyTree, still: PyTree, batch: Batch
) -> tuple[jax.Array, PyTree, PyTree]:
  """Returns loss, sums and gradient, of what is trained, over microbatches."""
  of_moving = lambda moving, batch: loss(join(moving, still), batch)
  whole = jax.value_and_grad(of_moving, has_aux=True)

  def gradient(moving: PyTree, batch: Batch) -> tuple[Any, PyTree]:
    found, grads = whole(moving, batch)
    return found, mesh_lib.along_params(grads)

  if microbatches == 1:
    (value, sums), grads = gradient(moving, batch)
    return value, sums, grads
  cut = lambda x: x.reshape(microbatches, -1, *x.shape[1:])
  parts = jax.tree.map(lambda x: mesh_lib.along_rows(cut(x), 1), batch)

  def add(total: PyTree, micro: Batch) -> tuple[PyTree, None]:
    return jax.tree.map(jnp.add, total, gradient(moving, micro)), None

  first = jax.tree.map(lambda x: x[0], parts)
  # In float32: a sum of many bfloat16 gradients would drop the small ones.
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.float32),
    (jax.eval_shape(of_moving, moving, first), moving),
  )
  ((value, sums), grads), _ = jax.lax.scan(add, zeros, parts)
  mean = lambda total, like: (total / microbatches).astype(like.dtype)
  return value / microbatches, sums, jax.tree.map(mean, grads, moving)
