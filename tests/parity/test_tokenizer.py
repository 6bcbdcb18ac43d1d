"""Tokenizers and chat templates against transformers', on the same files."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import processors

pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from tests.train.data.tiny import (  # noqa: E402
  CHAT,
  CHATML,
  DOCUMENTS,
  GENERATION,
  LLAMA3,
  LLAMA3_SPECIALS,
  MISTRAL,
  MISTRAL_SPECIALS,
  QWEN,
  SPECIALS,
  THINK_OR_NOT,
  TOOLS,
  VICUNA,
  write,
  write_other,
)
from train.data.chats import Chats  # noqa: E402
from train.data.template import ChatTemplate  # noqa: E402
from train.data.tokenizer import load  # noqa: E402
from train.export import write_ends  # noqa: E402

pytestmark = pytest.mark.parity

_CASES = {
  'chatml': (CHATML, SPECIALS),
  'generation': (GENERATION, SPECIALS),
  'qwen': (QWEN, SPECIALS),
  'llama3': (LLAMA3, LLAMA3_SPECIALS),
  'mistral': (MISTRAL, MISTRAL_SPECIALS),
}

_TEXTS = (
  *DOCUMENTS[:2],
  'a\0b  c\t\r\n\n d\u00e9 \u4e2d\u6587 \U0001f600  ',
  '',
)


@pytest.fixture(params=_CASES)
def both(request, tmp_path):
  """Ours, transformers' and the messages that a template takes."""
  template, specials = _CASES[request.param]
  settings = {
    'bos_token': specials[0],
    'eos_token': specials[1],
    'tokenizer_class': 'PreTrainedTokenizerFast',
  }
  write(tmp_path, template, settings, specials)
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  messages = CHAT[1:] if request.param == 'mistral' else CHAT
  return load(tmp_path), theirs, [dict(message) for message in messages]


def test_ids_are_equal(both):
  ours, theirs, _ = both
  for text in _TEXTS:
    expected = theirs(text, add_special_tokens=False).input_ids
    assert ours.encode(text).tolist() == expected
    assert ours.encode(text, special=True).tolist() == expected
    assert ours.decode(expected) == theirs.decode(
      expected, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
  assert (ours.vocab_size, ours.eos_id) == (len(theirs), theirs.eos_token_id)


@pytest.mark.parametrize('prompt', [False, True])
def test_rendered_chats_are_equal(both, prompt):
  ours, theirs, messages = both
  rendered = theirs.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=prompt
  )
  assert rendered == ours.chat_template.render(
    messages, add_generation_prompt=prompt
  )
  expected = theirs.apply_chat_template(
    messages, add_generation_prompt=prompt, return_dict=False
  )
  assert ours.encode(rendered, special=True).tolist() == expected


@pytest.mark.parametrize('both', ['generation'], indirect=True)
def test_scored_tokens_are_equal(both):
  ours, theirs, messages = both
  expected = theirs.apply_chat_template(
    messages, return_dict=True, return_assistant_tokens_mask=True
  )
  scored = [message['role'] == 'assistant' for message in messages]
  for template in (
    ours.chat_template,
    # Without the marks, we find the same.
    ChatTemplate(CHATML, ours.tokens, ours.specials),
  ):
    ids_n, scored_n = ours.encode_pieces(template.pieces(messages, scored))
    assert ids_n.tolist() == expected['input_ids']
    np.testing.assert_array_equal(scored_n, expected['assistant_masks'])


def test_bos_is_what_transformers_puts_in_front(tmp_path):
  write(tmp_path, LLAMA3, {'bos_token': '<|im_start|>'})
  path = str(tmp_path / 'tokenizer.json')
  library = tokenizers.Tokenizer.from_file(path)
  bos = library.token_to_id('<|im_start|>')
  library.post_processor = processors.TemplateProcessing(
    single='<|im_start|> $A', special_tokens=[('<|im_start|>', bos)]
  )
  library.save(path)
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  ours = load(tmp_path)
  for text in _TEXTS:
    assert [ours.bos_id, *ours.encode(text)] == theirs(text).input_ids


@pytest.mark.parametrize('kind', ['metaspace', 'wordpiece'])
def test_other_kinds(tmp_path, kind):
  write_other(tmp_path, kind)
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  ours = load(tmp_path)
  for text in DOCUMENTS:
    expected = theirs(text, add_special_tokens=False).input_ids
    assert ours.encode(text).tolist() == expected


def test_named_templates_and_files(tmp_path):
  """Where a template may be: transformers reads the same one."""
  named = [
    {'name': 'default', 'template': CHATML},
    {'name': 'tool_use', 'template': 'other'},
  ]
  token = {'__type': 'AddedToken', 'content': '<|im_start|>'}
  write(tmp_path, named, {'bos_token': token})
  config = tmp_path / 'tokenizer_config.json'
  messages = [dict(message) for message in CHAT]
  for file in (None, 'chat_template.jinja'):
    if file:
      (tmp_path / file).write_text(LLAMA3)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(messages, tokenize=False)
    assert load(tmp_path).chat_template.render(messages) == expected
  assert json.loads(config.read_text())['chat_template'] == named


@pytest.mark.parametrize('template', [THINK_OR_NOT, VICUNA])
@pytest.mark.parametrize('prompt', [False, True])
def test_what_a_run_adds_to_a_template(tmp_path, template, prompt):
  """Values of variables and an end: transformers reads them in the template."""
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}')
  path = str(tmp_path / 'a.jsonl')
  thinks = template is THINK_OR_NOT
  variables = ('enable_thinking=false',) if thinks else ()
  chats = Chats(path, path, template_variables=variables).open('train')
  ours = chats.templated(load(write(tmp_path, template)))
  ours.save(tmp_path)
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  messages = [dict(message) for message in CHAT]
  kwargs = {'tokenize': False, 'add_generation_prompt': prompt}
  rendered = theirs.apply_chat_template(messages, **kwargs)
  assert rendered == ours.chat_template.render(
    messages, add_generation_prompt=prompt
  )
  if thinks:
    # A value that is given comes before the one that was saved.
    given = {'enable_thinking': True}
    assert theirs.apply_chat_template(messages, **kwargs, **given) == (
      ours.chat_template.render(
        messages, add_generation_prompt=prompt, context=given
      )
    )
    assert rendered.endswith('</think>\n\n') == prompt
  else:
    assert f'The quick brown fox.{SPECIALS[0]}' in rendered


def test_tools_and_calls_are_rendered_alike(tmp_path):
  function = {'name': 'f', 'arguments': {'a': 'caf\u00e9 <b>'}}
  call = {'type': 'function', 'function': function}
  tools = [{'type': 'function', 'function': {'name': 'f', 'parameters': {}}}]
  messages = [
    {'role': 'user', 'content': 'go'},
    {'role': 'assistant', 'content': '', 'tool_calls': [call]},
    {'role': 'tool', 'content': '4'},
  ]
  write(tmp_path, TOOLS)
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  assert load(tmp_path).chat_template.render(
    messages, context={'tools': tools}
  ) == theirs.apply_chat_template(messages, tools=tools, tokenize=False)


def test_transformers_stops_where_an_answer_ends(tmp_path):
  token = {'__type': 'AddedToken', 'content': SPECIALS[0], 'special': True}
  write(tmp_path, CHATML, {'eos_token': token, 'pad_token': SPECIALS[0]})
  settings = {'eos_token': SPECIALS[0], 'pad_token': SPECIALS[0]}
  (tmp_path / 'special_tokens_map.json').write_text(json.dumps(settings))
  ours = load(tmp_path)
  write_ends(tmp_path, ours, is_chat=True)
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  assert (theirs.eos_token, theirs.pad_token) == ('<|im_end|>', SPECIALS[0])
  generation = transformers.GenerationConfig.from_pretrained(tmp_path)
  assert generation.eos_token_id == [
    ours.specials[x] for x in ('<|im_end|>', SPECIALS[0])
  ]
