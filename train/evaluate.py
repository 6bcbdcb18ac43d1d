"""Measures a model: `python -m train.evaluate PATH`.

It measures the validation split of a run, the perplexity of texts (`--text`),
or the accuracy on questions with choices (`--choices`), by likelihood.

Axes: B rows of a batch, T tokens of a row, n pairs, q questions.
"""

from train.engine import signals

if __name__ == '__main__':
  signals.end_quietly()  # before the imports below, which take seconds

import dataclasses
import string
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from train.data.batches import bucket, validation_batches
from train.data.corpus import Indexed
from train.data.records import records
from train.data.text_files import index_texts
from train.data.tokenizer import Tokenizer, check_texts
from train.engine import checkpoint, machine, metrics
from train.engine.command import (
  check_given,
  check_least,
  parse_options,
  user_errors,
)
from train.engine.mesh import Mesh
from train.engine.run import Run
from train.engine.task import Batch, Metrics, PyTree, task_of
from train.tasks.language import perplexity
from train.tasks.text_model import (
  Model,
  ModelOptions,
  is_directory,
  opened,
  shared,
)

CONTEXTS = ('question', 'prompt', 'context')
"""The names that a question's text may have in a JSONL file."""


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
  """Measures a checkpoint of a run, or a model of transformers."""

  program: ClassVar[str] = 'train.evaluate'
  batches: int | None = None
  """Number of batches of the validation split; None is the whole split."""
  text: Annotated[
    tuple[str, ...] | None, tyro.conf.arg(metavar='FILE [FILE ...]')
  ] = None
  """Text files with one document each, or JSONL files with a field "text";
  prints the perplexity and the bits per byte."""
  choices: Annotated[
    tuple[str, ...] | None, tyro.conf.arg(metavar='FILE [FILE ...]')
  ] = None
  """Files of records, such as JSONL, with lines {"question": TEXT, "choices":
  [TEXT, ...], "answer": index from 0, letter or text}; prints the accuracy of
  the most likely choice."""
  window: int | None = None
  """Number of tokens that the model reads at once; None is the sequence_length
  of a run, else 512."""
  batch_size: int = 8
  """Number of rows in a batch of texts or choices."""

  def __post_init__(self) -> None:
    """Raises ValueError if an option is wrong."""
    check_least(
      1, batches=self.batches, window=self.window, batch_size=self.batch_size
    )
    check_given(text=self.text, choices=self.choices)


class Question(NamedTuple):
  """A text and several continuations, one of which is right."""

  context: str
  """The text before the choices."""
  choices: tuple[str, ...]
  """The continuations."""
  answer: int
  """Index of the right choice."""


def main(argv: Sequence[str] | None = None) -> None:
  """Measures a checkpoint of a run, or a model of transformers."""
  with user_errors():
    args = parse_options(Options, sys.argv[1:] if argv is None else argv)
    machine.prepare()
    if args.text is None and args.choices is None:
      print(f'validation: {metrics.describe(validation(args))}')
      return
    questions = {path: read_questions(path) for path in args.choices or ()}
    model = opened(args.path, best=args.best)
    window = args.window
    if window is None:
      window = 512 if is_directory(args.path) else model.window
    texts = {name: documents(name) for name in args.text or ()}
    for some in texts.values():
      stream = some.stream(seed=0, repeat=False)
      check_texts(model.tokenizer, stream, special=False)
    pairs = {
      path: encoded(model.tokenizer, path, some, window)
      for path, some in questions.items()
    }
  for name, text in texts.items():
    found = text_perplexity(model, text, window, args.batch_size)
    print(f'{name}: {metrics.describe(found)}')
  for path, some in questions.items():
    found_n = log_likelihoods(model, pairs[path], window, args.batch_size)
    print(f'{path}: {described(accuracies(some, found_n))}')


def validation(args: Options) -> Metrics:
  """Computes the metrics of a run's checkpoint on its validation split."""
  if is_directory(args.path):
    raise ValueError(
      f'{args.path} is a directory of transformers, which has no validation '
      'split: name --text or --choices'
    )
  run = Run(args.path)
  config = dataclasses.replace(
    run.config(), eval_batches=args.batches, mesh=Mesh()
  )
  task = task_of(config)
  evaluate = task.evaluate(task.held_out(run.directory))
  params = checkpoint.restore_params(run.checkpoints_path, task, best=args.best)
  return evaluate(params)


def documents(pattern: str) -> Indexed:
  """Reads texts: each line of a JSONL file, and every other file as a whole."""
  found = index_texts(pattern, None)
  if not len(found):
    raise ValueError(f'no text in {pattern!r}: name a file that is not blank')
  return Indexed(found)


def text_perplexity(
  model: Model, texts: Indexed, window: int, batch_size: int
) -> Metrics:
  """Computes loss, perplexity and bits per byte of texts.

  The texts are packed into rows of `window` tokens, as in training. The model
  predicts a token from the preceding tokens of the same text in the same row.
  """
  batches = validation_batches(
    texts, model.tokenizer, batch_size=batch_size, sequence_length=window
  )
  return perplexity(jax.jit(model.layers), model.params, batches=batches)


def read_questions(pattern: str) -> list[Question]:
  """Reads the questions in files of records, such as JSON lines.

  Raises:
    FileNotFoundError: no file matches.
    ValueError: a record is not a question; the message names file and line.
  """
  questions = []
  for entry in records(pattern):
    try:
      questions.append(question(entry.record))
    except ValueError as error:
      raise ValueError(f'{entry.place}: {error}') from error
  if not questions:
    raise ValueError(f'{pattern} must have a question on a line, got none')
  return questions


def question(fields: Any) -> Question:
  """Converts a line of JSON to a question; raises ValueError if it is wrong.

  >>> question({'question': '1 + 1 =', 'choices': ['1', '2'], 'answer': 'B'})
  Question(context='1 + 1 =', choices=('1', '2'), answer=1)
  """
  if not isinstance(fields, dict):
    raise ValueError(f'must be a JSON object, got {str(fields)[:40]!r}')
  names = [name for name in CONTEXTS if name in fields]
  if len(names) != 1 or not isinstance(fields[names[0]], str):
    raise ValueError(
      f'must have one text among {", ".join(CONTEXTS)}, got {sorted(fields)}'
    )
  choices = fields.get('choices')
  if (
    not isinstance(choices, list)
    or len(choices) < 2
    or not all(isinstance(x, str) and x.strip() for x in choices)
  ):
    raise ValueError(
      f'choices must be two texts or more, none of them blank, got {choices!r}'
    )
  right = answer(fields.get('answer'), choices)
  return Question(fields[names[0]], tuple(choices), right)


def answer(value: Any, choices: Sequence[str]) -> int:
  """Returns the index of the choice that an index, a text or a letter names."""
  letters = string.ascii_uppercase[: len(choices)]
  if isinstance(value, int) and not isinstance(value, bool):
    if 0 <= value < len(choices):
      return value
  elif isinstance(value, str) and value:
    if value in choices:
      return choices.index(value)
    if len(value) == 1 and value in letters:
      return letters.index(value)
  raise ValueError(
    f'answer must be a number in 0..{len(choices) - 1}, a letter of '
    f'{letters} or the text of a choice, got {value!r}'
  )


class Pair(NamedTuple):
  """A text and its continuation, as tokens."""

  ids: list[int]
  """The tokens of both."""
  num_scored: int
  """Number of tokens at the end that belong to the continuation."""


def encoded(
  tokenizer: Tokenizer, path: str, questions: Sequence[Question], window: int
) -> list[Pair]:
  """Returns a pair for each choice of each question, in order.

  Raises:
    ValueError: a choice has more tokens than the window.
  """
  pairs = []
  for number, (context, choices, _) in enumerate(questions, 1):
    for choice in choices:
      pair = joined(tokenizer, context, choice)
      if pair.num_scored > window:
        raise ValueError(
          f'{path}, question {number}: a choice must have at most --window='
          f'{window} tokens, got {pair.num_scored}: {choice[:40]!r}'
        )
      # Drop the beginning of a text that is longer than the window.
      pairs.append(pair._replace(ids=pair.ids[-window - 1 :]))
  return pairs


def joined(tokenizer: Tokenizer, context: str, choice: str) -> Pair:
  """Encodes a context and a choice as one text, with a space between them.

  No space is added if the texts already have one. They are encoded together
  because a token may contain the space before a word. The tokens that differ
  from those of the context are scored.
  """
  before = context.rstrip()
  between = context[len(before) :]
  if before and not between and not choice[0].isspace():
    between = ' '
  known = tokenizer.encode(before).tolist()
  ids = tokenizer.encode(before + between + choice).tolist()
  same = min(shared(known, ids), len(ids) - 1)
  num_scored = len(ids) - same
  if tokenizer.bos_id is not None:
    ids = [tokenizer.bos_id, *ids]
  elif same == 0:
    # The first scored token needs a token before it.
    assert tokenizer.eos_id is not None
    ids = [tokenizer.eos_id, *ids]
  return Pair(ids, num_scored)


def log_likelihoods(
  model: Model, pairs: Sequence[Pair], window: int, batch_size: int
) -> np.ndarray:
  """Returns log p [n] of each continuation, given the text before it.

  Rows of similar length form a batch. Lengths are powers of two, or the window,
  and the program compiles once for each length.
  """
  layers = model.layers

  @jax.jit
  def score(params: PyTree, batch: Batch) -> jax.Array:
    nll_BT = layers.nll(params, batch)
    return -jnp.sum(jnp.where(batch['scored'], nll_BT, 0), axis=1)

  lengths = defaultdict(list)
  for i, pair in enumerate(pairs):
    lengths[min(window, bucket(len(pair.ids) - 1))].append(i)
  found = []
  order = []
  for length, members in sorted(lengths.items()):
    for start in range(0, len(members), batch_size):
      some = members[start : start + batch_size]
      batch = stacked([pairs[i] for i in some], batch_size, length)
      found.append(score(model.params, batch)[: len(some)])
      order += some
  found_n = np.empty(len(pairs))
  found_n[order] = np.concatenate(jax.device_get(found))
  return found_n


def stacked(pairs: Sequence[Pair], batch_size: int, length: int) -> Batch:
  """Returns a batch of B = batch_size rows and T = length tokens."""
  inputs_BT, targets_BT = np.zeros((2, batch_size, length), np.int32)
  scored_BT = np.zeros((batch_size, length), bool)
  for b, (ids, num_scored) in enumerate(pairs):
    last = len(ids) - 1
    inputs_BT[b, :last] = ids[:-1]
    targets_BT[b, :last] = ids[1:]
    scored_BT[b, last - num_scored : last] = True
  times_1T = np.arange(length, dtype=np.int32)[None]
  return {
    'inputs': inputs_BT,
    'targets': targets_BT,
    'positions': np.repeat(times_1T, batch_size, axis=0),
    'segments': np.zeros_like(inputs_BT),
    'scored': scored_BT,
  }


def accuracies(
  questions: Sequence[Question], log_p_n: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns whether the right choice has the highest score [q], by measure.

  'accuracy' compares the log-likelihoods of the choices, 'accuracy per byte'
  the log-likelihoods divided by the number of bytes of each choice.

  >>> question = Question('', ('ab', 'a'), 0)
  >>> found = accuracies([question], np.array([-3.0, -2.0]))
  >>> {name: right_q.tolist() for name, right_q in found.items()}
  {'accuracy': [False], 'accuracy per byte': [True]}
  """
  stops = np.cumsum([len(x.choices) for x in questions])
  rows = np.split(log_p_n, stops[:-1])
  right = {'accuracy': [], 'accuracy per byte': []}
  for row, (_, choices, best) in zip(rows, questions, strict=True):
    sizes = np.array([len(choice.encode()) for choice in choices])
    right['accuracy'].append(np.argmax(row) == best)
    right['accuracy per byte'].append(np.argmax(row / sizes) == best)
  return {name: np.array(some) for name, some in right.items()}


def described(right: dict[str, np.ndarray]) -> str:
  """Formats accuracies with their standard errors.

  >>> described({'accuracy': np.array([True, False, True])})
  'accuracy 0.6667 (standard error 0.3333), 3 questions'
  """
  words = []
  for name, right_q in right.items():
    p = right_q.mean()
    error = np.sqrt(p * (1 - p) / max(len(right_q) - 1, 1))
    words.append(f'{name} {p:.4f} (standard error {error:.4f})')
  return f'{", ".join(words)}, {len(right_q)} questions'


if __name__ == '__main__':
  main()
