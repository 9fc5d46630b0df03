"""Makes a copy of the default model with a chat template for tools like those of Hermes and Qwen,
and a context that holds the prompts of agents.

    python benchmarks/clients/teach_tools.py FOLDER && minisrv serve FOLDER

The model was not trained for tools: it calls one when a request requires a call, with arguments
that the grammar allows. That is enough to test whether a client and the server agree on the API.

Knows: the files of a checkpoint. Knows nothing of servers.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

MODEL = Path(__file__).resolve().parents[2] / "models" / "minisrv-default"
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}"
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Give the default model a template with tools.")
    parser.add_argument("folder", type=Path, help="is made; its name is the served model's")
    folder = parser.parse_args().folder
    shutil.copytree(MODEL, folder)
    for name, changed in (
        ("tokenizer_config.json", {"chat_template": TEMPLATE}),
        ("config.json", {"max_position_embeddings": 8192}),
    ):
        config = folder / name
        settings = json.loads(config.read_text(encoding="utf-8")) | changed
        config.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
