"""Reads the tokenizers of checkpoints with transformers.

`read` turns the files of any tokenizer that transformers reads into those of
`train.data.tokenizer.Tokenizer`. A run keeps the converted files, so that its
ids do not depend on the version of transformers.
"""

import codecs
import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

from train.data.hub import import_offline

MODEL = 'tokenizer.json'
"""Name of the file with the vocabulary, in the form of `tokenizers`."""

CONFIG = 'tokenizer_config.json'
"""Name of the file with the special tokens, in the form of transformers."""

GENERATION = 'generation_config.json'
"""Name of the file with the ids that end a text."""

TEMPLATE = 'chat_template.jinja'
"""Name of a file that holds only a chat template."""

CLOCK = 'chat_clock.json'
"""Name of a run's file with the time that its chat template formats."""

OWN = 'galore_optax'
"""The key in tokenizer_config.json that marks files that need no conversion.
Its value is an object: 'whole' lists the ordinary tokens that must not be
split."""

PLAIN_CLASS = 'PreTrainedTokenizerFast'
"""The class of transformers that reads a tokenizer.json as it is."""

_PIECES = 'tokenizer.model'
"""Name of a sentencepiece model."""

_NAMES = 'special_tokens_map.json'
"""Name of a further file with the special tokens."""

_RULE = 'tokenizer_spaces.json'
"""Name of a file beside the sentencepiece model of an older version's run. It
states how transformers would have used the model."""

_VOCABULARIES = (
  *(MODEL, _PIECES, 'vocab.txt', 'vocab.json', 'spiece.model'),
  *('sentencepiece.bpe.model', 'tekken.json', '*.tiktoken'),
)
"""Files of which transformers needs at least one."""

_SETTINGS = (
  *(CONFIG, GENERATION, TEMPLATE, CLOCK, _RULE, 'config.json', 'merges.txt'),
  *(_NAMES, 'added_tokens.json', 'chat_template.json'),
)
"""Further files that affect a tokenizer."""

# Fields of a checkpoint's config.json by which transformers chooses the class
# of the tokenizer.
_CHOICE = (
  *('model_type', 'model_name', '_name_or_path', 'tokenizer_class'),
  'transformers_version',
)

_ENDS = ('bos_token_id', 'eos_token_id')

_USER_DEFINED = 4
"""The type of a piece that a trainer of sentencepiece was given."""


def read(path: pathlib.Path) -> dict[str, bytes]:
  """Returns the contents of a tokenizer's files by name.

  Files of this project are returned as they are. Others are converted.

  Args:
    path: a directory, a tokenizer.json, or a sentencepiece model of any name.

  Raises:
    FileNotFoundError: there is no tokenizer at this path.
    ImportError: a package that converts the files is not installed.
    ValueError: a file is damaged, or transformers cannot read the files.
  """
  directory = path if path.is_dir() else path.parent
  files = _vocabularies(path)
  for name in _SETTINGS:
    if (directory / name).is_file():
      content = (directory / name).read_bytes()
      files[name] = content.removeprefix(codecs.BOM_UTF8)
  with located(directory):
    if MODEL in files and OWN in json_of(files, CONFIG):
      # It is the config of a run or of another model.
      files.pop('config.json', None)
      return files
    for name in (CONFIG, _NAMES):
      files |= _without_blanks(files, name)
    if (directory / 'checkpoints').is_dir():
      files = _of_older_run(files)
    return _converted(files, f'the tokenizer in {str(directory)!r}')


def is_of_first_version(directory: pathlib.Path) -> bool:
  """Returns whether a run put a space behind every special token.

  The first version used every sentencepiece model in this way. Later versions
  stored a rule.
  """
  names = {file.name for file in directory.iterdir()}
  return {_PIECES, CONFIG} <= names and not {MODEL, _RULE} & names


@contextlib.contextmanager
def located(directory: pathlib.Path) -> Iterator[None]:
  """Names the directory in errors about a tokenizer's files."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'the tokenizer in {str(directory)!r}: {error}') from error
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(
      f'the tokenizer in {str(directory)!r}: a field of {", ".join(_SETTINGS)} '
      f'has another form than transformers writes ({type(error).__name__}: '
      f'{error}): copy the directory again'
    ) from error


def json_of(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
  """Returns the JSON object in a file; an empty dict without the file.

  Raises:
    ValueError: the content is not a JSON object.
  """
  content = files.get(name, b'{}')
  try:
    found = json.loads(content.decode())
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{name} is no JSON ({error}): copy the directory again'
    ) from error
  if not isinstance(found, dict):
    raise ValueError(
      f'{name} must be a JSON object, got {content[:40]!r}: copy the directory '
      'again'
    )
  return found


def parsed(model: bytes) -> tokenizers.Tokenizer:
  """Returns the `tokenizers` object of a tokenizer.json.

  It neither truncates nor pads.

  Raises:
    ValueError: the file is damaged, or has no vocabulary.
  """
  try:
    found = tokenizers.Tokenizer.from_str(model.decode())
  # `tokenizers` raises no subclass of Exception.
  except Exception as error:
    remedy = 'copy it again, or save it with the library tokenizers'
    raise ValueError(
      f'{MODEL} cannot be read ({error}): {_pointer(model) or remedy}'
    ) from error
  if not found.get_vocab_size():
    raise ValueError(
      f'{MODEL} has an empty vocabulary: save it again from the library that '
      'trained it'
    )
  # A tokenizer that was last used on batches of one length is saved with these
  # settings.
  found.no_truncation()
  found.no_padding()
  return found


def ids_of(value: int | list[int] | None) -> list[int]:
  """Returns the ids in a field that has one, several or none.

  >>> ids_of(3), ids_of([3, 4]), ids_of(None)
  ([3], [3, 4], [])
  """
  if value is None:
    return []
  return list(value) if isinstance(value, list) else [value]


def _vocabularies(path: pathlib.Path) -> dict[str, bytes]:
  """Returns the vocabulary files at a path."""
  if path.is_file():
    name = MODEL if path.name == MODEL else _PIECES
    files = {name: path}
  elif path.is_dir():
    files = {
      file.name: file
      for pattern in _VOCABULARIES
      for file in sorted(path.glob(pattern))
    }
  else:
    raise FileNotFoundError(
      f'no tokenizer at {str(path)!r}: give the path of a directory, a '
      f'{MODEL} or a sentencepiece model, or none to train one on the corpus'
    )
  if not files:
    raise FileNotFoundError(
      f'no tokenizer in {str(path)!r}: it has neither {MODEL} nor {_PIECES} '
      'nor another vocabulary that transformers reads; copy one of them there, '
      'or name a directory that has one'
    )
  contents = {name: file.read_bytes() for name, file in files.items()}
  if MODEL in contents:
    contents[MODEL] = contents[MODEL].removeprefix(codecs.BOM_UTF8)
  return contents


def _of_older_run(files: dict[str, bytes]) -> dict[str, bytes]:
  """Returns the files of an older version's run with the settings it used.

  Older versions ignored the class that the settings name for a tokenizer.json.
  For a sentencepiece model they kept a rule, because the config.json of a run
  has no model_type.
  """
  config = json_of(files, CONFIG)
  if MODEL in files:
    config['tokenizer_class'] = PLAIN_CLASS
  elif json_of(files, _RULE).get('normalizes'):
    config.pop('tokenizer_class', None)
  return files | {CONFIG: _dumped(config), 'config.json': b'{}'}


def _converted(files: dict[str, bytes], origin: str) -> dict[str, bytes]:
  """Returns the files of a checkpoint's tokenizer in the form of a run.

  Args:
    files: contents by name.
    origin: where the files are from, for the error about a missing package.
  """
  from_pieces = _PIECES in files and MODEL not in files
  known, whole = _known_tokens(files, origin)
  tokenizer = _loaded(files, origin)
  backend = tokenizer.backend_tokenizer
  _check_ids(files, backend)
  # The ids of BOS and EOS in a checkpoint's config.json are kept here, because
  # a run has a config.json of its own.
  model = json_of(files, 'config.json')
  ends = {name: model[name] for name in _ENDS if model.get(name) is not None}
  generation = ends | json_of(files, GENERATION)
  settings = {
    'tokenizer_class': PLAIN_CLASS,
    **_named(files, tokenizer, known, generation),
    OWN: {'whole': whole},
  }
  # Without this setting, a sentencepiece model had BOS before transformers 5.
  adds_bos = json_of(files, CONFIG).get('add_bos_token', from_pieces or None)
  if adds_bos is not None:
    settings['add_bos_token'] = adds_bos
  template = _template(tokenizer, files)
  if template is not None and TEMPLATE not in files:
    settings['chat_template'] = template
  kept = (TEMPLATE, CLOCK, _PIECES) if from_pieces else (TEMPLATE, CLOCK)
  found = {name: files[name] for name in kept if name in files}
  found |= {MODEL: backend.to_str().encode(), CONFIG: _dumped(settings)}
  return found | ({GENERATION: _dumped(generation)} if generation else {})


def _named(
  files: Mapping[str, bytes],
  tokenizer: Any,
  known: set[str] | None,
  generation: Mapping[str, Any],
) -> dict[str, str]:
  """Returns the texts of special tokens by name, such as 'eos_token'.

  Args:
    files: contents by name.
    tokenizer: the tokenizer of transformers.
    known: the tokens of the vocabulary, if known.
    generation: the fields of generation_config.json.

  Raises:
    ValueError: the settings name a token that is not in the vocabulary.
      transformers would give it an id without a row in the embedding.
  """
  declared = json_of(files, _NAMES) | json_of(files, CONFIG)
  found = {
    name: text
    for name, text in tokenizer.special_tokens_map.items()
    if isinstance(text, str)
  }
  for name in ('bos_token', 'eos_token'):
    text = found.get(name)
    if known is not None and text is not None and text not in known:
      if declared.get(name):
        raise ValueError(
          f'the special token {text!r} is not in the vocabulary of '
          f'{MODEL if MODEL in files else _PIECES}: correct {CONFIG}'
        )
      # It is a default of the class in transformers.
      del found[name]
    ids = ids_of(generation.get(f'{name}_id'))
    text = tokenizer.backend_tokenizer.id_to_token(ids[0]) if ids else None
    if text is not None and name not in declared:
      found[name] = text
  return found


def _check_ids(
  files: Mapping[str, bytes], backend: tokenizers.Tokenizer
) -> None:
  """Raises ValueError if transformers gives an added token another id."""
  for text, i in _added(files).items():
    found = backend.token_to_id(text)
    if found != i:
      raise ValueError(
        f'the token {text!r} has the id {i} in the settings and the id {found} '
        f'in transformers: save the tokenizer as a {MODEL} with the ids that '
        'the model was trained with'
      )


def _loaded(files: Mapping[str, bytes], origin: str) -> Any:
  """Returns the tokenizer of transformers for some files."""
  transformers = import_offline('transformers', origin)
  config = json_of(files, CONFIG)
  # The code of a checkpoint's own class is not run.
  config.pop('auto_map', None)
  model = json_of(files, 'config.json')
  model = {name: model[name] for name in _CHOICE if name in model}
  changed = {CONFIG: config, 'config.json': model}
  with tempfile.TemporaryDirectory() as scratch:
    for name, content in files.items():
      (pathlib.Path(scratch) / name).write_bytes(content)
    for name, fields in changed.items():
      (pathlib.Path(scratch) / name).write_bytes(_dumped(fields))
    try:
      found = transformers.AutoTokenizer.from_pretrained(
        scratch, local_files_only=True, trust_remote_code=False
      )
    except (AttributeError, KeyError, TypeError):
      raise
    # The classes of transformers raise errors of many kinds.
    except Exception as error:
      reason = ' '.join(str(error).split())[:200]
      raise ValueError(
        f'transformers cannot read it ({type(error).__name__}: {reason}): copy '
        'the directory again, or name another tokenizer'
      ) from error
  if getattr(found, 'backend_tokenizer', None) is None:
    raise ValueError(
      f'the class {type(found).__name__} of transformers has no {MODEL}: name '
      'another tokenizer'
    )
  return found


def _known_tokens(
  files: Mapping[str, bytes], origin: str
) -> tuple[set[str] | None, list[str]]:
  """Returns the tokens of a vocabulary, and those that must not be split.

  The first value is None for a vocabulary that only transformers can read.
  """
  added = set(_added(files))
  if MODEL in files:
    return added.union(parsed(files[MODEL]).get_vocab()), []
  if not any(name.endswith('.model') for name in files):
    return None, []
  import_offline('sentencepiece', origin)
  pieces = import_offline('sentencepiece.sentencepiece_model_pb2', origin)
  if _PIECES not in files:
    return None, []
  try:
    found = pieces.ModelProto.FromString(files[_PIECES]).pieces
  # The class of this error differs between versions of protobuf.
  except Exception as error:
    remedy = 'copy it again, or name another tokenizer'
    raise ValueError(
      f'it is not a sentencepiece model ({error}): '
      f'{_pointer(files[_PIECES]) or remedy}'
    ) from error
  whole = [x.piece for x in found if x.type == _USER_DEFINED]
  return added.union(x.piece for x in found), whole


def _added(files: Mapping[str, bytes]) -> dict[str, int]:
  """Returns the ids of the tokens that the settings add to a vocabulary."""
  listed = json_of(files, CONFIG).get('added_tokens_decoder')
  if listed is None:
    found = json_of(files, 'added_tokens.json')
  else:
    found = {token['content']: int(i) for i, token in listed.items()}
  return {text: i for text, i in found.items() if text}


def _without_blanks(files: Mapping[str, bytes], name: str) -> dict[str, bytes]:
  """Returns a file of settings without special tokens that have no text.

  The first LLaMA checkpoints have '' for the tokens of the model itself.
  """
  found = {
    key: x
    for key, x in json_of(files, name).items()
    if not (key.endswith('_token') and x == '')
  }
  return {name: _dumped(found)} if name in files else {}


def _template(tokenizer: Any, files: Mapping[str, bytes]) -> str | None:
  """Returns the chat template of a checkpoint, if it has one."""
  source = tokenizer.chat_template
  if source is None:
    # transformers reads this file only for models of images.
    source = json_of(files, 'chat_template.json').get('chat_template')
  return source.get('default') if isinstance(source, dict) else source


def _dumped(fields: Mapping[str, Any]) -> bytes:
  return json.dumps(fields, indent=2).encode()


def _pointer(content: bytes) -> str | None:
  """Returns the remedy for a file that Git LFS has not fetched; else None."""
  if content.startswith(b'version https://git-lfs'):
    return 'it is a pointer: git lfs pull'
  return None
