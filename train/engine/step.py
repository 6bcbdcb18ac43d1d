"""The training step: microbatches, gradient, update.

A step whose loss or gradient is non-finite changes nothing but the step number,
and its metric `skipped_steps` is 1. A layer-wise step may update some weights
before it detects this; see `make_layerwise_step`.

`build` makes the step of a `train.engine.task.Task`, which `train.engine.loop`
repeats. The step updates all weights at once or, with `galore_optax.layerwise`,
one layer after another. Weights that the task does not train stay fixed: they
have neither gradients nor optimizer state.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from galore_optax.clipping import global_norm
from galore_optax.galore import Galore
from galore_optax.layerwise import stack
from galore_optax.layerwise.step import Layerwise, layerwise
from galore_optax.quantized.array import is_quantized
from galore_optax.sharding import state_shardings
from train.config import Config, WholeTree
from train.engine import mesh as mesh_lib
from train.engine.task import Batch, Loss, Mask, PyTree, Task, everything
from train.optimizers import adapter as adapter_lib
from train.optimizers import subspace_metrics
from train.optimizers.registry import projects

Init: TypeAlias = Callable[[jax.Array], 'State']
Step: TypeAlias = Callable[['State', Batch], tuple['State', PyTree]]

NO_SUMS = ('loss', 'grad_norm', 'projected_grad_norm')
"""Metrics of a layer-wise update that are not sums over the batch."""


class State(NamedTuple):
  """The training state, which every step reads and replaces."""

  step: jax.Array
  """Number of steps so far, skipped ones included; [], int32."""
  params: PyTree
  """The model's parameters, as they are stored between steps."""
  optimizer: optax.OptState
  """The optimizer's state for the trained parameters."""
  average: PyTree = None
  """The moving average of the parameters in float32, or None."""

  @property
  def evaluated(self) -> PyTree:
    """The parameters that validations and samples use."""
    return self.params if self.average is None else as_params(self)


def build(config: Config, task: Task) -> tuple[Init, Step]:
  """Builds the functions that initialize a task's state and train it.

  Args:
    config: the experiment.
    task: the task of `config`.

  Returns:
    `key -> state`, and the jitted `(state, batch) -> (state, metrics)`, which
    donates its state.
  """
  schedule = config.schedule()
  trained = task.trained
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
    checks_first = config.clip_norm is not None and tx.clip == 'exact'
    step = make_layerwise_step(
      tx,
      schedule=schedule,
      trained=trained,
      in_part=not checks_first and tx.accumulate == 1,
    )
  if config.learning_rate == 0:
    step = without_updates(step)
  step = with_health(with_adapter(with_rates(step, config), config))
  step = with_average(step, config.average)
  start = starter(config, task)
  return lambda key: start(task.init(key)), step


def starter(config: Config, task: Task) -> Callable[[PyTree], 'State']:
  """Returns `parameters -> state`, the state before the first update.

  The returned function raises ValueError if the optimizer cannot project the
  parameters.
  """
  tx = optimizer_of(config, task)

  def start(params: PyTree) -> 'State':
    try:
      state = init(params, tx, task.trained)
    except ValueError as error:
      if config.adapter is None or not projects(config.optimizer):
        raise
      raise ValueError(
        f'{error}. With adapter {type(config.adapter).__name__} the optimizer '
        f'trains factors of rank {config.adapter.rank}: take --optimizer '
        'AdamW, or a rank and targets that fit them'
      ) from error
    if config.average is None:
      return state
    return state._replace(average=as_float32(params))

  return start


def optimizer_of(config: Config, task: Task) -> Any:
  """Returns the transformation, or layer-wise update, that a config describes.

  Both have an `init` that makes the optimizer's state.
  """
  if isinstance(config.update, WholeTree):
    return config.transformation()
  return make_layerwise(config, task)


def shardings(
  first: Init, config: Config, task: Task, mesh: jax.sharding.Mesh
) -> 'State':
  """Returns the sharding of each array of the training state.

  Args:
    first: the first function that `build` returns.
    config: the experiment.
    task: the task of `config`.
    mesh: the devices.
  """
  whole = mesh_lib.everywhere(mesh)
  key = jax.random.key(0)
  shapes = jax.eval_shape(first, key)
  if mesh.size == 1:
    return jax.tree.map(lambda _: whole, shapes)
  params = jax.eval_shape(task.init, key)
  places = mesh_lib.of_params(params, mesh)
  moving, _ = split_trained(params, task.trained)
  of_moving, _ = split_trained(places, lambda _: task.trained(params))
  optimizer = state_shardings(optimizer_of(config, task), moving, of_moving)
  average = None if config.average is None else places
  return shapes._replace(
    step=whole, params=places, optimizer=optimizer, average=average
  )


def placed(step: Step, mesh: jax.sharding.Mesh, places: 'State') -> Step:
  """Jits a step for a mesh; each array of the state keeps its sharding.

  The metrics are replicated, so that every process can read them.
  """
  out = places, mesh_lib.everywhere(mesh)
  step = mesh_lib.under(mesh, step)
  return jax.jit(step, donate_argnums=0, out_shardings=out)


def without_updates(step: Step) -> Step:
  """Returns a step that changes no weight, for a learning rate of 0.

  Adding an update of 0 would turn a weight of -0 into +0.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def same(state: State, batch: Batch) -> tuple[State, PyTree]:
    new, metrics = step(state, batch)
    return new._replace(params=state.params), metrics

  return same


def init(params: PyTree, tx: Any, trained: Mask = everything) -> State:
  """Returns the training state before the first update."""
  moving, _ = split_trained(params, trained)
  return State(jnp.zeros([], jnp.int32), params, tx.init(moving))


def as_float32(params: PyTree) -> PyTree:
  """Returns parameters in float32."""
  return jax.tree.map(lambda w: w.astype(jnp.float32), params)


@jax.jit
def as_params(state: State) -> PyTree:
  """Returns the average in the data types of the parameters."""
  return jax.tree.map(
    lambda mean, w: mean.astype(w.dtype), state.average, state.params
  )


def with_average(step: Step, rate: float | None) -> Step:
  """Adds a moving average of the parameters to a step.

  In the first steps the rate is lower, so that the initial weights do not count
  for long. A skipped step does not change the average.

  Args:
    step: the step.
    rate: the decay rate, or None for no average.
  """
  if rate is None:
    return step

  @functools.partial(jax.jit, donate_argnums=0)
  def around(state: State, batch: Batch) -> tuple[State, PyTree]:
    old = state.average
    done = state.step.astype(jnp.float32)
    state, metrics = step(state._replace(average=None), batch)
    decay = jnp.minimum(rate, (1 + done) / (10 + done))
    share = jnp.where(metrics['skipped_steps'] > 0, 0.0, 1 - decay)

    def moved(mean: jax.Array, w: jax.Array) -> jax.Array:
      difference = w.astype(jnp.float32) - mean
      return mean + jnp.where(share > 0, share * difference, 0)

    average = jax.tree.map(moved, old, state.params)
    return state._replace(average=average), metrics

  return around


def with_health(step: Step) -> Step:
  """Adds the statistics of `train.optimizers.subspace_metrics` to a step's
  metrics.

  `subspace` is the result of `health`. `refreshed` is 1 if this step raised the
  number of refreshes that every matrix has had. Both are absent if no basis
  depends on the gradient.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def around(state: State, batch: Batch) -> tuple[State, PyTree]:
    before = subspace_metrics.health(state.optimizer)
    state, metrics = step(state, batch)
    found = subspace_metrics.health(state.optimizer)
    if found:
      refreshed = jnp.not_equal(
        subspace_metrics.refreshes(before), subspace_metrics.refreshes(found)
      )
      metrics = metrics | {'subspace': found, 'refreshed': refreshed}
    return state, metrics

  return around


def with_rates(step: Step, config: Config) -> Step:
  """Adds the learning rate of each group to a step's metrics."""
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
  """Adds an adapter's dropout and ReLoRA's restarts to a step.

  Both depend only on the seed and the step number, so that a resumed run
  repeats them.
  """
  adapter = config.adapter
  seed = config.seed
  noisy = isinstance(adapter, adapter_lib.Lora) and adapter.dropout > 0
  relora = adapter if isinstance(adapter, adapter_lib.Relora) else None
  if not noisy and relora is None:
    return step

  @functools.partial(jax.jit, donate_argnums=0)
  def around(state: State, batch: Batch) -> tuple[State, PyTree]:
    if noisy:
      batch = adapter_lib.with_noise(batch, seed, state.step)
    state, metrics = step(state, batch)
    if relora is not None:
      params, optimizer = adapter_lib.restart(
        state.params,
        state.optimizer,
        state.step,
        adapter=relora,
        weights=config.weights(),
        seed=seed,
      )
      state = State(state.step, params, optimizer)
    return state, metrics

  return around


def split_trained(params: PyTree, trained: Mask) -> tuple[PyTree, PyTree]:
  """Splits parameters into trained and fixed ones; None fills the gaps.

  >>> split_trained({'a': 1, 'b': 2}, lambda params: {'a': True, 'b': False})
  ({'a': 1, 'b': None}, {'a': None, 'b': 2})
  """
  chosen = trained(params)

  def pick(wanted: bool) -> PyTree:
    return jax.tree.map(
      lambda is_trained, w: w if is_trained == wanted else None, chosen, params
    )

  return pick(True), pick(False)


def join_trained(moving: PyTree, still: PyTree) -> PyTree:
  """Inverts `split_trained`: takes each leaf from the tree that has it.

  >>> join_trained({'a': 1, 'b': None}, {'a': None, 'b': 2})
  {'a': 1, 'b': 2}
  """
  return jax.tree.map(
    lambda w, other: other if w is None else w,
    moving,
    still,
    is_leaf=lambda x: x is None or is_quantized(x),
  )


class WithFixedWeights(NamedTuple):
  """A model as `galore_optax.layerwise` reads it, with fixed weights added.

  The layer-wise update passes only the trained weights. The layer's index
  travels with the activations, so that each layer finds its fixed weights.
  """

  layers: Any
  """The task's `layers`."""
  still: PyTree
  """Parameters that are not trained, as they are stored; None elsewhere."""
  read: Callable[[Any], jax.Array]
  """Converts a stored weight to an array."""

  def embed(self, params: PyTree, batch: Batch) -> PyTree:
    """Returns the input of the first layer."""
    x = self.layers.embed(join_trained(params, self.still), batch)
    return {'x': x, 'layer': jnp.int32(0)}

  def block(self, layer_params: PyTree, x: PyTree) -> PyTree:
    """Returns the output of one layer, the input of the next."""
    mine = jax.tree.map(
      lambda w: self.read(stack.take(w, x['layer'])),
      self.still['blocks'],
      is_leaf=is_quantized,
    )
    y = self.layers.block(join_trained(layer_params, mine), x['x'])
    return {'x': y, 'layer': x['layer'] + 1}

  def loss(self, params: PyTree, x: PyTree, batch: Batch) -> Any:
    """Returns the loss and the sums of `Task.loss`."""
    return self.layers.loss(join_trained(params, self.still), x['x'], batch)


def make_layerwise(config: Config, task: Task) -> Layerwise:
  """Returns the layer-wise update of a config whose `update` is Layerwise."""
  update = config.update
  assert not isinstance(update, WholeTree)
  slices = {}
  if update.slices > 1:
    slices = dict.fromkeys(config.resolved_model.large, update.slices)
  return layerwise(
    task.layers,
    config.rule(),
    clip_norm=config.clip_norm,
    clip=update.clip,
    microbatches=config.microbatches,
    accumulate=update.accumulate,
    sums_dtype=update.sums,
    slices=slices,
    weights=config.weights(),
  )


def make_layerwise_step(
  update: Layerwise,
  *,
  schedule: optax.Schedule,
  trained: Mask = everything,
  in_part: bool = False,
) -> Step:
  """Returns a step like that of `make_step`, with a layer-wise update.

  If `update.accumulate` is more than 1, the metrics have `projected_grad_norm`
  instead of `grad_norm`.

  Args:
    update: the layer-wise update.
    schedule: the learning rate by step, only for the metrics.
    trained: as in `Task`.
    in_part: whether a non-finite gradient can appear after some weights have
      changed, because no earlier pass checks all gradients. The layers above
      it are then updated, and the metric `partial_steps` is 1.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: State, batch: Batch) -> tuple[State, PyTree]:
    batch, weight = with_mean_weight(batch)
    moving, still = split_trained(state.params, trained)
    run = update
    if jax.tree.leaves(still):
      model = WithFixedWeights(update.model, still, update.weights.read)
      run = dataclasses.replace(update, model=model)
    inner: Any = state.optimizer
    moving, optimizer, found = run(moving, inner, batch)
    params = join_trained(moving, still)
    metrics = {name: found[name] for name in NO_SUMS if name in found}
    metrics['learning_rate'] = jnp.asarray(schedule(state.step))
    norm: Any = found.get('projected_grad_norm', found.get('grad_norm'))
    bad = ~jnp.isfinite(norm)
    lost = ~jnp.isfinite(found['loss'])
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

  The loss is the weighted mean over the whole batch; the number of microbatches
  does not change it. Metrics are `loss`, `grad_norm`, `learning_rate`,
  `skipped_steps`, `weight` (the sum of the batch's weights) and the sums that
  the loss returns, by name. If devices sum projected gradients,
  `projected_grad_norm` replaces `grad_norm`.

  Args:
    loss: as in `Task.loss`.
    tx: the optimizer.
    schedule: the learning rate by step, only for the metrics.
    microbatches: number of equal parts of the batch, computed one at a time.
    trained: as in `Task`.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: State, batch: Batch) -> tuple[State, PyTree]:
    batch, weight = with_mean_weight(batch)
    moving, still = split_trained(state.params, trained)
    gradient = functools.partial(mean_gradient, loss, microbatches)
    if sums_projected(tx):
      # Between refreshes, devices along 'data' sum only projected gradients.
      value, sums, grads, found = projected(
        gradient, tx, moving, still, state.optimizer, batch
      )
      update = tx.apply
      name = 'projected_grad_norm'
    else:
      value, sums, grads = gradient(moving, still, batch)
      found = state.optimizer
      update = tx.update
      name = 'grad_norm'
    norm = global_norm(grads)
    sound = jnp.isfinite(value) & jnp.isfinite(norm)

    def updated(kept: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
      del kept
      updates, optimizer = update(grads, found, moving)
      return optax.apply_updates(moving, updates), optimizer

    # `train.plan` finds this conditional in the compiled step by its name.
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
    params = join_trained(moving, still)
    return State(state.step + 1, params, optimizer), metrics

  return step


def with_mean_weight(batch: Batch) -> tuple[Batch, jax.Array]:
  """Scales a batch's weights to mean 1; returns their original sum, too."""
  weight = jnp.sum(batch['weights'])
  weights = batch['weights'] * (batch['weights'].size / weight)
  return {**batch, 'weights': weights}, weight


def with_own_weight(
  sums: dict[str, jax.Array], batch: Batch, weight: jax.Array
) -> dict[str, jax.Array]:
  """Undoes `with_mean_weight` in sums, which are linear in the weights."""
  share = weight / batch['weights'].size
  return {name: share * total for name, total in sums.items()} | {
    'weight': weight
  }


def sums_projected(tx: Any) -> TypeGuard[Galore]:
  """Whether devices along 'data' can sum projected gradients instead of whole.

  The result is the same if the optimizer reads nothing but the projection of a
  gradient: it has no residual rule, and does not clip by the whole gradient's
  norm. Call it while a step is traced under its mesh, whose sizes it reads.
  """
  sides = jax.sharding.get_abstract_mesh().shape
  if sides.get('data', 1) == 1 or not isinstance(tx, Galore):
    return False
  # With three axes above 1, XLA's partitioner fails on the embedding's gather.
  return tx.linear and min(sides['fsdp'], sides['tensor']) == 1


def traffic(config: Config) -> str:
  """Describes which gradients the devices along 'data' sum."""
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
  gradient: Callable[..., tuple[jax.Array, PyTree, PyTree]],
  tx: Galore,
  moving: PyTree,
  still: PyTree,
  optimizer: PyTree,
  batch: Batch,
) -> tuple[jax.Array, PyTree, PyTree, PyTree]:
  """Returns loss, sums, projected gradient and refreshed optimizer state.

  Each device along 'data' projects the gradient of its own rows, and the
  devices sum the projections, which have the size of the moments. Whole
  gradients are summed only if a refresh is due, inside the branch of
  `lax.cond`.

  Args:
    gradient: `(moving, still, batch) -> loss, sums, gradient`.
    tx: a `galore` for which `sums_projected` is true.
    moving: the trained parameters.
    still: the parameters that are not trained.
    optimizer: the state of `tx`.
    batch: the batch of all devices.
  """
  whole = PartitionSpec()
  own = PartitionSpec('data')
  mean = functools.partial(jax.lax.pmean, axis_name='data')
  on_each = functools.partial(
    jax.shard_map,
    axis_names={'data'},
    # With the check, JAX would sum the gradients of replicated parameters over
    # 'data', and the devices would exchange whole gradients.
    check_vma=False,
  )

  def of_rows(
    moving: PyTree, still: PyTree, batch: Batch
  ) -> tuple[jax.Array, PyTree, PyTree]:
    value, sums, grads = gradient(moving, still, batch)
    # The new leading axis keeps each device's gradient apart from the others'.
    grads = jax.tree.map(lambda g: g[None], grads)
    return mean(value), jax.lax.psum(sums, 'data'), grads

  def project(grads: PyTree, optimizer: PyTree) -> PyTree:
    return mean(tx.project(jax.tree.map(lambda g: g[0], grads), optimizer))

  def refreshed() -> PyTree:
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
  """Returns loss, sums and the trained parameters' gradient of a batch.

  The loss and the gradient are means over the microbatches; sums are totals.
  """

  def of_moving(moving: PyTree, batch: Batch) -> tuple[jax.Array, PyTree]:
    return loss(join_trained(moving, still), batch)

  whole = jax.value_and_grad(of_moving, has_aux=True)

  def gradient(moving: PyTree, batch: Batch) -> tuple[Any, PyTree]:
    found, grads = whole(moving, batch)
    return found, mesh_lib.along_params(grads)

  if microbatches == 1:
    (value, sums), grads = gradient(moving, batch)
    return value, sums, grads

  def cut(x: jax.Array) -> jax.Array:
    parts = x.reshape(microbatches, -1, *x.shape[1:])
    return mesh_lib.along_rows(parts, axis=1)

  parts = jax.tree.map(cut, batch)

  def add(total: PyTree, micro: Batch) -> tuple[PyTree, None]:
    return jax.tree.map(jnp.add, total, gradient(moving, micro)), None

  first = jax.tree.map(lambda x: x[0], parts)
  # Accumulate in float32: bfloat16 would lose the small gradients.
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.float32),
    (jax.eval_shape(of_moving, moving, first), moving),
  )
  ((value, sums), grads), _ = jax.lax.scan(add, zeros, parts)

  def mean(total: jax.Array, like: jax.Array) -> jax.Array:
    return (total / microbatches).astype(like.dtype)

  return value / microbatches, sums, jax.tree.map(mean, grads, moving)
