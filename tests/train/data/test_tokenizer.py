import io
import json
import re

import numpy as np
import pytest
import sentencepiece
import tokenizers

from tests.train.data.tiny import (
  CHAT,
  CHATML,
  DOCUMENTS,
  LLAMA3,
  MISTRAL,
  SPECIALS,
  TEXT,
  vocabulary,
  write,
  write_other,
  write_settings,
)
from tests.train.test_config import CONFIG
from train.data.tokenizer import Tokenizer, load, train_tokenizer
from train.run import Run

SMILE = '\U0001f600\u2581'
CHATML_TEXT = '<|im_start|>user\nThe dog?<|im_end|>\n'
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
  tokenizer.save(tmp_path)
  for loaded in (
    Tokenizer.load(str(tmp_path / 'tokenizer.model')),
    load(str(tmp_path)),
  ):
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


def test_a_directory_of_sentencepiece_has_a_template(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  settings = {
    'chat_template': MISTRAL,
    'added_tokens_decoder': {'320': {'content': '<|im_end|>', 'special': True}},
  }
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
  loaded = load(tmp_path)
  assert loaded.vocab_size == 321 == len(loaded.bytes_V)
  assert loaded.stop_ids == (2,)
  text = loaded.chat_template.render(CHAT[1:])
  ids_n = loaded.encode(text + '<|im_end|>', special=True)
  assert ids_n[0] == 1 and list(ids_n).count(2) == 2 and ids_n[-1] == 320
  assert loaded.decode(ids_n) == text.replace('<s>', '').replace('</s>', '')
  loaded.save(make(tmp_path / 'copy'))
  assert load(tmp_path / 'copy').chat_template.render(CHAT[1:]) == text


def make(directory):
  directory.mkdir()
  return directory


def test_pieces_of_a_model_that_adds_a_space(tmp_path):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(DOCUMENTS),
    model_writer=model,
    model_type='bpe',
    vocab_size=320,
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    minloglevel=2,
  )
  tokenizer = Tokenizer(model.getvalue())
  pieces = [('The quick', False), (' brown fox', True), (' jumps ', False)]
  ids_n, scored_n = tokenizer.encode_pieces([*pieces, ('over', True)])
  whole = 'The quick brown fox jumps over'
  np.testing.assert_array_equal(ids_n, tokenizer.encode(whole))
  assert tokenizer.decode(ids_n[scored_n]) == 'brown fox over'


@pytest.mark.parametrize('kind', ['sentencepiece', 'json'])
def test_a_run_keeps_its_tokenizer(tokenizer, tmp_path, kind):
  if kind == 'json':
    (tmp_path / 'checkpoint').mkdir()
    tokenizer = load(write(tmp_path / 'checkpoint', CHATML))
  run = Run(tmp_path / 'run')
  run.create(CONFIG, tokenizer)
  found = run.tokenizer()
  assert type(found) is type(tokenizer) and run.config() == CONFIG
  np.testing.assert_array_equal(found.encode(TEXT), tokenizer.encode(TEXT))
  assert found.stop_ids == tokenizer.stop_ids


class TestJson:
  """A byte-level BPE as SmolLM2's, and others by their parts."""

  def test_ids_of_special_tokens(self, tmp_path):
    tokenizer = load(write(tmp_path, CHATML))
    ids = {t: i for t, i in vocabulary(tmp_path).items() if t in SPECIALS}
    assert tokenizer.eos_id == ids['<|endoftext|>']
    assert tokenizer.stop_ids == (ids['<|endoftext|>'], ids['<|im_end|>'])
    assert tokenizer.bos_id is None  # nothing puts it in front of a text
    assert tokenizer.vocab_size == len(vocabulary(tmp_path))
    text = CHATML_TEXT + '<|endoftext|>'
    ids_n = tokenizer.encode(text, special=True)
    assert sum(i in ids.values() for i in ids_n) == text.count('<|')
    assert tokenizer.decode(ids_n) == re.sub(r'<\|\w+\|>', '', text)

  @pytest.mark.parametrize('text', [*DOCUMENTS[:2], ODD, '', ' ', '\n', SMILE])
  def test_round_trip_is_exact(self, tmp_path, text):
    tokenizer = load(write(tmp_path, CHATML))
    ids_n = tokenizer.encode(text)
    assert ids_n.dtype == np.int32
    assert tokenizer.decode(ids_n) == text
    assert tokenizer.bytes_V[ids_n].sum() == len(text.encode())

  def test_special_tokens_in_a_document_are_text(self, tmp_path):
    tokenizer = load(write(tmp_path, CHATML))
    ids_n = tokenizer.encode('a<|im_end|>b')
    assert tokenizer.decode(ids_n) == 'a<|im_end|>b'
    assert not set(ids_n) & set(tokenizer.stop_ids)

  @pytest.mark.parametrize(
    ('settings', 'bos', 'eos'),
    [
      ({'bos_token': {'content': '<|im_start|>'}}, None, '<|endoftext|>'),
      ({'add_bos_token': True, 'bos_token': '<|im_start|>'}, '<|im_start|>', 0),
      ({'add_bos_token': True, 'bos_token': None}, None, 0),
      ({'eos_token': {'content': '<|im_end|>'}}, None, '<|im_end|>'),
    ],
  )
  def test_bos_and_eos_by_tokenizer_config(self, tmp_path, settings, bos, eos):
    tokenizer = load(write(tmp_path, CHATML, settings))
    ids = vocabulary(tmp_path)
    assert tokenizer.bos_id == (ids[bos] if bos else None)
    assert tokenizer.eos_id == ids[eos or '<|endoftext|>']

  def test_bos_that_the_post_processor_adds(self, tmp_path):
    write(tmp_path, LLAMA3)
    change = {
      'type': 'TemplateProcessing',
      'single': [
        {'SpecialToken': {'id': '<|endoftext|>', 'type_id': 0}},
        {'Sequence': {'id': 'A', 'type_id': 0}},
      ],
      'pair': [
        {'Sequence': {'id': 'A', 'type_id': 0}},
        {'Sequence': {'id': 'B', 'type_id': 1}},
      ],
      'special_tokens': {
        '<|endoftext|>': {
          'id': '<|endoftext|>',
          'ids': [vocabulary(tmp_path)['<|endoftext|>']],
          'tokens': ['<|endoftext|>'],
        }
      },
    }
    path = tmp_path / 'tokenizer.json'
    words = json.loads(path.read_text()) | {'post_processor': change}
    # Saved after it cut and padded batches, as MiniLM's is.
    words['truncation'] = {
      'direction': 'Right',
      'max_length': 2,
      'strategy': 'LongestFirst',
      'stride': 0,
    }
    path.write_text(json.dumps(words))
    settings = {'eos_token': '<|im_end|>', 'bos_token': '<|endoftext|>'}
    write_settings(tmp_path, settings)
    tokenizer = load(tmp_path)
    assert tokenizer.bos_id == vocabulary(tmp_path)['<|endoftext|>']
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT

  def test_ids_of_config_and_generation_config(self, tmp_path):
    write(tmp_path)
    ids = vocabulary(tmp_path)
    start, stop = ids['<|im_start|>'], ids['<|im_end|>']
    write_settings(tmp_path, {})
    (tmp_path / 'config.json').write_text(
      json.dumps({'bos_token_id': start, 'eos_token_id': 5})
    )
    (tmp_path / 'generation_config.json').write_text(
      json.dumps({'eos_token_id': [stop, start]})
    )
    (made := tmp_path / 'run').mkdir()
    load(tmp_path).save(made)
    # A run has a config.json of its own.
    (made / 'config.json').write_text('{"kind": "Config"}')
    for tokenizer in (load(tmp_path), load(made)):
      assert tokenizer.eos_id == stop
      assert tokenizer.stop_ids == (stop, start)
      assert tokenizer.tokens['bos_token'] == '<|im_start|>'

  def test_tokens_added_beyond_the_vocabulary_count(self, tmp_path):
    write(tmp_path, CHATML)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    size = library.get_vocab_size()
    library.add_tokens(['\u2603snow'])
    library.save(str(tmp_path / 'tokenizer.json'))
    tokenizer = load(tmp_path)
    assert tokenizer.vocab_size == size + 1 == len(tokenizer.bytes_V)
    assert tokenizer.encode('\u2603snow').tolist() == [size]
    assert tokenizer.bytes_V[size] == len('\u2603snow'.encode())

  @pytest.mark.parametrize('kind', ['metaspace', 'wordpiece'])
  def test_bytes_of_other_kinds(self, tmp_path, kind):
    tokenizer = load(write_other(tmp_path, kind))
    ids_n = tokenizer.encode('the lazy dog')
    assert tokenizer.decode(ids_n) == 'the lazy dog'
    # Both see a space in front of a text.
    assert tokenizer.bytes_V[ids_n].sum() == 1 + len('the lazy dog')
    assert len(ids_n) > 3 and not tokenizer.bytes_V[tokenizer.eos_id]

  def test_tokens_of_scored_pieces(self, tmp_path):
    tokenizer = load(write(tmp_path, CHATML))
    pieces = [('The quick', False), (' br', True), ('own fox\U0001f600', False)]
    ids_n, scored_n = tokenizer.encode_pieces(pieces)
    whole = ''.join(text for text, _ in pieces)
    np.testing.assert_array_equal(ids_n, tokenizer.encode(whole))
    # One token is in two pieces.
    assert tokenizer.decode(ids_n[scored_n]) == ' brown'
    pieces = [('The quick ', False), ('br', True), ('own fox', False)]
    ids_n, scored_n = tokenizer.encode_pieces(pieces)
    assert tokenizer.decode(ids_n[scored_n]) == ' brown'
    assert [len(x) for x in tokenizer.encode_pieces([])] == [0, 0]

  @pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
      ('tokenizer.json', '{"a": 1}', r'tokenizer\.json cannot be read'),
      ('tokenizer.json', '\xff', r'tokenizer\.json cannot be read'),
      ('tokenizer_config.json', '{', r'tokenizer_config\.json is no JSON'),
      ('tokenizer_config.json', '[]', r'must be a JSON object, got .*\[\]'),
      ('tokenizer_config.json', '{}', 'nothing says what ends a document'),
      (
        'tokenizer_config.json',
        '{"eos_token": "<none>"}',
        "'<none>' is not in the vocabulary",
      ),
      (
        'tokenizer_config.json',
        '{"eos_token": {"text": "a"}}',
        r"a field of .* has another form .*KeyError: 'content'",
      ),
      ('chat_template.jinja', '{% if %}', r'no Jinja template \(line 1'),
    ],
  )
  def test_broken_files(self, tmp_path, name, content, message):
    write(tmp_path)
    (tmp_path / name).write_text(content, 'latin-1')
    with pytest.raises(ValueError, match=rf'in .*{tmp_path.name}.*{message}'):
      load(tmp_path)

  def test_no_tokenizer(self, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'neither tokenizer\.json nor'):
      load(tmp_path)
    with pytest.raises(
      FileNotFoundError, match=r'no tokenizer at .*none\.json'
    ):
      load(tmp_path / 'none.json')
