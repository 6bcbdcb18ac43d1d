"""`galore_adamw` equals GaLoreAdamW of the PyTorch reference.

Torch weights are (out, in). Our kernels are (in, out) and stacked over layers.
Distances are Frobenius norms relative to how far the weights moved. After 60
float32 steps they are at most 6e-6. The tolerance is 1e-3 in tests on a LLaMA
where each side computes its own bases, because nearly equal singular values
make the two bases differ.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_optax import Group, galore_adamw, grouped

torch = pytest.importorskip('torch')
galore_torch = pytest.importorskip('galore_torch')
transformers = pytest.importorskip('transformers')

from models import huggingface  # noqa: E402
from models.llama import Layers, LlamaConfig  # noqa: E402

pytestmark = pytest.mark.parity

# Refreshes at steps 0, 15, 30 and 45.
RANK, GAP, SCALE, STEPS = 6, 15, 0.25, 60
LR, WARMUP, DECAY = 0.01, 10, 0.1


def learning_rate(step):
  """Returns a learning rate with a warm-up from zero.

  The first update does not move the weights, but its moments are kept.
  """
  minimum = jnp.minimum if isinstance(step, jax.Array) else min
  return LR * minimum(step / WARMUP, 1.0)


def reference(plain, projected, proj_type='std'):
  galore = {'rank': RANK, 'update_proj_gap': GAP, 'scale': SCALE}
  groups = [
    {'params': plain},
    {'params': projected, 'proj_type': proj_type, **galore},
  ]
  return galore_torch.GaLoreAdamW(
    [group for group in groups if group['params']],
    lr=LR,
    weight_decay=DECAY,
    no_deprecation_warning=True,
  )


def step_reference(optimizer, step):
  for group in optimizer.param_groups:
    group['lr'] = learning_rate(step)
  optimizer.step()


def ours(**options):
  options = {'rank': RANK, 'gap': GAP, 'scale': SCALE, **options}
  tx = galore_adamw(learning_rate, weight_decay=DECAY, **options)

  def update(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return jax.tree.map(jnp.add, params, updates), state

  return tx, jax.jit(update)


def distances(params, others, start):
  """Returns the distance of each leaf, relative to how far the leaf moved."""
  return jax.tree.map(
    lambda x, y, z: float(np.linalg.norm(x - y) / np.linalg.norm(y - z)),
    *(
      jax.tree.map(lambda a: np.asarray(a, np.float64), t)
      for t in (params, others, start)
    ),
  )


def largest(tree):
  return max(jax.tree.leaves(tree))


SHAPES = {'tall': (47, 19), 'wide': (21, 53), 'square': (29, 29)}


def separated(seed, size):
  """Returns matrices (in, out) with well-separated singular values 0.7^k."""
  rng = np.random.default_rng(seed)
  out = {}
  for name, shape in SHAPES.items():
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    out[name] = (size * (u * 0.7 ** np.arange(len(vt))) @ vt).astype(np.float32)
  return out


# The left side of a torch weight is its output axis, which is the right side of
# a Flax kernel.
SIDES = {'std': 'std', 'reverse_std': 'reverse_std', 'right': 'left'}
SIDES |= {'left': 'right', 'full': 'full'}


@pytest.mark.parametrize(
  'side, subspace',
  [(side, 'svd') for side in SIDES]
  + [('std', 'gram'), ('reverse_std', 'gram')],
)
def test_separated_singular_values(signs_by_rule, side, subspace):
  start = separated(0, 0.5)
  weights = {k: torch.nn.Parameter(torch.tensor(w.T)) for k, w in start.items()}
  optimizer = reference([], list(weights.values()), SIDES[side])
  tx, update = ours(side=side, subspace=subspace)
  params = jax.tree.map(jnp.asarray, start)
  state = tx.init(params)
  for step in range(STEPS):
    grads = separated(1 + step, 0.1)
    for name, w in weights.items():
      w.grad = torch.tensor(grads[name].T)
    step_reference(optimizer, step)
    params, state = update(grads, state, params)
  theirs = {k: w.detach().numpy().T for k, w in weights.items()}
  found = distances(params, theirs, start)
  assert largest(found) < 1e-5, found


CONFIG = LlamaConfig(
  vocab_size=61, width=24, mlp_width=40, num_heads=3, num_layers=2
)


def torch_llama():
  torch.manual_seed(0)
  return transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=CONFIG.vocab_size,
      hidden_size=CONFIG.width,
      intermediate_size=CONFIG.mlp_width,
      num_attention_heads=CONFIG.num_heads,
      num_key_value_heads=CONFIG.num_heads,
      num_hidden_layers=CONFIG.num_layers,
      rms_norm_eps=CONFIG.norm_eps,
      rope_parameters={
        'rope_type': 'default',
        'rope_theta': CONFIG.rope_theta,
      },
      tie_word_embeddings=False,
      initializer_range=0.1,
      attn_implementation='eager',
      dtype='float32',
    )
  )


def to_tree(tensors):
  """Converts tensors, named as in torch, to our tree with stacked layers."""
  arrays = {name: x.detach().numpy().copy() for name, x in tensors}
  return jax.tree.map(jnp.asarray, huggingface.params_of(arrays, CONFIG))


def is_projected(name):
  return 'self_attn' in name or 'mlp' in name


def make(model):
  named = list(model.named_parameters())
  optimizer = reference(
    [x for name, x in named if not is_projected(name)],
    [x for name, x in named if is_projected(name)],
  )
  return optimizer, to_tree(named)


def tokens(step):
  """Returns tokens in which each token depends on its predecessor."""
  rng = np.random.default_rng(step)
  noise = rng.integers(5, size=(8, 25))
  return np.cumsum(noise * noise, axis=1) % CONFIG.vocab_size


def torch_gradients(model, step):
  ids = torch.tensor(tokens(step))
  model.zero_grad()
  model(input_ids=ids, labels=ids).loss.backward()
  return to_tree((name, x.grad) for name, x in model.named_parameters())


def assert_all_projected(params, state):
  kernels = jax.tree.leaves(state[0].basis)
  assert len(kernels) == 7  # q, k, v, o, gate, up, down
  shapes = {x.shape for x in jax.tree.leaves(params['blocks']) if x.ndim == 3}
  assert shapes == {(2, 24, 24), (2, 24, 40), (2, 40, 24)}


def reference_bases(model, optimizer):
  """Returns the reference's bases, stacked over layers, by our leaf names."""
  rows = {}
  for name, x in model.named_parameters():
    if is_projected(name):
      basis = optimizer.state[x]['projector'].ortho_matrix
      # The basis of a wide torch weight is (rank, in), of a tall one (out,
      # rank).
      basis = basis if basis.shape[0] == RANK else basis.T
      rows.setdefault(name.split('.')[-2][0], []).append(basis.numpy())
  return {key[0]: np.stack(layers) for key, layers in rows.items()}


def inject(state, bases):
  """Returns our optimizer state with its bases replaced."""
  galore_state, decay_state = state

  def swap(path, mine):
    name = path[-2].key[0]
    assert mine.shape == bases[name].shape
    return jnp.asarray(bases[name])

  basis = jax.tree_util.tree_map_with_path(swap, galore_state.basis)
  return galore_state._replace(basis=basis), decay_state


def test_every_weight_of_a_llama_with_the_reference_bases():
  """With the reference's bases, all other computations of ours agree with it.

  The reference itself runs unmodified.
  """
  model = torch_llama()
  optimizer, start = make(model)
  # Our side never refreshes, because its count starts at 1 and the gap exceeds
  # the number of steps.
  tx, update = ours(gap=10**9)
  params, (galore_state, decay_state) = start, tx.init(start)
  state = galore_state._replace(count=jnp.int32(1)), decay_state
  assert_all_projected(params, state)
  for step in range(STEPS):
    grads = torch_gradients(model, step)
    step_reference(optimizer, step)
    if step % GAP == 0:
      state = inject(state, reference_bases(model, optimizer))
    params, state = update(grads, state, params)
  found = distances(params, to_tree(model.named_parameters()), start)
  assert largest(found) < 1e-5, found


@pytest.mark.parametrize('subspace', ['svd', 'gram'])
def test_every_weight_of_a_llama_with_bases_of_its_own(signs_by_rule, subspace):
  model = torch_llama()
  optimizer, start = make(model)
  tx, update = ours(subspace=subspace)
  params, state = start, tx.init(start)
  assert_all_projected(params, state)
  for step in range(STEPS):
    grads = torch_gradients(model, step)
    step_reference(optimizer, step)
    params, state = update(grads, state, params)
  found = distances(params, to_tree(model.named_parameters()), start)
  assert largest(found) < 1e-3, found


def gradients_of_ours():
  layers = Layers(CONFIG)

  def loss(params, batch):
    value, _ = layers(params, batch)
    return value

  return jax.jit(jax.value_and_grad(loss))


def batch_of(step):
  ids = tokens(step).astype(np.int32)
  shape = ids[:, 1:].shape
  return {
    'inputs': ids[:, :-1],
    'targets': ids[:, 1:],
    'weights': np.ones(shape, np.float32),
    'positions': np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
    'segments': np.zeros(shape, np.int32),
  }


@pytest.mark.parametrize('subspace', ['svd', 'gram'])
def test_two_training_runs_end_to_end(signs_by_rule, subspace):
  """Each side has its own model, gradients, bases and optimizer."""
  model = torch_llama()
  optimizer, start = make(model)
  tx, update = ours(subspace=subspace)
  params, state = start, tx.init(start)
  loss_and_gradients = gradients_of_ours()
  losses = []
  for step in range(STEPS):
    loss, grads = loss_and_gradients(params, batch_of(step))
    params, state = update(grads, state, params)
    torch_gradients(model, step)
    step_reference(optimizer, step)
    losses.append(float(loss))
  assert losses[-1] < 0.8 * losses[0]
  found = distances(params, to_tree(model.named_parameters()), start)
  assert largest(found) < 1e-3, found


def test_the_unmodified_reference_within_the_first_gap():
  """Before the second refresh, updates do not depend on the basis signs."""
  model = torch_llama()
  optimizer, start = make(model)
  tx, update = ours()
  params, state = start, tx.init(start)
  for step in range(GAP):
    grads = torch_gradients(model, step)
    step_reference(optimizer, step)
    params, state = update(grads, state, params)
  found = distances(params, to_tree(model.named_parameters()), start)
  assert largest(found) < 1e-5, found


def test_groups_are_the_param_groups_of_pytorch(signs_by_rule):
  """Groups of projected weights have their own learning rate and decay."""
  start = separated(0, 0.5)
  weights = {k: torch.nn.Parameter(torch.tensor(w.T)) for k, w in start.items()}
  galore = {'rank': RANK, 'update_proj_gap': GAP, 'scale': SCALE}
  factors = {'tall': (2.0, 0.5), 'wide': (0.5, 0.0), 'square': (1.0, 1.0)}
  optimizer = galore_torch.GaLoreAdamW(
    [
      {'params': [weights[name]], 'weight_decay': DECAY * decay, **galore}
      | {'proj_type': 'std'}
      for name, (_, decay) in factors.items()
    ],
    lr=LR,
    no_deprecation_warning=True,
  )
  groups = [
    Group(name, rate=rate, decay=decay)
    for name, (rate, decay) in factors.items()
    if name != 'square'
  ]
  tx = grouped(galore_adamw, groups)(
    learning_rate, rank=RANK, gap=GAP, scale=SCALE, weight_decay=DECAY
  )
  params = jax.tree.map(jnp.asarray, start)
  state, update = tx.init(params), jax.jit(tx.update)
  for step in range(STEPS):
    grads = separated(1 + step, 0.1)
    for group, (rate, _) in zip(
      optimizer.param_groups, factors.values(), strict=True
    ):
      group['lr'] = rate * learning_rate(step)
    for name, w in weights.items():
      w.grad = torch.tensor(grads[name].T)
    optimizer.step()
    updates, state = update(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)
  theirs = {k: w.detach().numpy().T for k, w in weights.items()}
  found = distances(params, theirs, start)
  assert largest(found) < 1e-5, found
