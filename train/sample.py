"""Continues a text: `python -m train.sample RUN --prompt '...'`.

Axes: B prompts, T tokens of the window, V vocabulary.
"""

from train import signals

if __name__ == '__main__':
  signals.end_quietly()  # before the imports below, which take seconds

import argparse
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models.llama import Layers
from train import checkpoint, machine
from train.command import check_least, user_errors
from train.data.tokenizer import Tokenizer
from train.run import Run
from train.task import PyTree, language_model, stored_layers


def continuations(
  layers: Layers,
  params: PyTree,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  *,
  window: int,
  num_tokens: int = 80,
  temperature: float = 0.8,
  top_k: int = 50,
  seed: int = 0,
) -> list[str]:
  """Returns what the model says after each prompt.

  Args:
    layers: the model.
    params: its parameters.
    tokenizer: of the run.
    prompts: texts to continue.
    window: tokens that the model looks back at, no more than it was trained on.
    num_tokens: tokens to sample at most; the end of a document ends it.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: number of most likely tokens to choose from.
    seed: of the choice.
  """
  ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
  lengths_B = np.array([min(len(row), window) for row in ids], np.int32)
  tokens_BT = np.zeros((len(ids), window), np.int32)
  for row, length, tokens_T in zip(ids, lengths_B, tokens_BT, strict=True):
    tokens_T[:length] = row[-length:]

  # One compilation: the window has a fixed length, and slides once it is full.
  @jax.jit
  def extend(params, tokens_BT, lengths_B, key):
    new_B = choose(last_logits(layers, params, tokens_BT, lengths_B), key)
    full_B1 = (lengths_B == window)[:, None]
    tokens_BT = jnp.where(full_B1, jnp.roll(tokens_BT, -1, axis=1), tokens_BT)
    at_B = jnp.minimum(lengths_B, window - 1)
    tokens_BT = tokens_BT.at[jnp.arange(len(new_B)), at_B].set(new_B)
    return tokens_BT, at_B + 1, new_B

  def choose(logits_BV, key):
    if temperature == 0:
      return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    best_BK, ids_BK = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))
    pick_B = jax.random.categorical(key, best_BK / temperature)
    return jnp.take_along_axis(ids_BK, pick_B[:, None], axis=-1)[:, 0]

  said = []
  for key in jax.random.split(jax.random.key(seed), num_tokens):
    tokens_BT, lengths_B, new_B = extend(params, tokens_BT, lengths_B, key)
    said.append(new_B)
  return [
    tokenizer.decode(until(tokenizer.eos_id, row))
    for row in np.stack(said, axis=1).tolist()
  ]


def last_logits(
  layers: Layers, params: PyTree, tokens_BT: jax.Array, lengths_B: jax.Array
) -> jax.Array:
  """Returns the logits [B, V] after the last token of each row."""
  positions_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
  batch = {
    'inputs': tokens_BT,
    'positions': jnp.broadcast_to(positions_T[None], tokens_BT.shape),
    'segments': jnp.ones_like(tokens_BT),
  }
  logits_BTV = layers.logits(params, batch)
  return jnp.take_along_axis(
    logits_BTV, (lengths_B - 1)[:, None, None], axis=1
  )[:, 0]


def until(end: int, ids: list[int]) -> list[int]:
  """Returns the ids before the first `end`."""
  return ids[: ids.index(end)] if end in ids else ids


def main(argv: Sequence[str] | None = None) -> None:
  """Continues a prompt with the newest checkpoint of a run."""
  parser = argparse.ArgumentParser(
    'python -m train.sample', description=main.__doc__
  )
  parser.add_argument('run', type=pathlib.Path, help='directory of the run')
  parser.add_argument('--prompt', required=True, help='text to continue')
  parser.add_argument('--num-tokens', type=int, default=80, help='default: 80')
  parser.add_argument(
    '--temperature', type=float, default=0.8, help='default: 0.8; 0 is greedy'
  )
  parser.add_argument('--top-k', type=int, default=50, help='default: 50')
  parser.add_argument('--seed', type=int, default=0, help='default: 0')
  args = parser.parse_args(argv)
  machine.cache_compilations()
  with user_errors():
    check_least(1, num_tokens=args.num_tokens, top_k=args.top_k)
    if not 0 <= args.temperature < math.inf:
      raise ValueError(
        '--temperature must be finite and not negative (0 is greedy), got '
        f'{args.temperature}'
      )
    run = Run(args.run)
    config, tokenizer = run.config(), run.tokenizer()
    task = language_model(config)
    params = checkpoint.restore_params(run.checkpoints_path, task)
  (text,) = continuations(
    stored_layers(config),
    params,
    tokenizer,
    [args.prompt],
    window=config.sequence_length,
    num_tokens=args.num_tokens,
    temperature=args.temperature,
    top_k=args.top_k,
    seed=args.seed,
  )
  print(args.prompt + text)


if __name__ == '__main__':
  main()
