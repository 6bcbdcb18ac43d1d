import json
import sys

import jax
import numpy as np
import pytest

from tests.train import glue
from tests.train.data import tiny
from train.data import tokenizer as tokenizer_lib
from train.data.labelled import (
  LabelledFiles,
  LabelledTfds,
  Labels,
  Row,
  batches,
  encoder,
  validation_batches,
)

PAIRS = [
  (f'is it {i}', f'it is number {i} and no other', i % 3) for i in range(40)
]
NAMES = ('entailment', 'neutral', 'contradiction')
THREE = Labels(3, NAMES)


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  directory = tmp_path_factory.mktemp('roberta')
  glue.roberta(directory)
  return tokenizer_lib.load(directory)


def write(path, columns=('premise', 'hypothesis', 'label'), rows=PAIRS):
  """Writes a table in the format of the file's name."""
  if path.suffix == '.jsonl':
    records = [dict(zip(columns, row, strict=True)) for row in rows]
    path.write_text(''.join(json.dumps(x) + '\n' for x in records))
  else:
    mark = {'.csv': ',', '.tsv': '\t'}[path.suffix]
    lines = [mark.join(map(str, row)) for row in (columns, *rows)]
    path.write_text('\n'.join(lines) + '\n')
  return str(path)


def read(examples):
  return sorted(
    (*row.texts, str(row.label))
    for row in examples.stream(seed=0, repeat=False)
  )


@pytest.mark.parametrize('ending', ['csv', 'tsv', 'jsonl'])
def test_files(tmp_path, ending):
  path = write(tmp_path / f'a.{ending}')
  corpus = LabelledFiles(path, path)
  expected = sorted((a, b, str(label)) for a, b, label in PAIRS)
  for split in ('train', 'validation'):
    assert read(corpus.open(split)) == expected


def test_columns_can_be_named(tmp_path):
  path = write(tmp_path / 'a.jsonl', ('left', 'right', 'is'))
  corpus = LabelledFiles(path, path, texts=('right',), label='is')
  assert read(corpus.open('train'))[0][0].startswith('it is number')
  with pytest.raises(ValueError, match=r"a\.jsonl, line 1: no column 'label'"):
    LabelledFiles(path, path).open('train')
  with pytest.raises(ValueError, match='must be one or two columns'):
    LabelledFiles(path, path, texts=()).open('train')


def test_quotes_of_a_tsv_quote_nothing(tmp_path):
  rows = [('he said "no', 1), ('"', 0)]
  path = write(tmp_path / 'a.tsv', ('sentence', 'label'), rows)
  assert read(LabelledFiles(path, path).open('train')) == [
    ('"', '0'),
    ('he said "no', '1'),
  ]


def test_holdout_depends_on_the_texts_alone(tmp_path):
  a = write(tmp_path / 'a.jsonl')
  b = write(tmp_path / 'b.csv', rows=PAIRS[::-1])
  for split in ('train', 'validation'):
    found = [read(LabelledFiles(x, holdout=0.3).open(split)) for x in (a, b)]
    assert found[0] == found[1]
  train, held = (
    read(LabelledFiles(a, holdout=0.3).open(s)) for s in ('train', 'validation')
  )
  assert len(train) + len(held) == 40 and not {*train} & {*held}


@pytest.mark.parametrize(
  ('name', 'text', 'message'),
  [
    ('a.txt', 'x', r'a\.txt must end in one of \.jsonl, \.csv, \.tsv'),
    ('a.csv', 'text,label\n', 'no row in the files'),
    ('a.csv', 'text,label\nx\n', r'line 2: must have 2 columns'),
    ('a.csv', 'text,label\nx,1,2\n', r'line 2: must have 2 columns'),
    ('a.csv', 'words,label\nx,1\n', r"no column of texts among .*'words'"),
    ('a.jsonl', '{"text": "x"', r'line 1: no JSON'),
    ('a.jsonl', '["x", 1]', r"line 1: must be a JSON object, got \['x', 1\]"),
    ('a.jsonl', '{"text": 3, "label": 1}', r'line 1: text must be a text'),
    ('a.tsv', '\ufffftext', 'no row'),
  ],
)
def test_what_is_no_row_is_named(tmp_path, name, text, message):
  (tmp_path / name).write_text(text)
  path = str(tmp_path / name)
  with pytest.raises(ValueError, match=message):
    LabelledFiles(path, path).open('train')


@pytest.mark.parametrize(
  ('label', 'labels', 'expected'),
  [
    (2, THREE, 2),
    ('2', THREE, 2),
    ('neutral', THREE, 1),
    (True, Labels(2), 1),
    ('3.5', Labels(1), 3.5),
    (0, Labels(1), 0.0),
  ],
)
def test_what_a_label_means(label, labels, expected):
  found = labels.target(Row(('x',), label, 'here'))
  assert found == expected
  assert found.dtype == (np.float32 if labels.count == 1 else np.int32)


@pytest.mark.parametrize(
  ('label', 'labels', 'message'),
  [
    (3, THREE, r"here: .* one of \['entailment'.* or in 0\.\.2, got 3"),
    (-1, Labels(2), r'must be in 0\.\.1, got -1'),
    ('yes', Labels(2), r"in 0\.\.1, got 'yes'; .* model\.labels"),
    (0.5, Labels(2), r'got 0\.5'),
    ('x', Labels(1), "a number, got 'x'"),
    (float('nan'), Labels(1), 'a number, got nan'),
    (None, Labels(2), 'got None'),
  ],
)
def test_an_unknown_label_is_named(label, labels, message):
  with pytest.raises(ValueError, match=message):
    labels.target(Row(('x',), label, 'here'))


def test_a_row_is_what_the_template_makes_of_it(tmp_path, tokenizer):
  path = write(tmp_path / 'a.jsonl', rows=PAIRS[:3])
  examples = LabelledFiles(path, path).open('train')
  (batch,) = validation_batches(
    examples, tokenizer, THREE, batch_size=4, sequence_length=64
  )
  assert batch['inputs'].shape == (4, 32)
  np.testing.assert_array_equal(batch['weights'], [1, 1, 1, 0])
  texts = {}
  for i in range(3):
    length = batch['segments'][i].sum()
    ids = batch['inputs'][i, :length]
    assert (batch['inputs'][i, length:] == 1).all()  # <pad>
    assert ids[0] == 0 and ids[-1] == 2 and (ids == 2).sum() == 3
    texts[tokenizer.decode(ids)] = batch['targets'][i]
  assert texts == {a + b: label for a, b, label in PAIRS[:3]}
  assert not batch['types'].any()  # RoBERTa has only one type


def test_types_are_those_of_the_template(tmp_path):
  import tokenizers

  directory = tmp_path / 'bert'
  glue.roberta(directory)
  file = directory / 'tokenizer.json'
  fast = tokenizers.Tokenizer.from_file(str(file))
  fast.post_processor = tokenizers.processors.BertProcessing(
    ('</s>', 2), ('<s>', 0)
  )
  fast.enable_padding(length=50)  # some checkpoints are saved with padding
  fast.save(str(file))
  # For a RoBERTa, transformers would replace this post-processor.
  (directory / 'config.json').unlink()
  ids, types = encoder(tokenizer_lib.load(directory), 30)(['a film', 'a plot'])
  second = list(ids).index(2) + 1
  assert types.tolist() == [0] * second + [1] * (len(ids) - second)


@pytest.mark.parametrize('fills', [True, False])
def test_a_token_without_a_row_is_named_if_rows_need_it(tmp_path, fills):
  import tokenizers

  directory = tmp_path / 'roberta'
  rows = glue.roberta(directory).vocab_size
  file = directory / 'tokenizer.json'
  fast = tokenizers.Tokenizer.from_file(str(file))
  fast.add_special_tokens(['[NEW]'])
  fast.save(str(file))
  words = {'eos_token': '</s>', 'pad_token': '[NEW]' if fills else '<pad>'}
  (directory / 'tokenizer_config.json').write_text(json.dumps(words))
  tokenizer = tokenizer_lib.fitted(
    tokenizer_lib.load(directory), rows, origin='here', remedy=''
  )
  made = lambda texts: batches(
    LabelledFiles(*2 * [write(tmp_path / 'a.jsonl', rows=texts)]).open('train'),
    tokenizer,
    THREE,
    batch_size=1,
    sequence_length=64,
    seed=0,
  )
  used = [('a [NEW]', 'film', 0)]
  if fills:
    with pytest.raises(ValueError, match=rf"'\[NEW\]' has the id {rows}, for"):
      made(PAIRS)
    return
  assert int(next(made(PAIRS))['inputs'].max()) < rows
  with pytest.raises(ValueError, match=rf"token '\[NEW\]' of id {rows}, for"):
    made(used)


def test_the_longer_text_is_cut(tokenizer):
  encode = encoder(tokenizer, 14)
  short, long = 'a film', 'the plot of the song ' * 9
  for texts in ([short, long], [long, short]):
    ids, _ = encode(texts)
    assert len(ids) == 14
    assert 'a film' in tokenizer.decode(ids)
  with pytest.raises(ValueError, match=r'more than the 4 special .* got 4'):
    encoder(tokenizer, 4)


def test_a_tokenizer_without_special_tokens_is_refused(tmp_path):
  plain = tokenizer_lib.load(tiny.write(tmp_path))
  with pytest.raises(ValueError, match=r'needs a tokenizer\.json.*--tokenizer'):
    encoder(plain, 14)


def test_epochs_differ_and_a_restored_iterator_goes_on(tmp_path, tokenizer):
  path = write(tmp_path / 'a.jsonl')
  examples = LabelledFiles(path, path).open('train')
  start = lambda: batches(
    examples,
    tokenizer,
    THREE,
    batch_size=8,
    sequence_length=64,
    seed=3,
    noise=True,
  )
  iterator = start()
  found = [jax.tree.map(np.asarray, next(iterator)) for _ in range(5)]
  state = iterator.get_state()
  found += [jax.tree.map(np.asarray, next(iterator)) for _ in range(6)]
  json.dumps(json.loads(state) if isinstance(state, bytes) else state)
  key = lambda batch: [
    tokenizer.decode(row[: n.sum()])
    for row, n in zip(batch['inputs'], batch['segments'], strict=True)
  ]
  first, second = (
    [text for batch in found[i : i + 5] for text in key(batch)] for i in (0, 5)
  )
  assert sorted(first) == sorted(second) == sorted(a + b for a, b, _ in PAIRS)
  assert first != second
  noises = np.concatenate([batch['noise'] for batch in found])
  assert len(np.unique(noises, axis=0)) == len(noises)
  again = start()
  again.set_state(state)
  for batch in found[5:]:
    jax.tree.map(np.testing.assert_array_equal, next(again), batch)


def test_all_labels_of_files_are_checked_first(tmp_path, tokenizer):
  path = write(tmp_path / 'a.csv', rows=[*PAIRS, ('a', 'b', 'maybe')])
  examples = LabelledFiles(path, path).open('train')
  with pytest.raises(ValueError, match=r"a\.csv, line 42: .*got 'maybe'"):
    batches(
      examples, tokenizer, THREE, batch_size=8, sequence_length=64, seed=0
    )


@pytest.mark.parametrize('task', ['cola', 'mnli', 'stsb'])
def test_tfds(tmp_path, task, tokenizer):
  glue.prepare(tmp_path, task, count=12)
  names, labels = glue.GLUE[task]
  held = 'validation_matched' if task == 'mnli' else 'validation'
  corpus = LabelledTfds(f'glue/{task}', str(tmp_path), validation=held)
  expected = [*glue.examples(names, labels, 12, 0)]
  rows = [*corpus.open('train').stream(seed=0, repeat=False)]
  assert sorted(row.texts for row in rows) == sorted(
    tuple(x[name] for name in names) for x in expected
  )
  (batch,) = validation_batches(
    corpus.open('validation'),
    tokenizer,
    Labels(len(labels) or 1),
    batch_size=3,
    sequence_length=64,
  )
  assert len(batch['targets']) == 3
  assert 'tensorflow' not in sys.modules
  with pytest.raises(ValueError, match=r"glue/.*: no column 'answer'"):
    LabelledTfds(f'glue/{task}', str(tmp_path), label='answer').open('train')
