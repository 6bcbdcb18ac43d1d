"""Reads records from files: JSON lines, JSON lists, tables, Parquet, text.

A record is a dict. `records` yields the records of all files that a pattern
names, each with its place for errors. `train.data.text_files` gives random
access to them.
"""

import atexit
import bz2
import contextlib
import csv
import datetime
import decimal
import errno
import functools
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple, TypeAlias

from train.data.hub import import_offline

Record: TypeAlias = dict[str, Any]

_COMPRESSED: dict[str, Callable[..., IO[Any]]] = {
  '.gz': gzip.open,
  '.bz2': bz2.open,
  '.xz': lzma.open,
}

_TABLES = ('.csv', '.tsv')

# An escape of half a surrogate pair. The other half usually follows.
_SURROGATE = re.compile(r'\\u[dD][89a-fA-F]')

_SPACE = re.compile(r'[ \t\r\n]*')

_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)

_FULL = (errno.ENOSPC, errno.EDQUOT)


class RecordError(ValueError):
  """An error for a record that can be parsed but must not be used."""


class Entry(NamedTuple):
  """A record and its place."""

  record: Record
  """The record."""
  path: str
  """Path of the file."""
  number: int
  """Number of the line, item or row, from 1. A record of CSV may have several
  lines; this is the last one."""
  unit: str = 'line'
  """The unit of the number: 'line', 'item' (of a JSON list) or 'row'."""
  raw: bytes | None = None
  """The line or text that the record was parsed from. None if the record is
  not a separate part of the file."""
  start: int | None = None
  """Offset of `raw` in the file, None if the file must be copied for random
  access."""
  is_text: bool = False
  """Whether `raw` is plain text, not JSON."""

  @property
  def place(self) -> str:
    """The place in words, for example file and line."""
    return f'{self.path}, {self.unit} {self.number}'

  @property
  def content(self) -> bytes:
    """The bytes from which `parse_content` makes the record again."""
    if self.raw is not None:
      return self.raw
    return json.dumps(self.record, ensure_ascii=False).encode()


def records(
  pattern: str, *, plain_text: bool = False, separator: str | None = None
) -> Iterator[Entry]:
  r"""Yields the records of one or several files, in order.

  The ending of a file's name decides its format:

    .json               a JSON list of objects, or JSON lines
    .csv, .tsv          the first line names the columns; .tsv has no quotes
    .parquet, .arrow    rows, read by the package `datasets`, which works
                        offline and leaves no cache
    any other           JSON lines: an object on each line that is not blank

  Each ending may be followed by .gz, .bz2 or .xz. Files are read as they are
  consumed; only JSON lists and plain text are read into memory as a whole.

  Values keep their exact form. Cells of CSV and TSV are strings, so `0012` and
  `NA` stay as they are. Dates in JSON are strings, and dates in Parquet become
  strings in ISO format. Fields of Parquet and Arrow that are null are left out,
  because a column has a null where a JSON object would not have the key.

  Args:
    pattern: path of a file, or a glob, whose files are read in sorted order.
    plain_text: whether files that hold no records of texts are plain text. They
      are files with an ending that is not in the list above, tables without a
      column 'text', and .json files that are not a list. Each document of a
      plain text file is a record {'text': document}.
    separator: text between the documents of a plain text file; None or '' makes
      the file one document. Its newlines also match '\r\n'.

  Yields:
    Each record with its file and the number of its line, item or row.

  Raises:
    FileNotFoundError: no file matches.
    ImportError: Parquet and Arrow need the package `datasets`.
    OSError: Parquet or Arrow needs more space for temporary files.
    ValueError: a record or a file cannot be read. The message names the file,
      and the line, item or row.

  >>> with tempfile.TemporaryDirectory() as directory:
  ...   path = os.path.join(directory, 'a.csv')
  ...   with open(path, 'w') as file:
  ...     _ = file.write('text,label\n0012,NA\n')
  ...   [(entry.record, entry.unit, entry.number) for entry in records(path)]
  [({'text': '0012', 'label': 'NA'}, 'line', 2)]
  """
  for path in expand(pattern):
    if plain_text and not _has_texts(path):
      yield from _documents(path, separator)
      continue
    read = READERS.get(kind_of(path), _lines)
    yield from read(path)


def expand(pattern: str) -> list[str]:
  """Returns the files of a path or glob, sorted.

  Raises:
    FileNotFoundError: no file matches.
  """
  pattern = os.path.expanduser(pattern)
  found = [pattern] if os.path.exists(pattern) else []
  found = found or sorted(glob.glob(pattern, recursive=True))
  paths = [path for path in found if os.path.isfile(path)]
  if not paths:
    raise FileNotFoundError(
      f'no file matches {pattern!r}: give the path of a text file, or a quoted '
      "glob such as 'corpus/**/*.jsonl'"
    )
  return paths


def kind_of(path: str) -> str:
  """Returns the ending of a file's name without the ending of a compression.

  >>> kind_of('a/chats.jsonl.gz'), kind_of('a.b/TEXT')
  ('.jsonl', '')
  """
  stem, ending = os.path.splitext(path.lower())
  return os.path.splitext(stem)[1] if ending in _COMPRESSED else ending


def parse_content(content: bytes, *, is_text: bool) -> Record:
  """Returns the record of an entry from its content.

  Args:
    content: `Entry.content`.
    is_text: `Entry.is_text`.
  """
  return {'text': content.decode()} if is_text else parse_object(content)


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


def _is_compressed(path: str) -> bool:
  return os.path.splitext(path.lower())[1] in _COMPRESSED


def _open_bytes(path: str) -> IO[bytes]:
  """Opens a file for reading its bytes, decompressed."""
  ending = os.path.splitext(path.lower())[1]
  return _COMPRESSED.get(ending, open)(path, 'rb')


@contextlib.contextmanager
def _open_text(path: str) -> Iterator[io.TextIOWrapper]:
  with _open_bytes(path) as file:
    with io.TextIOWrapper(file, 'utf-8-sig', newline='') as text:
      yield text


def _is_list(path: str) -> bool:
  """Returns whether a .json file holds a list, not an object per line."""
  if kind_of(path) != '.json':
    return False
  with _naming(path), _open_bytes(path) as file:
    first = file.read(4096).decode('utf-8-sig', 'replace')
  return first.lstrip().startswith('[')


def _has_texts(path: str) -> bool:
  """Returns whether a file has records, and a table a column 'text'."""
  kind = kind_of(path)
  if kind in _TABLES:
    with _naming(path), _open_text(path) as file:
      first = file.readline()
    return 'text' in next(csv.reader([first], **_dialect(path)), [])
  if kind == '.json':
    return _is_list(path)
  return kind in READERS


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
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


def _list_or_lines(path: str) -> Iterator[Entry]:
  """Yields the objects of a .json file, which is a list or JSON lines."""
  yield from _items(path) if _is_list(path) else _lines(path)


def _lines(path: str) -> Iterator[Entry]:
  """Yields the objects of JSON lines.

  They are parsed one by one: `load_dataset('json')` would turn the string
  "2024-01-02" into a date, add missing keys, and lose the numbers of lines.
  """
  is_copied = _is_compressed(path)
  start = 0
  with _naming(path), _open_bytes(path) as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        try:
          record = parse_object(line)
        except ValueError as error:
          raise ValueError(
            f'{path}, line {number}: {error}: correct or remove it'
          ) from error
        if is_copied:
          yield Entry(record, path, number)
        else:
          yield Entry(record, path, number, raw=line, start=start)
      start += len(line)


def _items(path: str) -> Iterator[Entry]:
  """Yields the objects of a JSON list.

  Each item is parsed by itself, so that an error names the item.
  """
  with _naming(path), _open_bytes(path) as file:
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
    yield Entry(record, path, number, 'item')
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


def _cells(path: str) -> Iterator[Entry]:
  """Yields the rows of a table; cells are strings.

  `load_dataset('csv')` would turn 0012 into 12 and NA into null.
  """
  csv.field_size_limit(sys.maxsize)
  with _naming(path), _open_text(path) as file:
    reader = csv.DictReader(file, **_dialect(path))
    for record in reader:
      if None in record or None in record.values():
        raise ValueError(
          f'{path}, line {reader.line_num}: must have '
          f'{len(reader.fieldnames or ())} columns, as the first line has; '
          'correct it'
        )
      yield Entry(record, path, reader.line_num)


def _documents(path: str, separator: str | None) -> Iterator[Entry]:
  """Yields the documents between separators, stripped of white space."""
  is_copied = _is_compressed(path)
  with _naming(path), _open_bytes(path) as file:
    content = file.read()
  start = 0
  counted = 0
  number = 1
  ends = (match.span() for match in _separator(separator).finditer(content))
  for stop, after in itertools.chain(ends, [(len(content), len(content))]):
    part = content[start:stop]
    raw = part.strip()
    if raw:
      start += len(part) - len(part.lstrip())
      number += content.count(b'\n', counted, start)
      counted = start
      record = _document(path, raw, start)
      offset = None if is_copied else start
      yield Entry(record, path, number, raw=raw, start=offset, is_text=True)
    start = after


def _document(path: str, raw: bytes, start: int) -> Record:
  try:
    return parse_content(raw, is_text=True)
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{path} must be UTF-8 text, got byte {raw[error.start]:#04x} at '
      f'offset {start + error.start}: convert it, or leave it out of the glob'
    ) from error


def _separator(separator: str | None) -> re.Pattern[bytes]:
  """Returns a pattern of the separator, for both conventions of newlines.

  Without a separator, the pattern never matches.
  """
  if not separator:
    return re.compile(rb'(?!)')
  return re.compile(
    rb'\r?\n'.join(map(re.escape, separator.encode().split(b'\n')))
  )


def _rows(path: str) -> Iterator[Entry]:
  """Streams the rows of a Parquet or Arrow file.

  Nothing is left on the disk: `datasets` writes lock files into its cache even
  when it streams, and a compressed file is decompressed to a temporary one.
  """
  datasets = _datasets(path)
  # Its builders are named after the endings.
  builder = kind_of(path).removeprefix('.')
  numbers = itertools.count(1)
  try:
    with tempfile.TemporaryDirectory() as scratch:
      stream = datasets.load_dataset(
        builder,
        data_files=glob.escape(_decompressed(path, scratch)),
        split='train',
        streaming=True,
        cache_dir=scratch,
      )
      for table in stream.with_format('arrow').iter(batch_size=1000):
        for row, number in zip(table.to_pylist(), numbers, strict=False):
          yield Entry(_exact(row), path, number, 'row')
  # `datasets` raises errors of many types.
  except Exception as error:
    if _is_full(error):
      raise no_space(path, error) from error
    reason = ' '.join(str(error).split())[:200]
    raise ValueError(
      f'{path} cannot be read as {builder.capitalize()} '
      f'({type(error).__name__}: {reason}): write it again'
    ) from error


def _decompressed(path: str, scratch: str) -> str:
  """Returns the path of a file, or of its decompressed copy in `scratch`."""
  if not _is_compressed(path):
    return os.path.abspath(path)
  copied = os.path.join(scratch, f'decompressed{kind_of(path)}')
  with _open_bytes(path) as source, open(copied, 'wb') as target:
    shutil.copyfileobj(source, target)
  return copied


def _datasets(path: str) -> Any:
  """Imports the library `datasets`, which takes seconds."""
  datasets = import_offline('datasets', path)
  # It would print each error before it raises it.
  datasets.logging.set_verbosity(datasets.logging.CRITICAL)
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


def _is_full(error: BaseException | None) -> bool:
  """Returns whether the cause of an error is a full disk."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in _FULL:
      return True
    error = error.__cause__ or error.__context__
  return False


def no_space(path: str, error: Exception) -> OSError:
  """Returns the error for a file that cannot be copied for random access."""
  where = tempfile.tempdir or os.environ.get('TMPDIR') or '/tmp'
  reason = error.strerror if isinstance(error, OSError) else str(error)
  return OSError(
    f'{path} cannot be copied to the directory for temporary files, {where} '
    f'({reason}): set TMPDIR to a directory with more space, or convert the '
    'file to uncompressed JSON lines, which need no copy'
  )


READERS: dict[str, Callable[[str], Iterator[Entry]]] = {
  '.jsonl': _lines,
  '.csv': _cells,
  '.tsv': _cells,
  '.json': _list_or_lines,
  '.ndjson': _lines,
  '.parquet': _rows,
  '.arrow': _rows,
}
"""Endings of the names of record files, to the function that reads such a file.
Each may be followed by .gz, .bz2 or .xz."""


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
