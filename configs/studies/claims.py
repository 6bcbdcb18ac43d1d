"""Tests claims of papers on the results of `configs.studies.methods`.

`python -m configs.studies.claims` reads results/methods.json and writes
claims.md to the same directory. Each claim compares two methods. Its rows
contain their difference in bits per byte, the 95% interval of this difference
over seeds and rows of held-out text, and whether the claim is confirmed. The
numbers are from the final round if it contains both methods, and otherwise from
the first round. Claims without results are marked "not yet run".
"""

import argparse
import enum
import math
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from configs.studies.comparison import command
from configs.studies.comparison.intervals import less, paired
from configs.studies.comparison.results import finals, firsts, held, rows_of
from configs.studies.comparison.runner import Runner
from configs.studies.comparison.study import Done
from configs.studies.comparison.text import unshuffled
from configs.studies.methods import STUDY, Methods


class Kind(enum.Enum):
  """The relation between two methods that a claim states."""

  BETTER = 'better than'
  NO_WORSE = 'at least as good as'
  EQUAL = 'equal to'
  NEAR = 'within 2% of the perplexity of'
  FRONT = 'on the Pareto front of bits per byte and memory'


class Claim(NamedTuple):
  """A relation between two methods, and the paper that claims it."""

  one: str
  kind: Kind
  other: str
  source: str


ONE_RATE = 'AdamW, one rate'

CLAIMS = (
  Claim('GaLore', Kind.NEAR, STUDY.baseline, 'GaLore, Table 2'),
  Claim('GaLore, one rate', Kind.NEAR, ONE_RATE, 'GaLore, tuned as in Table 2'),
  Claim('GaLore', Kind.BETTER, 'Low-Rank', 'GaLore, Table 2'),
  Claim('GaLore', Kind.BETTER, 'LoRA', 'GaLore, Table 2'),
  Claim('GaLore', Kind.BETTER, 'ReLoRA', 'GaLore, Table 2'),
  Claim('8-bit GaLore', Kind.EQUAL, 'GaLore', 'GaLore'),
  Claim('FRUGAL', Kind.BETTER, 'GaLore', 'FRUGAL, Table 2'),
  Claim('FRUGAL', Kind.BETTER, 'BAdam', 'FRUGAL, Table 2'),
  Claim('Fira', Kind.NO_WORSE, 'GaLore', 'Fira'),
  Claim('APOLLO', Kind.NO_WORSE, 'GaLore', 'APOLLO, Table 2'),
  Claim('SCALE', Kind.FRONT, '', 'SCALE'),
)


WHY = """
## Reasons for the differences

* **GaLore and AdamW.** The papers tune one learning rate for all weights, and
  GaLore's scale derives a second rate for the matrices from it. If only GaLore
  has this second rate, it is far ahead (the claim about one rate above). If
  both methods have two tuned rates, AdamW is level at 0.4 M tokens and ahead
  with more tokens.
* **More tokens.** Low-rank methods start level or ahead, and fall behind as the
  number of tokens grows ([methods.md](methods.md), *With more tokens*). The
  reason is the part of the gradient outside of the subspace. FRUGAL has
  GaLore's subspace and also steps along the sign of this part; at 3 M tokens it
  is ahead of AdamW on newsgroups and level on chitchat. Fira steps along this
  part too. If this part has the learning rate of embedding and head, Fira is
  0.063 bits ahead of GaLore at 1 M tokens ([ablations.md](ablations.md),
  *scaled by channel*). In the first round this part has the learning rate of
  the matrices, and Fira is level with GaLore.
* **The first moment.** GaLore Adafactor has no first moment and is ahead of
  GaLore by 0.03 in the finals. GaLore without a first moment gains 0.034 bits
  at 1 M tokens (ablations.md, b1 0.0). AdamW without one gained three quarters
  as much in a separate experiment, so most of the gain comes from the small
  batches of this benchmark.
* **APOLLO** is behind GaLore by 0.03 bits after 0.4 M tokens and after 1 M. It
  steps along the gradient, so the first moment only affects its scaling
  factors. Without the first moment, APOLLO gains 0.056 bits at 1 M tokens. It
  is then ahead of GaLore by 0.026, and behind GaLore without a first moment by
  0.009. Twice the rank gains 0.026 for APOLLO, and about as much for GaLore.
* **SCALE** is behind AdaLomo, which stores only second moments of rows and
  columns and needs fewer bytes.
"""


class Pair(NamedTuple):
  """Results of two methods in the same round."""

  where: str
  """Name of the round."""
  one: np.ndarray
  """Bits per byte of the first method: [seeds, rows of text]."""
  other: np.ndarray
  """Bits per byte of the second method, for the same seeds and rows."""
  corpus: str = STUDY.corpora[0]

  @property
  def difference(self) -> float:
    """Mean bits per byte of the first method minus those of the second."""
    return paired(self.one, self.other)[0]

  @property
  def error(self) -> float:
    """Half the 95% interval of the difference."""
    return paired(self.one, self.other)[1]


def pairs(claim: Claim, study: Methods, done: Done) -> Iterator[Pair]:
  """Yields the results of two methods: each final, or else the first round."""
  known = False
  for corpus in study.corpora:
    last = finals(corpus, study, done)
    if claim.one in last and claim.other in last:
      known = True
      where = f'{corpus}, {study.size.seeds} seeds'
      one, other = rows_of(last[claim.one]), rows_of(last[claim.other])
      yield Pair(where, one, other, corpus)
  first = firsts(study, done)
  if not known and claim.one in first and claim.other in first:
    one, other = rows_of([first[claim.one]]), rows_of([first[claim.other]])
    yield Pair('first round', one, other)


def confirmed(kind: Kind, pair: Pair, bytes_per_token: float) -> bool | None:
  """Returns whether results confirm a claim, or None if they do not decide.

  >>> rows = np.array([2.0, 2.2, 2.1])
  >>> confirmed(Kind.BETTER, Pair('', rows - 0.1, rows), 3.0)
  True
  >>> confirmed(Kind.NEAR, Pair('', rows + 0.1, rows), 3.0)
  False
  """
  off, error = pair.difference, pair.error
  limit = math.log2(1.02) / bytes_per_token
  match kind:
    case Kind.BETTER:
      return None if abs(off) <= error else off < 0
    case Kind.NO_WORSE:
      return off <= error
    case Kind.EQUAL:
      # The claim is confirmed only if the whole interval is within 2% of the
      # perplexity. Otherwise a difference could be hidden by noise.
      return False if abs(off) > error else (error + abs(off) <= limit or None)
    case Kind.NEAR:
      return None if abs(off - limit) <= error else off < limit
  raise ValueError(f'{kind} does not compare two methods')


def on_front(name: str, study: Methods, done: Done) -> list[str]:
  """Returns the methods that are better and need no more bytes.

  The named method is on the Pareto front if the list is empty. A method counts
  as better only if the difference exceeds its 95% interval.
  """
  first = firsts(study, done)
  rows = {key: rows_of([run]) for key, run in first.items()}
  return [
    other
    for other, run in first.items()
    if other != name
    and held(run) <= held(first[name])
    and confirmed(Kind.BETTER, Pair('', rows[other], rows[name]), 1.0)
  ]


def lines(
  claim: Claim, study: Methods, done: Done, bytes_per_token: dict[str, float]
) -> list[str]:
  """Returns the table rows of a claim."""
  text = ' '.join(x for x in (claim.one, claim.kind.value, claim.other) if x)

  def row(where: str, found: str, result: str) -> str:
    return f'| {text} ({claim.source}) | {where} | {found} | {result} |'

  if claim.kind is Kind.FRONT:
    if claim.one not in firsts(study, done):
      return [row('', '', 'not yet run')]
    ahead = on_front(claim.one, study, done)
    found = f'better with no more bytes: {", ".join(ahead) or "none"}'
    return [row('first round', found, verdict(not ahead))]
  found = []
  for pair in pairs(claim, study, done):
    each = bytes_per_token[pair.corpus]
    ratio = 2 ** (pair.difference * each) - 1
    off = less(pair.one, pair.other)
    difference = f'{off} bits per byte, perplexity {ratio:+.1%}'
    answer = verdict(confirmed(claim.kind, pair, each))
    found.append(row(pair.where, difference, answer))
  return found or [row('', '', 'not yet run')]


def verdict(answer: bool | None) -> str:
  """Returns the text of an answer for the table."""
  words = {True: 'confirmed', False: '**contradicted**', None: 'undecided'}
  return words[answer]


def page(study: Methods, done: Done, bytes_per_token: dict[str, float]) -> str:
  """Returns the results page in Markdown."""
  rows = [x for c in CLAIMS for x in lines(c, study, done, bytes_per_token)]
  return '\n'.join(
    [
      '# Claims of papers, tested at 1.5 M parameters',
      '',
      *unshuffled(study.size),
      'By `python -m configs.studies.claims`, from the runs of '
      '[methods.md](methods.md). The models are',
      'small, and both learning rates are tuned for every method. A difference '
      'is the first method',
      'minus the second, so negative is better for the first. Intervals are '
      '95% intervals over rows of',
      'text and, in the final round, seeds; a claim is undecided if the '
      'interval allows both answers.',
      'Perplexity is per token.',
      '',
      '| claim | round | difference | result |',
      '| --- | --- | --- | --- |',
      *rows,
      WHY,
    ]
  )


def bytes_per_token(runner: Runner, corpus: str) -> float:
  """Returns the mean bytes of the scored tokens in the validation text."""
  sums: Any = np.zeros(2)
  for row in runner.held_out(corpus):
    sums += [np.sum(row['weights'] * row['bytes']), np.sum(row['weights'])]
  return float(sums[0] / sums[1])


def main(argv: Sequence[str] | None = None) -> None:
  """Writes the page and prints it."""
  parser = argparse.ArgumentParser('python -m configs.studies.claims')
  parser.add_argument('--results', type=pathlib.Path, default=command.RESULTS)
  args = parser.parse_args(argv)
  done = command.runs_of(args.results, STUDY).done
  if not done:
    raise SystemExit(
      f'{args.results}/methods.json has no runs: python -m '
      'configs.studies.methods'
    )
  with tempfile.TemporaryDirectory() as scratch:
    runner = Runner(STUDY, pathlib.Path(scratch))
    ran = {job.corpus for job in done}
    each = {corpus: bytes_per_token(runner, corpus) for corpus in sorted(ran)}
  text = page(STUDY, done, each)
  (args.results / 'claims.md').write_text(text)
  print(text)


if __name__ == '__main__':
  main()
