"""Tunix 0.1.7: its trainer on eight devices, with all weights and with LoRA."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import galore_optax as go
from tests.peers import steps

with warnings.catch_warnings():
  # Tunix and its dependencies import modules that JAX and Python deprecate.
  warnings.simplefilter('ignore', DeprecationWarning)
  import qwix
  from tunix.models.llama3 import model as llama3
  from tunix.rl import reshard
  from tunix.sft import hooks, peft_trainer

pytestmark = [
  pytest.mark.peers,
  # Tunix reads and writes the arrays of NNX variables in ways that Flax 0.12
  # deprecates, and qwix warns about its own default.
  pytest.mark.filterwarnings('ignore::DeprecationWarning'),
  pytest.mark.filterwarnings('ignore::UserWarning'),
]

VOCABULARY, BATCH, TIME = 62, 8, 12
CONFIG = llama3.ModelConfig(
  num_layers=2,
  vocab_size=VOCABULARY,
  embed_dim=24,
  hidden_dim=40,
  num_heads=4,
  head_dim=8,
  num_kv_heads=2,
  rope_theta=10_000,
  norm_eps=1e-5,
)

# Each attention kernel is one matrix: q [24, 4 * 8], k and v [24, 2 * 8] and
# o [4 * 8, 24]. The shorter side is projected.
BASES = {
  f'layers/{layer}/{name}': (10, size)
  for layer in range(2)
  for name, size in (
    ('attn/k_proj/w', 16),
    ('attn/o_proj/w', 24),
    ('attn/q_proj/w', 24),
    ('attn/v_proj/w', 16),
    ('mlp/down_proj/kernel', 24),
    ('mlp/gate_proj/kernel', 24),
    ('mlp/up_proj/kernel', 24),
  )
}


LORA_BASES = {
  f'layers/{layer}/{name}': (4, 6)
  for layer in range(2)
  for name in (
    'attn/q_proj/w_lora_a',
    'mlp/gate_proj/kernel_lora_a',
    'mlp/gate_proj/kernel_lora_b',
    'mlp/down_proj/kernel_lora_a',
    'mlp/down_proj/kernel_lora_b',
  )
}
STEPS = 10


def mesh():
  axis_types = (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh((4, 2), ('fsdp', 'tp'), axis_types=axis_types)


def full_model():
  model = llama3.Llama3(CONFIG, rngs=nnx.Rngs(0))
  return reshard.reshard_model_to_mesh(model, mesh())


def lora_model():
  """Returns a model with random weights and trainable factors.

  Tunix expects to load a checkpoint. It initializes the kernels of the MLP with
  zeros, so that their factors would have no gradient, and the head with small
  numbers.
  """
  model = llama3.Llama3(CONFIG, rngs=nnx.Rngs(0))
  keys = iter(jax.random.split(jax.random.key(1), 7))
  mlps = [layer.mlp for layer in model.layers]
  linears = [x for m in mlps for x in (m.gate_proj, m.up_proj, m.down_proj)]
  for weight in (*(x.kernel for x in linears), model.lm_head.w):
    weight[...] = 0.3 * jax.random.normal(next(keys), weight.shape)
  provider = qwix.LoraProvider(
    module_path='.*(q_proj|gate_proj|down_proj)', rank=6, alpha=12.0
  )
  with jax.numpy_rank_promotion('allow'):
    model = qwix.apply_lora_to_model(
      model, provider, rngs=nnx.Rngs(2), **model.get_model_input()
    )
  return reshard.reshard_model_to_mesh(model, mesh())


def batches():
  """Yields rows in which each token determines the next one."""
  for seed in itertools.count():
    first = np.random.default_rng(seed).integers(VOCABULARY, size=(BATCH, 1))
    tokens = (first + 7 * np.arange(TIME)) % VOCABULARY
    yield peft_trainer.TrainingInput(
      input_tokens=tokens.astype(np.int32),
      input_mask=np.ones((BATCH, TIME), bool),
    )


def model_input(x):
  positions = jnp.broadcast_to(jnp.arange(TIME), (BATCH, TIME))
  causal = jnp.tril(jnp.ones((TIME, TIME), bool))
  return {
    'input_tokens': x.input_tokens,
    'input_mask': x.input_mask,
    'positions': positions,
    'attention_mask': jnp.broadcast_to(causal, (BATCH, TIME, TIME)),
  }


class Losses(hooks.TrainingHooks):
  """Records the loss of each step."""

  def __init__(self):
    self.losses = []

  def on_train_start(self, trainer):
    del trainer

  def on_train_end(self, trainer):
    del trainer

  def on_train_step_start(self, trainer):
    del trainer

  def on_train_step_end(self, trainer, train_step, train_loss):
    del trainer, train_step
    self.losses.append(float(train_loss))

  def on_eval_step_start(self, trainer):
    del trainer

  def on_eval_step_end(self, trainer, eval_loss):
    del trainer, eval_loss


def train(model, tx, num_steps, directory=None, accumulation=None):
  """Returns the trainer after some steps, and the loss of each step."""
  options = ocp.CheckpointManagerOptions(save_interval_steps=1)
  config = peft_trainer.TrainingConfig(
    eval_every_n_steps=1000,
    max_steps=num_steps,
    gradient_accumulation_steps=accumulation,
    checkpoint_root_directory=directory and str(directory),
    checkpointing_options=options,
    pbar_description=None,
  )
  recorder = Losses()
  # Tunix's models promote the ranks of their operands.
  with mesh(), jax.numpy_rank_promotion('allow'):
    trainer = peft_trainer.PeftTrainer(model, tx, config)
    trainer = trainer.with_gen_model_input_fn(model_input)
    trainer.with_training_hooks(recorder)
    trainer.train(batches())
  return trainer, recorder.losses


def optimizer_state(trainer):
  return nnx.state(trainer.optimizer, nnx.OptState)


def make_tx():
  return optax.chain(go.galore(rank=10, gap=3), optax.adamw(0.03))


def bases_of(trainer):
  return steps.bases(optimizer_state(trainer))


@pytest.fixture(scope='module')
def trained():
  return train(full_model(), make_tx(), STEPS)


def test_full_fine_tuning(trained):
  trainer, losses = trained
  assert len(losses) == trainer.train_steps == STEPS
  assert np.mean(losses[-2:]) < 0.9 * np.mean(losses[:2])
  assert bases_of(trainer) == BASES
  kernel = trainer.model.layers[0].mlp.up_proj.kernel[...]
  assert kernel.addressable_shards[0].data.shape == (6, 20)


def test_resumed_training_equals_training_without_a_stop(trained, tmp_path):
  trainer, losses = trained
  train(full_model(), make_tx(), 5, tmp_path)
  resumed, last = train(full_model(), make_tx(), STEPS, tmp_path)
  np.testing.assert_array_equal(losses[5:], last)
  steps.assert_equal_leaves(nnx.state(resumed.model), nnx.state(trainer.model))
  steps.assert_equal_leaves(optimizer_state(resumed), optimizer_state(trainer))


def test_lora():
  """The factors of LoRA are weights like others, and are projected."""
  tx = optax.chain(go.galore(rank=4, gap=3), optax.adamw(0.1))
  trainer, losses = train(lora_model(), tx, STEPS)
  assert np.mean(losses[-2:]) < 0.9 * np.mean(losses[:2])
  assert bases_of(trainer).items() >= LORA_BASES.items()
  # The trainer updates the factors only.
  kernel = 'mlp/up_proj/kernel'
  assert not any(path.endswith(kernel) for path in bases_of(trainer))


def test_accumulation_with_an_injected_learning_rate():
  """Tunix wraps the transformation in `optax.MultiSteps`."""
  rate = optax.linear_schedule(0.1, 0.05, STEPS)
  make = optax.inject_hyperparams(go.galore_adamw, static_args=('rank', 'gap'))
  tx = make(learning_rate=rate, rank=10, gap=3)
  trainer, losses = train(full_model(), tx, 5, accumulation=2)
  assert len(losses) == trainer.train_steps == 5
  assert trainer.iter_steps == 10
  assert losses[-1] < 0.95 * losses[0]
  state = nnx.to_pure_dict(optimizer_state(trainer))['opt_state']
  found = state['inner_opt_state']['hyperparams']['learning_rate']
  np.testing.assert_allclose(found, rate(4), rtol=1e-6)
  assert bases_of(trainer) == BASES
