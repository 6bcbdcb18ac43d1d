"""Random access to the documents in files, by an index of byte offsets.

A document is a part of a plain text file, or a record (`train.data.records`)
that the caller parses.

Shapes: d documents of a file.
"""

import dataclasses
import glob
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from train.data import records
from train.data.records import Record, RecordError


@dataclasses.dataclass(frozen=True)
class File:
  """The places of the documents in one file."""

  path: str
  """Path of the file."""
  starts_d: np.ndarray
  """[d] int64, offset of the first byte of each document."""
  stops_d: np.ndarray
  """[d] int64, offset past the last byte."""
  crcs_d: np.ndarray
  """[d] int64, CRC-32 of the bytes."""
  numbers_d: np.ndarray
  """[d] int64, number of the line, item or row, from 1, for errors."""
  parse: Callable[[bytes], Any]
  """Converts the bytes of a document into the document."""
  unit: str = 'line'
  """The unit of the numbers: 'line', 'item' or 'row'."""
  is_copied: bool = False
  """Whether the offsets are those of a copy in `train.data.records.spool`."""

  def read(self, i: int) -> Any:
    """Reads document i.

    Raises:
      OSError: the file has changed or does not exist.
    """
    start = int(self.starts_d[i])
    stop = int(self.stops_d[i])
    if self.is_copied:
      return self.parse(records.spool().read(start, stop))
    with open(self.path, 'rb') as file:
      file.seek(start)
      content = file.read(stop - start)
    if zlib.crc32(content.strip()) != self.crcs_d[i]:
      raise OSError(
        f'{self.path} has changed since it was opened: other bytes at offset '
        f'{start:,}; put the old file back, or start a new run with it'
      )
    return self.parse(content)

  def place(self, i: int) -> str:
    """Returns the place of document i in words, for example file and line."""
    return f'{self.path}, {self.unit} {self.numbers_d[i]}'

  def where(self, keep: Callable[[np.ndarray], np.ndarray]) -> 'File':
    """Returns the documents for which the mask `keep(crcs_d)` is true."""
    kept_d = keep(self.crcs_d)
    return dataclasses.replace(
      self,
      starts_d=self.starts_d[kept_d],
      stops_d=self.stops_d[kept_d],
      crcs_d=self.crcs_d[kept_d],
      numbers_d=self.numbers_d[kept_d],
    )


class Texts:
  """Documents of several files, as a random-access source for grain."""

  def __init__(self, files: Iterable[File]) -> None:
    """Concatenates the documents of files."""
    self._files = tuple(files)
    self._stops = np.cumsum([len(file.starts_d) for file in self._files])

  def __len__(self) -> int:
    """Number of documents."""
    return int(self._stops[-1])

  def __getitem__(self, index: int) -> Any:
    """Reads a document from its file."""
    file, i = self._at(index)
    return file.read(i)

  def place(self, index: int) -> str:
    """Returns the place of a document in words, for example file and line."""
    file, i = self._at(index)
    return file.place(i)

  def where(self, keep: Callable[[np.ndarray], np.ndarray]) -> 'Texts':
    """Returns the documents for which the mask `keep(crcs_d)` is true."""
    return Texts(file.where(keep) for file in self._files)

  def _at(self, index: int) -> tuple[File, int]:
    """Returns the file of a document, and the document's index in it."""
    f = int(np.searchsorted(self._stops, index, side='right'))
    # The second value is a negative index: document stops[f] - 1 is the last
    # one of file f, at index -1.
    return self._files[f], index - int(self._stops[f])


class _Span(NamedTuple):
  """The place of a document."""

  start: int
  """Offset of the first byte."""
  stop: int
  """Offset past the last byte."""
  crc: int
  """CRC-32 of the bytes."""
  number: int
  """Number of the line, item or row, from 1."""


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


def index(path: str, separator: str | None) -> File:
  """Indexes the documents of a file, and checks that each can be read.

  Args:
    path: path of the file. Records must have a field "text". A .csv or .tsv
      file has records if its first line names a column "text", and a .json file
      if it holds a list. Any other file is plain text.
    separator: text between the documents of a plain text file; None makes the
      file one document.

  Raises:
    ImportError: Parquet needs the package `datasets`.
    ValueError: the file or a record cannot be read. The message names it.
  """
  if _has_texts(path):
    rule = 'a record must be a JSON object whose field "text" is a string'
    return index_records(path, _text_of_record, rule)
  with records.naming(path), records.open_bytes(path) as file:
    content = file.read()
  is_copied = records.is_compressed(path)
  spans = (
    _copied(span, text) if is_copied else span
    for span, text in _parts(path, content, separator)
  )
  return _file(path, spans, bytes.decode, is_copied=is_copied)


def index_records(
  path: str,
  parse: Callable[[Record], Any],
  rule: str,
  seen: Callable[[Record, Any, str], None] | None = None,
) -> File:
  """Indexes the records of a file, and checks that each can be parsed.

  Args:
    path: path of the file.
    parse: converts a record into a document. If the document is false, the
      record is left out. Blank lines are left out too.
    rule: the required form of a record, for the error that names file and line.
    seen: called with each record, its document and its place.

  Raises:
    ImportError: Parquet needs the package `datasets`.
    ValueError: a record cannot be read, or `parse` raises ValueError, KeyError,
      TypeError or AttributeError.
  """
  is_copied = not records.has_lines(path)
  unit = 'line'
  if is_copied:
    unit, numbered = records.read(path)
    found = _dumped(numbered)
  else:
    found = _lines(path)

  def spans() -> Iterator[_Span]:
    for span, content in found:
      place = f'{path}, {unit} {span.number}'
      record, item = _checked(parse, content, place, rule)
      if seen is not None:
        seen(record, item, place)
      if item:
        yield _copied(span, content) if is_copied else span

  return _file(
    path,
    spans(),
    lambda content: parse(records.parse_object(content)),
    unit=unit,
    is_copied=is_copied,
  )


def _file(
  path: str,
  spans: Iterable[_Span],
  parse: Callable[[bytes], Any],
  **options: Any,
) -> File:
  table = np.array(list(spans), np.int64).reshape(-1, 4)
  starts_d, stops_d, crcs_d, numbers_d = table.T
  return File(path, starts_d, stops_d, crcs_d, numbers_d, parse, **options)


def _lines(path: str) -> Iterator[tuple[_Span, bytes]]:
  """Yields the place and the bytes of each line that is not blank."""
  start = 0
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      stop = start + len(line)
      if line.strip():
        yield _Span(start, stop, zlib.crc32(line.strip()), number), line
      start = stop


def _dumped(
  numbered: Iterable[tuple[int, Record]],
) -> Iterator[tuple[_Span, bytes]]:
  """Yields each record as JSON, with a place that has no offsets yet."""
  for number, record in numbered:
    content = records.dump(record)
    yield _Span(0, 0, zlib.crc32(content), number), content


def _copied(span: _Span, content: bytes) -> _Span:
  """Copies a document to the spool, and returns its place there."""
  start = records.spool().append(content)
  return span._replace(start=start, stop=start + len(content))


def _checked(
  parse: Callable[[Record], Any], content: bytes, place: str, rule: str
) -> tuple[Record, Any]:
  try:
    record = records.parse_object(content)
    return record, parse(record)
  except RecordError as error:
    raise ValueError(f'{place}: {error}') from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    shown = content[:60].decode('utf-8', 'replace').strip()
    raise ValueError(
      f'{place}: {rule}, got {shown!r} '
      f'({type(error).__name__}: {error}): correct or remove the line'
    ) from error


def _has_texts(path: str) -> bool:
  kind = records.kind_of(path)
  if kind in ('.csv', '.tsv'):
    return 'text' in records.header(path)
  if kind in ('.jsonl', '.ndjson', '.parquet', '.arrow'):
    return True
  return records.is_list(path)


def _text_of_record(record: Record) -> str:
  """Returns the document in a record, '' if it is blank."""
  text = record['text']
  if not isinstance(text, str):
    raise TypeError(f'got {text!r:.40}')
  return text if text.strip() else ''


def _parts(
  path: str, content: bytes, separator: str | None
) -> Iterator[tuple[_Span, bytes]]:
  """Yields the documents between separators, stripped of white space."""
  try:
    content.decode()
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{path} must be UTF-8 text, got byte {content[error.start]:#04x} at '
      f'offset {error.start}: convert it, or leave it out of the glob'
    ) from error
  start = 0
  counted = 0
  number = 1
  ends = [match.span() for match in _separator(separator).finditer(content)]
  for stop, after in [*ends, (len(content), len(content))]:
    part = content[start:stop]
    text = part.strip()
    if text:
      start += len(part) - len(part.lstrip())
      number += content.count(b'\n', counted, start)
      counted = start
      stop = start + len(text)
      yield _Span(start, stop, zlib.crc32(text), number), text
    start = after


def _separator(separator: str | None) -> re.Pattern[bytes]:
  """Returns a pattern of the separator, for both conventions of newlines.

  Without a separator, the pattern never matches.
  """
  if not separator:
    return re.compile(rb'(?!)')
  return re.compile(
    rb'\r?\n'.join(map(re.escape, separator.encode().split(b'\n')))
  )
