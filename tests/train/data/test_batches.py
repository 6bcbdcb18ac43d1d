import dataclasses
import functools
import itertools
import json
import time

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import sentencepiece

from tests.train.test_config import CONFIG
from train.data import batches as batches_lib
from train.data.batches import batches, shown, validation_batches
from train.data.corpus import Indexed
from train.data.tokenizer import load, train_tokenizer
from train.engine.task import task_of
from train.tasks.text import Text

# The documents have up to 40 sentences, so that many rows hold several
# documents and many documents span several rows.
TEXTS = [
  f'Document {i}.\n'
  + ' '.join(f'No {j}, caf\u00e9!' for j in range(i * 7 % 41))
  for i in range(45)
]
DOCUMENTS = Indexed(TEXTS)
SHAPE = {'batch_size': 4, 'sequence_length': 33}
KEYS = {'inputs', 'targets', 'weights', 'positions', 'segments'}


@functools.cache
def tokenizer():
  return train_tokenizer(TEXTS, vocab_size=300)


def training(seed=0, documents=DOCUMENTS, **kwargs):
  return batches(documents, tokenizer(), seed=seed, **SHAPE | kwargs)


def test_parts_of_a_batch_hold_the_same_validation_rows():
  rows = []
  for parts in (1, 2):
    config = dataclasses.replace(CONFIG, microbatches=parts, eval_batches=2)
    text = Text(None, DOCUMENTS, tokenizer())
    found = list(task_of(config).validation_rows(text))
    rows.append(np.concatenate([batch['targets'] for batch in found]))
  np.testing.assert_array_equal(*rows)


def validation(tokenizer_=None, documents=DOCUMENTS, **kwargs):
  return validation_batches(
    documents, tokenizer_ or tokenizer(), **SHAPE | kwargs
  )


def assert_same(ours, theirs):
  ours, theirs = list(ours), list(theirs)
  assert len(ours) == len(theirs) > 0
  for a, b in zip(ours, theirs, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def segments(batch):
  """Yields inputs, targets and positions of each segment of each row."""
  for row in range(len(batch['inputs'])):
    ids_T = batch['segments'][row]
    for i in range(1, ids_T.max() + 1):
      yield tuple(
        batch[key][row][ids_T == i]
        for key in ('inputs', 'targets', 'positions')
      )


def test_shapes_and_dtypes():
  batch = next(training())
  assert batch.keys() == KEYS
  for key, x_BT in batch.items():
    assert x_BT.shape == (4, 33)
    assert x_BT.dtype == (np.float32 if key == 'weights' else np.int32)


@dataclasses.dataclass(frozen=True)
class Whole(Indexed):
  """Documents that do not continue in the next row."""

  continues = False
  num_left_out = 3


def test_the_documents_decide_whether_they_continue_in_the_next_row():
  documents = Whole(TEXTS)
  found = [x for b in validation(documents=documents) for x in segments(b)]
  longest = SHAPE['sequence_length']
  encode = tokenizer().encode
  sizes = sorted(min(longest, len(encode(text)) + 1) for text in TEXTS)
  assert sorted(len(targets) for _, targets, _ in found) == sizes
  assert {inputs[0] for inputs, *_ in found} == {tokenizer().bos_id}
  caption = shown(documents, tokenizer(), sequence_length=longest).caption
  assert caption.endswith('are left out, as 3 lines without an answer are')
  caption = shown(DOCUMENTS, tokenizer(), sequence_length=longest).caption
  assert 'left out' not in caption


def test_targets_are_the_next_inputs_and_documents_come_back_whole():
  pieces = []
  for batch in validation():
    for inputs, targets, positions in segments(batch):
      np.testing.assert_array_equal(inputs[1:], targets[:-1])
      np.testing.assert_array_equal(positions, np.arange(len(inputs)))
      if inputs[0] == tokenizer().bos_id:
        pieces.append([])
      pieces[-1].extend(targets)
  assert all(targets[-1] == tokenizer().eos_id for targets in pieces)
  assert sorted(map(tokenizer().decode, pieces)) == sorted(TEXTS)


def test_training_has_no_padding_and_every_document_once_an_epoch():
  num_targets = sum(len(tokenizer().encode(text)) + 1 for text in TEXTS)
  rows = list(itertools.islice(training(), num_targets // (4 * 33) + 1))
  assert min(batch['weights'].min() for batch in rows) == 1
  targets_n = np.concatenate([batch['targets'].ravel() for batch in rows])
  texts = tokenizer().decode(targets_n[:num_targets]).split('Document ')
  assert sorted('Document ' + text for text in texts[1:]) == sorted(TEXTS)


def test_batches_are_made_and_sent_before_they_are_asked_for(monkeypatch):
  make, made = batches_lib._training_batch, []
  monkeypatch.setattr(
    batches_lib, '_training_batch', lambda x: made.append(x) or make(x)
  )
  iterator = training()
  for taken in range(1, 4):
    assert all(isinstance(x, jax.Array) for x in next(iterator).values())
    limit = time.monotonic() + 30
    while len(made) <= taken and time.monotonic() < limit:
      time.sleep(0.001)
    assert len(made) > taken


def test_same_seed_same_batches_other_seed_others():
  first, same, other = (
    list(itertools.islice(training(seed), 20)) for seed in (1, 1, 2)
  )
  assert_same(first, same)
  assert (first[0]['inputs'] != other[0]['inputs']).any()


def test_state_resumes_bit_equal():
  iterator = training(seed=5)
  for _ in range(17):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  # This reaches a second epoch.
  following = list(itertools.islice(iterator, 60))
  resumed = training(seed=5)
  resumed.set_state(state)
  assert_same(itertools.islice(resumed, 60), following)


def test_state_resumes_within_a_document_of_many_batches():
  documents = Indexed([10 * ' '.join(TEXTS), 'short'])
  iterator = training(documents=documents)
  for _ in range(17):
    next(iterator)
  resumed = training(documents=documents)
  resumed.set_state(iterator.get_state())
  assert_same(itertools.islice(resumed, 30), itertools.islice(iterator, 30))


def test_orbax_checkpoint_resumes_bit_equal(tmp_path):
  iterator = training()
  for _ in range(17):
    next(iterator)
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(
      17,
      args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)),
    )
    following = list(itertools.islice(iterator, 20))
    resumed = training()
    manager.restore(
      17,
      args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)),
    )
  assert_same(itertools.islice(resumed, 20), following)


def test_scored_bytes_are_the_bytes_of_the_documents():
  num_bytes = sum((b['weights'] * b['bytes']).sum() for b in validation())
  assert num_bytes == sum(len(text.encode()) for text in TEXTS)
  ends = [b['bytes'][b['targets'] == tokenizer().eos_id] for b in validation()]
  np.testing.assert_array_equal(np.concatenate(ends), np.zeros(len(TEXTS)))


def test_bytes_are_exact_for_a_tokenizer_that_changes_the_text(tmp_path):
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS),
    model_prefix=str(tmp_path / 'nfkc'),
    vocab_size=40,
    normalization_rule_name='nmt_nfkc_cf',
    minloglevel=2,
  )
  texts = [*TEXTS, '  \u2581 \ufb01 \u4e2d  twice  spaced ', ' ']
  tokenizer_ = load(tmp_path / 'nfkc.model')
  assert tokenizer_.decode(tokenizer_.encode(texts[-2])) != texts[-2]
  found = validation(tokenizer_, Indexed(texts))
  num_bytes = sum((b['weights'] * b['bytes']).sum() for b in found)
  assert num_bytes == sum(len(text.encode()) for text in texts)


def test_validation_is_the_same_each_time_and_bounded():
  whole = validation()
  assert_same(whole, whole)
  num_batches = len(list(whole))
  assert num_batches > 3
  assert_same(validation(num_batches=3), list(whole)[:3])
  assert len(list(validation(num_batches=99))) == num_batches


def test_last_validation_batch_is_padded_with_weight_zero():
  *_, last = validation(batch_size=64)
  assert last['inputs'].shape == (64, 33)
  np.testing.assert_array_equal(last['weights'], last['segments'] > 0)
  padding = last['weights'] == 0
  assert padding[-1].all() and not padding[0].any()
  for x_BT in last.values():
    assert not x_BT[padding].any()


def test_bad_sizes():
  with pytest.raises(ValueError, match=r'batch_size .* got 0'):
    validation(batch_size=0)
  with pytest.raises(ValueError, match=r'sequence_length .* at least 1, got 0'):
    training(sequence_length=0)
  with pytest.raises(ValueError, match=r'seed must be in .* got -1'):
    training(seed=-1)
