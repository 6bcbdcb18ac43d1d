"""The study of classification: scheduled runs, data, one run per method."""

import io
import json
import pathlib
import tarfile

import pytest

from configs.studies import classify as bench
from configs.studies.classify import Job, Method, Size
from tests.train import glue
from train.method import AdamW

METHODS = (Method('AdamW', {'optimizer': AdamW()}, (0.001, 0.01)),)
WIDER = (Method('wide', {'optimizer': AdamW()}, ()),)


def follow(value, methods=METHODS, names=('a',)):
  """Schedules all runs if a learning rate validates at `value(rate)`.

  Returns the jobs in order, and their made-up results.
  """
  done, order = {}, []
  for job in bench.todo(names, methods, WIDER, done):
    order.append(job)
    done[job] = {
      'validation': value(job.rate),
      'test': 0.5 + job.seed / 100,
      'state_bytes': 2_000_000,
      'seconds': 3.0,
    }
  return order, done


def test_a_grid_grows_until_its_best_is_inside():
  order, done = follow(lambda rate: -abs(rate - 0.03))
  rates = [job.rate for job in order if job.seed == 0 and job.method == 'AdamW']
  assert rates == [0.001, 0.01, 0.03, 0.09]
  seeds = [Job('a', 'AdamW', 0.03, seed) for seed in (1, 2)]
  wide = [Job('a', 'wide', 0.03, seed) for seed in range(3)]
  assert order[4:] == seeds + wide
  text = bench.table(['a', 'b'], METHODS, WIDER, done)
  assert '| a | AdamW | 0.03 | 51.0000 +- 1.0000 (3 seeds) | 2.0 | 3 |' in text
  assert '| a | wide | 0.03 | 51.0000' in text
  assert text.count('\n') == 4  # data set b has no runs yet


def test_a_grid_ends_somewhere():
  order, _ = follow(lambda rate: rate)
  assert len({job.rate for job in order}) == bench.MOST_RATES


def test_equal_rates_give_the_smaller_one():
  order, _ = follow(lambda rate: float(rate < 0.02))
  assert order[-1].rate == pytest.approx(0.001 / 3**4, rel=0.1)


def test_vader(tmp_path):
  def pack(files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode='w:gz') as archive:
      for name, content in files.items():
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()

  rows = '1\t2.5\tso good\r\n2\t-0.4\tso so\r\n3\t-1.2\tcaf\u00e9 shut\r\n'
  inner = pack({'hutto_ICWSM_2014/tweets_GroundTruth.txt': rows.encode()})
  expected = [('so good', 'good'), ('caf\u00e9 shut', 'bad')]
  for name, content in (
    ('inner.tar.gz', inner),
    ('outer.tar.gz', pack({'v-3/x/hutto_ICWSM_2014.tar.gz': inner})),
  ):
    (tmp_path / name).write_bytes(content)
    assert bench.vader(tmp_path / name, 'tweets') == expected
  with pytest.raises(ValueError, match=r'must have .* or movies_GroundTruth'):
    bench.vader(tmp_path / 'inner.tar.gz', 'movies')


def test_splits_are_disjoint_and_balanced(tmp_path):
  sentences = [(f'good {i}', 'good') for i in range(90)]
  sentences += [(f'bad {i}', 'bad') for i in range(30)] * 2
  paths = bench.write(sentences, tmp_path, Size(60, 20, 40))
  rows = {
    part: [*map(json.loads, pathlib.Path(path).read_text().splitlines())]
    for part, path in paths.items()
  }
  # The benchmark requests 120 rows, half of them per label, but the rarer label
  # has only 30 rows.
  assert {part: len(x) for part, x in rows.items()} == {
    'train': 30,
    'validation': 10,
    'test': 20,
  }
  for some in rows.values():
    assert 2 * sum(row['label'] == 'bad' for row in some) == len(some)
  texts = [row['text'] for some in rows.values() for row in some]
  assert len(set(texts)) == len(texts)


@pytest.mark.slow
def test_every_method_runs_and_none_runs_twice(tmp_path, monkeypatch):
  checkpoint = tmp_path / 'roberta'
  glue.roberta(checkpoint)
  records = glue.examples(('text',), bench.LABELS, 200, 0)
  sets = {'made-up': [(x['text'], bench.LABELS[x['label']]) for x in records]}
  monkeypatch.setattr(bench, 'SEEDS', 1)
  monkeypatch.setattr(bench, 'MOST_RATES', 1)
  methods = [
    method._replace(rates=(0.01,))
    for method in bench.METHODS
    if method.name in ('AdamW', 'GaLore r=4', 'LoRA r=4')
  ]
  lines = []
  run = lambda: bench.bench(
    sets,
    str(checkpoint),
    results=tmp_path / 'results',
    size=Size(64, 16, 16, tokens=32),
    methods=methods,
    # Leave out the other entries, whose ranks exceed the width of this model.
    wider=bench.WIDER[:1],
    show=lines.append,
  )
  run()
  assert len(lines) == len(methods) + 1 + 1
  runs = json.loads((tmp_path / 'results/classify.json').read_text())['runs']
  assert len(runs) == len(methods) + 1
  size = {run['method']: run['state_bytes'] for run in runs}
  # AdamW also has moments of the embedding. LoRA has only those of the factors
  # and the head.
  assert size['AdamW'] > size['GaLore r=4'] > size['LoRA r=4']
  lines.clear()
  run()
  (text,) = lines
  assert text == (tmp_path / 'results/classify.md').read_text()
  assert text.count('1 seed') == len(methods) + 1
