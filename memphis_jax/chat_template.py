"""The prompt format of `data/prompts.py` as a chat template, for tokenizer_config.json. No jax.

transformers' `apply_chat_template(messages, add_generation_prompt=True)` then gives the tokens of
`prompts.encode_prompt` for one user message, and those of `encode_chat` for a conversation;
`rationale=False` asks for an "### Assistant:" reply instead of "### Rationale:". Text from outside
cannot open a section, as in `prompts.neutralise`. One thing differs: where a text spells a special
token, which the trainer encodes as characters, transformers would encode the token itself, so the
template refuses that text.
"""

import json
from pathlib import Path

TEMPLATE = r"""
{%- set special_tokens = SPECIAL_TOKENS -%}
{%- set ns = namespace(text="") -%}
{%- for message in messages -%}
  {%- if message["role"] != ["user", "assistant"][loop.index0 % 2] -%}
    {{- raise_exception("the roles must alternate: user, assistant, user, ...") -}}
  {%- endif -%}
  {%- for token in special_tokens -%}
    {%- if token in message["content"] -%}
      {{- raise_exception("a message spells the special token " + token) -}}
    {%- endif -%}
  {%- endfor -%}
  {%- set ns.text = "\n" + (message["content"] | trim) -%}
  {%- if ns.text == "\n" -%}
    {{- raise_exception("a message is empty") -}}
  {%- endif -%}
  {%- for header in ["User:", "Assistant:", "Rationale:", "Answer:"] -%}
    {%- set ns.text = ns.text.replace("\n### " + header, "\n###  " + header) -%}
  {%- endfor -%}
  {%- if message["role"] == "user" -%}
    {{- ("" if loop.first else "\n") + "### User:" + ns.text + "\n" -}}
    {%- if not loop.last -%}
      {{- "### Assistant:\n" -}}
    {%- elif add_generation_prompt -%}
      {{- "### Rationale:\n" if rationale | default(DEFAULT) else "### Assistant:\n" -}}
    {%- endif -%}
  {%- else -%}
    {{- ns.text[1:] + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""


def chat_template(folder: Path, *, rationale: bool = True) -> str:
    """The template for the tokenizer in a folder.

    rationale: what a reply begins with where the caller says nothing, "### Rationale:" or else
    "### Assistant:". Raises FileNotFoundError without a tokenizer.json.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer.json in {folder}: nothing to put a template into")
    added = json.loads(path.read_text("utf-8")).get("added_tokens") or []
    special = [token["content"] for token in added if token.get("special")]
    text = TEMPLATE.replace("SPECIAL_TOKENS", json.dumps(special))
    return text.replace("DEFAULT", "true" if rationale else "false").strip()


def tokenizer_config(folder: Path, template: str) -> dict[str, object]:
    """The folder's tokenizer_config.json with the template; made where there is none."""
    path = folder / "tokenizer_config.json"
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if path.is_file():
        config = json.loads(path.read_text("utf-8"))
    elif (folder / "special_tokens_map.json").is_file():
        config |= json.loads((folder / "special_tokens_map.json").read_text("utf-8"))
    return {**config, "chat_template": template}
