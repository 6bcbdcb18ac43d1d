import bz2
import csv
import datetime
import errno
import glob
import gzip
import json
import lzma
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import tracemalloc
import zlib

import pytest

from train.data import records as records_lib
from train.data.chats import Chats
from train.data.corpus import TextFiles
from train.data.labelled import LabelledFiles
from train.data.records import records
from train.data.text_files import index_texts
from train.evaluate import read_questions

# Values that a reader that guesses types would change, and a key that only one
# record has.
ROWS = [
  {'text': '0012', 'date': '2024-01-02', 'label': '1'},
  {'text': 'NA', 'date': 'null', 'label': '0', 'more': '1e3'},
  {'text': 'caf\u00e9, "\U0001f600"\nand so on', 'date': '', 'label': '1'},
]


def write(path, rows=ROWS):
  """Writes records in the format of the file's ending."""
  kind = records_lib.kind_of(str(path))
  if kind in ('.csv', '.tsv'):
    content = table(rows, kind)
  elif kind == '.json':
    content = json.dumps(rows, indent=2)
  else:
    content = ''.join(json.dumps(row) + '\n' for row in rows)
  opened = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}
  with opened.get(path.suffix, open)(path, 'wb') as file:
    file.write(content.encode())
  return str(path)


def table(rows, kind):
  """Returns the records as CSV or TSV, where every record has all keys."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  lines = []
  writer = csv.writer(Lines(lines), delimiter={'.csv': ',', '.tsv': '\t'}[kind])
  for row in [names, *([row.get(name, '') for name in names] for row in rows)]:
    writer.writerow(row)
  return ''.join(lines)


class Lines(list):
  """A list of lines that `csv` can write to."""

  def __init__(self, lines):
    self.write = lines.append


def read(path):
  return [entry.record for entry in records(path)]


COMPRESSED = ('', '.gz', '.bz2', '.xz')

# Values that only JSON and Parquet have.
NESTED = [
  {'text': 'a', 'null': None, 'nested': {'b': [1, 2.5, None, {'c': True}]}},
  {'text': 'b', 'big': 2**70, 'empty': {}},
]


@pytest.mark.parametrize('compression', COMPRESSED)
@pytest.mark.parametrize('kind', ['.jsonl', '.ndjson', '', '.json', '.JSON'])
@pytest.mark.parametrize('rows', [ROWS, NESTED], ids=['flat', 'nested'])
def test_json_is_read_as_it_stands(tmp_path, rows, kind, compression):
  assert read(write(tmp_path / f'a{kind}{compression}', rows)) == rows


@pytest.mark.parametrize('compression', COMPRESSED)
@pytest.mark.parametrize('kind', ['.csv', '.tsv'])
def test_cells_of_a_table_are_texts(tmp_path, kind, compression):
  # A cell of a .tsv file has no quotes, so it cannot contain a newline.
  rows = ROWS if kind == '.csv' else ROWS[:2]
  expected = [{'more': '', **row} for row in rows]
  path = write(tmp_path / f'a{kind}{compression}', rows)
  if kind == '.tsv' and not compression:
    assert (tmp_path / 'a.tsv').read_text().startswith('text\tdate\tlabel')
  assert read(path) == expected


def test_a_pattern_names_several_files(tmp_path):
  write(tmp_path / 'b.jsonl.gz', ROWS[:2])
  write(tmp_path / 'a.csv', ROWS[2:])
  write(tmp_path / 'c.json', ROWS[:1])
  assert [
    (entry.record['text'], entry.place) for entry in records(f'{tmp_path}/*')
  ] == [
    (ROWS[2]['text'], f'{tmp_path}/a.csv, line 3'),
    (ROWS[0]['text'], f'{tmp_path}/b.jsonl.gz, line 1'),
    (ROWS[1]['text'], f'{tmp_path}/b.jsonl.gz, line 2'),
    (ROWS[0]['text'], f'{tmp_path}/c.json, item 1'),
  ]


@pytest.mark.parametrize('kind', ['text', 'chats', 'labelled', 'questions'])
def test_an_error_names_the_file_among_several(tmp_path, kind):
  good = {
    'text': 'good',
    'label': 0,
    'question': 'a',
    'choices': ['b', 'c'],
    'answer': 0,
  }
  if kind == 'chats':
    good = {'text': 'good'}
  for name in ('a', 'b', 'c'):
    write(tmp_path / f'{name}.jsonl', [good])
  with open(tmp_path / 'b.jsonl', 'a') as file:
    file.write('{"text": 0, "label": 0}\n')
  pattern = f'{tmp_path}/*.jsonl'
  with pytest.raises(ValueError, match=r'/b\.jsonl, line 2: '):
    if kind == 'questions':
      read_questions(pattern)
    else:
      CORPORA[kind](pattern).open('train')


def test_questions_of_several_files(tmp_path):
  question = {'question': 'a', 'choices': ['0012', 'NA'], 'answer': 'NA'}
  for name in ('a.jsonl', 'b.json.gz'):
    write(tmp_path / name, [question])
  found = read_questions(f'{tmp_path}/*')
  assert [(x.choices, x.answer) for x in found] == 2 * [(('0012', 'NA'), 1)]


def test_files_are_read_while_they_are_consumed(tmp_path):
  with open(tmp_path / 'a.jsonl', 'w') as file:
    for _ in range(2000):
      file.write('{"text": "%s"}\n' % (5000 * 'x'))
  tracemalloc.start()
  assert sum(1 for _ in records(str(tmp_path / 'a.jsonl'))) == 2000
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 1e6  # the file has 10 MB


def test_a_cell_may_be_long(tmp_path):
  rows = [{'text': 200_000 * 'x', 'label': '0'}]
  assert read(write(tmp_path / 'a.csv', rows)) == rows


def test_a_json_file_may_hold_lines(tmp_path):
  (tmp_path / 'a.json').write_text('\ufeff{"text": "a"}\n\n{"text": "b"}\n')
  found = records(str(tmp_path / 'a.json'))
  assert [(entry.unit, entry.number, entry.record) for entry in found] == [
    ('line', 1, {'text': 'a'}),
    ('line', 3, {'text': 'b'}),
  ]


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('[{"a": 1}', r'item 1: a comma or "\]" must follow the item, got \'\''),
    ('[{"a": 1} {"b": 2}]', r'item 1: a comma or .*got \'{\''),
    ('[{"a": 1},\n 3]', 'item 2: must be a JSON object, got 3'),
    ('[{"a": 1},]', 'item 2: no JSON'),
    ('[{"a": 1}] 3', 'text follows the list'),
    ('[{"a": 1}, {"b": "\\ud800"}]', 'item 2: .*half a surrogate pair'),
    ('{\n"a": 1\n}', 'line 1: no JSON'),
  ],
)
def test_a_fault_of_a_json_file_is_named(tmp_path, content, message):
  (tmp_path / 'a.json').write_text(content)
  with pytest.raises(ValueError, match=rf'a\.json(, |: ){message}'):
    read(str(tmp_path / 'a.json'))


DEEP = '{"text": ' + 100_000 * '[' + 100_000 * ']' + '}'
CORPORA = {
  'text': lambda path: TextFiles(path, path),
  'chats': lambda path: Chats(path, path),
  'labelled': lambda path: LabelledFiles(path, path),
}


@pytest.mark.parametrize('ending', ['jsonl', 'jsonl.gz', 'json'])
@pytest.mark.parametrize('kind', CORPORA)
@pytest.mark.parametrize(
  ('line', 'reason'),
  [
    (DEEP, 'nested too deep'),
    ('{"text": "\\ud800", "label": 0}', 'half a surrogate pair'),
    ('{"text": "a", "label": "\\udc00"}', 'half a surrogate pair'),
    ('{"text": "a", "\\ud800": 0}', 'half a surrogate pair'),
    ('{"text": "a"', '(no JSON|comma)'),
    ('"text"', 'must be a JSON object'),
  ],
)
def test_every_reader_names_file_and_line(tmp_path, kind, ending, line, reason):
  good = '{"text": "good", "label": 0}'
  lines = [good, '', line] if ending.startswith('jsonl') else [good, line]
  text = '\n'.join(lines)
  if ending == 'json':
    text = f'[{",".join(lines)}]'
  path = tmp_path / f'a.{ending}'
  opened = gzip.open if path.suffix == '.gz' else open
  with opened(path, 'wb') as file:
    file.write(text.encode())
  if kind == 'chats':
    reason = f'({reason}|of preference data)'
  with pytest.raises(ValueError, match=reason) as error:
    CORPORA[kind](str(path)).open('train')
  found = str(error.value)
  assert '\n' not in found
  place = 'item 2' if ending == 'json' else 'line 3'
  place = place if 'preference' not in found else place[:-1] + '1'
  assert f'{path}, {place}: ' in found


def test_bytes_that_are_not_utf8_are_named(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(b'{"text": "\xff"}\n')
  # Half a surrogate pair, encoded like a character in UTF-8.
  (tmp_path / 'b.jsonl').write_bytes(b'{"text": "\xed\xa0\x80"}\n')
  for name in ('a', 'b'):
    path = str(tmp_path / f'{name}.jsonl')
    with pytest.raises(ValueError, match=rf'{name}\.jsonl, line 1: .*utf-8'):
      TextFiles(path, path).open('train')


@pytest.mark.parametrize('ending', ['gz', 'bz2', 'xz'])
@pytest.mark.parametrize('how', ['cut', 'other'])
def test_a_damaged_file_is_named(tmp_path, ending, how):
  path = tmp_path / f'a.jsonl.{ending}'
  write(path, 99 * ROWS)
  content = path.read_bytes()
  path.write_bytes(content[:-20] if how == 'cut' else b'{"text": "a"}\n')
  for kind in ('text', 'labelled'):
    with pytest.raises(ValueError, match=r'a\.jsonl\.\w+ cannot be read') as e:
      CORPORA[kind](str(path)).open('train')
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', ['a.json', 'a.jsonl.gz', 'a.csv', 'a.jsonl'])
def test_documents_of_every_kind_have_random_access(tmp_path, name):
  source = (
    TextFiles(write(tmp_path / name), write(tmp_path / name))
    .open('train')
    .source
  )
  assert [source[i] for i in (2, 0, 1)] == [ROWS[i]['text'] for i in (2, 0, 1)]
  unit = 'item' if name == 'a.json' else 'line'
  # The third row of the table starts in line 4 and ends in line 5.
  number = 5 if name == 'a.csv' else 3
  assert source.place(2) == f'{tmp_path / name}, {unit} {number}'


def test_plain_text_may_be_compressed(tmp_path):
  path = tmp_path / 'a.txt.gz'
  path.write_bytes(gzip.compress(b'\n\none\ntwo\n\nthree\n'))
  source = TextFiles(str(path), str(path)).open('train').source
  assert list(source) == ['one\ntwo', 'three']
  assert [source.place(i) for i in range(2)] == [
    f'{path}, line 3',
    f'{path}, line 6',
  ]


def test_files_without_a_column_text_stay_plain_text(tmp_path):
  (tmp_path / 'a.csv').write_text('words,label\nx,1\n')
  (tmp_path / 'b.json').write_text('{\n"words": 1\n}')
  for name in ('a.csv', 'b.json'):
    content = (tmp_path / name).read_text().strip()
    path = str(tmp_path / name)
    assert list(TextFiles(path, path).open('train').source) == [content]


def test_a_copied_record_is_held_out_by_its_content(tmp_path):
  rows = [{'text': f'document {i}'} for i in range(60)]
  splits = []
  for name in ('a.json', 'b.jsonl.gz', 'c.csv'):
    path = write(tmp_path / name, rows)
    corpus = TextFiles(path, holdout=0.3)
    train, held = (set(corpus.open(x).source) for x in ('train', 'validation'))
    assert len(train) + len(held) == 60 and not train & held
    splits.append(held)
  assert splits[0] == splits[1] == splits[2]


def test_labels_of_every_kind(tmp_path):
  expected = [(row['text'], row['label']) for row in ROWS]
  for name in ('a.jsonl', 'a.json', 'a.csv', 'a.csv.gz', 'a.jsonl.bz2'):
    path = write(tmp_path / name)
    rows = LabelledFiles(path, path).open('train').found.source
    assert [(row.texts[0], row.label) for row in rows] == expected


def membership(corpus):
  return {str(x) for x in corpus.open('validation').source}


def test_runs_of_older_versions_keep_their_splits(tmp_path):
  """The hash that holds out a document must never change."""
  texts = [f'caf\u00e9 {i}' for i in range(60)]

  def held(contents):
    return {
      text
      for text, content in zip(texts, contents, strict=True)
      if zlib.crc32(content.encode()) < 0.3 * 2**32
    }

  # JSON lines: the hash is that of the line as it stands.
  lines = [f' {{"text":"{text}"}}  ' for text in texts]
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  assert membership(TextFiles(f'{tmp_path}/a.jsonl', holdout=0.3)) == held(
    line.strip() for line in lines
  )
  # Files that are copied: the hash is that of the record's JSON.
  expected = held(f'{{"text": "{text}"}}' for text in texts)
  (tmp_path / 'b.jsonl.gz').write_bytes(
    gzip.compress('\n'.join(lines).encode())
  )
  (tmp_path / 'c.csv').write_text('\n'.join(['text', *texts]))
  (tmp_path / 'd.json').write_text(f'[{",".join(lines)}]')
  for name in ('b.jsonl.gz', 'c.csv', 'd.json'):
    assert membership(TextFiles(f'{tmp_path}/{name}', holdout=0.3)) == expected
  # Plain text: the hash is that of the document.
  (tmp_path / 'e.txt').write_text('\n\n'.join(texts))
  (tmp_path / 'f.txt.xz').write_bytes(
    lzma.compress('\n\n'.join(texts).encode())
  )
  for name in ('e.txt', 'f.txt.xz'):
    found = membership(TextFiles(f'{tmp_path}/{name}', holdout=0.3))
    assert found == held(texts)
  # Labelled texts: the hash is that of the texts.
  (tmp_path / 'g.csv').write_text(
    '\n'.join(['premise,hypothesis,label', *(f'{x},b,0' for x in texts)])
  )
  rows = LabelledFiles(f'{tmp_path}/g.csv', holdout=0.3).open('validation')
  found = {row.texts[0] for row in rows.found.source}
  assert found == held(f'{text}\0b' for text in texts)


def test_a_document_of_other_spaces_is_kept_in_plain_text(tmp_path):
  (tmp_path / 'a.txt').write_text('a\n\n\u3000\n\nb')
  write(tmp_path / 'a.jsonl', [{'text': x} for x in ('a', '\u3000', 'b')])
  plain, lines = (
    list(TextFiles(path, path).open('train').source)
    for path in (f'{tmp_path}/a.txt', f'{tmp_path}/a.jsonl')
  )
  assert (plain, lines) == (['a', '\u3000', 'b'], ['a', 'b'])


@pytest.fixture
def full(monkeypatch):
  """A spool on a full disk."""
  monkeypatch.setattr(
    tempfile,
    'TemporaryFile',
    lambda **options: open('/dev/full', 'r+b', **options),
  )
  records_lib.spool.cache_clear()
  yield
  records_lib.spool.cache_clear()


@pytest.mark.parametrize('kind', ['text', 'chats'])
def test_a_full_disk_is_one_clear_line(tmp_path, full, kind):
  path = write(tmp_path / 'a.jsonl.gz', [{'text': 'a'}])
  with pytest.raises(OSError, match=r'a\.jsonl\.gz cannot be copied') as error:
    CORPORA[kind](path).open('train')
  found = str(error.value)
  assert f'temporary files, {tempfile.gettempdir()} (No space left' in found
  assert 'set TMPDIR to a directory' in found and '\n' not in found


def test_files_that_need_no_copy_need_no_space(tmp_path, full):
  path = write(tmp_path / 'a.jsonl')
  assert len(TextFiles(path, path).open('train')) == 3


def test_no_directory_for_temporary_files(tmp_path, monkeypatch):
  def fail(**_):
    raise FileNotFoundError(errno.ENOENT, "No usable directory in ['/x']")

  monkeypatch.setattr(tempfile, 'TemporaryFile', fail)
  records_lib.spool.cache_clear()
  path = write(tmp_path / 'a.csv')
  with pytest.raises(
    OSError, match=r"a\.csv cannot be .*No usable .*'/x'.*set TMPDIR"
  ):
    TextFiles(path, path).open('train')


def test_parquet_without_its_library_names_the_command(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', None)
  path = tmp_path / 'a.parquet'
  path.write_bytes(b'PAR1')
  for kind in CORPORA.values():
    with pytest.raises(
      ImportError,
      match=r"a\.parquet needs .*: pip install 'galore-optax\[data\]'$",
    ):
      kind(str(path)).open('train')


def test_the_spool_returns_what_was_copied():
  found = records_lib.Spool()
  starts = [found.append(content) for content in (b'one', b'', b'three')]
  assert starts == [0, 3, 3]
  assert (found.read(0, 3), found.read(3, 8)) == (b'one', b'three')
  found.close()


@pytest.mark.slow  # Importing `datasets` takes seconds.
class TestParquet:
  @pytest.fixture(params=['parquet', 'arrow'])
  def write(self, request, tmp_path):
    """Writes rows with pyarrow, as users do."""
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet

    def write(rows, name='[1] a*'):
      path = tmp_path / f'{name}.{request.param}'
      # `from_pylist` reads only the keys of the first row.
      names = list(dict.fromkeys(name for row in rows for name in row))
      found = pyarrow.Table.from_pylist(
        [{name: row.get(name) for name in names} for row in rows]
      )
      if request.param == 'parquet':
        parquet.write_table(found, path)
      else:
        with pyarrow.ipc.new_stream(str(path), found.schema) as file:
          file.write_table(found)
      return str(path)

    return write

  def test_values_are_exact_and_null_fields_absent(self, write):
    rows = [
      {
        'text': '0012',
        'number': 12,
        'time': datetime.datetime(2024, 1, 2, 3, 4),
        'raw': b'caf\xc3\xa9',
        'call': {'name': 'f', 'arguments': {'a': 1, 'b': None}},
        'more': None,
      },
      {'text': 'NA', 'number': None, 'raw': b'\xff', 'more': [None, 'x']},
    ]
    assert read(write(rows)) == [
      {
        'text': '0012',
        'number': 12,
        'time': '2024-01-02T03:04:00',
        'raw': 'caf\u00e9',
        'call': {'name': 'f', 'arguments': {'a': 1}},
      },
      {'text': 'NA', 'more': [None, 'x']},
    ]

  def test_each_corpus_reads_it(self, write):
    path = write(ROWS)
    source = TextFiles(path, path).open('train').source
    assert [source[i] for i in range(3)] == [row['text'] for row in ROWS]
    assert source.place(1) == f'{path}, row 2'
    rows = LabelledFiles(path, path).open('train').found.source
    assert [row.label for row in rows] == ['1', '0', '1']
    chat = [
      {'role': 'user', 'content': 'Who?'},
      {'role': 'assistant', 'content': 'Me.', 'weight': 1},
    ]
    path = write([{'messages': chat, 'label': None}], 'chats')
    (found,) = Chats(path, path).open('train').source
    assert found.scored == (False, True)
    assert set(found.messages[0]) == {'role', 'content'}

  @pytest.mark.parametrize('compression', COMPRESSED[1:])
  def test_it_may_be_compressed(self, write, compression):
    path = write(ROWS)
    opened = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}[compression]
    with open(path, 'rb') as file, opened(path + compression, 'wb') as target:
      target.write(file.read())
    found = list(records(glob.escape(path + compression)))
    assert [entry.record for entry in found] == ROWS
    assert found[1].place == f'{path}{compression}, row 2'

  def test_a_full_disk_is_one_clear_line(self, write, monkeypatch):
    def fail(*_):
      raise OSError(errno.ENOSPC, 'No space left on device')

    path = write(ROWS)
    monkeypatch.setattr(shutil, 'copyfileobj', fail)
    monkeypatch.setattr(os, 'mkdir', fail)
    with open(path, 'rb') as file:
      content = file.read()
    (pathlib.Path(path + '.gz')).write_bytes(gzip.compress(content))
    for name in (path, path + '.gz'):
      with pytest.raises(OSError, match=r'cannot be copied to .*TMPDIR') as e:
        list(records(name))
      assert name in str(e.value) and '\n' not in str(e.value)

  def test_nothing_is_fetched_and_nothing_left(
    self, write, tmp_path, monkeypatch
  ):
    def connect(*_):
      raise AssertionError('the network is used')

    monkeypatch.setattr(socket.socket, 'connect', connect)
    monkeypatch.setattr(socket, 'getaddrinfo', connect)
    home = tmp_path / 'home'
    for name in ('HOME', 'HF_HOME', 'HF_DATASETS_CACHE', 'TMPDIR'):
      monkeypatch.setenv(name, str(home))
    monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
    monkeypatch.setenv('HF_DATASETS_OFFLINE', '0')
    home.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(home))
    before = dict(os.environ)
    assert len(read(write(ROWS))) == 3
    assert dict(os.environ) == before
    assert not list(home.iterdir())

  @pytest.mark.parametrize('content', [b'', b'PAR1 and no more', None])
  def test_a_damaged_file_is_named(self, write, content, capfd):
    path = write(ROWS)
    if content is None:
      with open(path, 'rb') as file:
        content = file.read()[:-40]
    with open(path, 'wb') as file:
      file.write(content)
    with pytest.raises(ValueError, match='cannot be read as') as error:
      index_texts(path, None)
    assert path in str(error.value) and '\n' not in str(error.value)
    assert capfd.readouterr() == ('', '')
