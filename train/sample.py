"""Continues texts, or talks: `python -m train.sample PATH --prompt '...'`.

Axes: B prompts, T tokens, V vocabulary, K candidates.
"""

from train import signals

if __name__ == '__main__':
  signals.end_quietly()  # before the imports below, which take seconds

import argparse
import functools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.llama import Layers
from train import machine
from train.command import add_flag, check_least, user_errors
from train.data.batches import bucket
from train.data.chats import variables_of
from train.data.tokenizer import AnyTokenizer
from train.model import Model, opened, options_of, shared
from train.task import PyTree

CHUNK = 256
"""Tokens of a prompt that are read at a time, at most."""


class Choice(NamedTuple):
  """How a token is chosen."""

  temperature: float = 0.8
  """What logits are divided by; 0 takes the most likely token."""
  top_k: int = 50
  """Number of most likely tokens to choose from."""
  top_p: float = 1.0
  """Probability that those of them have together, at least, that are left:
  as few as it takes."""


def candidates(
  logits_BV: jax.Array, choice: Choice
) -> tuple[jax.Array, jax.Array]:
  """Returns scores [B, K], most likely first, and which tokens [B, K] they are.

  A softmax of scores is the distribution to draw from; of what is not to be
  drawn they are -inf.

  >>> logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
  >>> scores, ids = candidates(logits, Choice(1.0, top_k=3, top_p=0.8))
  >>> ids.tolist(), [round(p, 3) for p in jax.nn.softmax(scores)[0].tolist()]
  ([[1, 3, 2]], [0.667, 0.333, 0.0])
  """
  num_kept = min(choice.top_k, logits_BV.shape[-1])
  best_BK, ids_BK = jax.lax.top_k(logits_BV, num_kept)
  # Differences first: a small temperature makes no infinity of the best.
  scores_BK = (best_BK - best_BK[:, :1]) / choice.temperature
  p_BK = jax.nn.softmax(scores_BK, axis=-1)
  before_BK = jnp.cumsum(p_BK, axis=-1) - p_BK
  return jnp.where(before_BK < choice.top_p, scores_BK, -jnp.inf), ids_BK


@functools.partial(jax.jit, static_argnames='choice')
def choose(logits_BV: jax.Array, key: jax.Array, *, choice: Choice):
  """Returns a token of each row [B]; the key and the row decide."""
  if choice.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1)
  scores_BK, ids_BK = candidates(logits_BV, choice)
  rows_B = jnp.arange(len(logits_BV))
  keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(rows_B)
  pick_B = jax.vmap(jax.random.categorical)(keys_B, scores_BK)
  return jnp.take_along_axis(ids_BK, pick_B[:, None], axis=-1)[:, 0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend(layers, params, cache, tokens_BT, lengths_B):
  return layers.extend(params, cache, tokens_BT, lengths_B)


class Reader:
  """A model that remembers the rows of tokens that it has read last."""

  def __init__(self, layers: Layers, params: PyTree):
    """Has read nothing."""
    self._layers, self._params = layers, params
    self._cache, self._rows = None, []

  def read(self, rows: Sequence[list[int]], room: int) -> jax.Array:
    """Returns the logits [B, V] after rows; known beginnings are not read.

    Args:
      rows: tokens, at least one in each; as many rows each time.
      room: tokens of a row that are to be remembered.
    """
    if self._cache is None or room > self._cache.keys.shape[2]:
      self._cache = self._layers.cache(len(rows), room)
      self._rows = [[] for _ in rows]
    # The last token is read again if need be: its logits are asked for.
    known = [
      min(shared(row, old), len(row) - 1)
      for row, old in zip(rows, self._rows, strict=True)
    ]
    self._rows = [list(row) for row in rows]
    self._cache = self._cache._replace(lengths=jnp.int32(np.array(known)))
    new = [row[n:] for row, n in zip(rows, known, strict=True)]
    longest = max(map(len, new))
    # A prompt has one of few lengths, the token chosen last is alone.
    size = 1 if longest == 1 else min(CHUNK, bucket(longest))
    logits_BV = None
    for start in range(0, longest, size):
      tokens_BT, lengths_B = padded(
        [x[start : start + size] for x in new], size
      )
      found_BV, self._cache = _extend(
        *(self._layers, self._params, self._cache, tokens_BT, lengths_B)
      )
      if start == 0:
        logits_BV = found_BV
      else:
        logits_BV = jnp.where(lengths_B[:, None] > 0, found_BV, logits_BV)
    return logits_BV


def padded(rows: Sequence[list[int]], size: int):
  """Returns rows with zeros after them, [B, size], and their lengths [B]."""
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

  A row that has more tokens than the window forgets the older half of them,
  the beginning first, and reads the rest anew.

  Args:
    reader: of the model.
    prompts: tokens to begin with, at least one in each row.
    window: tokens that the model looks back at.
    num_tokens: tokens to choose for a row, at most.
    choice: how.
    seed: of the choice; what a row says depends on no other row.
    stop_ids: tokens that end a row. From there on it has None, and there are no
      more where every row has.
  """
  rows = [list(prompt[-window:]) for prompt in prompts]
  room = min(window, bucket(max(map(len, rows)) + num_tokens, least=256))
  key, ended = jax.random.key(seed), [False] * len(rows)
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
  tokenizer: AnyTokenizer,
  prompt: list[int],
  ids: list[int],
  stop: Sequence[str],
) -> tuple[str, bool]:
  """Returns the text of tokens after a prompt, and whether it is all there is.

  It ends before the first of the stop strings.
  """
  # What comes before decides whether a first word begins with a space.
  context = prompt[-8:]
  text = tokenizer.decode([*context, *ids])[len(tokenizer.decode(context)) :]
  ends = [text.find(end) for end in stop if end in text]
  return (text[: min(ends)], True) if ends else (text, False)


def settled(text: str, stop: Sequence[str]) -> str:
  """Returns the beginning of a text that no further token changes.

  The rest is part of a character, or may be that of a stop string.

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
  tokenizer: AnyTokenizer,
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
  """Returns what the model says after each prompt.

  Args:
    layers: the model.
    params: its parameters.
    tokenizer: of the run.
    prompts: texts to continue.
    window: tokens that the model looks back at, no more than it was trained on;
      as in `stream`, older ones are forgotten.
    num_tokens: tokens to sample at most; the end of a document ends it.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: number of most likely tokens to choose from.
    top_p: probability of the tokens to choose from, as in `Choice`.
    stop: texts that end it, and are no part of it.
    seed: of the choice.
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


def beginning(tokenizer: AnyTokenizer, prompt: str) -> list[int]:
  """Returns a prompt's tokens, at least one."""
  ids = tokenizer.encode(prompt).tolist()
  if tokenizer.bos_id is not None:
    return [tokenizer.bos_id, *ids]
  return ids or [tokenizer.eos_id]


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
  """Returns the answers to lines, in pieces; each ends with a newline.

  The model's own template makes a prompt of the whole conversation, whose known
  beginning is not read again. What no longer fits into the window is forgotten,
  a line and its answer at a time.

  Args:
    model: the model, and its tokenizer.
    lines: messages of the user.
    num_tokens: tokens of an answer, at most.
    choice: how a token is chosen.
    stop: texts that end an answer.
    seed: of the choice.
    variables: of the template, instead of those that it was saved with.

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
  """Yields what `chat` returns."""
  tokenizer = model.tokenizer
  reader, messages = Reader(model.layers, model.params), []
  room = min(num_tokens, model.window // 2)
  for turn, line in enumerate(lines):
    messages.append({'role': 'user', 'content': line})
    prompt = rendered(tokenizer, messages, variables)
    while len(messages) > 1 and len(prompt) + room > model.window:
      messages = messages[2:]
      prompt = rendered(tokenizer, messages, variables)
    ids, text, shown = [], '', ''
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
  tokenizer: AnyTokenizer,
  messages: list[dict[str, str]],
  variables: Mapping[str, Any] | None = None,
) -> list[int]:
  """Returns the tokens of a conversation, up to where the answer begins."""
  text = tokenizer.chat_template.render(
    messages, add_generation_prompt=True, context=variables
  )
  return tokenizer.encode(text, special=True).tolist()


def typed() -> Iterator[str]:
  """Yields the lines of standard input that are not blank, to its end."""
  asked = sys.stdin.isatty()
  while True:
    try:
      line = input('> ' if asked else '')
    except EOFError:
      if asked:
        print()  # the shell's prompt has a line of its own
      return
    if line.strip():
      yield line


def main(argv: Sequence[str] | None = None) -> None:
  """Continues prompts, or answers in a chat, with a run or a checkpoint."""
  args = parser().parse_args(argv)
  machine.prepare()
  with user_errors():
    check(args)
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
        variables=variables_of(args.template_variables),
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


def parser() -> argparse.ArgumentParser:
  """Returns the options."""
  options = options_of('train.sample', main.__doc__)
  options.add_argument(
    '--prompt',
    action='append',
    default=[],
    help='text to continue; several times, to continue several at once',
  )
  add_flag(
    options,
    'chat',
    help='answer the lines of standard input, with the template of the model; '
    'Ctrl-D ends it',
  )
  options.add_argument(
    '--template-variables',
    nargs='+',
    default=[],
    metavar='NAME=VALUE',
    help='variables of the template of --chat, such as enable_thinking=false '
    '(default: those of the run)',
  )
  options.add_argument(
    '--num-tokens',
    type=int,
    help='tokens to choose at most (default: 80, of an answer 512)',
  )
  options.add_argument(
    '--temperature', type=float, default=0.8, help='default: 0.8; 0 is greedy'
  )
  options.add_argument('--top-k', type=int, default=50, help='default: 50')
  options.add_argument(
    '--top-p',
    type=float,
    default=1.0,
    help='choose from the fewest tokens that have this probability together '
    '(default: 1)',
  )
  options.add_argument(
    '--stop',
    action='append',
    default=[],
    help='text that ends what is said; several times for several',
  )
  options.add_argument('--seed', type=int, default=0, help='default: 0')
  return options


def check(args: argparse.Namespace) -> None:
  """Raises ValueError for what means nothing."""
  if bool(args.prompt) == args.chat:
    raise ValueError('give either --prompt or --chat')
  if args.template_variables and not args.chat:
    raise ValueError('--template-variables are of --chat: leave them out')
  check_least(1, num_tokens=args.num_tokens, top_k=args.top_k)
  if not 0 <= args.temperature < math.inf:
    raise ValueError(
      '--temperature must be finite and not negative (0 is greedy), got '
      f'{args.temperature}'
    )
  if not 0 < args.top_p <= 1:
    raise ValueError(
      f'--top-p is a probability in (0, 1], got {args.top_p}; 1 leaves all'
    )
  if '' in args.stop:
    raise ValueError('--stop must be a text that is not empty')


if __name__ == '__main__':
  main()
