"""Tiny tokenizers as files of a checkpoint, with chat templates of real models.

The tests of chats and the parity tests use them too.
"""

import io
import json

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXT = 'The quick brown fox jumps over the lazy dog, said the other dog.'
DOCUMENTS = [f'{TEXT}\nLine {i} of many: {i * i}.' for i in range(50)]

SPECIALS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
LLAMA3_SPECIALS = (
  *('<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>'),
  *('<|start_header_id|>', '<|end_header_id|>'),
)
MISTRAL_SPECIALS = ('<s>', '</s>')

CHATML = (
  "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
  "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

GENERATION = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
  "{% if message['role'] == 'assistant' %}{% generation %}"
  "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
  "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
  '{% endfor %}{% if add_generation_prompt %}'
  "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

LLAMA3 = (
  '{% set loop_messages = messages %}{% for message in loop_messages %}'
  "{% set content = '<|start_header_id|>' + message['role'] + "
  "'<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}"
  '{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}'
  '{{ content }}{% endfor %}{% if add_generation_prompt %}'
  "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

MISTRAL = (
  '{{ bos_token }}{% for message in messages %}'
  "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
  "{% if message['role'] == 'user' %}"
  "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
  "{% elif message['role'] == 'assistant' %}"
  "{{ message['content'] + eos_token}}{% else %}"
  "{{ raise_exception('Only user and assistant roles are supported!') }}"
  '{% endif %}{% endfor %}'
)

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""  # noqa: E501

# Like Qwen3's template, which keeps the thoughts of only the last answer.
THINK = """{%- for message in messages %}
    {%- set content = message.content %}
    {%- set thought = '' %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == "assistant" and loop.last %}
        {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Like Qwen3's generation prompt, which can contain an empty thought.
THINK_OR_NOT = THINK.replace(
  "{{- '<|im_start|>assistant\\n' }}\n{%- endif %}",
  "{{- '<|im_start|>assistant\\n' }}\n"
  '{%- if enable_thinking is defined and enable_thinking is false %}'
  "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}\n{%- endif %}",
)

# This template puts no special token after an answer.
VICUNA = (
  "{%- for m in messages %}{%- if m.role == 'user' %}USER: {{ m.content }} "
  "{% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }} {% endif %}"
  '{%- endfor %}{%- if add_generation_prompt %}ASSISTANT:{% endif %}'
)

TOOLS = """{%- if tools %}<|im_start|>system
Tools: {% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>
{{- c.function | tojson }}</tool_call>{% endfor %}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

DATED = (
  "<|im_start|>system\nToday: {{ strftime_now('%d %b %Y %H:%M:%S.%f') }}"
  '<|im_end|>\n' + CHATML
)

CHAT = (
  {'role': 'system', 'content': 'Be brief.'},
  {'role': 'user', 'content': 'Who jumps over the dog?'},
  {'role': 'assistant', 'content': 'The quick brown fox.'},
  {'role': 'user', 'content': ' And then? '},
  {'role': 'assistant', 'content': 'user\nThe end: caf\u00e9 \U0001f600'},
)


def write(directory, template=None, settings=None, specials=SPECIALS):
  """Writes a byte-level BPE; the first of `specials` is EOS."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(
    DOCUMENTS,
    trainers.BpeTrainer(
      vocab_size=400,
      special_tokens=list(specials),
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  tokenizer.save(str(directory / 'tokenizer.json'))
  words = {'eos_token': specials[0], 'chat_template': template}
  write_settings(directory, words | (settings or {}))
  return directory


def write_other(directory, kind):
  """Writes a BPE with U+2581 for a space, or a WordPiece as BERT's."""
  if kind == 'metaspace':
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
      vocab_size=60, special_tokens=['</s>'], show_progress=False
    )
  else:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
      vocab_size=60, special_tokens=['</s>', '[UNK]'], show_progress=False
    )
  tokenizer.train_from_iterator(DOCUMENTS, trainer)
  tokenizer.save(str(directory / 'tokenizer.json'))
  write_settings(directory, {'eos_token': '</s>'})
  return directory


def write_sentencepiece(directory, settings=None, **trainer):
  """Writes a sentencepiece model as LLaMA's, of 330 pieces."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(DOCUMENTS),
    model_writer=model,
    **{
      'model_type': 'bpe',
      'vocab_size': 330,
      'byte_fallback': True,
      'normalization_rule_name': 'identity',
      'remove_extra_whitespaces': False,
      'minloglevel': 2,
    }
    | trainer,
  )
  (directory / 'tokenizer.model').write_bytes(model.getvalue())
  if settings is not None:
    write_settings(directory, settings)
  return directory


def added(tokens, first=330):
  """Returns the setting added_tokens_decoder, with ids from `first`.

  Args:
    tokens: the flags of each token, by its text.
    first: id of the first token.
  """
  usual = dict.fromkeys(
    ('lstrip', 'rstrip', 'single_word', 'normalized'), False
  )
  return {
    'added_tokens_decoder': {
      str(i): usual | {'content': text, 'special': True} | flags
      for i, (text, flags) in enumerate(tokens.items(), first)
    }
  }


def write_settings(directory, settings):
  (directory / 'tokenizer_config.json').write_text(json.dumps(settings))


def vocabulary(directory):
  """Returns the id of each token."""
  library = tokenizers.Tokenizer.from_file(str(directory / 'tokenizer.json'))
  return library.get_vocab()
