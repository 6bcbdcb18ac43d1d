"""Samples text, or chats: `python -m train.sample PATH --prompt '...'`.

`train.sample` calls `main` for a language model.

Axes: B prompts, T tokens, V vocabulary, K candidates.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from models.llama import Cache, Layers
from train.data.batches import bucket
from train.data.chats import variables_of
from train.data.tokenizer import Tokenizer
from train.engine import machine
from train.engine.command import (
  check_given,
  check_least,
  parse_options,
  user_errors,
)
from train.engine.task import PyTree
from train.tasks.text_model import Model, ModelOptions, opened, shared

CHUNK = 256
"""Largest number of tokens of a prompt that are read at a time."""


class Choice(NamedTuple):
  """How to choose a token from logits."""

  temperature: float = 0.8
  """Divides the logits; 0 takes the most likely token."""
  top_k: int = 50
  """Number of most likely tokens to choose from."""
  top_p: float = 1.0
  """Chooses from the fewest of these tokens that together have at least this
  probability."""


def candidates(
  logits_BV: jax.Array, choice: Choice
) -> tuple[jax.Array, jax.Array]:
  """Returns the scores [B, K] of the most likely tokens, and their ids [B, K].

  The softmax of the scores is the distribution to sample from. Tokens that
  `top_p` excludes have a score of -inf.

  >>> logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
  >>> scores, ids = candidates(logits, Choice(1.0, top_k=3, top_p=0.8))
  >>> ids.tolist(), [round(p, 3) for p in jax.nn.softmax(scores)[0].tolist()]
  ([[1, 3, 2]], [0.667, 0.333, 0.0])
  """
  num_kept = min(choice.top_k, logits_BV.shape[-1])
  best_BK, ids_BK = jax.lax.top_k(logits_BV, num_kept)
  # Subtract before dividing: a small temperature could make the best infinite.
  scores_BK = (best_BK - best_BK[:, :1]) / choice.temperature
  p_BK = jax.nn.softmax(scores_BK, axis=-1)
  before_BK = jnp.cumsum(p_BK, axis=-1) - p_BK
  return jnp.where(before_BK < choice.top_p, scores_BK, -jnp.inf), ids_BK


@functools.partial(jax.jit, static_argnames='choice')
def choose(
  logits_BV: jax.Array, key: jax.Array, *, choice: Choice
) -> jax.Array:
  """Samples a token for each row [B]; it depends on the key and the row."""
  if choice.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1)
  scores_BK, ids_BK = candidates(logits_BV, choice)
  rows_B = jnp.arange(len(logits_BV))
  keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(rows_B)
  pick_B = jax.vmap(jax.random.categorical)(keys_B, scores_BK)
  return jnp.take_along_axis(ids_BK, pick_B[:, None], axis=-1)[:, 0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend(
  layers: Layers,
  params: PyTree,
  cache: Cache,
  tokens_BT: jax.Array,
  lengths_B: jax.Array,
) -> tuple[jax.Array, Cache]:
  """Reads tokens; returns the logits [B, V] after them, and the cache."""
  return layers.extend(params, cache, tokens_BT, lengths_B)


class Reader:
  """Computes logits of growing rows of tokens, and caches earlier tokens."""

  def __init__(self, layers: Layers, params: PyTree) -> None:
    """Starts with an empty cache."""
    self._layers = layers
    self._params = params
    self._cache: Cache | None = None
    self._rows: list[list[int]] = []

  def read(self, rows: Sequence[list[int]], room: int) -> jax.Array:
    """Returns the logits [B, V] after the last token of each row.

    Tokens at the start of a row that are still in the cache are not read again.

    Args:
      rows: tokens, at least one in each row; always the same number of rows.
      room: number of tokens in a row that the cache must hold.
    """
    if self._cache is None or room > self._cache.keys.shape[2]:
      self._cache = self._layers.cache(len(rows), room)
      self._rows = [[] for _ in rows]
    # The last token must be read even if it is cached, since its logits are
    # needed.
    known = [
      min(shared(row, old), len(row) - 1)
      for row, old in zip(rows, self._rows, strict=True)
    ]
    self._rows = [list(row) for row in rows]
    self._cache = self._cache._replace(lengths=jnp.int32(np.array(known)))
    new = [row[n:] for row, n in zip(rows, known, strict=True)]
    longest = max(map(len, new))
    # `bucket` limits the number of lengths to compile. After the prompt, rows
    # grow by one token.
    size = 1 if longest == 1 else min(CHUNK, bucket(longest))
    logits_BV: jax.Array | None = None
    for start in range(0, longest, size):
      tokens_BT, lengths_B = padded(
        [x[start : start + size] for x in new], size
      )
      found_BV, self._cache = _extend(
        self._layers, self._params, self._cache, tokens_BT, lengths_B
      )
      if logits_BV is not None:
        found_BV = jnp.where(lengths_B[:, None] > 0, found_BV, logits_BV)
      logits_BV = found_BV
    # The loop runs at least once: each row has a last token to read.
    assert logits_BV is not None
    return logits_BV


def padded(
  rows: Sequence[list[int]], size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Pads rows with zeros to [B, size]; returns them and their lengths [B]."""
  tokens_BT = np.zeros((len(rows), size), np.int32)
  for row, tokens_T in zip(rows, tokens_BT, strict=True):
    tokens_T[: len(row)] = row
  return tokens_BT, np.array([len(row) for row in rows], np.int32)


def stream(
  reader: Reader,
  prompts: Sequence[list[int]],
  *,
  window: int,
  num_tokens: int,
  choice: Choice,
  seed: int = 0,
  stop_ids: Sequence[int] = (),
) -> Iterator[list[int | None]]:
  """Yields the next token of each row, as soon as it is known.

  A row with more tokens than the window drops its older half, and the rest is
  read again.

  Args:
    reader: reads the rows with the model.
    prompts: tokens to start with, at least one in each row.
    window: number of tokens that the model can read.
    num_tokens: largest number of tokens to sample for a row.
    choice: how to choose a token.
    seed: seed of the random choices; rows do not influence each other.
    stop_ids: tokens that end a row. An ended row yields None; the iterator
      stops once all rows have ended.
  """
  rows = [list(prompt[-window:]) for prompt in prompts]
  room = min(window, bucket(max(map(len, rows)) + num_tokens, least=256))
  key = jax.random.key(seed)
  ended = [False] * len(rows)
  for step in range(num_tokens):
    logits_BV = reader.read(rows, room)
    new = choose(logits_BV, jax.random.fold_in(key, step), choice=choice)
    for b, token in enumerate(np.asarray(new).tolist()):
      ended[b] = ended[b] or token in stop_ids
      if not ended[b]:
        rows[b].append(token)
      if len(rows[b]) > window:
        rows[b] = rows[b][-max(1, window // 2) :]
    if all(ended):
      return
    yield [
      None if over else row[-1] for over, row in zip(ended, rows, strict=True)
    ]


def spoken(
  tokenizer: Tokenizer,
  prompt: list[int],
  ids: list[int],
  stop: Sequence[str],
) -> tuple[str, bool]:
  """Decodes the tokens after a prompt, up to the first stop string.

  Returns:
    The text, and whether a stop string ended it.
  """
  # The tokens before a word determine whether it is decoded with a space.
  context = prompt[-8:]
  text = tokenizer.decode([*context, *ids])[len(tokenizer.decode(context)) :]
  ends = [text.find(end) for end in stop if end in text]
  return (text[: min(ends)], True) if ends else (text, False)


def settled(text: str, stop: Sequence[str]) -> str:
  """Returns the part of a text that no further token can change.

  The remainder is an incomplete character, or may become a stop string.

  >>> settled('a cat <e', ['<end>']), settled('na\\ufffd', [])
  ('a cat ', 'na')
  """
  text = text.rstrip('\ufffd')
  begun = [
    len(text) - n
    for end in stop
    for n in range(1, len(end))
    if text.endswith(end[:n])
  ]
  return text[: min(begun, default=len(text))]


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
  top_p: float = 1.0,
  stop: Sequence[str] = (),
  seed: int = 0,
) -> list[str]:
  """Returns the model's continuation of each prompt.

  Args:
    layers: the model.
    params: its parameters.
    tokenizer: the run's tokenizer.
    prompts: texts to continue.
    window: number of tokens that the model can read, at most as many as in
      training; older tokens are dropped, as in `stream`.
    num_tokens: largest number of tokens to sample; the end of a document ends a
      continuation earlier.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: number of most likely tokens to choose from.
    top_p: probability of the tokens to choose from, as in `Choice`.
    stop: strings that end a continuation; they are not part of it.
    seed: seed of the random choices.
  """
  rows = [beginning(tokenizer, prompt) for prompt in prompts]
  said = [[] for _ in rows]
  found = [('', False)] * len(rows)
  for step in stream(
    Reader(layers, params),
    rows,
    window=window,
    num_tokens=num_tokens,
    choice=Choice(temperature, top_k, top_p),
    seed=seed,
    stop_ids=tokenizer.stop_ids,
  ):
    for b, token in enumerate(step):
      if token is None:
        found[b] = (found[b][0], True)
      elif not found[b][1]:
        said[b].append(token)
        found[b] = spoken(tokenizer, rows[b], said[b], stop)
    if all(over for _, over in found):
      break
  return [text for text, _ in found]


def beginning(tokenizer: Tokenizer, prompt: str) -> list[int]:
  """Encodes a prompt; returns at least one token."""
  ids = tokenizer.encode(prompt).tolist()
  if tokenizer.bos_id is not None:
    return [tokenizer.bos_id, *ids]
  if ids:
    return ids
  assert tokenizer.eos_id is not None
  return [tokenizer.eos_id]


def chat(
  model: Model,
  lines: Iterable[str],
  *,
  num_tokens: int,
  choice: Choice,
  stop: Sequence[str] = (),
  seed: int = 0,
  variables: Mapping[str, Any] | None = None,
) -> Iterator[str]:
  """Returns an iterator over pieces of the answers; a newline ends each answer.

  The model's chat template renders the whole conversation as a prompt. Its
  cached beginning is not read again. If it is too long for the window, the
  oldest line and its answer are dropped.

  Args:
    model: the model and its tokenizer.
    lines: messages of the user.
    num_tokens: largest number of tokens of an answer.
    choice: how to choose a token.
    stop: strings that end an answer.
    seed: seed of the random choices.
    variables: variables of the template; None takes those that it was saved
      with.

  Raises:
    ValueError: the model has no template, or it does not read a variable.
  """
  template = model.tokenizer.chat_template
  if template is None:
    raise ValueError(
      '--chat needs a model with a chat template, which this one has not: '
      'continue its texts with --prompt'
    )
  template.check_variables(variables or {})
  return answers(
    model,
    lines,
    num_tokens=num_tokens,
    choice=choice,
    stop=stop,
    seed=seed,
    variables=variables,
  )


def answers(
  model: Model,
  lines: Iterable[str],
  *,
  num_tokens: int,
  choice: Choice,
  stop: Sequence[str],
  seed: int,
  variables: Mapping[str, Any] | None,
) -> Iterator[str]:
  """Yields the pieces that `chat` returns."""
  tokenizer = model.tokenizer
  reader = Reader(model.layers, model.params)
  messages = []
  room = min(num_tokens, model.window // 2)
  for turn, line in enumerate(lines):
    messages.append({'role': 'user', 'content': line})
    prompt = rendered(tokenizer, messages, variables)
    while len(messages) > 1 and len(prompt) + room > model.window:
      messages = messages[2:]
      prompt = rendered(tokenizer, messages, variables)
    ids = []
    text = ''
    shown = ''
    for (token,) in stream(
      reader,
      [prompt],
      window=model.window,
      num_tokens=num_tokens,
      choice=choice,
      seed=seed + turn,
      stop_ids=tokenizer.stop_ids,
    ):
      ids.append(token)
      text, over = spoken(tokenizer, prompt, ids, stop)
      if over:
        break
      piece = settled(text, stop)[len(shown) :]
      shown += piece
      yield piece
    yield text[len(shown) :] + '\n'
    messages.append({'role': 'assistant', 'content': text})


def rendered(
  tokenizer: Tokenizer,
  messages: list[dict[str, str]],
  variables: Mapping[str, Any] | None = None,
) -> list[int]:
  """Renders a conversation as tokens, up to the start of the next answer."""
  template = tokenizer.chat_template
  assert template is not None
  text = template.render(
    messages, add_generation_prompt=True, context=variables
  )
  return tokenizer.encode(text, special=True).tolist()


def typed() -> Iterator[str]:
  """Yields the lines of standard input that are not blank."""
  asked = sys.stdin.isatty()
  while True:
    try:
      line = input('> ' if asked else '')
    except EOFError:
      if asked:
        print()  # so that the shell's prompt starts on a new line
      return
    if line.strip():
      yield line


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
  """Continues prompts, or answers in a chat, with a run or a checkpoint."""

  program: ClassVar[str] = 'train.sample'
  prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
  """Text to continue; repeat the option for several texts."""
  chat: bool = False
  """Answer the lines of standard input, with the model's chat template; end
  with Ctrl-D."""
  template_variables: Annotated[
    tuple[str, ...] | None, tyro.conf.arg(metavar='NAME=VALUE [NAME=VALUE ...]')
  ] = None
  """Variables of the chat template, such as enable_thinking=false; None takes
  those of the run."""
  num_tokens: int | None = None
  """Largest number of tokens; None is 80 for a text, and 512 for an answer."""
  temperature: float = 0.8
  """Divides the logits; 0 takes the most likely token."""
  top_k: int = 50
  """Number of most likely tokens to choose from."""
  top_p: float = 1.0
  """Choose from the fewest tokens that together have this probability."""
  stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
  """Text that ends a continuation; repeat the option for several."""
  seed: int = 0
  """Seed of the random choices."""

  def __post_init__(self) -> None:
    """Raises ValueError if an option is wrong, or contradicts another."""
    if bool(self.prompt) == self.chat:
      raise ValueError('give either --prompt or --chat')
    check_given(template_variables=self.template_variables)
    if self.template_variables and not self.chat:
      raise ValueError('--template-variables are of --chat: leave them out')
    check_least(1, num_tokens=self.num_tokens, top_k=self.top_k)
    if not 0 <= self.temperature < math.inf:
      raise ValueError(
        '--temperature must be finite and not negative (0 is greedy), got '
        f'{self.temperature}'
      )
    if not 0 < self.top_p <= 1:
      raise ValueError(
        f'--top-p is a probability in (0, 1], got {self.top_p}; 1 leaves all'
      )
    if '' in self.stop:
      raise ValueError('--stop must be a text that is not empty')


def main(argv: Sequence[str] | None = None) -> None:
  """Continues prompts, or answers in a chat, with a run or a checkpoint."""
  with user_errors():
    args = parse_options(Options, sys.argv[1:] if argv is None else argv)
    machine.prepare()
    model = opened(args.path, best=args.best)
    choice = Choice(args.temperature, args.top_k, args.top_p)
    options = {'stop': args.stop, 'seed': args.seed}
    if args.chat:
      num_tokens = args.num_tokens or 512
      pieces = chat(
        model,
        typed(),
        num_tokens=num_tokens,
        choice=choice,
        variables=variables_of(args.template_variables or ()),
        **options,
      )
  if args.chat:
    for piece in pieces:
      print(piece, end='', flush=True)
    return
  texts = continuations(
    *model[:3],
    args.prompt,
    window=model.window,
    num_tokens=args.num_tokens or 80,
    **choice._asdict(),
    **options,
  )
  said = [x + text for x, text in zip(args.prompt, texts, strict=True)]
  print('\n---\n'.join(said))
