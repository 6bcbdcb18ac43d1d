"""Tokenizers and chat templates agree with transformers on the same files."""

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
  added,
  write,
  write_other,
  write_sentencepiece,
  write_settings,
)
from train.data.chats import Chats  # noqa: E402
from train.data.template import ChatTemplate  # noqa: E402
from train.data.tokenizer import load, train_tokenizer  # noqa: E402
from train.tasks.text_export import write_ends  # noqa: E402

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
  """Returns our tokenizer, transformers' tokenizer, and messages to render."""
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
    # Without the template's generation marks, we find the same scored tokens.
    ChatTemplate(CHATML, ours.tokens, ours.specials),
  ):
    ids_n, scored_n = ours.encode_pieces(template.pieces(messages, scored))
    assert ids_n.tolist() == expected['input_ids']
    np.testing.assert_array_equal(scored_n, expected['assistant_masks'])


def test_bos_is_the_token_that_transformers_prepends(tmp_path):
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


_LLAMA = {
  **{'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>'},
  'tokenizer_class': 'LlamaTokenizer',
}
_ANY = {name: x for name, x in _LLAMA.items() if name != 'tokenizer_class'}
_TURNS = {'user_defined_symbols': ['<|im_start|>', '<|im_end|>']}
_TURN = '<|im_end|>'

# Values are: settings in tokenizer_config.json, options of the SentencePiece
# trainer, and the model_type.
_PIECES = {
  'legacy': (_LLAMA | {'legacy': True}, {}, 'llama'),
  'not legacy': (_LLAMA | {'legacy': False}, {}, 'llama'),
  'legacy unsaid': (_LLAMA, {}, 'llama'),
  'fast': (
    _LLAMA | {'tokenizer_class': 'LlamaTokenizerFast', 'legacy': False},
    *({}, 'llama'),
  ),
  'no space': (_LLAMA | {'add_prefix_space': False}, {}, 'llama'),
  'no space in the model': (_LLAMA, {'add_dummy_prefix': False}, 'llama'),
  'user-defined': (_LLAMA | {'legacy': False}, _TURNS, 'llama'),
  'user-defined, legacy': (_LLAMA | {'legacy': True}, _TURNS, 'llama'),
  'user-defined and named': (
    _LLAMA | {'extra_special_tokens': _TURNS['user_defined_symbols']},
    *(_TURNS, 'llama'),
  ),
  'another class, legacy': (_LLAMA | {'legacy': True}, _TURNS, 'mistral'),
  'another class': (_LLAMA | {'legacy': False}, _TURNS, 'mistral'),
  'no class': (_ANY, _TURNS, 'llama'),
  'no class, not legacy': (_ANY | {'legacy': False}, {}, 'llama'),
  'no class, no space': (_ANY, {'add_dummy_prefix': False}, 'llama'),
  'no settings': (None, {}, 'llama'),
  'added': (
    _LLAMA | added({'<|im_start|>': {}, _TURN: {}}) | {'legacy': False},
    *({}, 'llama'),
  ),
  'added, legacy': (
    _LLAMA | added({'<|im_start|>': {}, _TURN: {}}) | {'legacy': True},
    *({}, 'llama'),
  ),
  'takes space after': (_LLAMA | added({_TURN: {'rstrip': True}}), {}, 'llama'),
  'takes space before': (
    _LLAMA | added({_TURN: {'lstrip': True}}),
    *({}, 'llama'),
  ),
  'a word': (
    _LLAMA | added({'tool': {'single_word': True, 'special': False}}),
    *({}, 'llama'),
  ),
  'not special': (_LLAMA | added({'<tool>': {'special': False}}), {}, 'llama'),
  'the end is added': (
    _LLAMA | added({_TURN: {}}) | {'eos_token': _TURN},
    *({}, 'llama'),
  ),
  'normalized': (
    _ANY,
    {
      'normalization_rule_name': 'nmt_nfkc',
      'remove_extra_whitespaces': True,
    },
    'llama',
  ),
  'unigram': (None, {'model_type': 'unigram'}, 'llama'),
  'unigram, not legacy': (
    _ANY | {'legacy': False},
    *({'model_type': 'unigram'}, 'llama'),
  ),
}
_PIECE_TEXTS = (
  *('', ' ', 'The dog', ' The dog', '  two', '\n a', 'a\u2581b', '\u2581a'),
  *('<s>The dog</s>The fox', 'a</s> b', 'a</s>  b', '</s>  b', 'dog</s>\nfox'),
  *('<unk>a', 'a<|im_end|>b', 'a <|im_end|>  b', ' <|im_end|> <|im_end|> '),
  *('x <tool> y', 'x<tool>y', 'toolx tool y', 'ta\ufb01'),
  '<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\nHi \u00e9'
  '\U0001f600\u4e2d<|im_end|>',
)


@pytest.mark.parametrize('name', _PIECES)
def test_ids_of_sentencepiece_are_equal(tmp_path, name):
  settings, trainer, model_type = _PIECES[name]
  write_sentencepiece(tmp_path, settings, **trainer)
  config = {'model_type': model_type}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ours = load(tmp_path)
  for text in _PIECE_TEXTS:
    expected = theirs(text, add_special_tokens=False).input_ids
    assert ours.encode(text, special=True).tolist() == expected, text
    assert ours.decode(expected) == theirs.decode(
      expected, skip_special_tokens=True
    )
  assert (ours.vocab_size, ours.eos_id) == (len(theirs), theirs.eos_token_id)


def test_a_vocabulary_of_bert(tmp_path):
  words = '[PAD] [UNK] [CLS] [SEP] [MASK] the lazy dog ##s'.split()
  (tmp_path / 'vocab.txt').write_text('\n'.join(words))
  (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
  ours = load(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  text = 'The lazy dogs'
  expected = theirs(text, add_special_tokens=False).input_ids
  assert ours.encode(text).tolist() == expected == [5, 6, 7, 8]
  assert [ours.bos_id, *expected, ours.eos_id] == theirs(text).input_ids


# For some of these types, transformers replaces parts of the tokenizer.json.
@pytest.mark.parametrize(
  'settings', [{}, {'tokenizer_class': 'LlamaTokenizer'}], ids=['', 'class']
)
@pytest.mark.parametrize('kind', ['bytes', 'metaspace'])
@pytest.mark.parametrize('model_type', ['llama', 'mistral', 'qwen2'])
def test_the_type_of_the_model_counts(tmp_path, model_type, kind, settings):
  if kind == 'bytes':
    write(tmp_path, CHATML, {'bos_token': SPECIALS[1]} | settings)
  else:
    write_other(tmp_path, kind)
    write_settings(tmp_path, {'eos_token': '</s>'} | settings)
  config = tmp_path / 'config.json'
  config.write_text(json.dumps({'model_type': model_type}))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ours = load(tmp_path)
  (tmp_path / 'run').mkdir()
  ours.save(tmp_path / 'run')
  for found in (ours, load(tmp_path / 'run')):
    for text in (*_TEXTS, "it's 2024, isn't it?", 'a<|im_end|> b </s>c'):
      expected = theirs(text, add_special_tokens=False).input_ids
      assert found.encode(text, special=True).tolist() == expected


@pytest.mark.parametrize('model_type', ['llama', 'mistral', 'qwen3'])
def test_transformers_reads_what_is_trained_here(tmp_path, model_type):
  ours = train_tokenizer(DOCUMENTS, vocab_size=320)
  ours.save(tmp_path)
  config = tmp_path / 'config.json'
  config.write_text(json.dumps({'model_type': model_type}))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in _TEXTS:
    assert [ours.bos_id, *ours.encode(text)] == theirs(text).input_ids
  assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, 0)


def test_named_templates_and_files(tmp_path):
  """We find the template in each place where transformers finds it."""
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
def test_transformers_reads_additions_of_a_run_to_a_template(
  tmp_path, template, prompt
):
  """Transformers reads variables and end tokens from the saved template."""
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
    # A value that the caller passes overrides the saved value.
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


@pytest.mark.parametrize('read', ['reasoning_content', 'thinking'])
@pytest.mark.parametrize('key', ['reasoning_content', 'thinking', 'reasoning'])
def test_thoughts_are_rendered_alike(tmp_path, key, read):
  source = CHATML.replace(
    "message['content'] +", f"(message.{read} or '') + message['content'] +"
  )
  messages = [*map(dict, CHAT[1:])]
  messages[-1][key] = 'Hm.'
  write(tmp_path, source)
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  template = load(tmp_path).chat_template
  rendered = template.render(messages)
  assert rendered == theirs.apply_chat_template(messages, tokenize=False)
  assert 'Hm.' in rendered
  flags = [False] * (len(messages) - 1) + [True]
  _, (answer,) = template.answers(messages, flags)
  assert rendered[answer.start :].startswith('Hm.')


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
