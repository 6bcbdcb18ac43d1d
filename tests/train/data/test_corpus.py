import ast
import json
import pathlib
import struct
import sys

import pytest

from train.data import chats, corpus, labelled
from train.data.corpus import Chitchat, TextFiles, Tfds
from train.data.tokenizer import train_tokenizer

PARAGRAPHS = [f'Paragraph {i}.\nIts second line, \u00e9.' for i in range(60)]


def read(documents, seed=0):
  return list(documents.stream(seed=seed, repeat=False))


def write_jsonl(path, texts):
  path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  return str(path)


class TestChitchat:
  def test_splits_are_disjoint_and_complete(self):
    train, validation = (
      Chitchat().open(split).source for split in ('train', 'validation')
    )
    assert len(train) + len(validation) == 7168
    assert 0.04 < len(validation) / 7168 < 0.06
    assert round(sum(map(len, train + validation)), -5) == 12_700_000
    assert Chitchat().open('validation').source == validation

  def test_a_turn_is_a_line(self):
    first = Chitchat(holdout=1e-9).open('train').source[0].split('\n')
    assert first[0] == 'Hello How are you doing today?'
    assert first[1] == 'whats up MD im doing good how are you doing?'

  def test_missing_package_names_the_extra(self, monkeypatch):
    monkeypatch.setitem(sys.modules, 'chitchat_dataset', None)
    corpus.dialogues.cache_clear()
    with pytest.raises(
      ValueError, match=r"pip install 'galore-optax\[train\]'"
    ):
      Chitchat().open('train')

  def test_holdout_is_a_share(self):
    with pytest.raises(ValueError, match=r'between 0 and 1, got 1\.5'):
      Chitchat(holdout=1.5).open('train')


class TestTextFiles:
  def test_blank_lines_separate_documents(self, tmp_path):
    text = '\n\n'.join(PARAGRAPHS[:30]) + '\r\n\r\n' + PARAGRAPHS[30] + '\n'
    (tmp_path / 'a.txt').write_bytes(text.encode())
    corpus = TextFiles(
      train=str(tmp_path / 'a.txt'), validation=str(tmp_path / 'a.txt')
    )
    for split in ('train', 'validation'):
      assert list(corpus.open(split).source) == PARAGRAPHS[:31]

  @pytest.mark.parametrize(
    ('separator', 'expected'),
    [(None, ['a<|b|>\n\n c']), ('', ['a<|b|>\n\n c']), ('<|b|>', ['a', 'c'])],
  )
  def test_other_separators(self, tmp_path, separator, expected):
    path = tmp_path / 'a.txt'
    path.write_text('a<|b|>\n\n c\n')
    corpus = TextFiles(str(path), str(path), separator=separator)
    assert list(corpus.open('train').source) == expected

  def test_jsonl_and_globs(self, tmp_path):
    (tmp_path / 'sub').mkdir()
    write_jsonl(tmp_path / 'sub/b.jsonl', [*PARAGRAPHS[20:], ' '])
    write_jsonl(tmp_path / 'a.jsonl', PARAGRAPHS[:20])
    corpus = TextFiles(f'{tmp_path}/**/*.jsonl', f'{tmp_path}/a.jsonl')
    source = corpus.open('train').source
    assert [source[i] for i in range(len(source))] == PARAGRAPHS
    assert list(corpus.open('validation').source) == PARAGRAPHS[:20]

  def test_holdout_depends_on_the_content_alone(self, tmp_path):
    once = write_jsonl(tmp_path / 'once.jsonl', PARAGRAPHS)
    twice = write_jsonl(tmp_path / 'twice.jsonl', 2 * PARAGRAPHS[::-1])
    train, held = (
      set(TextFiles(once, holdout=0.2).open(split).source)
      for split in ('train', 'validation')
    )
    assert train | held == set(PARAGRAPHS) and not train & held
    assert set(TextFiles(twice, holdout=0.2).open('validation').source) == held

  def test_a_name_that_looks_like_a_glob(self, tmp_path):
    path = tmp_path / '[1]*.txt'
    path.write_text('text')
    assert list(TextFiles(str(path), str(path)).open('train').source) == [
      'text'
    ]

  @pytest.mark.parametrize('name', ['none.txt', '*.txt', ''])
  def test_nothing_matches(self, tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r'no file matches .*give the'):
      TextFiles(str(tmp_path / name)).open('train')

  def test_missing_validation_file(self, tmp_path):
    path = write_jsonl(tmp_path / 'a.jsonl', PARAGRAPHS)
    with pytest.raises(FileNotFoundError, match='no file matches'):
      TextFiles(path, str(tmp_path / 'none')).open('validation')

  @pytest.mark.parametrize('content', ['', ' \n\n\n'])
  def test_empty_corpus(self, tmp_path, content):
    (tmp_path / 'a.txt').write_text(content)
    with pytest.raises(ValueError, match=r'no document .*a\.txt.*not blank'):
      TextFiles(str(tmp_path / 'a.txt')).open('train')

  def test_one_document_cannot_be_split(self, tmp_path):
    (tmp_path / 'a.txt').write_text('one document')
    with pytest.raises(
      ValueError, match=r'split of .* is empty: .* 1 documents'
    ):
      for split in ('train', 'validation'):
        TextFiles(str(tmp_path / 'a.txt')).open(split)

  @pytest.mark.parametrize(
    'line',
    [
      '{"text": ',
      '{"body": "a"}',
      '["a"]',
      '{"text": 1}',
      r'{"text": "\ud800"}',
    ],
  )
  def test_bad_line_is_named(self, tmp_path, line):
    (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n\n' + line)
    with pytest.raises(ValueError, match=r'a\.jsonl, line 3: .*correct or'):
      TextFiles(str(tmp_path / 'a.jsonl')).open('train')

  def test_not_utf8(self, tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'caf\xe9')
    with pytest.raises(ValueError, match=r'a\.txt must be UTF-8.* 0xe9 .* 3'):
      TextFiles(str(tmp_path / 'a.txt')).open('train')


def test_only_its_own_module_knows_the_type_of_a_corpus():
  """Other modules call methods of `Documents` and `TextSplit`."""
  modules = [corpus, chats, labelled]
  names = {
    name: module.__name__
    for module in modules
    for name, value in vars(module).items()
    if isinstance(value, type) and value.__module__ == module.__name__
  }
  for path in sorted(pathlib.Path(corpus.__file__).parent.glob('*.py')):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and ast.unparse(node.func) == 'isinstance':
        used = {x.id for x in ast.walk(node.args[1]) if isinstance(x, ast.Name)}
        owners = {names[name] for name in used & names.keys()}
        assert owners <= {f'train.data.{path.stem}'}, ast.unparse(node)


def test_every_split_of_texts_has_one_protocol(tmp_path):
  path = str(tmp_path / 'a.jsonl')
  rows = [{'text': f'text {i}', 'label': i % 2} for i in range(9)]
  (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (tmp_path / 'b.jsonl').write_text('{"text": "a"}\n')
  tokenizer = train_tokenizer(PARAGRAPHS, vocab_size=300)
  for opened in (
    TextFiles(path, path).open('train'),
    labelled.LabelledFiles(path, path).open('train'),
    chats.Chats(f'{tmp_path}/b.jsonl', path).open('train'),
  ):
    assert isinstance(opened, corpus.TextSplit)
    assert len(opened) == len(list(opened.stream(seed=0, repeat=False)))
    templated = opened.templated(tokenizer)
    has_template = isinstance(opened, chats.Dialogues)
    assert (templated.chat_template is not None) == has_template
    assert opened.check(templated) == []


class TestOrder:
  @pytest.fixture(params=['jsonl', 'tfrecord'])
  def documents(self, request, tmp_path):
    if request.param == 'tfrecord':
      return Tfds(data_dir=prepare_tfrecord(tmp_path)).open('train')
    path = write_jsonl(tmp_path / 'a.jsonl', PARAGRAPHS)
    return TextFiles(path, path).open('train')

  def test_a_pass_is_a_permutation_fixed_by_the_seed(self, documents):
    once = read(documents, seed=3)
    assert once != PARAGRAPHS and sorted(once) == sorted(PARAGRAPHS)
    assert read(documents, seed=3) == once != read(documents, seed=4)

  def test_epochs_differ(self, documents):
    stream = iter(documents.stream(seed=3, repeat=True))
    both = [next(stream) for _ in range(120)]
    assert sorted(both) == sorted(2 * PARAGRAPHS)
    assert both[:60] != both[60:]

  def test_state_resumes_in_the_second_epoch(self, documents):
    stream = iter(documents.stream(seed=3, repeat=True))
    for _ in range(77):
      next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    following = [next(stream) for _ in range(99)]
    resumed = iter(documents.stream(seed=3, repeat=True))
    resumed.set_state(state)
    assert [next(resumed) for _ in range(99)] == following


def prepare(directory, field='text'):
  """Prepares 60 texts as a data set with C4's name, config and features."""
  import tensorflow_datasets as tfds

  class C4(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = 'c4'
    VERSION = tfds.core.Version('3.1.0')
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name='en'),)

    def _info(self):
      keys = ('content-length', 'content-type', field, 'timestamp', 'url')
      features = {key: tfds.features.Text() for key in keys}
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples()}

    def _generate_examples(self):
      for i, text in enumerate(PARAGRAPHS):
        yield i, dict.fromkeys(self.info.features, 'other') | {field: text}

  builder = C4(config='en', data_dir=directory, file_format='array_record')
  config = tfds.download.DownloadConfig(num_shards=3)
  builder.download_and_prepare(download_config=config)
  return builder


def prepare_tfrecord(directory):
  """Prepares the same data set with its records in tfrecord files."""
  builder = prepare(directory / 'array_record')
  old = pathlib.Path(builder.data_dir)
  new = directory / 'tfrecord/c4/en/3.1.0'
  new.mkdir(parents=True)
  info = json.loads((old / 'dataset_info.json').read_text())
  shards = [int(n) for n in info['splits'][0]['shardLengths']]
  assert len(shards) == 3
  (new / 'dataset_info.json').write_text(
    json.dumps(info | {'fileFormat': 'tfrecord'})
  )
  (new / 'features.json').write_bytes((old / 'features.json').read_bytes())
  records = iter(builder.as_data_source('train').data_source)
  for shard, length in enumerate(shards):
    frames = [frame(next(records)) for _ in range(length)]
    path = new / f'c4-train.tfrecord-{shard:05}-of-00003'
    path.write_bytes(b''.join(frames))
  return str(directory / 'tfrecord')


def frame(record):
  # The two checksums are zero, because the reader does not check them.
  return struct.pack('<QI', len(record), 0) + record + bytes(4)


class TestTfds:
  def test_array_record(self, tmp_path):
    prepare(tmp_path)
    corpus = Tfds('c4/en', data_dir=str(tmp_path), validation='train[50%:]')
    assert sorted(read(corpus.open('train'))) == sorted(PARAGRAPHS)
    assert len(read(corpus.open('validation'))) == 30
    assert 'tensorflow' not in sys.modules

  def test_tfrecord(self, tmp_path):
    corpus = Tfds('c4/en', data_dir=prepare_tfrecord(tmp_path))
    assert sorted(read(corpus.open('train'))) == sorted(PARAGRAPHS)
    assert 'tensorflow' not in sys.modules

  def test_tfrecord_has_no_slices(self, tmp_path):
    directory = prepare_tfrecord(tmp_path)
    with pytest.raises(ValueError, match=r"validation='train\[50%:\]' .*slice"):
      Tfds(data_dir=directory, validation='train[50%:]').open('validation')

  def test_missing_split(self, tmp_path):
    prepare(tmp_path)
    with pytest.raises(ValueError, match=r"no split 'validation', .*'train'"):
      Tfds(data_dir=str(tmp_path)).open('validation')

  def test_data_set_without_text(self, tmp_path):
    prepare(tmp_path, field='image')
    with pytest.raises(
      ValueError, match=r"c4/en has no feature 'text', but .*'image'"
    ):
      Tfds(data_dir=str(tmp_path)).open('train')

  def test_missing_directory(self, tmp_path):
    with pytest.raises(
      FileNotFoundError, match=r"data set 'c4/en' in .*nowhere"
    ):
      Tfds(data_dir=str(tmp_path / 'nowhere')).open('train')


def flipped(raw):
  middle = len(raw) // 2
  return raw[: middle - 200] + 400 * b'\xff' + raw[middle + 200 :]


def damage(path, how):
  """Removes, truncates or overwrites a file."""
  raw = path.read_bytes()
  path.unlink()
  if how != 'gone':
    path.write_bytes(flipped(raw) if how == 'flipped' else raw[: len(raw) // 2])


@pytest.mark.parametrize('how', ['gone', 'cut', 'flipped'])
class TestDamaged:
  """A file becomes unreadable after it was opened."""

  def test_text_names_its_file(self, how, tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('\n\n'.join(PARAGRAPHS))
    documents = TextFiles(str(path), str(path)).open('train')
    damage(path, how)
    with pytest.raises(OSError, match=r'a\.txt'):
      read(documents)

  def test_json_names_its_file(self, how, tmp_path):
    path = tmp_path / 'a.jsonl'
    write_jsonl(path, PARAGRAPHS)
    documents = TextFiles(str(path), str(path)).open('train')
    damage(path, how)
    with pytest.raises(OSError, match=r'a\.jsonl'):
      read(documents)

  def test_array_record_names_its_file(self, how, tmp_path):
    directory = pathlib.Path(prepare(tmp_path).data_dir)
    documents = Tfds(data_dir=str(tmp_path)).open('train')
    damage(directory / 'c4-train.array_record-00001-of-00003', how)
    with pytest.raises(OSError, match='array_record-00001-of-00003'):
      read(documents)

  def test_tfrecord_names_its_file(self, how, tmp_path):
    data_dir = prepare_tfrecord(tmp_path)
    documents = Tfds(data_dir=data_dir).open('train')
    (path,) = pathlib.Path(data_dir).rglob('*.tfrecord-00001-of-00003')
    damage(path, how)
    with pytest.raises(OSError, match='tfrecord-00001-of-00003'):
      read(documents)
