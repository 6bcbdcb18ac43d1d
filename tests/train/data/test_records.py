import bz2
import csv
import datetime
import gzip
import json
import lzma
import os
import sys
import tempfile

import pytest

from train.data import records, text_files
from train.data.chats import Chats
from train.data.corpus import TextFiles
from train.data.labelled import LabelledFiles

# Values that a reader that guesses types would change, and a key that only one
# record has.
ROWS = [
  {'text': '0012', 'date': '2024-01-02', 'label': '1'},
  {'text': 'NA', 'date': 'null', 'label': '0', 'more': '1e3'},
  {'text': 'caf\u00e9, "\U0001f600"\nand so on', 'date': '', 'label': '1'},
]


def write(path, rows=ROWS):
  """Writes records in the format of the file's ending."""
  kind = records.kind_of(str(path))
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
  return [record for _, record in records.read(path).numbered]


@pytest.mark.parametrize(
  'name',
  [
    *('a.jsonl', 'a.ndjson', 'a', 'a.json', 'A.JSON', 'a.jsonl.gz'),
    *('a.json.bz2', 'a.jsonl.xz'),
  ],
)
def test_json_is_read_as_it_stands(tmp_path, name):
  assert read(write(tmp_path / name)) == ROWS


@pytest.mark.parametrize('name', ['a.csv', 'a.csv.gz'])
def test_cells_of_a_table_are_texts(tmp_path, name):
  expected = [{'more': '', **row} for row in ROWS]
  assert read(write(tmp_path / name)) == expected


def test_a_cell_may_be_long(tmp_path):
  rows = [{'text': 200_000 * 'x', 'label': '0'}]
  assert read(write(tmp_path / 'a.csv', rows)) == rows


def test_a_json_file_may_hold_lines(tmp_path):
  (tmp_path / 'a.json').write_text('\ufeff{"text": "a"}\n\n{"text": "b"}\n')
  unit, numbered = records.read(str(tmp_path / 'a.json'))
  assert (unit, list(numbered)) == (
    'line',
    [(1, {'text': 'a'}), (3, {'text': 'b'})],
  )


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
    rows = LabelledFiles(path, path).open('train').source
    assert [(row.texts[0], row.label) for row in rows] == expected


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
  found = records.Spool()
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
      found = pyarrow.Table.from_pylist(rows)
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
    rows = LabelledFiles(path, path).open('train').source
    assert [row.label for row in rows] == ['1', '0', '1']
    chat = [
      {'role': 'user', 'content': 'Who?'},
      {'role': 'assistant', 'content': 'Me.', 'weight': 1},
    ]
    path = write([{'messages': chat, 'label': None}], 'chats')
    (found,) = Chats(path, path).open('train').source
    assert found.scored == (False, True)
    assert set(found.messages[0]) == {'role', 'content'}

  def test_nothing_is_fetched_and_nothing_left(
    self, write, tmp_path, monkeypatch
  ):
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

  @pytest.mark.parametrize('content', [b'', b'PAR1 and no more'])
  def test_a_damaged_file_is_named(self, write, content):
    path = write(ROWS)
    with open(path, 'wb') as file:
      file.write(content)
    with pytest.raises(ValueError, match='cannot be read as') as error:
      text_files.index(path, None)
    assert path in str(error.value) and '\n' not in str(error.value)
