"""Reads records from JSON lines, JSON lists, CSV, TSV, Parquet and Arrow files.

A record is a dict. `read` yields the records of a file of any kind, and
`parse_object` parses one line of JSON. `train.data.text_files` gives random
access to records.
"""

import atexit
import bz2
import contextlib
import csv
import datetime
import decimal
import functools
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple, TypeAlias

Record: TypeAlias = dict[str, Any]

_COMPRESSED: dict[str, Callable[..., IO[Any]]] = {
  '.gz': gzip.open,
  '.bz2': bz2.open,
  '.xz': lzma.open,
}

_TABLES = ('.csv', '.tsv')

# Names of the builders of `datasets` that read these files.
_ROWS = {'.parquet': 'parquet', '.arrow': 'arrow'}

KINDS = ('.jsonl', *_TABLES, '.json', '.ndjson', *_ROWS)
"""Endings of the names of record files. Each may be followed by .gz, .bz2 or
.xz."""

# An escape of half a surrogate pair. The other half usually follows.
_SURROGATE = re.compile(r'\\u[dD][89a-fA-F]')

_SPACE = re.compile(r'[ \t\r\n]*')

_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


class RecordError(ValueError):
  """An error for a record that can be parsed but must not be used."""


class Records(NamedTuple):
  """The records of a file, numbered for errors."""

  unit: str
  """The unit of the numbers: 'line', 'item' (of a JSON list) or 'row'."""
  numbered: Iterator[tuple[int, Record]]
  """Pairs of a number, from 1, and a record."""


def kind_of(path: str) -> str:
  """Returns the ending of a file's name without the ending of a compression.

  >>> kind_of('a/chats.jsonl.gz'), kind_of('a.b/TEXT')
  ('.jsonl', '')
  """
  stem, ending = os.path.splitext(path.lower())
  return os.path.splitext(stem)[1] if ending in _COMPRESSED else ending


def is_compressed(path: str) -> bool:
  """Returns whether `open_bytes` decompresses the file."""
  return os.path.splitext(path.lower())[1] in _COMPRESSED


def open_bytes(path: str) -> IO[bytes]:
  """Opens a file for reading its bytes, decompressed."""
  ending = os.path.splitext(path.lower())[1]
  return _COMPRESSED.get(ending, open)(path, 'rb')


@contextlib.contextmanager
def _open_text(path: str) -> Iterator[io.TextIOWrapper]:
  with open_bytes(path) as file:
    with io.TextIOWrapper(file, 'utf-8-sig', newline='') as text:
      yield text


def is_list(path: str) -> bool:
  """Returns whether a .json file holds a list, not an object per line."""
  if kind_of(path) != '.json':
    return False
  with naming(path), open_bytes(path) as file:
    first = file.read(4096).decode('utf-8-sig', 'replace')
  return first.lstrip().startswith('[')


def has_lines(path: str) -> bool:
  """Returns whether a file is JSON lines that can be read in place.

  A file whose ending does not name another kind counts as JSON lines.
  """
  is_table = kind_of(path) in (*_TABLES, *_ROWS)
  return not (is_compressed(path) or is_table or is_list(path))


def header(path: str) -> list[str]:
  """Returns the column names of a .csv or .tsv file."""
  with naming(path), _open_text(path) as file:
    first = file.readline()
  return next(csv.reader([first], **_dialect(path)), [])


def read(path: str) -> Records:
  """Reads the records of a file.

  Values keep their exact form. In CSV and TSV they are strings. Null values of
  Parquet and Arrow are left out: a column has a null where a record of JSON
  would not have the key.

  Args:
    path: path of the file. Its ending decides the format; files with an ending
      that is not in `KINDS` are read as JSON lines.

  Raises:
    ImportError: Parquet needs the package `datasets`.
    ValueError: while iterating, if a record or the file cannot be read. The
      message names the file and the line, item or row.
  """
  kind = kind_of(path)
  if kind in _ROWS:
    return Records('row', enumerate(_rows(path, _ROWS[kind]), 1))
  if kind in _TABLES:
    return Records('line', _table(path))
  if is_list(path):
    return Records('item', _items(path))
  return Records('line', _lines(path))


def parse_object(content: bytes) -> Record:
  """Parses the JSON object in UTF-8 bytes.

  Raises:
    ValueError: the bytes are not UTF-8, not JSON, nested too deep or not an
      object, or contain a string that is not Unicode text.

  >>> parse_object(b'{"text": "0012"}')
  {'text': '0012'}
  """
  return _object(parse_json(content.decode('utf-8-sig')))


def parse_json(text: str) -> Any:
  """Parses a JSON text.

  Raises:
    ValueError: the text is not JSON, nested too deep, or has a string that is
      not Unicode text.
  """
  with _readable():
    found = json.loads(text)
    if _SURROGATE.search(text):
      json.dumps(found, ensure_ascii=False).encode()
    return found


def dump(record: Record) -> bytes:
  """Returns a record as JSON that `parse_object` can parse."""
  return json.dumps(record, ensure_ascii=False).encode()


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
  """Names the file in errors that a library raises for damaged files."""
  try:
    yield
  except (*_DAMAGED, UnicodeDecodeError, csv.Error) as error:
    raise ValueError(
      f'{path} cannot be read ({type(error).__name__}: {error}): copy or '
      'convert it again'
    ) from error
  except OSError as error:
    # For damaged data bz2 raises an OSError without a number.
    if error.errno is not None:
      raise
    raise ValueError(
      f'{path} cannot be read ({error}): copy or convert it again'
    ) from error


@contextlib.contextmanager
def _readable() -> Iterator[None]:
  """Turns every error of the JSON parser into a short ValueError."""
  try:
    yield
  except RecursionError as error:
    raise ValueError('JSON is nested too deep') from error
  except UnicodeEncodeError as error:
    raise ValueError(
      'a string has half a surrogate pair '
      f'({error.object[error.start : error.end]!a}), which is not Unicode text'
    ) from error
  except ValueError as error:
    raise ValueError(f'no JSON ({error})') from error


def _object(value: Any) -> Record:
  if not isinstance(value, dict):
    raise ValueError(f'must be a JSON object, got {value!r:.40}')
  return value


def _lines(path: str) -> Iterator[tuple[int, Record]]:
  with naming(path), open_bytes(path) as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        record = parse_object(line)
      except ValueError as error:
        raise ValueError(
          f'{path}, line {number}: {error}: correct or remove it'
        ) from error
      yield number, record


def _items(path: str) -> Iterator[tuple[int, Record]]:
  """Yields the objects of a JSON list, with their numbers.

  Each item is parsed by itself, so that an error names the item.
  """
  with naming(path), open_bytes(path) as file:
    text = file.read().decode('utf-8-sig')
  at = _skip_space(text, text.index('[') + 1)
  if text[at : at + 1] == ']':
    return
  for number in itertools.count(1):
    try:
      record, at = _item(text, at)
    except ValueError as error:
      raise ValueError(
        f'{path}, item {number}: {error}: correct or remove it'
      ) from error
    yield number, record
    if text[at] == ']':
      break
    at = _skip_space(text, at + 1)
  if text[at + 1 :].strip():
    raise ValueError(
      f'{path}: text follows the list: remove it, or name the file .jsonl if '
      'it holds an object in each line'
    )


def _item(text: str, start: int) -> tuple[Record, int]:
  """Parses an item of a list; returns it and the offset of the mark after it.

  The mark is a comma, or the bracket that closes the list.
  """
  with _readable():
    found, stop = json.JSONDecoder().raw_decode(text, start)
    json.dumps(found, ensure_ascii=False).encode()
  record = _object(found)
  stop = _skip_space(text, stop)
  mark = text[stop : stop + 1]
  if mark not in (',', ']'):
    raise ValueError(f'a comma or "]" must follow the item, got {mark!r}')
  return record, stop


def _skip_space(text: str, start: int) -> int:
  found = _SPACE.match(text, start)
  return start if found is None else found.end()


def _dialect(path: str) -> dict[str, Any]:
  """Returns the arguments of `csv.reader` for a file.

  Quotes have no meaning in .tsv files, because texts in GLUE's contain them.
  """
  if kind_of(path) == '.tsv':
    return {'delimiter': '\t', 'quoting': csv.QUOTE_NONE}
  return {}


def _table(path: str) -> Iterator[tuple[int, Record]]:
  csv.field_size_limit(sys.maxsize)
  with naming(path), _open_text(path) as file:
    reader = csv.DictReader(file, **_dialect(path))
    for record in reader:
      if None in record or None in record.values():
        raise ValueError(
          f'{path}, line {reader.line_num}: must have '
          f'{len(reader.fieldnames or ())} columns, as the first line has; '
          'correct it'
        )
      yield reader.line_num, record


def _rows(path: str, builder: str) -> Iterator[Record]:
  """Streams the rows of a Parquet or Arrow file, without a copy on the disk."""
  datasets = _datasets(path)
  # `datasets` writes lock files into its cache even when it streams.
  with tempfile.TemporaryDirectory() as cache:
    try:
      stream = datasets.load_dataset(
        builder,
        data_files=glob.escape(os.path.abspath(path)),
        split='train',
        streaming=True,
        cache_dir=cache,
      )
      tables = stream.with_format('arrow').iter(batch_size=1000)
      for table in tables:
        yield from map(_exact, table.to_pylist())
    # `datasets` raises errors of many types.
    except Exception as error:
      raise ValueError(
        f'{path} cannot be read as {builder.capitalize()} '
        f'({type(error).__name__}: {str(error)[:200]}): write it again'
      ) from error


def _datasets(path: str) -> Any:
  """Imports the library `datasets` with its use of the network turned off."""
  names = ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE')
  before = {name: os.environ.get(name) for name in names}
  os.environ.update(dict.fromkeys(names, '1'))
  try:
    # This import takes seconds, which other kinds of files need not spend.
    import datasets
  except ImportError as error:
    raise ImportError(
      f'{path} needs the package datasets, which is not installed: pip install '
      "'galore-optax[data]'"
    ) from error
  finally:
    for name, value in before.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value
  return datasets


def _exact(value: Any) -> Any:
  """Returns a value of Arrow in its JSON form.

  Null fields, and bytes that are not UTF-8 text, are left out.
  """
  if isinstance(value, dict):
    pairs = ((str(name), _exact(x)) for name, x in value.items())
    return {name: x for name, x in pairs if x is not None}
  if isinstance(value, list | tuple):
    return [_exact(x) for x in value]
  if isinstance(value, bytes):
    try:
      return value.decode()
    except UnicodeDecodeError:
      return None
  if isinstance(value, datetime.date | datetime.time):
    return value.isoformat()
  if isinstance(value, datetime.timedelta | decimal.Decimal):
    return str(value)
  return value


class Spool:
  """A temporary file that records are copied to, for random access.

  The file is in the directory of `tempfile.gettempdir()`, which TMPDIR sets. It
  is deleted when the process ends.
  """

  def __init__(self) -> None:
    """Opens an empty file."""
    self._file = tempfile.TemporaryFile(buffering=0)
    self._size = 0

  def append(self, content: bytes) -> int:
    """Writes bytes at the end, and returns the offset of the first one."""
    start = self._size
    view = memoryview(content)
    while view:
      written = os.pwrite(self._file.fileno(), view, self._size)
      view = view[written:]
      self._size += written
    return start

  def read(self, start: int, stop: int) -> bytes:
    """Returns the bytes between two offsets. It is thread-safe."""
    parts: list[bytes] = []
    while start < stop:
      parts.append(os.pread(self._file.fileno(), stop - start, start))
      start += len(parts[-1])
    return b''.join(parts)

  def close(self) -> None:
    """Closes the file, which deletes it."""
    self._file.close()


@functools.cache
def spool() -> Spool:
  """Returns the spool of this process, which is created by the first call."""
  found = Spool()
  atexit.register(found.close)
  return found
