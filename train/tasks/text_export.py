"""Writes the tokenizer and related files of an exported text model."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from train.data.pretrained import CLOCK, TEMPLATE
from train.data.tokenizer import Tokenizer
from train.engine.run import Run
from train.tasks.text import stored_tokenizer


def write_tokenizer(run: pathlib.Path, directory: pathlib.Path) -> Tokenizer:
  """Adds a run's tokenizer to an export, and returns it.

  The tokenizer of a checkpoint has been copied already.
  """
  tokenizer = stored_tokenizer(run)
  if Run(run).source() is None:
    tokenizer.save(directory)
    # Remove the run's fixed date: other programs render chats with today's.
    (directory / CLOCK).unlink(missing_ok=True)
  return tokenizer


def write_language(
  run: pathlib.Path, directory: pathlib.Path, *, is_chat: bool
) -> None:
  """Writes tokenizer, chat template and the tokens that end a text.

  generation_config.json lists all tokens that end a text. If the run was
  trained on chats, the tokenizer's EOS is the token that ends an answer.

  Args:
    run: directory of the run.
    directory: the exported checkpoint.
    is_chat: whether the run was trained on answers of chats.
  """
  tokenizer = write_tokenizer(run, directory)
  # The run's template may differ from the template of the checkpoint.
  template = tokenizer.files.get(TEMPLATE)
  if template is not None and Run(run).source() is not None:
    (directory / TEMPLATE).write_bytes(template)
  write_ends(directory, tokenizer, is_chat=is_chat)


def write_ends(
  directory: pathlib.Path, tokenizer: Tokenizer, *, is_chat: bool
) -> None:
  """Writes the tokens that end a text to the files that list them.

  Args:
    directory: an exported checkpoint.
    tokenizer: the run's tokenizer.
    is_chat: whether the run was trained on answers of chats.
  """
  ids = list(tokenizer.stop_ids)
  template = tokenizer.chat_template
  end = template.end_of_turn if is_chat and template is not None else None
  if end is not None:
    first = tokenizer.specials[end]
    ids = [first, *(i for i in ids if i != first)]
    name = 'tokenizer_config.json'
    change(directory / name, {'eos_token': end}, make=end != eos_of(tokenizer))
    change(directory / 'special_tokens_map.json', {'eos_token': end})
    if first not in ids_of(directory / 'config.json'):
      change(directory / 'config.json', {'eos_token_id': first})
  path = directory / 'generation_config.json'
  if set(ids) != ids_of(path):
    found = ids if len(ids) > 1 else ids[0]
    change(path, {'eos_token_id': found}, make=True)


def eos_of(tokenizer: Tokenizer) -> str | None:
  """Returns the text of the tokenizer's EOS token."""
  for text, token in tokenizer.specials.items():
    if token == tokenizer.eos_id:
      return text
  return None


def ids_of(path: pathlib.Path) -> set[int]:
  """Returns the token ids that end a text, according to a JSON file."""
  found = fields_of(path).get('eos_token_id')
  if found is None:
    return set()
  return set(found) if isinstance(found, list) else {found}


def fields_of(path: pathlib.Path) -> dict[str, Any]:
  """Returns the fields of a JSON file; none if the file does not exist."""
  return json.loads(path.read_bytes()) if path.is_file() else {}


def change(
  path: pathlib.Path, fields: Mapping[str, Any], *, make: bool = False
) -> None:
  """Changes fields of a JSON file; does not write the file if nothing changes.

  Args:
    path: the file.
    fields: new values. If the old value is an object that describes a token,
      only its text changes.
    make: whether to add missing fields, and to create a missing file.
  """
  found = fields_of(path)
  new = {}
  for name, value in fields.items():
    old = found.get(name)
    if isinstance(old, dict) and isinstance(value, str):
      value = {**old, 'content': value}
    if value != old and (name in found or make):
      new[name] = value
  if new:
    path.write_text(json.dumps(found | new, indent=2) + '\n')
