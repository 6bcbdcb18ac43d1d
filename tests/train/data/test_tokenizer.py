import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from tests.train.data.tiny import (
  CHAT,
  CHATML,
  DOCUMENTS,
  LLAMA3,
  MISTRAL,
  SPECIALS,
  TEXT,
  added,
  vocabulary,
  write,
  write_other,
  write_sentencepiece,
  write_settings,
)
from tests.train.test_config import CONFIG
from train.data.tokenizer import check_texts, fitted, load, train_tokenizer
from train.engine.run import Run
from train.tasks.text import stored_tokenizer

SMILE = '\U0001f600\u2581'
CHATML_TEXT = '<|im_start|>user\nThe dog?<|im_end|>\n'
ODD = 'a\0b  c\t\r\n\n d\u00e9 \u4e2d\u6587 \U0001f600  '


@pytest.fixture(scope='module')
def tokenizer():
  return train_tokenizer(DOCUMENTS, vocab_size=320)


def test_ids_of_the_special_pieces(tokenizer):
  assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
  assert tokenizer.vocab_size == 320
  assert not tokenizer.bytes_V[:3].any()
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
  assert not any('\n' in tokenizer.decode([i]) for i in range(3 + 256, 320))


def test_training_is_deterministic(tokenizer):
  assert train_tokenizer(DOCUMENTS, vocab_size=320).model == tokenizer.model


def test_training_gives_the_same_ids_in_each_process():
  code = (
    'import hashlib, pydoc_data.topics as words\n'
    'from train.data.tokenizer import train_tokenizer\n'
    'found = train_tokenizer(words.topics.values(), vocab_size=1000)\n'
    'print(hashlib.sha256(found.model).hexdigest())'
  )
  runs = [
    subprocess.Popen(
      [sys.executable, '-c', code],
      env=os.environ | {'RAYON_NUM_THREADS': number, 'PYTHONHASHSEED': number},
      stdout=subprocess.PIPE,
    )
    for number in ('1', '3')
  ]
  one, other = (run.communicate()[0] for run in runs)
  assert one == other and len(one) == 65


def test_reading_what_is_trained_here_needs_only_tokenizers(
  tokenizer, tmp_path
):
  tokenizer.save(tmp_path)
  code = (
    'import sys\n'
    'from train.data.tokenizer import load\n'
    f'load({str(tmp_path)!r}).encode("a")\n'
    'print(*{"transformers", "sentencepiece", "datasets"} & {*sys.modules})'
  )
  run = subprocess.run([sys.executable, '-c', code], capture_output=True)
  assert (run.returncode, run.stdout, run.stderr) == (0, b'\n', b'')


@pytest.mark.parametrize(
  ('name', 'write_files'),
  [
    ('transformers', write),
    ('sentencepiece', write_sentencepiece),
    ('google.protobuf', write_sentencepiece),
  ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, write_files):
  write_files(tmp_path)
  monkeypatch.delitem(
    sys.modules, 'sentencepiece.sentencepiece_model_pb2', raising=False
  )
  monkeypatch.setitem(sys.modules, name, None)
  match = rf"'{tmp_path}' needs .*: pip install 'galore-optax\[data\]'$"
  with pytest.raises(ImportError, match=match) as error:
    load(tmp_path)
  assert name in str(error.value)


def test_training_reads_no_more_than_the_sample():
  read = []

  def documents():
    for document in DOCUMENTS:
      read.append(document)
      yield document

  train_tokenizer(documents(), vocab_size=310, sample_chars=1000)
  assert sum(map(len, read[:-1])) < 1000 <= sum(map(len, read))


def test_long_lines_are_learned_from():
  long_line = ' '.join(DOCUMENTS).replace('\n', ' ')
  tokenizer = train_tokenizer([long_line], vocab_size=320)
  assert len(tokenizer.encode(TEXT)) < len(TEXT)


def test_training_is_quiet(capfd):
  train_tokenizer(DOCUMENTS, vocab_size=320)
  assert capfd.readouterr() == ('', '')


def test_save_and_load(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  for path in (tmp_path / 'tokenizer.json', str(tmp_path)):
    found = load(path)
    np.testing.assert_array_equal(found.encode(TEXT), tokenizer.encode(TEXT))
    assert found.files == tokenizer.files


def test_vocabulary_larger_than_the_corpus_supports():
  with pytest.raises(ValueError, match=r'at most (\d+) .*, got 9999: lower'):
    train_tokenizer(DOCUMENTS, vocab_size=9999)


def test_largest_vocabulary_the_message_names_works():
  with pytest.raises(ValueError) as error:
    train_tokenizer(DOCUMENTS, vocab_size=9999)
  most = int(str(error.value).split('at most ')[1].split()[0])
  assert train_tokenizer(DOCUMENTS, vocab_size=most).vocab_size == most


@pytest.mark.parametrize('vocab_size', [-1, 0, 1, 100, 258])
def test_vocabulary_smaller_than_the_characters(vocab_size):
  with pytest.raises(
    ValueError, match=rf'at least \d+ .*got {vocab_size}: raise'
  ):
    train_tokenizer(DOCUMENTS, vocab_size=vocab_size)


def test_nothing_to_train_on():
  with pytest.raises(ValueError, match=r'at most 2\d\d .*or give more text'):
    train_tokenizer(['\n\n'], vocab_size=300)


def test_load_names_what_is_wrong(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'no tokenizer at .*none\.model'):
    load(tmp_path / 'none.model')
  (tmp_path / 'text.model').write_text('not a model')
  with pytest.raises(ValueError, match=r'is not a sentencepiece model .*: c'):
    load(tmp_path / 'text.model')


def test_a_sentencepiece_model_without_bos(tmp_path):
  write_sentencepiece(tmp_path, bos_id=-1)
  assert load(tmp_path).bos_id is None
  write_sentencepiece(tmp_path, eos_id=-1)
  with pytest.raises(ValueError, match='nothing says what ends a document'):
    load(tmp_path)


def test_settings_of_a_run_have_a_template(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  path = tmp_path / 'tokenizer_config.json'
  settings = json.loads(path.read_text()) | {'chat_template': MISTRAL}
  path.write_text(json.dumps(settings))
  loaded = load(tmp_path)
  assert loaded.stop_ids == (2,)
  text = loaded.chat_template.render(CHAT[1:])
  ids_n = loaded.encode(text, special=True)
  assert ids_n[0] == 1 and list(ids_n).count(2) == 2
  assert loaded.decode(ids_n) == text.replace('<s>', '').replace('</s>', '')
  loaded.save(make(tmp_path / 'copy'))
  assert load(tmp_path / 'copy').chat_template.render(CHAT[1:]) == text


def make(directory):
  directory.mkdir()
  return directory


def test_pieces_of_a_model_that_adds_a_space(tmp_path):
  tokenizer = load(write_sentencepiece(tmp_path))
  pieces = [('The quick', False), (' brown fox', True), (' jumps ', False)]
  ids_n, scored_n = tokenizer.encode_pieces([*pieces, ('over', True)])
  whole = 'The quick brown fox jumps over'
  np.testing.assert_array_equal(ids_n, tokenizer.encode(whole))
  assert tokenizer.decode(ids_n[scored_n]) == 'brown fox over'


_LLAMA = {'tokenizer_class': 'LlamaTokenizer'}
_TURNS = ['<|im_start|>', '<|im_end|>']


def vocabulary_of(tokenizer):
  """Returns the id of each token."""
  return tokenizers.Tokenizer.from_str(tokenizer.model.decode()).get_vocab()


def pieces_of(tokenizer, text):
  """Returns the tokens of a rendered text, as texts."""
  texts = {i: text for text, i in vocabulary_of(tokenizer).items()}
  return [texts[i] for i in tokenizer.encode(text, special=True)]


class TestSpaces:
  """Which parts of a text between special tokens get a space in front.

  tests/parity compares all cases with transformers.
  """

  @pytest.mark.parametrize(
    ('settings', 'expected'),
    [
      # Only the whole text gets a space in front.
      (_LLAMA | {'legacy': False}, '\u2581dog </s> dog </s> \u2581dog'),
      (_LLAMA, '\u2581dog </s> dog </s> \u2581dog'),
      # Each part that does not begin with a space gets one.
      (
        _LLAMA | {'legacy': True},
        '\u2581dog </s> \u2581dog </s> \u2581dog',
      ),
      # Each part gets a space, as sentencepiece does by default.
      (None, '\u2581dog </s> \u2581dog </s> \u2581 \u2581dog'),
      (
        _LLAMA | {'legacy': False, 'add_prefix_space': False},
        'dog </s> dog </s> \u2581dog',
      ),
    ],
  )
  def test_between_special_tokens(self, tmp_path, settings, expected):
    tokenizer = load(write_sentencepiece(tmp_path, settings))
    assert pieces_of(tokenizer, 'dog</s>dog</s> dog') == expected.split(' ')
    # A document without special tokens gets the same space in front.
    begins = pieces_of(tokenizer, 'dog')[0].startswith('\u2581')
    assert begins == expected.startswith('\u2581')

  @pytest.mark.parametrize('legacy', [True, False])
  def test_a_run_keeps_the_rule_of_its_checkpoint(self, tmp_path, legacy):
    # For another model_type, transformers does not use the class in the
    # settings.
    settings = _LLAMA | {'legacy': legacy}
    source = write_sentencepiece(make(tmp_path / 'source'), settings)
    text = 'dog</s> dog'
    (source / 'config.json').write_text('{"model_type": "mistral"}')
    tokenizer = load(source)
    run = Run(tmp_path / 'run')
    run.create(CONFIG)
    tokenizer.save(run.directory)
    assert pieces_of(stored_tokenizer(run.directory), text) == pieces_of(
      tokenizer, text
    )
    again = tokenizer.with_template(MISTRAL)
    assert pieces_of(again, text) == pieces_of(tokenizer, text)
    (source / 'config.json').unlink()
    differs = pieces_of(load(source), text) != pieces_of(tokenizer, text)
    assert differs == legacy

  @pytest.mark.parametrize('legacy', [True, False])
  @pytest.mark.parametrize('model_type', ['llama', 'mistral'])
  def test_a_run_of_an_older_version_has_the_ids_of_its_checkpoint(
    self, tmp_path, legacy, model_type, capsys
  ):
    settings = _LLAMA | {'legacy': legacy}
    source = write_sentencepiece(make(tmp_path / 'source'), settings)
    old = write_sentencepiece(make(tmp_path / 'old'), settings)
    (source / 'config.json').write_text(f'{{"model_type": "{model_type}"}}')
    # Older versions kept the model, and stored a rule instead of the type.
    (old / 'checkpoints').mkdir()
    spaces = {True: 'each', False: 'first'}[legacy]
    rule = {'spaces': spaces, 'normalizes': model_type != 'llama'}
    (old / 'tokenizer_spaces.json').write_text(json.dumps(rule))
    for text in ('dog</s> dog', 'dog</s>dog', ' dog'):
      expected = pieces_of(load(source), text)
      assert pieces_of(stored_tokenizer(old), text) == expected
    assert capsys.readouterr().err == ''

  def test_a_run_of_the_first_version_is_read_with_one_line(
    self, tmp_path, capsys
  ):
    write_sentencepiece(tmp_path, _LLAMA)
    (tmp_path / 'checkpoints').mkdir()
    # The first version did not store the rule.
    assert stored_tokenizer(tmp_path).encode('dog').tolist()
    err = capsys.readouterr().err
    assert err.count('\n') == 1
    assert f'{tmp_path} is of an older version' in err

  def test_a_run_keeps_what_is_trained_here_as_tokenizer_json(
    self, tokenizer, tmp_path, capsys
  ):
    tokenizer.save(tmp_path)
    assert sorted(x.name for x in tmp_path.iterdir()) == [
      *('tokenizer.json', 'tokenizer_config.json')
    ]
    stored_tokenizer(tmp_path)
    assert capsys.readouterr().err == ''

  @pytest.mark.parametrize(
    'settings',
    [_LLAMA | {'legacy': False}, _LLAMA | {'legacy': True}, None],
    ids=['first', 'each', 'always'],
  )
  def test_ids_of_pieces_are_those_of_the_whole_text(self, tmp_path, settings):
    tokenizer = load(write_sentencepiece(tmp_path, settings))
    pieces = [
      *(('<s>The qu', False), ('ick', True), (' brown ', False)),
      *(('fox</s>', True), ('\n', False), ('caf\u00e9 \U0001f600', True)),
      *((' over', False), ('', True), ('</s>', False)),
    ]
    text = ''.join(text for text, _ in pieces)
    ids_n, scored_n = tokenizer.encode_pieces(pieces)
    np.testing.assert_array_equal(ids_n, tokenizer.encode(text, special=True))
    assert [len(x) for x in tokenizer.encode_pieces([])] == [0, 0]
    # A space is scored with the text after it, and the space in front of 'The'
    # is not part of the text.
    scored = ids_n[scored_n].tolist()
    assert scored.count(tokenizer.eos_id) == 1
    found = tokenizer.decode(scored).strip()
    assert re.fullmatch(r' ?(qu)?ick ?fox ?caf\u00e9 \U0001f600', found), found

  @pytest.mark.parametrize('text', ['dog', 'd\u00e9g'])
  def test_a_token_in_two_pieces_is_scored_if_one_of_them_is(
    self, tmp_path, text
  ):
    tokenizer = load(write_sentencepiece(tmp_path, _LLAMA))
    whole = tokenizer.encode(f'a {text}')
    for scored in ((True, False), (False, True)):
      parts = zip((f'a {text[0]}', text[1:]), scored, strict=True)
      ids_n, scored_n = tokenizer.encode_pieces(parts)
      np.testing.assert_array_equal(ids_n, whole)
      if text == 'dog':
        assert scored_n[-1] and scored_n.sum() == (3 if scored[0] else 1)
      else:
        # All tokens of a character belong to the piece that contains it.
        assert scored_n[-3:].tolist() == [scored[1]] * 3


class TestUserDefinedPieces:
  """A sentencepiece model whose ends of turns are user-defined pieces."""

  @pytest.fixture(params=[_LLAMA | {'legacy': False}, _LLAMA, None])
  def turns(self, request, tmp_path):
    settings = {'chat_template': CHATML} | (request.param or {})
    return load(
      write_sentencepiece(tmp_path, settings, user_defined_symbols=_TURNS)
    )

  def test_they_are_special_tokens(self, turns):
    ids = [turns.specials[text] for text in _TURNS]
    assert ids == [3, 4] and turns.vocab_size == 330
    assert turns.stop_ids == (turns.eos_id, ids[1])
    assert turns.chat_template.end_of_turn == '<|im_end|>'

  def test_the_end_of_an_answer_is_scored(self, turns):
    scored = [message['role'] == 'assistant' for message in CHAT]
    pieces = turns.chat_template.pieces(CHAT, scored)
    ids_n, scored_n = turns.encode_pieces(pieces)
    text = turns.chat_template.render(CHAT)
    np.testing.assert_array_equal(ids_n, turns.encode(text, special=True))
    ends = ids_n == turns.specials['<|im_end|>']
    assert (ends.sum(), (ends & scored_n).sum()) == (len(CHAT), sum(scored))
    assert not scored_n[ids_n == turns.specials['<|im_start|>']].any()
    said = turns.decode(ids_n[scored_n & ~ends])
    assert said == ''.join(
      message['content'] for message in CHAT if message['role'] == 'assistant'
    )


class TestAddedTokens:
  """A sentencepiece model with a tokenizer_config.json."""

  def load(self, directory, **settings):
    return load(write_sentencepiece(directory, _LLAMA | settings))

  def test_the_end_may_be_added(self, tmp_path):
    tokenizer = self.load(
      tmp_path, eos_token='<|im_end|>', **added({'<|im_end|>': {}})
    )
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 330)
    assert tokenizer.stop_ids == (330,)
    assert tokenizer.tokens['eos_token'] == '<|im_end|>'
    assert tokenizer.decode([330, *tokenizer.encode('dog'), 330]) == 'dog'

  @pytest.mark.parametrize(
    ('settings', 'bos'),
    [
      ({}, 1),
      ({'add_bos_token': True}, 1),
      ({'add_bos_token': False}, None),
      ({'bos_token': ''}, 1),  # as in the first LLaMA checkpoints
      ({'bos_token': {'content': '<s>', '__type': 'AddedToken'}}, 1),
      ({'bos_token': '\u2581dog'}, 'piece'),
    ],
  )
  def test_the_beginning(self, tmp_path, settings, bos):
    tokenizer = self.load(tmp_path, **settings)
    if bos == 'piece':
      bos = vocabulary_of(tokenizer)['\u2581dog']
    assert tokenizer.bos_id == bos

  def test_the_ids_of_generation_config_name_tokens(self, tmp_path):
    write_sentencepiece(tmp_path, _LLAMA | added({'<|im_end|>': {}}))
    ends = {'eos_token_id': [330, 2]}
    (tmp_path / 'generation_config.json').write_text(json.dumps(ends))
    tokenizer = load(tmp_path)
    assert tokenizer.eos_id == 330 and tokenizer.stop_ids == (330, 2)

  def test_a_token_that_is_not_special_is_text(self, tmp_path):
    tokenizer = self.load(tmp_path, **added({'<tool>': {'special': False}}))
    ids_n = tokenizer.encode('a <tool> dog')
    assert 330 in ids_n and 330 == tokenizer.specials['<tool>']
    assert tokenizer.decode(ids_n) == 'a <tool> dog'
    assert tokenizer.bytes_V[330] == len('<tool>')

  def test_an_id_that_transformers_does_not_give_is_named(self, tmp_path):
    with pytest.raises(ValueError, match=r'335 in the sett.* 330 in transf'):
      self.load(tmp_path, **added({'<|im_end|>': {}}, first=335))

  def test_objects_in_special_tokens_map(self, tmp_path):
    write_sentencepiece(tmp_path, _LLAMA)
    end = {'content': '\u2581dog', 'lstrip': False}
    file = tmp_path / 'special_tokens_map.json'
    file.write_text(json.dumps({'eos_token': end}))
    tokenizer = load(tmp_path)
    assert tokenizer.eos_id == vocabulary_of(tokenizer)['\u2581dog']

  def test_a_token_without_text_is_not_found_everywhere(self, tmp_path):
    tokenizer = self.load(
      tmp_path,
      additional_special_tokens=[''],
      **added({'<|im_end|>': {}, '': {}}),
    )
    assert pieces_of(tokenizer, 'a dog') == ['\u2581', 'a', '\u2581dog']
    assert '' not in tokenizer.specials

  def test_a_special_token_that_is_nowhere_is_named(self, tmp_path):
    with pytest.raises(ValueError, match=r"'<none>' is not in .*\.model: corr"):
      self.load(tmp_path, eos_token='<none>')


@pytest.mark.parametrize('kind', ['sentencepiece', 'json'])
def test_a_byte_order_mark_is_read(tmp_path, kind):
  if kind == 'json':
    write(tmp_path, CHATML)
  else:
    write_sentencepiece(tmp_path, _LLAMA | {'chat_template': CHATML})
  expected = load(tmp_path)
  (tmp_path / 'chat_template.jinja').write_text(CHATML)
  (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
  for file in tmp_path.glob('*.j*'):
    file.write_text(file.read_text('utf-8'), 'utf-8-sig')
  found = load(tmp_path)
  assert found.chat_template.source == CHATML
  assert found.specials == expected.specials
  assert found.encode(TEXT).tolist() == expected.encode(TEXT).tolist()
  # Files are saved without the byte order mark, which other programs cannot
  # read.
  found.save(make(tmp_path / 'copy'))
  for file in (tmp_path / 'copy').glob('*.j*'):
    assert not file.read_bytes().startswith(b'\xef\xbb\xbf')


class TestRows:
  """A model whose embedding has fewer rows than the tokenizer has ids."""

  def padded(self, directory, kind, flags):
    """Returns a tokenizer with the token [PAD] at the highest id."""
    directory = make(directory)
    token = {'[PAD]': {'special': True} | flags}
    if kind == 'sentencepiece':
      return load(write_sentencepiece(directory, _LLAMA | added(token)))
    write(directory, CHATML)
    path = str(directory / 'tokenizer.json')
    library = tokenizers.Tokenizer.from_file(path)
    flags = {'normalized': False} | token['[PAD]']
    library.add_tokens([tokenizers.AddedToken('[PAD]', **flags)])
    library.save(path)
    return load(directory)

  @pytest.fixture(params=['sentencepiece', 'json'])
  def kind(self, request):
    return request.param

  def fit(self, tokenizer, rows):
    return fitted(tokenizer, rows, origin='here', remedy='do this')

  def test_a_token_that_no_text_uses_is_harmless(self, tmp_path, kind):
    tokenizer = self.padded(tmp_path / 'a', kind, {})
    last = tokenizer.specials['[PAD]']
    assert tokenizer.vocab_size == last + 1
    found = self.fit(tokenizer, last)
    for text in (TEXT, ODD, CHATML_TEXT):
      expected = tokenizer.encode(text, special=True)
      assert found.encode(text, special=True).tolist() == expected.tolist()
    # The text '[PAD]' in a document is not encoded as the token.
    assert found.decode(found.encode('a [PAD]')) == 'a [PAD]'
    assert found.with_template(MISTRAL).num_rows == last
    check_texts(found, [TEXT, 'a [PAD]'], special=False)

  @pytest.mark.parametrize('special', [True, False])
  def test_a_token_that_a_text_uses_is_named(self, tmp_path, kind, special):
    tokenizer = self.padded(tmp_path / 'a', kind, {'special': special})
    last = tokenizer.specials['[PAD]']
    found = self.fit(tokenizer, last)
    match = rf"'a \[PAD\]' has the token '\[PAD\]' of id {last}, .*={last} has"
    with pytest.raises(ValueError, match=match):
      found.encode('a [PAD]', special=True)
    with pytest.raises(ValueError, match=match):
      found.encode_pieces([('a ', False), ('[PAD]', True)])
    with pytest.raises(ValueError, match=match):
      check_texts(found, [TEXT, 'a [PAD]'], special=True)
    with pytest.raises(ValueError, match=match):
      found.with_template(CHATML).encode('a [PAD]', special=True)
    if not special:
      with pytest.raises(ValueError, match=match):
        check_texts(found, [TEXT, 'a [PAD]'], special=False)
    # With one more row, [PAD] is encoded.
    whole = self.fit(tokenizer, last + 1)
    assert whole.encode('a [PAD]', special=True)[-1] == last

  def test_texts_are_not_read_where_every_token_has_a_row(self, tmp_path, kind):
    tokenizer = self.padded(tmp_path / 'a', kind, {})

    def unread():
      raise AssertionError
      yield

    check_texts(tokenizer, unread(), special=True)
    rows = tokenizer.vocab_size
    check_texts(self.fit(tokenizer, rows), unread(), special=True)

  def test_tokens_that_all_texts_have_are_named(self, tmp_path, kind):
    tokenizer = self.padded(tmp_path / 'a', kind, {})
    last = tokenizer.specials['[PAD]']
    with pytest.raises(ValueError, match=rf'={last - 1} ids .* {last - 1}: do'):
      self.fit(tokenizer, last - 1)
    tokenizer.tokens['eos_token'] = '[PAD]'
    with pytest.raises(ValueError, match=rf"got '\[PAD\]' of id {last}: do"):
      self.fit(tokenizer, last)


@pytest.mark.parametrize('kind', ['sentencepiece', 'json'])
def test_a_run_keeps_its_tokenizer(tokenizer, tmp_path, kind):
  if kind == 'json':
    (tmp_path / 'checkpoint').mkdir()
    tokenizer = load(write(tmp_path / 'checkpoint', CHATML))
  run = Run(tmp_path / 'run')
  run.create(CONFIG)
  tokenizer.save(run.directory)
  found = stored_tokenizer(run.directory)
  assert type(found) is type(tokenizer) and run.config() == CONFIG
  np.testing.assert_array_equal(found.encode(TEXT), tokenizer.encode(TEXT))
  assert found.stop_ids == tokenizer.stop_ids


def content(text):
  """Returns a token in the form of transformers' settings."""
  return {'__type': 'AddedToken', 'content': text}


class TestJson:
  """A byte-level BPE like SmolLM2's, and variants of it."""

  def test_ids_of_special_tokens(self, tmp_path):
    tokenizer = load(write(tmp_path, CHATML))
    ids = {t: i for t, i in vocabulary(tmp_path).items() if t in SPECIALS}
    assert tokenizer.eos_id == ids['<|endoftext|>']
    assert tokenizer.stop_ids == (ids['<|endoftext|>'], ids['<|im_end|>'])
    assert tokenizer.bos_id is None  # the post-processor does not add it
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
      ({'bos_token': content('<|im_start|>')}, None, '<|endoftext|>'),
      ({'add_bos_token': True, 'bos_token': '<|im_start|>'}, '<|im_start|>', 0),
      ({'add_bos_token': True, 'bos_token': None}, None, 0),
      ({'eos_token': content('<|im_end|>')}, None, '<|im_end|>'),
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
    # MiniLM's tokenizer.json is saved with truncation and padding.
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
    # The config.json of a run does not have the checkpoint's ids.
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
    # Both kinds add a space in front of a text.
    assert tokenizer.bytes_V[ids_n].sum() == 1 + len('the lazy dog')
    assert len(ids_n) > 3 and not tokenizer.bytes_V[tokenizer.eos_id]

  def test_tokens_of_scored_pieces(self, tmp_path):
    tokenizer = load(write(tmp_path, CHATML))
    pieces = [('The quick', False), (' br', True), ('own fox\U0001f600', False)]
    ids_n, scored_n = tokenizer.encode_pieces(pieces)
    whole = ''.join(text for text, _ in pieces)
    np.testing.assert_array_equal(ids_n, tokenizer.encode(whole))
    # The token 'brown' spans two pieces.
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
        r'a field of .* has another form .*TypeError: .*eos_token',
      ),
      ('chat_template.jinja', '{% if %}', r'no Jinja template \(line 1'),
    ],
  )
  def test_broken_files(self, tmp_path, name, content, message):
    write(tmp_path)
    (tmp_path / name).write_text(content, 'latin-1')
    with pytest.raises(ValueError, match=rf'in .*{tmp_path.name}.*{message}'):
      load(tmp_path)

  @pytest.mark.parametrize('eos_token', [{}, {'eos_token': None}])
  def test_the_id_of_config_ends_a_document_without_a_name(
    self, tmp_path, eos_token
  ):
    write(tmp_path)
    write_settings(tmp_path, eos_token)
    ends = {'eos_token_id': [2, 0]}
    (tmp_path / 'config.json').write_text(json.dumps(ends))
    tokenizer = load(tmp_path)
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (2, (2, 0))
    # As in transformers, a token that is null is not a variable of the
    # template.
    assert ('eos_token' in tokenizer.tokens) == (not eos_token)

  def test_tokenizer_json_is_preferred_to_a_sentencepiece_model(self, tmp_path):
    expected = load(write(tmp_path, CHATML, {'bos_token': SPECIALS[1]}))
    write_sentencepiece(tmp_path)
    found = load(tmp_path)
    assert found.files == expected.files and found.bos_id is None
    (tmp_path / 'tokenizer_config.json').unlink()
    model = load(tmp_path / 'tokenizer.model')
    assert model.bos_id == 1 and model.files['tokenizer.model']

  def test_a_blank_template_is_none(self, tmp_path):
    assert load(write(tmp_path, '')).chat_template is None

  @pytest.mark.parametrize('name', ['tokenizer.json', 'tokenizer.model'])
  def test_a_pointer_of_git_lfs_is_named(self, tmp_path, name):
    (tmp_path / name).write_text(
      'version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 3\n'
    )
    with pytest.raises(ValueError, match=r'it is a pointer: git lfs pull$'):
      load(tmp_path)

  def test_utf_16_is_named(self, tmp_path):
    write(tmp_path)
    (tmp_path / 'tokenizer_config.json').write_text('{}', 'utf-16')
    with pytest.raises(ValueError, match=r"is no JSON \('utf-8' codec.*: copy"):
      load(tmp_path)

  @pytest.mark.parametrize(
    'name', ['vocab.txt', 'vocab.json', 'spiece.model', 'qwen.tiktoken']
  )
  def test_a_vocabulary_that_is_damaged_is_one_line(self, tmp_path, name):
    (tmp_path / name).write_text('a')
    with pytest.raises(
      ValueError, match=r'cannot read it \(.*: copy the dir'
    ) as e:
      load(tmp_path)
    assert str(tmp_path) in str(e.value) and '\n' not in str(e.value)

  def test_a_vocabulary_of_bert_is_read(self, tmp_path):
    words = '[PAD] [UNK] [CLS] [SEP] [MASK] the lazy dog ##s'.split()
    (tmp_path / 'vocab.txt').write_text('\n'.join(words))
    (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
    tokenizer = load(tmp_path)
    assert tokenizer.encode('The lazy dogs').tolist() == [5, 6, 7, 8]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 3)

  def test_no_tokenizer(self, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'neither tokenizer\.json nor'):
      load(tmp_path)
    with pytest.raises(
      FileNotFoundError, match=r'no tokenizer at .*none\.json'
    ):
      load(tmp_path / 'none.json')
