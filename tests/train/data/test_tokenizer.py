import io

import numpy as np
import pytest
import sentencepiece

from train.data.tokenizer import Tokenizer, train_tokenizer

TEXT = 'The quick brown fox jumps over the lazy dog, said the other dog.'
DOCUMENTS = [f'{TEXT}\nLine {i} of many: {i * i}.' for i in range(50)]
ODD = 'a\0b  c\t\r\n\n d\u00e9 \u4e2d\u6587 \U0001f600  '


@pytest.fixture(scope='module')
def tokenizer():
  return train_tokenizer(DOCUMENTS, vocab_size=320)


def test_ids_of_the_special_pieces(tokenizer):
  assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
  assert tokenizer.vocab_size == 320
  assert not tokenizer.bytes_V[:4].any()
  assert tokenizer.decode([0, 1, *tokenizer.encode(TEXT), 2, 0]) == TEXT


@pytest.mark.parametrize('text', [*DOCUMENTS[:2], ODD, '', ' ', '\n'])
def test_round_trip_is_exact(tokenizer, text):
  ids_n = tokenizer.encode(text)
  assert ids_n.dtype == np.int32
  assert tokenizer.decode(ids_n) == text
  assert tokenizer.bytes_V[ids_n].sum() == len(text.encode())


def test_pieces_are_learned_and_never_span_lines(tokenizer):
  ids_n = tokenizer.encode(TEXT)
  assert len(ids_n) < len(TEXT)
  assert not any('\n' in tokenizer.decode([i]) for i in range(4 + 256, 320))


def test_training_is_deterministic(tokenizer):
  assert train_tokenizer(DOCUMENTS, vocab_size=320).model == tokenizer.model


def test_training_reads_no_more_than_the_sample():
  read = []

  def documents():
    for document in DOCUMENTS:
      read.append(document)
      yield document

  train_tokenizer(documents(), vocab_size=310, sample_chars=1000)
  assert sum(map(len, read[:-1])) < 1000 <= sum(map(len, read))


def test_lines_longer_than_sentencepiece_takes_are_learned_from():
  long_line = ' '.join(DOCUMENTS).replace('\n', ' ')
  assert len(long_line) > 4192
  tokenizer = train_tokenizer([long_line], vocab_size=320)
  assert len(tokenizer.encode(TEXT)) < len(TEXT)


def test_training_is_quiet(capfd):
  train_tokenizer(DOCUMENTS, vocab_size=320)
  assert capfd.readouterr() == ('', '')


def test_save_and_load(tokenizer, tmp_path):
  tokenizer.save(tmp_path / 'tokenizer.model')
  loaded = Tokenizer.load(str(tmp_path / 'tokenizer.model'))
  np.testing.assert_array_equal(loaded.encode(TEXT), tokenizer.encode(TEXT))


def test_vocabulary_larger_than_the_corpus_supports():
  with pytest.raises(ValueError, match=r'at most (\d+) .*, got 9999: lower'):
    train_tokenizer(DOCUMENTS, vocab_size=9999)


def test_largest_vocabulary_the_message_names_works():
  with pytest.raises(ValueError) as error:
    train_tokenizer(DOCUMENTS, vocab_size=9999)
  most = int(str(error.value).split('at most ')[1].split()[0])
  assert train_tokenizer(DOCUMENTS, vocab_size=most).vocab_size == most


@pytest.mark.parametrize('vocab_size', [-1, 0, 1, 100, 260])
def test_vocabulary_smaller_than_the_characters(vocab_size):
  with pytest.raises(
    ValueError, match=rf'at least \d+ .*got {vocab_size}: raise'
  ):
    train_tokenizer(DOCUMENTS, vocab_size=vocab_size)


def test_nothing_to_train_on():
  with pytest.raises(ValueError, match=r'no tokenizer .*: give more text'):
    train_tokenizer(['\n\n'], vocab_size=300)


def test_load_names_what_is_wrong(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'no tokenizer at .*none\.model'):
    Tokenizer.load(tmp_path / 'none.model')
  (tmp_path / 'text.model').write_text('not a model')
  with pytest.raises(ValueError, match=r'text\.model.* is not a sentencepiece'):
    Tokenizer.load(tmp_path / 'text.model')
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(DOCUMENTS),
    model_writer=model,
    vocab_size=60,
    bos_id=-1,
    minloglevel=2,
  )
  (tmp_path / 'no_bos.model').write_bytes(model.getvalue())
  with pytest.raises(ValueError, match=r'BOS -1 .*documents need both'):
    Tokenizer.load(tmp_path / 'no_bos.model')
